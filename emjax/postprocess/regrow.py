"""Small fragments give way to large ones: what is left of a watershed after its crumbs are flooded again.

The seeds of Beier et al. (2017), who flood fragments below a size again, applied to fragments of affinities: membranes
that a network predicts too wide break into thousands of crumbs, and no agglomeration collects them well.
"""

import numpy as np

from emjax.postprocess.region_graph import region_sizes
from emjax.postprocess.seeded_watershed import seeded_watershed


def regrow(fragments: np.ndarray, affinities: np.ndarray, min_size: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Dissolves fragments of fewer than ``min_size`` voxels, and background; the others grow into their place.

    The flood runs over 1 - mean affinity of the first three channels, lowest values first. It takes the whole volume at
    once: a block by itself does not know how its fragments go on outside.

    Args:
      fragments: (z, y, x) unsigned ids, 0 for background.
      affinities: (c, z, y, x) with the nearest neighbours first, float32 or uint8.
      min_size: voxels; with 1 only background is flooded.
      mask: (z, y, x); where it is 0 nothing grows. All voxels if None.

    Returns:
      Ids 1.. in the order of the old ones, of the type of ``fragments``; the fragments unchanged if none is large enough.

    Raises:
      ValueError: shapes that do not fit, or ``min_size`` below 1.
    """
    if min_size < 1:
        raise ValueError(f"min_size is {min_size}; expected at least 1 voxel")
    if affinities.ndim != 4 or len(affinities) < 3 or affinities.shape[1:] != fragments.shape:
        raise ValueError(f"affinities has shape {affinities.shape}; expected (3 or more, *{fragments.shape})")
    kept = region_sizes(fragments) >= min_size
    kept[0] = False
    if not kept.any():
        return fragments
    numbers = np.where(kept, np.cumsum(kept), 0).astype(fragments.dtype)
    if affinities.dtype == np.uint8:
        surface = 765 - affinities[:3].sum(0, dtype=np.uint16)
    else:
        surface = 1 - affinities[:3].mean(0, dtype=np.float32)
    return seeded_watershed(surface, numbers[fragments], mask)

"""CREMI's border mask: ground truth near the border between labels is not scored."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emjax.metrics.contingency import check_ids


def border_mask(labels: NDArray, distance: float, voxel_size: Sequence[float] = (1.0, 1.0, 1.0)) -> NDArray[np.bool_]:
    """Voxels within ``distance`` of a label border of their own section (``cremi_python``'s ``create_border_mask``).

    A voxel is on a border if one of its four neighbours in the section has another id (0 counts as an id); border
    voxels have distance 0, and ``<= distance`` is masked. A section with one id everywhere has no border.

    Args:
        labels: ground-truth ids, (z, y, x) or (y, x).
        distance: world units, those of ``voxel_size`` (nm); the CREMI challenge's own evaluation uses none by default.
        voxel_size: z, y, x; the default makes ``distance`` a number of pixels.

    Returns:
        bool, shape of ``labels``. Score with ``mask=~border_mask(...)``; for blocks give the labels a margin of
        ``distance`` in y and x.

    Raises:
        ValueError: ``distance`` negative or not finite, ``voxel_size`` not three positive numbers, bad ``labels``.
    """
    labels = check_ids(labels, "labels")
    if labels.ndim < 2:
        raise ValueError(f"labels has {labels.ndim} axis; expected (z, y, x) or (y, x)")
    if not math.isfinite(distance) or distance < 0:
        raise ValueError(f"distance is {distance}; expected a finite number >= 0")
    size = check_voxel_size(voxel_size)
    volume = labels.reshape((-1, *labels.shape[-2:]))
    mask = np.zeros(volume.shape, bool)
    # In units of x, so that distances of square pixels are exact square roots and "<=" means what it says.
    sampling = (size[1] / size[2], 1.0)
    for section, result in zip(volume, mask):
        on_border = _on_border(section)
        if on_border.any():
            result[:] = ndimage.distance_transform_edt(~on_border, sampling=sampling) <= distance / size[2]
    return mask.reshape(labels.shape)


def check_voxel_size(voxel_size: Sequence[float], axes: int = 3) -> tuple[float, ...]:
    """The voxel size as floats; ValueError that names the argument unless it is ``axes`` positive numbers."""
    size = tuple(float(value) for value in voxel_size)
    if len(size) != axes or not all(math.isfinite(value) and value > 0 for value in size):
        raise ValueError(f"voxel_size is {tuple(voxel_size)}; expected {axes} positive numbers, one per axis")
    return size


def _on_border(section: NDArray) -> NDArray[np.bool_]:
    border = np.zeros(section.shape, bool)
    for low, high in (
        ((slice(None, -1), slice(None)), (slice(1, None), slice(None))),
        ((slice(None), slice(None, -1)), (slice(None), slice(1, None))),
    ):
        differ = section[low] != section[high]
        border[low] |= differ
        border[high] |= differ
    return border

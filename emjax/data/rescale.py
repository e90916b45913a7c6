"""Other voxel sizes: images by linear interpolation with anti-aliasing, ids by the nearest voxel, whole in memory."""

from collections.abc import Sequence

import numpy as np
from skimage.transform import resize

from emjax.errors import UserError

Size = tuple[float, float, float]


def rescaled_shape(shape: Sequence[int], voxel_size: Sequence[float], wanted: Sequence[float]) -> tuple[int, int, int]:
    """Voxels (z, y, x) of a volume of ``shape`` at another voxel size (nm), at least 1.

    Raises:
        UserError: a voxel size that is not positive.
    """
    if min(*voxel_size, *wanted) <= 0:
        raise UserError(f"voxel sizes {tuple(voxel_size)} and {tuple(wanted)} nm, expected positive numbers")
    z, y, x = (max(1, round(n * have / want)) for n, have, want in zip(shape, voxel_size, wanted))
    return z, y, x


def rescale_image(image: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The image (z, y, x) at ``shape``, of unchanged dtype; a Gaussian goes before where voxels become larger.

    Section by section where the number of sections stays, which needs no more memory than the result.
    """

    def to(part: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
        smaller = any(a < b for a, b in zip(size, part.shape))
        out = resize(part.astype(np.float32), size, order=1, mode="reflect", anti_aliasing=smaller, preserve_range=True)
        if image.dtype.kind in "iu":
            limits = np.iinfo(image.dtype)
            out = np.clip(np.rint(out), limits.min, limits.max)
        return out.astype(image.dtype)

    if image.shape == shape:
        return image
    if image.shape[0] == shape[0]:
        return np.stack([to(section, shape[1:]) for section in image])
    return to(image, shape)


def rescale_labels(labels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Ids (z, y, x) at ``shape``, each voxel the id at its centre."""
    lines = [
        np.minimum(((np.arange(wanted) + 0.5) * (have / wanted)).astype(np.int64), have - 1)
        for wanted, have in zip(shape, labels.shape)
    ]
    return labels[np.ix_(*lines)]

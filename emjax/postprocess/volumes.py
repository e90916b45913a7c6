"""What the kernels accept: affinities with their offsets, thresholds, fragments. Everything else is refused here."""

from collections.abc import Sequence

import numpy as np

NEAREST = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))

# Ids are uint32, and 2**32 - 1 is the kernels' mark for "none".
LARGEST_ID = 2**32 - 2


def nearest_channels(
    affinities: np.ndarray, offsets: Sequence[Sequence[int]] = NEAREST
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The z, y and x channels of an affinity volume, each C-contiguous and of shape (z, y, x).

    Args:
      affinities: (c, z, y, x), float32, or uint8 that stands for value / 255; ``affinities[c, z, y, x]`` joins the
        voxel with its partner at ``offsets[c]``.
      offsets: one (z, y, x) offset for each channel, in voxels. The three nearest (-1, 0, 0), (0, -1, 0), (0, 0, -1)
        must be among them, in any order; others are not read.

    Raises:
      ValueError: wrong rank, dtype, number of channels or offsets, or an axis of length zero.
    """
    affinities = np.asarray(affinities)
    if affinities.ndim != 4:
        raise ValueError(f"affinities has shape {affinities.shape}; expected (channel, z, y, x)")
    if affinities.dtype not in (np.float32, np.uint8):
        raise ValueError(f"affinities is {affinities.dtype}; expected float32, or uint8 that stands for value / 255")
    listed = [tuple(int(step) for step in offset) for offset in offsets]
    if len(listed) != affinities.shape[0]:
        raise ValueError(f"affinities has {affinities.shape[0]} channels for {len(listed)} offsets; expected as many")
    if 0 in affinities.shape:
        raise ValueError(f"affinities has shape {affinities.shape}; expected at least one voxel along each axis")
    missing = [offset for offset in NEAREST if offset not in listed]
    if missing:
        raise ValueError(
            f"offsets {listed} lack {missing[0]}; expected the three nearest neighbours, stored at the higher voxel"
        )
    z, y, x = (np.ascontiguousarray(affinities[listed.index(offset)]) for offset in NEAREST)
    return z, y, x


def check_limits(low: float, high: float) -> tuple[np.float32, np.float32]:
    """Watershed thresholds in float32, as they are compared.

    Raises:
      ValueError: not finite numbers, or ``low`` not below ``high`` (in float32).
    """
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"low is {low} and high is {high}; expected finite numbers")
    if not np.float32(low) < np.float32(high):
        raise ValueError(f"low is {low} and high is {high}; expected low < high (in float32)")
    return np.float32(low), np.float32(high)


def check_labels(labels: np.ndarray, name: str, ndim: int | None = 3) -> np.ndarray:
    """``labels`` as a C-contiguous array of unsigned (or bool to uint8) integers.

    Raises:
      ValueError: wrong rank, not whole numbers, negative ids, or an axis of length zero.
    """
    labels = np.asarray(labels)
    if ndim is not None and labels.ndim != ndim:
        raise ValueError(f"{name} has shape {labels.shape}; expected {ndim} axes (z, y, x)")
    if labels.dtype == bool:
        labels = labels.view(np.uint8)
    if labels.dtype.kind not in "ui":
        raise ValueError(f"{name} is {labels.dtype}; expected whole numbers")
    if 0 in labels.shape:
        raise ValueError(f"{name} has shape {labels.shape}; expected at least one voxel along each axis")
    labels = np.ascontiguousarray(labels)
    if labels.dtype.kind == "i":
        lowest = labels.min()
        if lowest < 0:
            where = tuple(int(i) for i in np.unravel_index(int(labels.argmin()), labels.shape))
            raise ValueError(f"{name} holds the negative id {lowest} at {where}; expected ids of 0 or more")
        labels = labels.view(labels.dtype.str.replace("i", "u"))
    return labels


def as_fragments(fragments: np.ndarray, shape: tuple[int, ...] | None = None, name: str = "fragments") -> np.ndarray:
    """``fragments`` as C-contiguous uint32.

    Raises:
      ValueError: as ``check_labels``; a shape other than ``shape``; ids above 2**32 - 2.
    """
    fragments = check_labels(fragments, name)
    if shape is not None and fragments.shape != tuple(shape):
        raise ValueError(f"{name} has shape {fragments.shape}; expected {tuple(shape)}, that of the affinities")
    if fragments.dtype.itemsize >= 4:
        largest = int(fragments.max())
        if largest > LARGEST_ID:
            raise ValueError(f"{name} holds the id {largest}; expected at most {LARGEST_ID}: renumber them first")
    return fragments.astype(np.uint32, copy=False)

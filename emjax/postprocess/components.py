"""Connected components: of voxels joined by large affinities, and of voxels of equal label."""

from collections.abc import Sequence

import numpy as np
from numba import njit

from emjax.postprocess.threads import check_threads, each, ranges
from emjax.postprocess.volumes import LARGEST_ID, NEAREST, check_labels, nearest_channels
from emjax.postprocess.watershed import _first_nan, _join, _label, number_provisional


@njit(nogil=True, cache=True)
def _flag_above(az, ay, ax, level, flags, z0, z1):
    """Watershed-like bytes: a bit for each direction whose affinity is above ``level``. Returns whether one is NaN."""
    depth, height, width = az.shape
    invalid = False
    for z in range(z0, z1):
        for y in range(height):
            for x in range(width):
                flags[z, y, x] = np.uint8(ax[z, y, x] > level) << np.uint8(2)
                invalid |= (x > 0) & (ax[z, y, x] != ax[z, y, x])
            flags[z, y, 0] = 0
            for x in range(width - 1):
                flags[z, y, x] |= np.uint8(ax[z, y, x + 1] > level) << np.uint8(5)
            if y > 0:
                for x in range(width):
                    flags[z, y, x] |= np.uint8(ay[z, y, x] > level) << np.uint8(1)
                    invalid |= ay[z, y, x] != ay[z, y, x]
            if y + 1 < height:
                for x in range(width):
                    flags[z, y, x] |= np.uint8(ay[z, y + 1, x] > level) << np.uint8(4)
            if z > 0:
                for x in range(width):
                    flags[z, y, x] |= np.uint8(az[z, y, x] > level)
                    invalid |= az[z, y, x] != az[z, y, x]
            if z + 1 < depth:
                for x in range(width):
                    flags[z, y, x] |= np.uint8(az[z + 1, y, x] > level) << np.uint8(3)
    return invalid


def connected_components(
    affinities: np.ndarray, threshold: float = 0.5, offsets: Sequence[Sequence[int]] = NEAREST, *, threads: int = 1
) -> np.ndarray:
    """Components of the voxels that are joined by nearest-neighbour affinities above ``threshold`` (strictly).

    Args:
      affinities: (c, z, y, x) float32, or uint8 that stands for float32(value) / float32(255), as for ``watershed``.
      threshold: compared in float32.
      offsets: (z, y, x) offset of each channel.
      threads: worker threads; the result does not depend on their number.

    Returns:
      (z, y, x) uint32: 1, 2, ... in raster order of each component's first voxel; 0: joined to none.

    Raises:
      ValueError: what ``nearest_channels`` refuses, NaN, or more voxels than there are ids.
    """
    threads = check_threads(threads)
    channels = nearest_channels(affinities, offsets)
    if np.isnan(threshold):
        raise ValueError("threshold is NaN; expected a number")
    if channels[0].size > LARGEST_ID:
        raise ValueError(f"affinities has {channels[0].size} voxels; expected at most {LARGEST_ID}")
    level: np.float32 | np.int64 = np.float32(threshold)
    if channels[0].dtype == np.uint8:
        # The largest byte that is not above the threshold: bytes are compared as whole numbers.
        level = np.int64(np.count_nonzero(np.arange(256, dtype=np.float32) / np.float32(255) <= level)) - 1
    flags = np.empty(channels[0].shape, np.uint8)
    az, ay, ax = channels
    slabs = ranges(len(flags), threads)
    if any(each(lambda z0, z1: _flag_above(az, ay, ax, level, flags, z0, z1), slabs, threads)):
        raise ValueError(f"affinities holds NaN {_first_nan(channels)}; expected numbers")
    return _label(flags, threads)[0]


@njit(nogil=True, cache=True, inline="always")
def _meet(parent, label, other):
    """The smaller of two labels that turn out to be one; 0 is none yet."""
    if label == 0:
        return other
    if label != other:
        _join(parent, label, other)
    return label


@njit(nogil=True, cache=True)
def _label_equal_slab(values, background, full, z0, z1, labels, parent):
    """Provisional labels from ``z0 * plane + 1`` on, of equal values in a slab; returns one more than the last."""
    _, height, width = values.shape
    fresh = np.uint32(z0 * height * width + 1)
    for z in range(z0, z1):
        for y in range(height):
            for x in range(width):
                value = values[z, y, x]
                if value == background:
                    labels[z, y, x] = 0
                    continue
                label = np.uint32(0)
                left = x > 0 and values[z, y, x - 1] == value
                if left:
                    label = labels[z, y, x - 1]
                if not full:
                    if y > 0 and values[z, y - 1, x] == value:
                        label = _meet(parent, label, labels[z, y - 1, x])
                    if z > z0 and values[z - 1, y, x] == value:
                        label = _meet(parent, label, labels[z - 1, y, x])
                else:
                    # What also touches the voxel to the left was joined when that was visited.
                    first = x + 1 if left else max(x - 1, 0)
                    last = min(x + 2, width)
                    if y > 0:
                        for i in range(first, last):
                            if values[z, y - 1, i] == value:
                                label = _meet(parent, label, labels[z, y - 1, i])
                    if z > z0:
                        for j in range(max(y - 1, 0), min(y + 2, height)):
                            for i in range(first, last):
                                if values[z - 1, j, i] == value:
                                    label = _meet(parent, label, labels[z - 1, j, i])
                if label == 0:
                    label = fresh
                    parent[fresh] = fresh
                    fresh += np.uint32(1)
                labels[z, y, x] = label
    return fresh


@njit(nogil=True, cache=True)
def _join_equal_slabs(values, background, full, z, labels, parent):
    """Joins equal values across the plane between sections ``z - 1`` and ``z``."""
    _, height, width = values.shape
    reach = 1 if full else 0
    for y in range(height):
        for x in range(width):
            value = values[z, y, x]
            if value == background:
                continue
            for j in range(max(y - reach, 0), min(y + reach + 1, height)):
                for i in range(max(x - reach, 0), min(x + reach + 1, width)):
                    if values[z - 1, j, i] == value:
                        _join(parent, labels[z, y, x], labels[z - 1, j, i])


def label_components(
    labels: np.ndarray, connectivity: int = 26, *, background: int = 0, threads: int = 1
) -> np.ndarray:
    """Connected components of voxels of equal value: those of ``skimage.measure.label``, numbered in raster order.

    The ids are skimage's too, but for volumes with an axis of one voxel, whose axes it exchanges before it scans.

    Args:
      labels: (z, y, x) whole numbers or bool.
      connectivity: 26 (faces, edges and corners touch) or 6 (faces only).
      background: the value that belongs to no component.
      threads: worker threads; the result does not depend on their number.

    Returns:
      (z, y, x) uint32: 1, 2, ... in raster order of each component's first voxel; 0 = background.

    Raises:
      ValueError: what ``check_labels`` refuses, another connectivity, or more voxels than there are ids.
    """
    threads = check_threads(threads)
    values = check_labels(labels, "labels")
    if connectivity not in (6, 26):
        raise ValueError(f"connectivity is {connectivity!r}; expected 6 or 26")
    if values.size > LARGEST_ID:
        raise ValueError(f"labels has {values.size} voxels; expected at most {LARGEST_ID}: work block by block")
    full = connectivity == 26
    out = np.empty(values.shape, np.uint32)
    # Only the pages that hold provisional labels in use are ever touched.
    parent = np.empty(values.size + 1, np.uint32)
    none = values.dtype.type(background) if 0 <= background <= np.iinfo(values.dtype).max else None
    if none is None:
        raise ValueError(f"background is {background}; expected a value that {values.dtype} can hold")
    slabs = ranges(values.shape[0], threads)
    ends = each(lambda z0, z1: _label_equal_slab(values, none, full, z0, z1, out, parent), slabs, threads)
    for z0, _ in slabs[1:]:
        _join_equal_slabs(values, none, full, z0, out, parent)
    number_provisional(out, parent, slabs, ends, threads)
    return out

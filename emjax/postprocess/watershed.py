"""Watershed of an affinity graph by steepest ascent: the fragments that agglomeration starts from.

Zlateski and Seung, "Image segmentation by size-dependent single linkage clustering of a watershed basin graph" (2015),
with the order of waterz among equal affinities, so that ids are equal to waterz's.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from emjax.postprocess.threads import check_threads, each, ranges
from emjax.postprocess.volumes import LARGEST_ID, NEAREST, check_limits, nearest_channels

# A voxel's byte: one bit for each direction that it drains to, in waterz's order -z, -y, -x, +z, +y, +x.
DIRECTIONS = np.uint8(0x3F)
# Its steepest affinity is at least `high`: such a plateau has no outlet, so it is never divided.
SATURATED = np.uint8(0x40)
REACHED = np.uint8(0x80)


def byte_limits(low: np.float32, high: np.float32) -> tuple[np.uint8, np.uint8] | None:
    """(low, high) among uint8 levels v = float32(v) / float32(255); None if even level 0 lies above ``low``."""
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    background = np.flatnonzero(levels <= low)
    saturated = np.flatnonzero(levels >= high)
    if background.size == 0:
        return None
    # No level reaches `high`: 255 does no harm, as a voxel whose steepest level is 255 flags that level anyway.
    return np.uint8(background[-1]), np.uint8(saturated[0] if saturated.size else 255)


@njit(nogil=True, cache=True)
def _flag_slab(az, ay, ax, low, high, inner, flags, z0, z1):
    """Sets ``flags[z0:z1]``; returns how many plateau voxels it holds, and whether an affinity is not a number.

    ``inner``: for each axis, whether the volume goes on below the first plane, whose affinities then count.
    """
    depth, height, width = az.shape
    nz = np.empty(width, az.dtype)
    pz = np.empty(width, az.dtype)
    ny = np.empty(width, az.dtype)
    py = np.empty(width, az.dtype)
    nx = np.empty(width + 1, az.dtype)
    many = 0
    invalid = 0
    for z in range(z0, z1):
        for y in range(height):
            for x in range(width):
                nz[x] = az[z, y, x] if z > 0 or inner[0] else low
            for x in range(width):
                pz[x] = az[z + 1, y, x] if z + 1 < depth else low
            for x in range(width):
                ny[x] = ay[z, y, x] if y > 0 or inner[1] else low
            for x in range(width):
                py[x] = ay[z, y + 1, x] if y + 1 < height else low
            for x in range(width):
                nx[x] = ax[z, y, x]
            if not inner[2]:
                nx[0] = low
            nx[width] = low
            wrong = 0
            for x in range(width):
                wrong |= (nz[x] != nz[x]) | (ny[x] != ny[x]) | (nx[x] != nx[x])
            invalid |= wrong
            plateau = 0
            for x in range(width):
                a = nz[x]
                b = ny[x]
                c = nx[x]
                d = pz[x]
                e = py[x]
                f = nx[x + 1]
                m = a if a > b else b
                m = c if c > m else m
                m = d if d > m else m
                m = e if e > m else m
                m = f if f > m else m
                t = m if m < high else high
                bits = (
                    np.uint8(a >= t)
                    | (np.uint8(b >= t) << np.uint8(1))
                    | (np.uint8(c >= t) << np.uint8(2))
                    | (np.uint8(d >= t) << np.uint8(3))
                    | (np.uint8(e >= t) << np.uint8(4))
                    | (np.uint8(f >= t) << np.uint8(5))
                )
                bits |= np.uint8(m >= high) << np.uint8(6)
                bits = bits if m > low else np.uint8(0)
                flags[z, y, x] = bits
                plateau += np.uint8((bits & np.uint8(bits - np.uint8(1))) != 0) & np.uint8((bits & SATURATED) == 0)
            many += plateau
    return many, invalid


@njit(nogil=True, cache=True)
def _outlets(flags, queue):
    """Lists the plateau voxels that drain to a voxel which does not drain back; returns how many."""
    depth, height, width = flags.shape
    flat = flags.reshape(-1)
    steps = (-height * width, -width, -1, height * width, width, 1)
    plateau = np.empty(width + 1, np.int64)
    count = 0
    for z in range(depth):
        for y in range(height):
            row = flags[z, y]
            n = 0
            for x in range(width):
                f = row[x]
                plateau[n] = x
                n += np.int64((f & np.uint8(f - np.uint8(1)) != 0) & (f & SATURATED == 0))
            for k in range(n):
                i = (z * height + y) * width + plateau[k]
                f = flat[i]
                # Which of the six neighbours drain back, in this voxel's own order of directions.
                back = np.uint8(0)
                for d in range(6):
                    if f >> np.uint8(d) & 1:
                        back |= (flat[i + steps[d]] >> np.uint8((d + 3) % 6) & np.uint8(1)) << np.uint8(d)
                if f & ~back & DIRECTIONS:
                    queue[count] = i
                    count += 1
    return count


@njit(nogil=True, cache=True)
def _divide_plateaus(flags, height, width, queue, count):
    """Breadth-first from the outlets, each plateau voxel keeps its last direction to a voxel that does not drain
    back.
    """
    steps = (-height * width, -width, -1, height * width, width, 1)
    for k in range(count):
        flags[queue[k]] |= REACHED
    head = 0
    while head < count:
        i = queue[head]
        head += 1
        f = flags[i]
        kept = np.uint8(0)
        for d in range(6):
            if not f >> np.uint8(d) & 1:
                continue
            j = i + steps[d]
            g = flags[j]
            if g >> np.uint8((d + 3) % 6) & 1:
                if g & REACHED == 0 and (g & DIRECTIONS) & np.uint8((g & DIRECTIONS) - np.uint8(1)):
                    flags[j] = g | REACHED
                    queue[count] = j
                    count += 1
            else:
                kept = np.uint8(1 << d)
        flags[i] = kept | REACHED


@njit(nogil=True, cache=True)
def _link_row(me, up, back, above, link):
    """Bits 1, 2, 4 of ``link[x]``: the voxel is joined to its neighbour at -z, -y, -x; bits 1, 2 only if in
    ``above``.
    """
    mask = above | np.uint8(4)
    link[0] = (me[0] | ((back[0] >> np.uint8(3)) & np.uint8(1)) | ((up[0] >> np.uint8(3)) & np.uint8(2))) & above
    for x in range(1, me.size):
        link[x] = (
            me[x]
            | ((back[x] >> np.uint8(3)) & np.uint8(1))
            | ((up[x] >> np.uint8(3)) & np.uint8(2))
            | ((me[x - 1] >> np.uint8(3)) & np.uint8(4))
        ) & mask


@njit(nogil=True, cache=True)
def _join(parent, a, b):
    while parent[a] != a:
        parent[a] = parent[parent[a]]
        a = parent[a]
    while parent[b] != b:
        parent[b] = parent[parent[b]]
        b = parent[b]
    if a < b:
        parent[b] = a
    else:
        parent[a] = b


@njit(nogil=True, cache=True)
def _label_slab(flags, z0, z1, labels, parent):
    """Provisional labels, from ``z0 * height * width + 1`` on, of a slab's voxels, and which are one; the last plus
    one.
    """
    _, height, width = flags.shape
    link = np.empty(width, np.uint8)
    fresh = np.uint32(z0 * height * width + 1)
    for z in range(z0, z1):
        for y in range(height):
            me = flags[z, y]
            up = flags[z, max(y - 1, 0)]
            back = flags[max(z - 1, z0), y]
            _link_row(me, up, back, np.uint8(z > z0) | np.uint8(2 * (y > 0)), link)
            row = labels[z, y]
            row_up = labels[z, max(y - 1, 0)]
            row_back = labels[max(z - 1, z0), y]
            previous = np.uint32(0)
            for x in range(width):
                bits = link[x]
                above = row_up[x]
                behind = row_back[x]
                parent[fresh] = fresh
                label = fresh if me[x] else np.uint32(0)
                fresh += np.uint32(np.uint8(bits == 0) & np.uint8(me[x] != 0))
                label = behind if bits & 1 else label
                label = above if bits & 2 else label
                label = previous if bits & 4 else label
                row[x] = label
                previous = label
                if bits & np.uint8(bits - np.uint8(1)):
                    if bits & 1 and behind != label:
                        _join(parent, behind, label)
                    if bits & 2 and above != label:
                        _join(parent, above, label)
    return fresh


@njit(nogil=True, cache=True)
def _join_slabs(flags, z, labels, parent):
    """Joins what is linked across the plane between sections ``z - 1`` and ``z``."""
    for y in range(flags.shape[1]):
        for x in range(flags.shape[2]):
            if flags[z, y, x] & 1 or flags[z - 1, y, x] & 8:
                _join(parent, labels[z, y, x], labels[z - 1, y, x])


@njit(nogil=True, cache=True)
def _flatten(parent, start, stop, last):
    """Turns provisional labels ``[start, stop)`` into ids that go on from ``last``, in order of the smallest member.

    A parent is never larger than its child. Returns the last id given.
    """
    for i in range(start, stop):
        p = parent[i]
        if p == i:
            last += np.uint32(1)
            parent[i] = last
        else:
            parent[i] = parent[p]
    return last


@njit(nogil=True, cache=True)
def _look_up_slab(labels, lut, z0, z1):
    for z in range(z0, z1):
        for y in range(labels.shape[1]):
            row = labels[z, y]
            for x in range(row.size):
                row[x] = lut[row[x]]


def number_provisional(labels, parent, slabs, ends, threads):
    """Replaces the provisional labels of slabs, joined in ``parent``, by 1, 2, ... in raster order; returns their
    number.
    """
    plane = labels.shape[1] * labels.shape[2]
    parent[0] = 0
    last = np.uint32(0)
    for (z0, _), end in zip(slabs, ends):
        last = _flatten(parent, z0 * plane + 1, int(end), np.uint32(last))
    each(lambda z0, z1: _look_up_slab(labels, parent, z0, z1), slabs, threads)
    return int(last)


def _flags(channels, low, high, threads, inner=(False, False, False)):
    """The drainage byte of each voxel, plateaus not yet divided, and the number of plateau voxels."""
    az, ay, ax = channels
    if az.dtype == np.uint8:
        limits = byte_limits(low, high)
        if limits is None:
            levels = np.arange(256, dtype=np.float32) / np.float32(255)
            return _flags(tuple(levels[channel] for channel in channels), low, high, threads, inner)
        low, high = limits
    flags = np.empty(az.shape, np.uint8)
    slabs = ranges(az.shape[0], threads)
    found = each(lambda z0, z1: _flag_slab(az, ay, ax, low, high, inner, flags, z0, z1), slabs, threads)
    if any(invalid for _, invalid in found):
        raise ValueError(f"affinities holds NaN {_first_nan(channels)}; expected numbers")
    return flags, sum(many for many, _ in found)


def _first_nan(channels):
    """Where the first NaN is that would be read, in words."""
    for channel, values in enumerate(channels):
        inner = [slice(None)] * 3
        inner[channel] = slice(1, None)
        found = np.argwhere(np.isnan(values[tuple(inner)]))
        if found.size:
            at = found[0]
            at[channel] += 1
            return f"in the {'zyx'[channel]} channel at {tuple(int(i) for i in at)}"
    return "somewhere"


def _label(flags, threads):
    """Basins of divided flags: ids 1, 2, ... in raster order of each basin's first voxel, 0 where no bit is set."""
    labels = np.empty(flags.shape, np.uint32)
    # One entry for each voxel and one more, as the kernel writes the next label before it knows whether it is
    # needed. Only the pages that hold labels in use become memory.
    parent = np.empty(flags.size + 2, np.uint32)
    slabs = ranges(flags.shape[0], threads)
    ends = each(lambda z0, z1: _label_slab(flags, z0, z1, labels, parent), slabs, threads)
    for z0, _ in slabs[1:]:
        _join_slabs(flags, z0, labels, parent)
    count = number_provisional(labels, parent, slabs, ends, threads)
    return labels, count


def divide_plateaus(flags: np.ndarray, plateau_voxels: int, threads: int = 1) -> None:
    """Divides the plateaus of ``flags`` in place; ``plateau_voxels`` bounds the length of the queue."""
    if plateau_voxels == 0:
        return
    _, height, width = flags.shape
    flat = flags.reshape(-1)
    queue = np.empty(plateau_voxels, np.int64)
    count = _outlets(flags, queue)
    _divide_plateaus(flat, height, width, queue, count)


def watershed(
    affinities: np.ndarray,
    low: float = 0.0001,
    high: float = 0.9999,
    offsets: Sequence[Sequence[int]] = NEAREST,
    *,
    threads: int = 1,
) -> np.ndarray:
    """Fragments of an affinity volume, with the ids that waterz gives them.

    Each voxel drains along its largest affinity, and along every affinity of at least ``high``; plateaus are divided
    breadth-first from their outlets; a fragment is what drains together (Zlateski and Seung 2015).

    Args:
      affinities: (c, z, y, x) float32, or uint8 that stands for float32(value) / float32(255). High = same object; stored
        at the voxel whose partner is at its offset.
      low: a voxel without an affinity above ``low`` is background, 0.
      high: affinities of at least ``high`` always join.
      offsets: (z, y, x) offset of each channel; the three nearest neighbours must be among them.
      threads: worker threads; the result does not depend on their number.

    Returns:
      (z, y, x) uint32: 1, 2, ... in raster order of each fragment's first voxel, and 0.

    Raises:
      ValueError: what ``nearest_channels`` and ``check_limits`` refuse, NaN, or more voxels than there are ids.
    """
    threads = check_threads(threads)
    channels = nearest_channels(affinities, offsets)
    limits = check_limits(low, high)
    if channels[0].size > LARGEST_ID:
        raise ValueError(
            f"affinities has {channels[0].size} voxels; expected at most {LARGEST_ID}: work block by block"
        )
    flags, plateau_voxels = _flags(channels, *limits, threads)
    divide_plateaus(flags, plateau_voxels)
    labels, _ = _label(flags, threads)
    return labels

"""Flooding of a surface from seeds with a bucket queue, and the published recipes for seeds.

The flood visits each voxel once: a voxel is labelled when its first labelled neighbour is taken from the queue, and
queued at its own level. The queue is one slot for every voxel, in sorted order, and a tree of bits that finds the first
slot in waiting. Within a level the queue is first in, first out, and neighbours are queued in raster order:
the order of ``mahotas.cwatershed``, whose labels this reproduces one to one. ``flooding="bioimage"`` gives the order of
bioimage-cpp (behind python-elf 0.9): 65,536 levels, last in first out, never below the current level.
"""

from collections.abc import Sequence

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic
from scipy import ndimage

from emjax.postprocess.radix import ordered_keys, packed, radix_sort, sorted_pairs
from emjax.postprocess.threads import check_threads, each
from emjax.postprocess.volumes import NEAREST, nearest_channels

BIOIMAGE_LEVELS = 65536

# Marks voxels that no seed may enter.
_WALL = 2**31 - 1


def seeded_watershed(
    surface: np.ndarray,
    seeds: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    per_section: bool = False,
    connectivity: int = 1,
    levels: int | None = None,
    flooding: str = "mahotas",
    threads: int = 1,
) -> np.ndarray:
    """Grows seeds over a surface, lowest values first; there are no watershed lines.

    Args:
      surface: (y, x) or (z, y, x), any integer or float type; finite.
      seeds: same shape, integer ids, 0 where there is none.
      mask: same shape; voxels where it is 0 are not flooded, and seeds there do not count. All voxels if None.
      per_section: flood every (y, x) section by itself.
      connectivity: 1 for neighbours that share a face, up to the number of flooded axes for all that touch.
      levels: quantise the surface to this many levels between its extremes (faster on float surfaces; ties then fall
        to the earlier voxel). None keeps every distinct value apart, whatever its type.
      flooding: "mahotas" (first in, first out; equal to ``mahotas.cwatershed``) or "bioimage" (bioimage-cpp's order;
        65,536 levels unless ``levels`` says otherwise).
      threads: sections done at once if ``per_section``; a flood itself is serial. The labels do not depend on it.

    Returns:
      Labels of the type of ``seeds``; 0 where no seed reaches.

    Raises:
      ValueError: shapes that do not fit, values not finite, negative seeds, unknown options, an empty axis, or 2**32
        voxels or more in one flood that keeps the values of floats apart.
    """
    surface, seeds = _surface(surface), _seeds(seeds)
    _same_shape(seeds, surface, "seeds")
    if mask is not None:
        mask = np.asarray(mask)
        _same_shape(mask, surface, "mask")
    axes = surface.ndim - 1 if per_section and surface.ndim == 3 else surface.ndim
    if isinstance(connectivity, bool) or not 1 <= connectivity <= axes:
        raise ValueError(f"connectivity is {connectivity}; expected 1 to {axes}, the number of flooded axes")
    if flooding not in ("mahotas", "bioimage"):
        raise ValueError(f"flooding is {flooding!r}; expected 'mahotas' or 'bioimage'")
    if levels is not None and not 2 <= levels <= 2**31 - 1:
        raise ValueError(f"levels is {levels}; expected None or 2 to 2**31 - 1")
    threads = check_threads(threads)
    if levels is None and flooding == "bioimage":
        levels = BIOIMAGE_LEVELS
    if surface.ndim == axes:
        return _flooded(surface, seeds, mask, connectivity, levels, flooding)
    result = np.empty_like(seeds)

    def one(z: int) -> None:
        result[z] = _flooded(surface[z], seeds[z], None if mask is None else mask[z], connectivity, levels, flooding)

    each(one, [(z,) for z in range(len(surface))], threads)
    return result


def lsd_fragments(
    affinities: np.ndarray,
    offsets: Sequence[Sequence[int]] = NEAREST,
    *,
    threshold: float = 0.5,
    min_seed_distance: int = 10,
    per_section: bool = True,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Fragments of the local shape descriptors pipeline (Sheridan et al. 2023; ``lsd.post``).

    Foreground = mean affinity > threshold (of y and x, or of all three in 3D); seeds = face-connected components of
    the voxels whose Euclidean distance to the background is the largest in a window of ``min_seed_distance`` voxels;
    the flood runs over (largest distance - distance).

    Args:
      affinities: (c, z, y, x), float32, or uint8 that stands for value / 255.
      offsets: of the channels; the three nearest must be among them.
      threshold: on the mean affinity.
      min_seed_distance: width of the window, in voxels.
      per_section: distances, seeds and flood in every section, else in 3D. Distances count voxels, not nm.
      threads: number of threads; the result does not depend on it.

    Returns:
      fragments and seeds, (z, y, x) uint32. Ids run on over sections, in raster order of the seeds.

    Raises:
      ValueError: bad affinities or offsets, or ``min_seed_distance`` below 1.
    """
    z_channel, y_channel, x_channel = (_as_float(channel) for channel in nearest_channels(affinities, offsets))
    if min_seed_distance < 1:
        raise ValueError(f"min_seed_distance is {min_seed_distance}; expected at least 1 voxel")
    threads = check_threads(threads)
    if per_section:
        foreground = (y_channel + x_channel) / np.float32(2) > threshold
    else:
        foreground = (z_channel + y_channel + x_channel) / np.float32(3) > threshold

    def flood(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        # The squared distance is a whole number in the order of the distance: exact levels without a square root.
        distance = squared_distance(inside)
        peaks = ndimage.maximum_filter(distance, min_seed_distance) == distance
        seeds, count = ndimage.label(peaks)
        seeds = seeds.astype(np.uint32)
        return _flooded(distance.max() - distance, seeds, None, 1, None, "mahotas"), seeds, count

    if not per_section:
        fragments, seeds, _ = flood(foreground)
        return fragments, seeds
    return _stacked(flood, foreground, threads)


def superhuman_fragments(
    affinities: np.ndarray,
    offsets: Sequence[Sequence[int]] = NEAREST,
    *,
    threshold: float = 0.5,
    reference_ids: bool = False,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Section-wise fragments of the SuperHuman and PEA pipelines (Lee et al. 2017; Huang et al. 2022).

    Boundary b = 1 - (a_y + a_x) / 2; seeds = regional maxima of the distance to b >= threshold; the flood runs over b.

    Args:
      affinities: (c, z, y, x), float32, or uint8 that stands for value / 255.
      offsets: of the channels; the three nearest must be among them.
      threshold: on the boundary map.
      reference_ids: number the seeds as the original does, from 2 on.
      threads: sections done at once; the result does not depend on it.

    Returns:
      fragments and seeds, (z, y, x) uint32. Ids run on over sections, in raster order of the seeds.

    Raises:
      ValueError: bad affinities or offsets.
    """
    _, y_channel, x_channel = (_as_float(channel) for channel in nearest_channels(affinities, offsets))
    threads = check_threads(threads)
    boundary = np.float32(1) - np.float32(0.5) * (y_channel + x_channel)

    def flood(section: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        seeds, count = regional_maxima(squared_distance(section < threshold))
        return _flooded(section, seeds, None, 1, None, "mahotas"), seeds, count

    return _stacked(flood, boundary, threads, first=1 if reference_ids else 0)


def distance_transform_watershed(
    boundary: np.ndarray,
    threshold: float = 0.25,
    sigma_seeds: float = 2.0,
    sigma_weights: float = 2.0,
    *,
    min_size: int = 100,
    alpha: float = 0.9,
    mask: np.ndarray | None = None,
    per_section: bool = True,
    flooding: str = "bioimage",
    threads: int = 1,
) -> np.ndarray:
    """Fragments of python-elf, PlantSeg and SegNeuron (Beier et al. 2017; ``elf.segmentation.watershed``).

    Distance to boundary > threshold, smoothed; seeds = its local maxima (3 x 3, plateaus joined); the flood runs over
    alpha * smoothed boundary + (1 - alpha) * (1 - scaled distance); fragments below ``min_size`` are flooded again.

    Args:
      boundary: (z, y, x) or (y, x) float, 1 = boundary: SegNeuron takes the larger of 1 - a_y and 1 - a_x.
      threshold: on the boundary.
      sigma_seeds: of the Gaussian on the distance, pixels; 0 for none.
      sigma_weights: of the Gaussian on the boundary, pixels; 0 for none.
      min_size: voxels; 0 keeps all fragments.
      alpha: weight of the boundary against the distance.
      mask: same shape; where 0 nothing is segmented. All voxels if None.
      per_section: all of the above in every section, ids running on; else in 3D.
      flooding: as ``seeded_watershed``; "bioimage" is what python-elf 0.9 does.
      threads: sections done at once; the result does not depend on it.

    Returns:
      uint32 ids, with gaps where small fragments went. A section without boundary, or with nothing else, is one
      fragment (python-elf divides by zero there).

    Raises:
      ValueError: shapes that do not fit, values not finite, sigma or ``min_size`` negative, alpha outside [0, 1].
    """
    boundary = _surface(boundary, "boundary").astype(np.float32, copy=False)
    for name, value in (("sigma_seeds", sigma_seeds), ("sigma_weights", sigma_weights), ("min_size", min_size)):
        if value < 0:
            raise ValueError(f"{name} is {value}; expected at least 0")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; expected 0 to 1")
    if mask is not None:
        mask = np.asarray(mask) != 0
        _same_shape(mask, boundary, "mask")
    threads = check_threads(threads)

    def flood(values: np.ndarray, inside: np.ndarray | None) -> tuple[np.ndarray, int]:
        fragments = _distance_transform_fragments(
            values, inside, threshold, sigma_seeds, sigma_weights, min_size, alpha, flooding
        )
        return fragments, int(fragments.max())

    if boundary.ndim == 2 or not per_section:
        return flood(boundary, mask)[0]
    sections = each(flood, [(values, None if mask is None else mask[z]) for z, values in enumerate(boundary)], threads)
    return _numbered_on([part[0] for part in sections], [part[1] for part in sections])


def squared_distance(foreground: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance to the nearest background voxel, exact, in voxels.

    Args:
      foreground: (y, x) or (z, y, x) bool. The outside of the array is not background.

    Returns:
      int32, 0 on background; everywhere 1 + the sum of squared side lengths if there is no background.
    """
    foreground = np.ascontiguousarray(foreground, bool)
    shape = (1,) * (3 - foreground.ndim) + foreground.shape
    far = 1 + sum(side * side for side in foreground.shape)
    if far > 2**30:
        raise ValueError(f"foreground has shape {foreground.shape}; expected sides whose squares sum to at most 2**30")
    distance = np.empty(shape, np.int32)
    _row_distances(foreground.reshape(shape), distance, far)
    _envelopes_y(distance, far)
    if shape[0] > 1:
        _envelopes_z(distance, far)
    return distance.reshape(foreground.shape)


def regional_maxima(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Face-connected plateaus without a higher neighbour, numbered 1.. in raster order.

    Args:
      values: (y, x), int32.

    Returns:
      (y, x) uint32 ids, 0 elsewhere; and their number.
    """
    values = np.ascontiguousarray(values, np.int32)
    labels = np.zeros(values.shape, np.uint32)
    count = _number_maxima(values, labels, np.zeros(values.shape, bool), np.empty(values.size, np.int64))
    return labels, int(count)


def _distance_transform_fragments(
    boundary: np.ndarray,
    mask: np.ndarray | None,
    threshold: float,
    sigma_seeds: float,
    sigma_weights: float,
    min_size: int,
    alpha: float,
    flooding: str,
) -> np.ndarray:
    inside = boundary <= threshold
    if mask is not None and not mask.any():
        return np.zeros(boundary.shape, np.uint32)
    distance = np.sqrt(squared_distance(inside).astype(np.float32))
    if mask is not None:
        distance[~mask] = 0
    smooth = _gaussian(distance, sigma_seeds) if sigma_seeds else distance
    lowest, highest = smooth.min(), smooth.max()
    one = np.ones(boundary.shape, np.uint32) if mask is None else mask.astype(np.uint32)
    if inside.all() or highest == lowest:
        return one
    peaks = (ndimage.maximum_filter(smooth, 3, mode="nearest") == smooth) & (smooth > lowest)
    seeds, _ = ndimage.label(peaks, np.ones((3,) * boundary.ndim))
    weights = _gaussian(boundary, sigma_weights) if sigma_weights else boundary
    height = np.float32(alpha) * weights + np.float32(1 - alpha) * (np.float32(1) - (smooth - lowest) / highest)
    levels = BIOIMAGE_LEVELS if flooding == "bioimage" else None
    fragments = _flooded(height, seeds.astype(np.uint32), None, 1, levels, flooding)
    if min_size:
        sizes = np.bincount(fragments.ravel())
        kept = sizes >= min_size
        kept[0] = False
        if not kept.any():
            return one
        fragments = np.where(kept[fragments], fragments, np.uint32(0))
        fragments = _flooded(height, fragments, None, 1, levels, flooding)
    return fragments if mask is None else np.where(mask, fragments, np.uint32(0))


def _gaussian(values: np.ndarray, sigma: float) -> np.ndarray:
    radius = int(np.ceil(3 * sigma))
    return ndimage.gaussian_filter(values, sigma, mode="mirror", radius=radius)


def _stacked(flood, sections: np.ndarray, threads: int, first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Floods every section; ids run on, from ``first`` + 1."""
    parts = each(flood, [(section,) for section in sections], threads)
    counts = [count for _, _, count in parts]
    fragments = _numbered_on([part[0] for part in parts], counts, first)
    return fragments, _numbered_on([part[1] for part in parts], counts, first)


def _numbered_on(sections: list[np.ndarray], counts: list[int], first: int = 0) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(counts)])
    if starts[-1] + first > 2**32 - 2:
        raise ValueError(f"the volume has {starts[-1]} fragments; expected at most 2**32 - 2: segment it in blocks")
    result = np.empty((len(sections), *sections[0].shape), np.uint32)
    for section, start, numbered in zip(sections, starts, result):
        np.add(section, np.uint32(start + first), out=numbered, where=section != 0)
        numbered[section == 0] = 0
    return result


def _as_float(channel: np.ndarray) -> np.ndarray:
    if channel.dtype == np.uint8:
        return channel.astype(np.float32) / np.float32(255)
    if np.isnan(channel.min()):
        raise ValueError("affinities holds NaN; expected finite numbers")
    return channel


def _surface(surface: np.ndarray, name: str = "surface") -> np.ndarray:
    surface = np.asarray(surface)
    if surface.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {surface.shape}; expected (y, x) or (z, y, x)")
    if 0 in surface.shape:
        raise ValueError(f"{name} has shape {surface.shape}; expected at least one voxel along each axis")
    if surface.dtype == bool:
        surface = surface.view(np.uint8)
    if surface.dtype.kind not in "uif":
        raise ValueError(f"{name} is {surface.dtype}; expected an integer or float type")
    if surface.dtype.kind == "f" and not (np.isfinite(surface.min()) and np.isfinite(surface.max())):
        raise ValueError(f"{name} holds values that are not finite; expected finite numbers")
    return surface


def _seeds(seeds: np.ndarray) -> np.ndarray:
    seeds = np.asarray(seeds)
    if seeds.dtype.kind not in "ui":
        raise ValueError(f"seeds is {seeds.dtype}; expected integer ids")
    if seeds.dtype.kind == "i" and seeds.size and seeds.min() < 0:
        raise ValueError(f"seeds holds the negative id {seeds.min()}; expected ids of 0 or more")
    return seeds


def _same_shape(array: np.ndarray, surface: np.ndarray, name: str) -> None:
    if array.shape != surface.shape:
        raise ValueError(f"{name} has shape {array.shape}; expected {surface.shape}, that of the surface")


def _flooded(
    surface: np.ndarray,
    seeds: np.ndarray,
    mask: np.ndarray | None,
    connectivity: int,
    levels: int | None,
    flooding: str,
) -> np.ndarray:
    highest = int(seeds.max())
    if highest >= _WALL:
        # The kernels hold ids in 31 bits: number the seeds, flood, and give the ids back.
        ids, numbers = np.unique(np.append(seeds.reshape(-1), seeds.dtype.type(0)), return_inverse=True)
        numbers = numbers[:-1].reshape(seeds.shape).astype(np.uint32)
        return ids[_flooded(surface, numbers, mask, connectivity, levels, flooding)]
    # A wall around the volume saves the tests for its edges.
    inner = (slice(1, -1),) * surface.ndim
    padded = tuple(side + 2 for side in surface.shape)
    steps = _steps(padded, connectivity, flooding)
    cells = np.full(padded, _WALL, np.int32 if np.prod(padded) < 2**30 else np.int64)
    cells[inner] = seeds
    if mask is not None:
        cells[inner][mask == 0] = _WALL
    flat = cells.reshape(-1)
    ranks = _levels(surface, levels)
    if flooding == "bioimage":
        assert ranks is not None
        heights = np.empty(padded, np.uint16 if ranks[1] <= 1 << 16 else np.uint32)
        heights[inner] = ranks[0]
        newest, older = np.full(ranks[1], -1, flat.dtype), np.empty_like(flat)
        _flood_last_in(heights.reshape(-1), flat, steps, newest, older)
    else:
        places = np.empty(np.count_nonzero(flat != _WALL), np.uint32 if flat.size < 2**32 else np.uint64)
        _fill_places(flat, places)
        inside = slice(None) if mask is None else mask.reshape(-1) != 0
        queue = np.empty(len(places), places.dtype)
        words = np.zeros(len(places) // 64 + 1, np.uint64)
        groups = np.zeros(len(words) // 64 + 1, np.uint64)
        if ranks is None:
            ends = _enter_sorted(_in_order(surface, inside, places), flat, queue, words, groups)
        else:
            ends = np.zeros(ranks[1] + 1, places.dtype)
            _enter_levels(ranks[0].reshape(-1)[inside], places, flat, queue, ends, words, groups)
        _flood_first_in(flat, steps, queue, ends, words, groups)
    return _labels(cells[inner], seeds.dtype)


def _labels(cells: np.ndarray, dtype: np.dtype) -> np.ndarray:
    result = np.empty(cells.shape, dtype)
    shape = (1,) * (3 - cells.ndim) + cells.shape
    _copy_labels(cells.reshape(shape) if cells.ndim == 3 else cells[None], result.reshape(shape))
    return result


def _in_order(surface: np.ndarray, inside: slice | np.ndarray, places: np.ndarray) -> np.ndarray:
    """Pairs (key, place) of the voxels inside, in the order of the surface and then of places."""
    keys = ordered_keys(surface)[inside]
    if len(keys) and int(places[-1]) >= 2**32:
        raise ValueError(
            f"surface has {surface.size} voxels; expected fewer than 2**32: flood it in blocks or by levels"
        )
    places = places.astype(np.uint32, copy=False)
    if keys.dtype == np.uint32:
        return sorted_pairs(keys, places)
    keys, places = radix_sort(keys, places)
    ranks = np.zeros(len(keys), np.uint32)
    np.cumsum(keys[1:] != keys[:-1], out=ranks[1:])
    return packed(ranks, places)


def _steps(padded: tuple[int, ...], connectivity: int, flooding: str) -> np.ndarray:
    """Flat steps to the neighbours in the order in which they are queued."""
    strides = np.cumprod((1, *padded[:0:-1]))[::-1]
    moves = [np.array(move) - 1 for move in np.ndindex(*(3,) * len(padded))]
    moves = [move for move in moves if 1 <= np.abs(move).sum() <= connectivity]
    if flooding == "bioimage":
        # Axis by axis, each axis backward then forward.
        moves.sort(key=lambda move: (np.abs(move).sum(), [-abs(step) for step in move], list(move)))
    return np.array([int(move @ strides) for move in moves], np.int64)


def _levels(surface: np.ndarray, count: int | None) -> tuple[np.ndarray, int] | None:
    """Whole numbers 0.. in the order of the surface, and one more than the largest; None if there are too many."""
    lowest, highest = surface.min(), surface.max()
    if lowest == highest:
        return np.zeros(surface.shape, np.uint32), 1
    if count is not None:
        levels = np.empty(surface.size, np.uint32)
        flat = np.ascontiguousarray(surface).reshape(-1)
        flat = flat if flat.dtype in (np.float32, np.float64) else flat.astype(np.float64)
        _quantise(flat, float(lowest), (count - 1) / (float(highest) - float(lowest)), count, levels)
        return levels.reshape(surface.shape), count
    if surface.dtype.kind in "ui":
        span = int(highest) - int(lowest)
        if span < max(BIOIMAGE_LEVELS, surface.size // 2):
            # Subtracted in uint64, where differences of large and of negative numbers both come out right.
            above = surface.astype(np.uint64) - np.array(lowest).astype(np.uint64)
            return above.astype(np.uint32), span + 1
    return None


@numba.njit(nogil=True, cache=True)
def _quantise(values, lowest, scale, count, levels):
    for place in range(len(values)):
        levels[place] = min(max(np.int64((np.float64(values[place]) - lowest) * scale), 0), count - 1)


# One machine instruction, which neither NumPy nor Numba's language has. Numba hands over the
# first argument, which mypy misses in the calls.
@intrinsic
def _lowest_bit(typing_context, word):
    """The place of the lowest bit of a uint64 that is not 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return numba.int64(numba.uint64), generate


@numba.njit(nogil=True, cache=True)
def _next_level(level, words, groups):
    """The first marked level from ``level`` on, or -1; no level below it may be marked."""
    full = ~np.uint64(0)
    word = level >> 6
    rest = words[word] & (full << np.uint64(level & 63))
    if rest:
        return (word << 6) + _lowest_bit(rest)  # type: ignore[call-arg]
    group = word >> 6
    rest = groups[group] & (full << np.uint64(word & 63))
    while rest == 0:
        group += 1
        if group == len(groups):
            return -1
        rest = groups[group]
    word = (group << 6) + _lowest_bit(rest)  # type: ignore[call-arg]
    return (word << 6) + _lowest_bit(words[word])  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True)
def _fill_places(cells, places):
    """Flat places of all that is not wall, rising."""
    count = 0
    for place in range(len(cells)):
        if cells[place] != _WALL:
            places[count] = place
            count += 1
    return places


@numba.njit(nogil=True, cache=True)
def _mark(slot, words, groups):
    one = np.uint64(1)
    words[slot >> 6] |= one << np.uint64(slot & 63)
    groups[slot >> 12] |= one << np.uint64((slot >> 6) & 63)


@numba.njit(nogil=True, cache=True)
def _enter_sorted(pairs, cells, queue, words, groups):
    """Writes the code of every voxel into ``cells``, queues the seeds, and returns the ends of the shared levels."""
    low = np.uint64(0xFFFFFFFF)
    ends = np.empty(len(pairs) // 2, queue.dtype)
    shared, start = 0, 0
    while start < len(pairs):
        key, place = pairs[start] >> np.uint64(32), pairs[start] & low
        end = start + 1
        if end == len(pairs) or pairs[end] >> np.uint64(32) != key:
            queue[start] = place
            if cells[place] == 0:
                cells[place] = ~(2 * start)
            else:
                _mark(start, words, groups)
            start = end
            continue
        end = start
        tail = start
        while end < len(pairs) and pairs[end] >> np.uint64(32) == key:
            place = pairs[end] & low
            if cells[place] == 0:
                cells[place] = ~(2 * shared + 1)
            else:
                queue[tail] = place
                _mark(tail, words, groups)
                tail += 1
            end += 1
        ends[shared] = tail
        shared += 1
        start = end
    return ends


@numba.njit(nogil=True, cache=True)
def _enter_levels(levels, places, cells, queue, ends, words, groups):
    """As ``_enter_sorted`` for whole-number levels, all of which count as shared; ``ends`` has one entry more."""
    for level in levels:
        ends[level + 1] += 1
    for level in range(1, len(ends)):
        ends[level] += ends[level - 1]
    for index in range(len(places)):
        place, level = places[index], np.int64(levels[index])
        if cells[place] == 0:
            cells[place] = ~(2 * level + 1)
        else:
            slot = np.int64(ends[level])
            ends[level] = slot + 1
            queue[slot] = place
            _mark(slot, words, groups)


@numba.njit(nogil=True, cache=True)
def _flood_first_in(cells, steps, queue, ends, words, groups):
    """Floods in order of (level, time of queueing).

    The queue has one slot for every voxel, in the order of the surface. A voxel alone on its level stands in its slot
    from the start; those of a shared level take its slots as they come, the next of them in ``ends``. A bit in
    ``words`` marks a slot that waits, a bit in ``groups`` a word that is not 0.

    A cell holds a label, or ``_WALL``, or, below 0, the complement of a code: twice the slot of a voxel alone on its
    level, or twice the number of its shared level, plus 1.
    """
    one, six, twelve, mask = np.uint64(1), np.uint64(6), np.uint64(12), np.uint64(63)
    moves = steps.view(np.uint64)
    current = np.int64(_next_level(0, words, groups))
    following = np.uint64(queue[current]) if current >= 0 else np.uint64(0)
    while current >= 0:
        slot = np.uint64(current)
        here = following
        rest = words[slot >> six] & ~(one << (slot & mask))
        words[slot >> six] = rest
        if rest == 0:
            groups[slot >> twelve] &= ~(one << ((slot >> six) & mask))
        label = cells[here]
        lowest = slot
        for place in range(len(moves)):
            neighbour = here + moves[place]
            cell = cells[neighbour]
            if cell < 0:
                cells[neighbour] = label
                code = np.uint64(~cell)
                to = code >> one
                if code & one:
                    level = to
                    to = np.uint64(ends[level])
                    ends[level] = to + one
                    queue[to] = neighbour
                words[to >> six] |= one << (to & mask)
                groups[to >> twelve] |= one << ((to >> six) & mask)
                if to < lowest:
                    lowest, following = to, neighbour
        current = np.int64(lowest)
        if lowest == slot:
            current = np.int64(_next_level(current, words, groups))
            following = np.uint64(queue[current])


@numba.njit(nogil=True, cache=True)
def _flood_last_in(heights, labels, steps, newest, older):
    """Floods level by level, never downwards; each level is a stack, kept as a linked list."""
    for seed in range(len(labels)):
        if labels[seed] != 0 and labels[seed] != _WALL:
            level = np.int64(heights[seed])
            older[seed] = newest[level]
            newest[level] = seed
    for current in range(len(newest)):
        while newest[current] >= 0:
            voxel = np.int64(newest[current])
            newest[current] = older[voxel]
            label = labels[voxel]
            for place in range(len(steps)):
                neighbour = voxel + steps[place]
                if labels[neighbour] == 0:
                    labels[neighbour] = label
                    level = max(np.int64(heights[neighbour]), np.int64(current))
                    older[neighbour] = newest[level]
                    newest[level] = neighbour


@numba.njit(nogil=True, cache=True)
def _copy_labels(cells, labels):
    """Labels, and 0 for walls and for what no seed reached."""
    for z in range(cells.shape[0]):
        for y in range(cells.shape[1]):
            for x in range(cells.shape[2]):
                cell = cells[z, y, x]
                labels[z, y, x] = cell if 0 < cell < _WALL else 0


@numba.njit(nogil=True, cache=True)
def _row_distances(foreground, distance, far):
    """Squared distance to the background within each row, ``far`` where it has none."""
    depth, height, width = foreground.shape
    for z in range(depth):
        for y in range(height):
            since = width + 1
            for x in range(width):
                since = since + 1 if foreground[z, y, x] else 0
                distance[z, y, x] = since if since <= x else width + 1
            since = width + 1
            for x in range(width - 1, -1, -1):
                since = since + 1 if foreground[z, y, x] else 0
                nearest = min(np.int64(distance[z, y, x]), since)
                distance[z, y, x] = nearest * nearest if nearest <= width else far


@numba.njit(nogil=True, cache=True)
def _envelopes_y(distance, far):
    depth, height, width = distance.shape
    values, apex, start = np.empty(height, np.int64), np.empty(height, np.int64), np.empty(height, np.int64)
    for z in range(depth):
        for x in range(width):
            for y in range(height):
                values[y] = distance[z, y, x]
            _lower_envelope(values, apex, start, far)
            for y in range(height):
                distance[z, y, x] = values[y]


@numba.njit(nogil=True, cache=True)
def _envelopes_z(distance, far):
    depth, height, width = distance.shape
    values, apex, start = np.empty(depth, np.int64), np.empty(depth, np.int64), np.empty(depth, np.int64)
    for y in range(height):
        for x in range(width):
            for z in range(depth):
                values[z] = distance[z, y, x]
            _lower_envelope(values, apex, start, far)
            for z in range(depth):
                distance[z, y, x] = values[z]


@numba.njit(nogil=True, cache=True)
def _lower_envelope(values, apex, start, far):
    """values[i] = min over j of values[j] + (i - j)^2, at most ``far`` (Felzenszwalb and Huttenlocher 2012)."""
    length = len(values)
    top = -1
    for place in range(length):
        if values[place] >= far:
            continue
        if top < 0:
            top = 0
            apex[0], start[0] = place, 0
            continue
        while True:
            other = apex[top]
            # The first whole position where the new parabola is strictly below.
            meets = (values[place] - values[other] + place * place - other * other) // (2 * (place - other)) + 1
            if meets > start[top] or top == 0:
                break
            top -= 1
        if meets <= start[top]:
            apex[top], start[top] = place, start[top]
        elif meets < length:
            top += 1
            apex[top], start[top] = place, meets
    if top < 0:
        return
    # Heights of the parabolas are read before they are overwritten: keep them beside their apexes.
    heights = np.empty(top + 1, np.int64)
    for index in range(top + 1):
        heights[index] = values[apex[index]]
    index = 0
    for place in range(length):
        while index < top and start[index + 1] <= place:
            index += 1
        values[place] = heights[index] + (place - apex[index]) ** 2


@numba.njit(nogil=True, cache=True)
def _number_maxima(values, labels, seen, stack):
    height, width = values.shape
    count = 0
    for y in range(height):
        for x in range(width):
            if seen[y, x]:
                continue
            value = values[y, x]
            seen[y, x] = True
            stack[0] = y * width + x
            size, done, highest = 1, 0, True
            while done < size:
                row, column = stack[done] // width, stack[done] % width
                done += 1
                for side in range(4):
                    a = row + (side == 3) - (side == 0)
                    b = column + (side == 2) - (side == 1)
                    if 0 <= a < height and 0 <= b < width:
                        if values[a, b] > value:
                            highest = False
                        elif values[a, b] == value and not seen[a, b]:
                            seen[a, b] = True
                            stack[size] = a * width + b
                            size += 1
            if highest:
                count += 1
                for place in range(size):
                    labels[stack[place] // width, stack[place] % width] = count
    return count

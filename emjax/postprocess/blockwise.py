"""Watershed, region graph and agglomeration block by block, with the result of the whole volume, voxel for voxel.

The stages are functions of arrays, so that any executor can run them; ``segment_blockwise`` chains them for
array-likes:

1. ``block_fragments``: the watershed of one block, from affinities with a halo of one voxel below and two above.
   Plateaus that lie within the block are divided there; those that continue in a neighbour are left pending.
2. ``face_links``: which fragments continue across the face between two blocks.
3. ``join_fragments``: divides the pending plateaus, all at once, and joins the fragments: a table for each block, from
   its local ids to ids 1, 2, ... in raster order of the first voxel in the volume, those of the whole volume.
4. ``block_graph``: the edges whose upper voxel lies in a block. ``Graph.merge`` of all blocks is the graph of the
   volume, since sums and counts are whole numbers.
5. ``agglomerate`` and ``apply``.

The order in which a plateau is divided (breadth-first from its outlets in raster order) depends on nothing but the
voxels of that plateau, so it may be divided apart from the rest of the volume.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numba import njit

from emjax.postprocess.agglomerate import MergeTree, Score, agglomerate, parse_score
from emjax.postprocess.components import label_components
from emjax.postprocess.region_graph import Graph, region_graph
from emjax.postprocess.relabel import apply, renumber
from emjax.postprocess.threads import check_threads
from emjax.postprocess.volumes import LARGEST_ID, NEAREST, check_labels, check_limits, nearest_channels
from emjax.postprocess.watershed import DIRECTIONS, REACHED, SATURATED, _flags, _join, _label

# Planes of affinities that `block_fragments` needs beyond the block, where the volume goes on.
HALO_BELOW = 1
HALO_ABOVE = 2

# Ids that are unique in a volume without any exchange between blocks: block number, then 27 bits for the fragment.
LOCAL_BITS = 27
PENDING = REACHED


@dataclasses.dataclass(frozen=True)
class Block:
    """A box of a volume: ``start`` and ``stop`` (z, y, x) in voxels of the volume, whose shape is ``volume``."""

    start: tuple[int, int, int]
    stop: tuple[int, int, int]
    volume: tuple[int, int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = (b - a for a, b in zip(self.start, self.stop))
        return z, y, x

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        z, y, x = (slice(a, b) for a, b in zip(self.start, self.stop))
        return z, y, x

    def with_halo(self, below: int = HALO_BELOW, above: int = HALO_ABOVE) -> "Block":
        """This block and its halo, as far as the volume reaches."""
        z0, y0, x0 = (max(a - below, 0) for a in self.start)
        z1, y1, x1 = (min(b + above, n) for b, n in zip(self.stop, self.volume))
        return Block((z0, y0, x0), (z1, y1, x1), self.volume)


def grid(volume: Sequence[int], block: Sequence[int]) -> dict[tuple[int, int, int], Block]:
    """The blocks of a volume by their place (z, y, x) in the grid, in raster order; those at the end may be smaller.

    Raises:
      ValueError: not three axes, or an axis of length zero.
    """
    if len(volume) != 3 or len(block) != 3 or min(volume) < 1 or min(block) < 1:
        raise ValueError(f"volume is {tuple(volume)} and block {tuple(block)}; expected three positive lengths each")
    (depth, height, width), (a, b, c) = (tuple(int(n) for n in sizes) for sizes in (volume, block))
    shape = (depth, height, width)
    return {
        (z, y, x): Block(
            (z * a, y * b, x * c),
            (min((z + 1) * a, depth), min((y + 1) * b, height), min((x + 1) * c, width)),
            shape,
        )
        for z, y, x in itertools.product(range(-(-depth // a)), range(-(-height // b)), range(-(-width // c)))
    }


@dataclasses.dataclass(frozen=True)
class Pending:
    """Voxels of plateaus that cross the faces of a block, in raster order.

    Attributes:
      voxel: (P,) int64, the raster index in the volume.
      fragment: (P,) uint32, the local fragment, which no other pending voxel shares.
      drains, mutual: (P,) uint8, a bit for each direction -z, -y, -x, +z, +y, +x that the voxel drains to, and whether
        the plateau goes on in that direction.
      link_row, link_direction, link_fragment: for each such direction within the block, the row in ``voxel``, the
        direction 0..5 and the local fragment there.
    """

    voxel: np.ndarray
    fragment: np.ndarray
    drains: np.ndarray
    mutual: np.ndarray
    link_row: np.ndarray
    link_direction: np.ndarray
    link_fragment: np.ndarray


@dataclasses.dataclass(frozen=True)
class BlockFragments:
    """What one block hands on.

    Attributes:
      labels: (z, y, x) uint32, local fragments 1, 2, ... in raster order; 0 = background.
      first: (n,) int64, the raster index in the volume of the first voxel of each local fragment.
      planes: for each (axis, side), side 0 the lowest plane and 1 the highest: labels (uint32) and drainage bytes
        (uint8).
      pending: the plateaus that are not yet divided.
    """

    labels: np.ndarray
    first: np.ndarray
    planes: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]
    pending: Pending


@dataclasses.dataclass(frozen=True)
class FaceLinks:
    """What continues across a face.

    Attributes:
      pairs: (n, 2) uint32, (local fragment of the lower block, of the upper block) that are one.
      voxel, direction, pairs_if: pending voxels that drain across the face if their plateau is divided that way:
        raster index (int64), direction 0..5, and the pair (n, 2) uint32 that this would join.
    """

    pairs: np.ndarray
    voxel: np.ndarray
    direction: np.ndarray
    pairs_if: np.ndarray


@njit(nogil=True, cache=True)
def _is_plateau(f):
    bits = f & DIRECTIONS
    return bits & np.uint8(bits - np.uint8(1)) != 0 and f & SATURATED == 0


@njit(nogil=True, cache=True)
def _find_pending(flags, low, high, queue):
    """Marks the plateau voxels of the core that are joined to a plateau voxel outside it; returns how many."""
    _, height, width = flags.shape
    flat = flags.reshape(-1)
    steps = (-height * width, -width, -1, height * width, width, 1)
    count = 0
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            inside = low[0] < z < high[0] - 1 and low[1] < y < high[1] - 1
            stride = max(high[2] - low[2] - 1, 1) if inside else 1
            for x in range(low[2], high[2], stride):
                i = (z * height + y) * width + x
                f = flat[i]
                if not _is_plateau(f):
                    continue
                for d in range(6):
                    if not f >> np.uint8(d) & 1:
                        continue
                    at = z if d % 3 == 0 else (y if d % 3 == 1 else x)
                    if at != (low[d % 3] if d < 3 else high[d % 3] - 1):
                        continue
                    g = flat[i + steps[d]]
                    if g >> np.uint8((d + 3) % 6) & 1 and _is_plateau(g):
                        flat[i] = f | PENDING
                        queue[count] = i
                        count += 1
                        break
    head = 0
    while head < count:
        i = queue[head]
        head += 1
        f = flat[i]
        z = i // (height * width)
        y = i // width % height
        x = i % width
        for d in range(6):
            if not f >> np.uint8(d) & 1:
                continue
            at = z if d % 3 == 0 else (y if d % 3 == 1 else x)
            if at == (low[d % 3] if d < 3 else high[d % 3] - 1):
                continue
            j = i + steps[d]
            g = flat[j]
            if g & PENDING == 0 and g >> np.uint8((d + 3) % 6) & 1 and _is_plateau(g):
                flat[j] = g | PENDING
                queue[count] = j
                count += 1
    return count


@njit(nogil=True, cache=True)
def _divide_inner(flags, low, high, queue):
    """Divides the plateaus that lie in the core; pending voxels stay as they are."""
    _, height, width = flags.shape
    flat = flags.reshape(-1)
    steps = (-height * width, -width, -1, height * width, width, 1)
    count = 0
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            for x in range(low[2], high[2]):
                i = (z * height + y) * width + x
                f = flat[i]
                if f & PENDING or not _is_plateau(f):
                    continue
                for d in range(6):
                    if f >> np.uint8(d) & 1 and not flat[i + steps[d]] >> np.uint8((d + 3) % 6) & 1:
                        queue[count] = i
                        count += 1
                        break
    for k in range(count):
        flat[queue[k]] |= REACHED
    head = 0
    while head < count:
        i = queue[head]
        head += 1
        f = flat[i]
        kept = np.uint8(0)
        for d in range(6):
            if not f >> np.uint8(d) & 1:
                continue
            j = i + steps[d]
            g = flat[j]
            if not g >> np.uint8((d + 3) % 6) & 1:
                kept = np.uint8(1 << d)
            elif g & REACHED == 0 and _is_plateau(g):
                flat[j] = g | REACHED
                queue[count] = j
                count += 1
        flat[i] = kept
    return count


@njit(nogil=True, cache=True)
def _mutual_bits(flags, voxels, mutual):
    """For each voxel, the directions in which its plateau goes on."""
    _, height, width = flags.shape
    flat = flags.reshape(-1)
    steps = (-height * width, -width, -1, height * width, width, 1)
    for k in range(voxels.size):
        i = voxels[k]
        for d in range(6):
            if flat[i] >> np.uint8(d) & 1:
                g = flat[i + steps[d]]
                if g >> np.uint8((d + 3) % 6) & 1 and _is_plateau(g):
                    mutual[k] |= np.uint8(1 << d)


@njit(nogil=True, cache=True)
def _reciprocal_bits(flags, voxels, reciprocal):
    """For each voxel, the directions that it drains to and from which it is drained to."""
    _, height, width = flags.shape
    flat = flags.reshape(-1)
    steps = (-height * width, -width, -1, height * width, width, 1)
    for k in range(voxels.size):
        i = voxels[k]
        for d in range(6):
            if flat[i] >> np.uint8(d) & 1 and flat[i + steps[d]] >> np.uint8((d + 3) % 6) & 1:
                reciprocal[k] |= np.uint8(1 << d)


@njit(nogil=True, cache=True)
def _first_voxels(labels, start, volume, first):
    last = np.uint32(0)
    for z in range(labels.shape[0]):
        for y in range(labels.shape[1]):
            for x in range(labels.shape[2]):
                if labels[z, y, x] > last:
                    first[last] = ((z + start[0]) * volume[1] + y + start[1]) * volume[2] + x + start[2]
                    last = labels[z, y, x]


def block_fragments(
    affinities: np.ndarray,
    block: Block,
    low: float = 0.0001,
    high: float = 0.9999,
    offsets: Sequence[Sequence[int]] = NEAREST,
    *,
    threads: int = 1,
) -> BlockFragments:
    """The watershed of one block, to be joined with its neighbours'.

    Args:
      affinities: (c, z, y, x) float32 or uint8, of ``block.with_halo()``.
      block: the box of this block.
      low, high, offsets, threads: as for ``watershed``.

    Raises:
      ValueError: as for ``watershed``, or affinities of another shape than ``block.with_halo()``.
    """
    threads = check_threads(threads)
    box = block.with_halo()
    channels = nearest_channels(affinities, offsets)
    if channels[0].shape != box.shape:
        raise ValueError(
            f"affinities has shape {channels[0].shape} for the block at {block.start}; expected {box.shape}, "
            f"with {HALO_BELOW} plane below and {HALO_ABOVE} above where the volume goes on"
        )
    limits = check_limits(low, high)
    inner = tuple(a > 0 for a in box.start)
    flags, _ = _flags(channels, *limits, threads, inner)
    core_low = tuple(a - b for a, b in zip(block.start, box.start))
    core_high = tuple(a + n for a, n in zip(core_low, block.shape))
    core = tuple(slice(a, b) for a, b in zip(core_low, core_high))
    bits = flags[core] & DIRECTIONS
    plateau = int(np.count_nonzero((bits & (bits - np.uint8(1)) != 0) & (flags[core] & SATURATED == 0)))
    del bits
    queue = np.empty(plateau, np.int64)
    pending_count = _find_pending(flags, core_low, core_high, queue)
    voxels = np.sort(queue[:pending_count])
    flat = flags.reshape(-1)
    mutual = np.zeros(voxels.size, np.uint8)
    reciprocal = np.zeros(voxels.size, np.uint8)
    _mutual_bits(flags, voxels, mutual)
    _reciprocal_bits(flags, voxels, reciprocal)
    drains = flat[voxels] & DIRECTIONS
    _divide_inner(flags, core_low, core_high, queue)

    # A pending voxel is foreground that as yet drains nowhere; others may drain to it.
    inside = np.ascontiguousarray(flags[core])
    place = np.stack(np.unravel_index(voxels, flags.shape)) - np.array(core_low)[:, None]
    del flags, flat
    planes_bytes = inside & DIRECTIONS
    inside[tuple(place)] = PENDING
    labels, count = _label(inside, threads)
    first = np.empty(count, np.int64)
    _first_voxels(labels, block.start, block.volume, first)
    planes_bytes[tuple(place)] = drains | PENDING
    planes = {}
    for axis in range(3):
        for side, index in ((0, 0), (1, -1)):
            where = tuple(index if a == axis else slice(None) for a in range(3))
            planes[axis, side] = labels[where].copy(), planes_bytes[where].copy()
    # Outlets and plateau neighbours count; a lone voxel that drains back to the plateau follows it by itself.
    open_ = drains & (mutual | ~reciprocal)
    rows, directions, fragments = _inner_links(labels, place, drains, block.shape)
    return BlockFragments(
        labels=labels,
        first=first,
        planes=planes,
        pending=Pending(
            voxel=np.ravel_multi_index(tuple(place + np.array(block.start)[:, None]), block.volume).astype(np.int64),
            fragment=labels[tuple(place)],
            drains=open_,
            mutual=mutual,
            link_row=rows,
            link_direction=directions,
            link_fragment=fragments,
        ),
    )


def _inner_links(labels, place, drains, shape):
    """For each direction of a pending voxel that stays in the block: row, direction, and the fragment there."""
    rows, directions, fragments = [], [], []
    for direction in range(6):
        axis, step = direction % 3, -1 if direction < 3 else 1
        target = place[axis] + step
        row = np.flatnonzero((drains >> np.uint8(direction) & 1 != 0) & (target >= 0) & (target < shape[axis]))
        there = place[:, row].copy()
        there[axis] += step
        rows.append(row)
        directions.append(np.full(row.size, direction, np.uint8))
        fragments.append(labels[tuple(there)])
    return np.concatenate(rows), np.concatenate(directions), np.concatenate(fragments)


def face_links(
    lower: tuple[np.ndarray, np.ndarray], upper: tuple[np.ndarray, np.ndarray], axis: int, blocks: tuple[Block, Block]
) -> FaceLinks:
    """Links across the face between a block and the next one along ``axis``.

    Args:
      lower: ``planes[axis, 1]`` of the lower block; upper: ``planes[axis, 0]`` of the upper one.
      axis: 0, 1 or 2.
      blocks: the lower and the upper block.

    Raises:
      ValueError: blocks that do not share that face, or planes of other shapes.
    """
    below, above = blocks
    other = [a for a in range(3) if a != axis]
    if below.stop[axis] != above.start[axis] or any(
        (below.start[a], below.stop[a]) != (above.start[a], above.stop[a]) for a in other
    ):
        raise ValueError(f"blocks at {below.start} and {above.start} share no face across axis {axis}")
    shape = tuple(below.shape[a] for a in other)
    if any(plane.shape != shape for plane in (*lower, *upper)):
        raise ValueError(f"lower and upper have shape {lower[0].shape} and {upper[0].shape}; expected {shape}")
    (low_ids, low_bytes), (high_ids, high_bytes) = lower, upper
    up = low_bytes >> np.uint8(axis + 3) & 1 != 0
    down = high_bytes >> np.uint8(axis) & 1 != 0
    low_pending, high_pending = low_bytes & PENDING != 0, high_bytes & PENDING != 0
    sure = (up & ~low_pending) | (down & ~high_pending)
    pairs = np.stack([low_ids[sure], high_ids[sure]], axis=1)
    pairs = np.unique(pairs, axis=0) if pairs.size else pairs
    voxel, direction, pairs_if = [], [], []
    for there, from_, block, edge in (
        (up & low_pending, axis + 3, below, below.stop[axis] - 1),
        (down & high_pending, axis, above, above.start[axis]),
    ):
        place = np.nonzero(there)
        full = [np.zeros(0, np.int64)] * 3
        full[axis] = np.full(place[0].size, edge)
        for a, index in zip(other, place):
            full[a] = index + block.start[a]
        voxel.append(np.ravel_multi_index(full, block.volume).astype(np.int64).reshape(-1))
        direction.append(np.full(place[0].size, from_, np.uint8))
        pairs_if.append(np.stack([low_ids[there], high_ids[there]], axis=1))
    return FaceLinks(pairs, np.concatenate(voxel), np.concatenate(direction), np.concatenate(pairs_if))


@njit(nogil=True, cache=True)
def _divide_pending(drains, mutual, neighbour, queue, kept):
    """Divides plateaus given as a list of voxels; ``neighbour[k, d]`` is the row of the next one. ``kept``: final
    bytes.
    """
    reached = np.zeros(drains.size, np.bool_)
    count = 0
    for k in range(drains.size):
        kept[k] = drains[k]
        if drains[k] & ~mutual[k]:
            queue[count] = k
            reached[k] = True
            count += 1
    head = 0
    while head < count:
        k = queue[head]
        head += 1
        f = kept[k]
        last = np.uint8(0)
        for d in range(6):
            if not f >> np.uint8(d) & 1:
                continue
            if mutual[k] >> np.uint8(d) & 1:
                n = neighbour[k, d]
                if kept[n] >> np.uint8((d + 3) % 6) & 1:
                    if not reached[n]:
                        reached[n] = True
                        queue[count] = n
                        count += 1
                    continue
            last = np.uint8(1 << d)
        kept[k] = last


@njit(nogil=True, cache=True)
def _join_pairs(parent, a, b):
    for k in range(a.size):
        _join(parent, a[k], b[k])


@njit(nogil=True, cache=True)
def _roots(parent):
    for i in range(parent.size):
        parent[i] = parent[parent[i]]


def join_fragments(
    volume: Sequence[int],
    first: Sequence[np.ndarray],
    pending: Sequence[Pending],
    links: Iterable[tuple[int, int, FaceLinks]],
) -> tuple[list[np.ndarray], int]:
    """Joins the fragments of all blocks of a volume.

    Args:
      volume: its shape.
      first, pending: of each block's ``BlockFragments``, in any fixed order of the blocks.
      links: (place of the lower block in that order, of the upper block, their ``FaceLinks``) for each inner face.

    Returns:
      For each block a table (n + 1,) uint32 from local to final ids, and the number of fragments. The ids are 1, 2,
      ... in raster order of each fragment's first voxel: those of ``watershed`` of the whole volume.

    Raises:
      ValueError: more local fragments than there are ids.
    """
    base = np.concatenate([[0], np.cumsum([f.size for f in first])]).astype(np.int64)
    if base[-1] > LARGEST_ID:
        raise ValueError(f"the blocks have {base[-1]} fragments; expected at most {LARGEST_ID}")
    parent = np.arange(base[-1] + 1, dtype=np.uint32)
    voxel = np.concatenate([np.zeros(0, np.int64), *(p.voxel for p in pending)])
    drains = np.concatenate([np.zeros(0, np.uint8), *(p.drains for p in pending)])
    mutual = np.concatenate([np.zeros(0, np.uint8), *(p.mutual for p in pending)])
    order = np.argsort(voxel, kind="stable")
    voxel, drains, mutual = voxel[order], drains[order], mutual[order]
    kept = _divided(volume, voxel, drains, mutual)

    row = 0
    back = np.empty_like(order)
    back[order] = np.arange(order.size)
    for block, p in enumerate(pending):
        rows = back[row : row + p.voxel.size]
        row += p.voxel.size
        chosen = kept[rows][p.link_row] >> p.link_direction & 1 != 0
        own = p.fragment[p.link_row[chosen]].astype(np.int64) + base[block]
        _join_pairs(parent, own, p.link_fragment[chosen].astype(np.int64) + base[block])
    for lower, upper, face in links:
        rows = np.searchsorted(voxel, face.voxel)
        chosen = kept[rows] >> face.direction & 1 != 0
        pairs = np.concatenate([face.pairs, face.pairs_if[chosen]]).astype(np.int64)
        _join_pairs(parent, pairs[:, 0] + base[lower], pairs[:, 1] + base[upper])
    final, count = _raster_numbers(parent, np.concatenate([np.zeros(0, np.int64), *first]))
    tables = [np.concatenate([final[:1], final[a + 1 : b + 1]]) for a, b in itertools.pairwise(base)]
    return tables, count


def _raster_numbers(parent, first):
    """Turns a union-find into ids 1, 2, ... in the order of the first voxel of each set; also their number."""
    _roots(parent)
    ahead = np.full(parent.size, np.iinfo(np.int64).max)
    np.minimum.at(ahead, parent[1:], first)
    roots = np.flatnonzero(parent[1:] == np.arange(1, parent.size)) + 1
    roots = roots[np.argsort(ahead[roots], kind="stable")]
    final = np.zeros(parent.size, np.uint32)
    final[roots] = np.arange(1, roots.size + 1)
    return final[parent], int(roots.size)


def _divided(volume, voxel, drains, mutual):
    """The final drainage bytes of the pending voxels, given in raster order."""
    _, height, width = volume
    neighbour = np.full((voxel.size, 6), -1, np.int64)
    for direction, step in enumerate((-height * width, -width, -1, height * width, width, 1)):
        rows = np.flatnonzero(mutual >> np.uint8(direction) & 1)
        neighbour[rows, direction] = np.searchsorted(voxel, voxel[rows] + step)
    kept = np.empty(voxel.size, np.uint8)
    _divide_pending(drains, mutual, neighbour, np.empty(voxel.size, np.int64), kept)
    return kept


def unique_ids(labels: np.ndarray, block: int) -> np.ndarray:
    """Local fragments as uint64 ids that are unique in the volume: block number << 27 | local id; 0 stays 0.

    Raises:
      ValueError: a local id of 2**27 or more, or a block number of 2**26 or more (ids stay below 2**53, which JSON
        holds).
    """
    most = int(labels.max(initial=0))
    if most >= 1 << LOCAL_BITS or not 0 <= block < 1 << (53 - LOCAL_BITS):
        raise ValueError(
            f"labels reach {most} in block {block}; expected ids below 2**{LOCAL_BITS} "
            f"and blocks below 2**{53 - LOCAL_BITS}"
        )
    return np.where(labels == 0, np.uint64(0), labels.astype(np.uint64) | np.uint64(block << LOCAL_BITS))


def block_graph(
    affinities: np.ndarray,
    fragments: np.ndarray,
    lead: Sequence[int],
    statistics: Iterable[str] = ("mean",),
    offsets: Sequence[Sequence[int]] = NEAREST,
    *,
    threads: int = 1,
) -> Graph:
    """The part of a volume's region graph that one block owns: the faces whose upper voxel it holds.

    Memory and time depend on the block only, not on how large the ids are.

    Args:
      affinities, fragments: of ``block.with_halo(1, 0)``: the block and the planes below it, where there are any.
      lead: for each axis 1 if there is such a plane, else 0.
      statistics, offsets, threads: as for ``region_graph``, without "running_mean".

    Raises:
      ValueError: as ``region_graph``.
    """
    statistics = {statistics} if isinstance(statistics, str) else set(statistics)
    if "running_mean" in statistics:
        raise ValueError("statistics has 'running_mean', which depends on the order of voxels and does not add")
    local, ids = renumber(fragments)
    return region_graph(affinities, local, statistics, offsets, lead=lead, threads=threads).relabel(ids)


def segment_blockwise(
    affinities: Any,
    block: Sequence[int],
    threshold: float | Sequence[float] = 0.5,
    *,
    low: float = 0.0001,
    high: float = 0.9999,
    score: str | Score = "mean",
    offsets: Sequence[Sequence[int]] = NEAREST,
    fragments: Any = None,
    out: Any = None,
    map_: Callable[[Callable, Iterable], Iterable] = map,
) -> tuple[Any, MergeTree]:
    """Watershed and canonical agglomeration of a volume that need not fit into memory.

    Equal to ``apply(agglomerate(region_graph(a, f), t).cut(t), f)`` with ``f = watershed(a)``, for any block shape.

    Args:
      affinities: (c, z, y, x) float32 or uint8; an array, or anything with ``shape`` that gives arrays for slices (a
        dataset of h5py or zarr).
      block: shape of a block, in voxels.
      threshold: one or several; the segmentation is that of the largest, the tree can be cut at any below it.
      low, high, offsets: as for ``watershed``.
      score: see ``parse_score``.
      fragments: where to write the fragments, (z, y, x) of a dtype that holds their ids, with slices to read and write;
        default a new uint32 array.
      out: where to write the segmentation; default a new uint32 array.
      map_: ``map`` or that of a thread pool; blocks are written through it, so no two at once share a chunk only if the
        block shape is a multiple of the chunks of ``fragments`` and ``out``.

    Returns:
      ``out`` and the merge tree; ``apply(tree.cut(t), fragments)`` is the segmentation at threshold t.

    Raises:
      ValueError: as the stages.
    """
    shape = tuple(int(n) for n in affinities.shape)
    if len(shape) != 4 or 0 in shape:
        raise ValueError(
            f"affinities has shape {shape}; expected (channel, z, y, x), at least one voxel along each axis"
        )
    volume = shape[1:]
    places = grid(volume, block)
    order = {place: number for number, place in enumerate(places)}
    blocks = list(places.values())
    scoring = parse_score(score)
    fragments = np.empty(volume, np.uint32) if fragments is None else fragments
    out = np.empty(volume, np.uint32) if out is None else out
    for name, array in (("fragments", fragments), ("out", out)):
        if tuple(array.shape) != volume:
            raise ValueError(f"{name} has shape {tuple(array.shape)}; expected {volume}")

    def read(box):
        return np.asarray(affinities[(slice(None), *box.slices)])

    def label(one):
        found = block_fragments(read(one.with_halo()), one, low, high, offsets)
        fragments[one.slices] = found.labels
        return found.first, found.planes, found.pending

    labelled = list(map_(label, blocks))
    links = []
    for place, number in order.items():
        for axis in range(3):
            z, y, x = (p + (a == axis) for a, p in enumerate(place))
            above = order.get((z, y, x))
            if above is not None:
                planes = labelled[number][1][axis, 1], labelled[above][1][axis, 0]
                links.append((number, above, face_links(*planes, axis, (blocks[number], blocks[above]))))
    tables, _ = join_fragments(volume, [part[0] for part in labelled], [part[2] for part in labelled], links)
    del labelled, links

    def rename(item):
        one, table = item
        fragments[one.slices] = apply(table, np.asarray(fragments[one.slices]))

    def measure(one):
        box = one.with_halo(1, 0)
        lead = tuple(int(a < b) for a, b in zip(box.start, one.start))
        return block_graph(read(box), np.asarray(fragments[box.slices]), lead, scoring.statistics(), offsets)

    for _ in map_(rename, zip(blocks, tables)):
        pass
    graphs = list(map_(measure, blocks))
    graph = graphs[0].merge(*graphs[1:])
    del graphs
    tree = agglomerate(graph, threshold, score=scoring)
    segments = tree.cut()

    def relabel(one):
        out[one.slices] = apply(segments, np.asarray(fragments[one.slices]))

    for _ in map_(relabel, blocks):
        pass
    return out, tree


@njit(nogil=True, cache=True)
def _touching(values, ids, full, low, high, background, pairs):
    """Pairs of ids of equal, touching values, one in the core and one outside; returns how many (``pairs`` may be
    short).
    """
    depth, height, width = values.shape
    count = 0
    for z in range(low[0], high[0]):
        for y in range(low[1], high[1]):
            inside = low[0] < z < high[0] - 1 and low[1] < y < high[1] - 1
            stride = max(high[2] - low[2] - 1, 1) if inside else 1
            for x in range(low[2], high[2], stride):
                value = values[z, y, x]
                if value == background:
                    continue
                for k in range(max(z - 1, 0), min(z + 2, depth)):
                    for j in range(max(y - 1, 0), min(y + 2, height)):
                        for i in range(max(x - 1, 0), min(x + 2, width)):
                            core = low[0] <= k < high[0] and low[1] <= j < high[1] and low[2] <= i < high[2]
                            near = full or abs(k - z) + abs(j - y) + abs(i - x) == 1
                            if core or not near or values[k, j, i] != value:
                                continue
                            if count < pairs.shape[0]:
                                pairs[count, 0] = ids[z, y, x]
                                pairs[count, 1] = ids[k, j, i]
                            count += 1
    return count


def touching_pairs(labels: np.ndarray, ids: np.ndarray, box: Block, block: Block, connectivity: int = 26) -> np.ndarray:
    """(n, 2) int64: ids of parts in ``block`` and outside it that touch and have equal labels.

    Args:
      labels, ids: (z, y, x) of ``box = block.with_halo(1, 1)``; 0 = background.
      connectivity: 6 or 26.
    """
    labels = check_labels(labels, "labels")
    ids = np.ascontiguousarray(ids, np.int64)
    low = tuple(a - b for a, b in zip(block.start, box.start))
    high = tuple(a + n for a, n in zip(low, block.shape))
    pairs = np.empty((1024, 2), np.int64)
    while True:
        count = _touching(labels, ids, connectivity == 26, low, high, labels.dtype.type(0), pairs)
        if count <= pairs.shape[0]:
            return np.unique(pairs[:count], axis=0)
        pairs = np.empty((count, 2), np.int64)


def block_components(labels: np.ndarray, block: Block, connectivity: int = 26) -> tuple[np.ndarray, np.ndarray]:
    """Connected parts of equal labels within a block, uint32 from 1 up, and each part's first voxel.

    Args:
      labels: (z, y, x) of the block; 0 = background.
      connectivity: 26 or 6.

    Returns:
      The parts, and int64 raster numbers of their first voxels in the whole volume.
    """
    found = label_components(labels, connectivity)
    first = np.empty(int(found.max(initial=0)), np.int64)
    _first_voxels(found, block.start, block.volume, first)
    return found, first


def id_bases(counts: Sequence[int]) -> np.ndarray:
    """What is added to the ids of each block so that they are unique; one more entry, their number. int64.

    Raises:
      ValueError: more ids than uint32 holds.
    """
    base = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    if base[-1] > LARGEST_ID:
        raise ValueError(f"the blocks have {base[-1]} parts; expected at most {LARGEST_ID}")
    return base


def join_components(firsts: Sequence[np.ndarray], pairs: Iterable[np.ndarray]) -> tuple[np.ndarray, int]:
    """Numbers of the volume's parts from those of its blocks.

    Args:
      firsts: raster numbers of the first voxels of each block's parts.
      pairs: (n, 2) each, unique ids (those of a block plus its entry of ``id_bases``) that belong together.

    Returns:
      A uint32 look-up table from unique ids to numbers 1, 2, ... in raster order, and how many there are.
    """
    parent = np.arange(sum(first.size for first in firsts) + 1, dtype=np.uint32)
    for some in pairs:
        _join_pairs(parent, some[:, 0], some[:, 1])
    return _raster_numbers(parent, np.concatenate([np.zeros(0, np.int64), *firsts]))


def label_components_blockwise(
    labels: Any,
    block: Sequence[int],
    connectivity: int = 26,
    *,
    out: Any = None,
    map_: Callable[[Callable, Iterable], Iterable] = map,
) -> tuple[Any, int]:
    """``label_components`` of a volume that need not fit into memory: the same ids, for any block shape.

    Args:
      labels: (z, y, x) whole numbers, an array or a dataset; 0 = background.
      block: shape of a block, in voxels.
      connectivity: 26 or 6.
      out: where to write the components; default a new uint32 array.
      map_: as for ``segment_blockwise``.

    Returns:
      ``out`` and the number of components.

    Raises:
      ValueError: as ``label_components``.
    """
    volume = tuple(int(n) for n in labels.shape)
    blocks = list(grid(volume, block).values())
    out = np.empty(volume, np.uint32) if out is None else out
    if tuple(out.shape) != volume:
        raise ValueError(f"out has shape {tuple(out.shape)}; expected {volume}")

    def label(one):
        out[one.slices], first = block_components(np.asarray(labels[one.slices]), one, connectivity)
        return first

    firsts = list(map_(label, blocks))
    base = id_bases([first.size for first in firsts])

    def shift(item):
        one, first, after = item
        table = np.append(0, np.arange(after + 1, after + first.size + 1)).astype(np.uint32)
        out[one.slices] = apply(table, np.asarray(out[one.slices]))

    def touch(one):
        box = one.with_halo(1, 1)
        return touching_pairs(np.asarray(labels[box.slices]), np.asarray(out[box.slices]), box, one, connectivity)

    for _ in map_(shift, zip(blocks, firsts, base)):
        pass
    table, count = join_components(firsts, map_(touch, blocks))

    def rename(one):
        out[one.slices] = apply(table, np.asarray(out[one.slices]))

    for _ in map_(rename, blocks):
        pass
    return out, count

"""Mutex watershed: a segmentation from attractive and repulsive edges, without seeds or a threshold.

Wolf et al. 2018, "The Mutex Watershed: Efficient, Parameter-Free Image Partitioning", algorithm 1: edges in falling
order of weight; an attractive edge joins two clusters unless a mutex stands between them, a repulsive edge puts a
mutex between two clusters.
"""

from collections.abc import Sequence

import numba
import numpy as np

from emjax.postprocess.radix import ordered_keys, radix_sort

CONVENTIONS = ("affogato", "signed")


def mutex_watershed(
    affinities: np.ndarray,
    offsets: Sequence[Sequence[int]],
    *,
    attractive: int = 3,
    strides: Sequence[int] | Sequence[Sequence[int]] = (1, 1, 1),
    mask: np.ndarray | None = None,
    convention: str = "affogato",
    bias: float = 0.5,
    drop_isolated: bool = False,
) -> np.ndarray:
    """Partitions a volume by its short- and long-range affinities.

    Args:
      affinities: (c, z, y, x), float32, or uint8 that stands for value / 255; high = same object.
        ``affinities[c, z, y, x]`` joins the voxel with its partner at ``offsets[c]``; edges that leave the volume
        are not read.
      offsets: one (z, y, x) offset for each channel, in voxels, of either sign.
      attractive: the first so many channels attract, the others repel ("affogato"); with "signed" it only says which
        channels ``strides`` leaves alone.
      strides: use the edges of the repulsive channels only at voxels whose z, y and x are multiples of these; or one
        triple for each channel, attractive ones too.
      mask: (z, y, x); edges with an end where it is 0 are left out, and those voxels get label 0. All voxels if None.
      convention: "affogato" (also elf, bioimage-cpp): attractive edges weigh a, repulsive ones 1 - a. "signed"
        (mwatershed): every edge weighs a - bias, positive ones attract, negative ones repel, in falling order of
        absolute value; edges of weight 0 do nothing.
      bias: for "signed" only.
      drop_isolated: give label 0 to voxels that have no attractive edge at all, as mwatershed does.

    Returns:
      (z, y, x) uint32, 1.. in raster order of each segment's first voxel. Equal weights: smaller channel first, then
      raster order.

    Raises:
      ValueError: channels that do not fit the offsets, NaN, bad strides, mask or convention, an axis of length zero.
    """
    affinities = _affinities(affinities)
    channels, *shape = affinities.shape
    moves = _triples(offsets, "offsets")
    if len(moves) != channels:
        raise ValueError(f"affinities has {channels} channels for {len(moves)} offsets; expected as many")
    if (moves == 0).all(1).any():
        raise ValueError("offsets holds (0, 0, 0); expected a partner other than the voxel itself")
    if not 0 <= attractive <= channels:
        raise ValueError(f"attractive is {attractive}; expected 0 to {channels}, the number of channels")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention is {convention!r}; expected one of {CONVENTIONS}")
    if not np.isfinite(bias):
        raise ValueError(f"bias is {bias}; expected a finite number")
    steps = _strides(strides, channels, attractive)
    inside = np.ones(shape, np.bool_) if mask is None else np.ascontiguousarray(np.asarray(mask) != 0)
    if inside.shape != tuple(shape):
        raise ValueError(f"mask has shape {inside.shape}; expected {tuple(shape)}, that of the affinities")
    voxels = int(np.prod(shape))
    if voxels > 2**31 - 1:
        raise ValueError(f"affinities has {voxels} voxels; expected at most 2**31 - 1: segment it in blocks")
    edges, place_bits = _sorted_edges(affinities, moves, steps, inside, attractive, convention, bias)
    partner = moves @ np.array([shape[1] * shape[2], shape[2], 1])
    parents = _clusters(edges, place_bits, _channel_bits(channels), partner, voxels)
    labels = np.empty(voxels, np.uint32)
    kept = inside.reshape(-1)
    if drop_isolated:
        attracted = np.zeros(voxels, np.bool_)
        _mark_attracted(edges, place_bits, _channel_bits(channels), partner, attracted)
        kept = kept & attracted
    _number(parents, kept, labels)
    return labels.reshape(shape)


def _affinities(affinities: np.ndarray) -> np.ndarray:
    affinities = np.asarray(affinities)
    if affinities.ndim != 4:
        raise ValueError(f"affinities has shape {affinities.shape}; expected (channel, z, y, x)")
    if 0 in affinities.shape:
        raise ValueError(f"affinities has shape {affinities.shape}; expected at least one voxel along each axis")
    if affinities.dtype not in (np.float32, np.uint8):
        raise ValueError(f"affinities is {affinities.dtype}; expected float32, or uint8 that stands for value / 255")
    if affinities.dtype == np.float32 and np.isnan(affinities.min()):
        raise ValueError("affinities holds NaN; expected numbers")
    return np.ascontiguousarray(affinities)


def _triples(values: Sequence[Sequence[int]], name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] != 3 or array.dtype.kind not in "ui":
        raise ValueError(f"{name} has shape {array.shape} and type {array.dtype}; expected whole numbers (channels, 3)")
    return array.astype(np.int64)


def _strides(strides: Sequence, channels: int, attractive: int) -> np.ndarray:
    if np.ndim(strides) == 1:
        all_steps = np.ones((channels, 3), np.int64)
        all_steps[attractive:] = _triples([strides], "strides")
    else:
        all_steps = _triples(strides, "strides")
    if len(all_steps) != channels:
        raise ValueError(f"strides has {len(all_steps)} triples; expected one, or one for each of {channels} channels")
    if (all_steps < 1).any():
        raise ValueError(f"strides holds {int(all_steps.min())}; expected at least 1")
    return all_steps


def _channel_bits(channels: int) -> int:
    return max(1, (channels - 1).bit_length())


def _sorted_edges(
    affinities: np.ndarray,
    moves: np.ndarray,
    steps: np.ndarray,
    inside: np.ndarray,
    attractive: int,
    convention: str,
    bias: float,
) -> tuple[np.ndarray, int]:
    """Edges in falling order of weight, each packed as (repulsive, channel, voxel), and the bits of the voxel."""
    shape = affinities.shape[1:]
    place_bits = max(1, (int(np.prod(shape)) - 1).bit_length())
    channel_bits = _channel_bits(len(affinities))
    packed = np.uint32 if place_bits + channel_bits + 1 <= 32 else np.uint64
    repulsive_bit = packed(1 << (place_bits + channel_bits))
    last = np.array(shape)
    lower = np.maximum(0, -moves)
    upper = np.minimum(last, last - moves)
    counts = np.prod(np.maximum(0, -(-upper // steps) - -(-lower // steps)), axis=1)
    # a - bias is exact in float64; in float32 it would make ties of weights that differ.
    kind = np.float64 if convention == "signed" else np.float32
    weights, edges = np.empty(int(counts.sum()), kind), np.empty(int(counts.sum()), packed)
    filled = 0
    for channel, (start, stop, step) in enumerate(zip(-(-lower // steps) * steps, upper, steps)):
        values = affinities[channel]
        values = values.astype(np.float32) / np.float32(255) if values.dtype == np.uint8 else values
        filled = _collect(
            values, inside, start, stop, step, moves[channel], weights, edges, filled,
            packed(channel << place_bits), repulsive_bit,
            convention == "signed", channel >= attractive, bias,
        )  # fmt: skip
    # A rising sort of the complements is a falling sort in which equal weights keep their order.
    keys = ordered_keys(weights[:filled])
    np.invert(keys, out=keys)
    return radix_sort(keys, edges[:filled])[1], place_bits


def _clusters(edges: np.ndarray, place_bits: int, channel_bits: int, partner: np.ndarray, voxels: int) -> np.ndarray:
    """The parent of each voxel in the union-find forest after all edges."""
    parents = np.arange(voxels, dtype=np.int32)
    first, sizes = np.full(voxels, -1, np.int32), np.zeros(voxels, np.int32)
    table = np.zeros(1 << 12, np.uint64)
    entries = np.empty((1 << 12, 2), np.int32)
    done, used, linked = 0, 0, 0
    while done < len(edges):
        done, used, linked, wanted = _process(
            edges, place_bits, channel_bits, partner, parents, first, sizes, table, entries, done, used, linked
        )
        if done == len(edges):
            break
        if len(entries) < linked + 2:
            if 2 * len(entries) > 2**31 - 1:
                raise ValueError("affinities needs more than 2**31 mutexes; expected fewer: use strides or blocks")
            entries = np.concatenate([entries, np.empty_like(entries)])
        if 2 * (used + wanted) > len(table):
            # Pairs with a cluster that has been joined to another are never looked up again: they stay behind.
            live = _count_live(table, parents)
            larger = np.zeros(1 << int(4 * (live + wanted)).bit_length(), np.uint64)
            used = _rehash(table, larger, parents)
            table = larger
    return parents


@numba.njit(nogil=True, cache=True)
def _collect(
    values, inside, start, stop, step, move, weights, edges, filled, tag, repulsive_bit, signed, repels, bias
):  # fmt: skip
    """Appends the edges of one channel; returns the new length."""
    height, width = values.shape[1], values.shape[2]
    for z in range(start[0], stop[0], step[0]):
        for y in range(start[1], stop[1], step[1]):
            row = (z * height + y) * width
            for x in range(start[2], stop[2], step[2]):
                if not (inside[z, y, x] and inside[z + move[0], y + move[1], x + move[2]]):
                    continue
                value = values[z, y, x]
                repulsive = repels
                if signed:
                    difference = np.float64(value) - bias
                    if difference == 0:
                        continue
                    repulsive = difference < 0
                    weights[filled] = abs(difference)
                elif repels:
                    weights[filled] = np.float32(1) - value
                else:
                    weights[filled] = value
                edge = np.uint64(tag) | np.uint64(row + x)
                edges[filled] = edge | np.uint64(repulsive_bit) if repulsive else edge
                filled += 1
    return filled


@numba.njit(nogil=True, cache=True)
def _process(edges, place_bits, channel_bits, partner, parents, first, sizes, table, entries, done, used, linked):
    """Goes through the edges from ``done`` on; stops where ``table`` or ``entries`` must grow.

    ``table`` is a hash set of pairs of clusters with a mutex. Each cluster also has a linked list of the clusters it
    excludes (``first``, ``entries``: voxel, next; ``sizes``), read through the forest, so that joining two clusters
    moves the shorter list only.
    """
    channel_mask = (np.uint64(1) << np.uint64(channel_bits)) - np.uint64(1)
    place_mask = (np.uint64(1) << np.uint64(place_bits)) - np.uint64(1)
    slots = np.uint64(len(table) - 1)
    limit = len(table) // 2
    for index in range(done, len(edges)):
        edge = np.uint64(edges[index])
        one = np.int64(edge & place_mask)
        tag = edge >> np.uint64(place_bits)
        other = one + partner[np.int64(tag & channel_mask)]
        while parents[one] != one:
            parents[one] = parents[parents[one]]
            one = np.int64(parents[one])
        while parents[other] != other:
            parents[other] = parents[parents[other]]
            other = np.int64(parents[other])
        if one == other:
            continue
        low, high = min(one, other), max(one, other)
        pair = (np.uint64(low) << np.uint64(32)) | np.uint64(high)
        slot = _hash(pair) & slots
        while table[slot] != 0 and table[slot] != pair:
            slot = (slot + np.uint64(1)) & slots
        if table[slot] == pair:
            continue
        if tag > channel_mask:
            if used + 1 > limit or linked + 2 > len(entries):
                return index, used, linked, 1
            table[slot] = pair
            used += 1
            entries[linked, 0], entries[linked, 1] = other, first[one]
            entries[linked + 1, 0], entries[linked + 1, 1] = one, first[other]
            first[one], first[other] = linked, linked + 1
            linked += 2
            sizes[one] += 1
            sizes[other] += 1
            continue
        kept, gone = one, other
        if sizes[one] < sizes[other] or (sizes[one] == sizes[other] and other < one):
            kept, gone = other, one
        if used + sizes[gone] > limit:
            return index, used, linked, sizes[gone]
        parents[gone] = kept
        entry = first[gone]
        while entry >= 0:
            following = entries[entry, 1]
            excluded = np.int64(entries[entry, 0])
            while parents[excluded] != excluded:
                parents[excluded] = parents[parents[excluded]]
                excluded = np.int64(parents[excluded])
            low, high = min(kept, excluded), max(kept, excluded)
            pair = (np.uint64(low) << np.uint64(32)) | np.uint64(high)
            slot = _hash(pair) & slots
            while table[slot] != 0 and table[slot] != pair:
                slot = (slot + np.uint64(1)) & slots
            if table[slot] == 0:
                table[slot] = pair
                used += 1
                entries[entry, 1] = first[kept]
                first[kept] = entry
                sizes[kept] += 1
            entry = following
    return len(edges), used, linked, 0


@numba.njit(nogil=True, cache=True)
def _hash(pair):
    mixed = pair * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(32)
    mixed *= np.uint64(0xD6E8FEB86659FD93)
    return mixed ^ (mixed >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def _count_live(table, parents):
    live = 0
    for pair in table:
        low, high = np.int64(pair >> np.uint64(32)), np.int64(pair & np.uint64(0xFFFFFFFF))
        if pair != 0 and parents[low] == low and parents[high] == high:
            live += 1
    return live


@numba.njit(nogil=True, cache=True)
def _rehash(table, larger, parents):
    slots = np.uint64(len(larger) - 1)
    used = 0
    for pair in table:
        low, high = np.int64(pair >> np.uint64(32)), np.int64(pair & np.uint64(0xFFFFFFFF))
        if pair != 0 and parents[low] == low and parents[high] == high:
            slot = _hash(pair) & slots
            while larger[slot] != 0:
                slot = (slot + np.uint64(1)) & slots
            larger[slot] = pair
            used += 1
    return used


@numba.njit(nogil=True, cache=True)
def _mark_attracted(edges, place_bits, channel_bits, partner, attracted):
    channel_mask = (np.uint64(1) << np.uint64(channel_bits)) - np.uint64(1)
    place_mask = (np.uint64(1) << np.uint64(place_bits)) - np.uint64(1)
    for index in range(len(edges)):
        edge = np.uint64(edges[index])
        tag = edge >> np.uint64(place_bits)
        if tag <= channel_mask:
            one = np.int64(edge & place_mask)
            attracted[one] = attracted[one + partner[np.int64(tag)]] = True


@numba.njit(nogil=True, cache=True)
def _number(parents, kept, labels):
    """Labels 1.. in raster order of first voxels."""
    numbers = np.zeros(len(parents), np.uint32)
    count = 0
    for voxel in range(len(parents)):
        if not kept[voxel]:
            labels[voxel] = 0
            continue
        root = np.int64(voxel)
        while parents[root] != root:
            parents[root] = parents[parents[root]]
            root = np.int64(parents[root])
        if numbers[root] == 0:
            count += 1
            numbers[root] = count
        labels[voxel] = numbers[root]

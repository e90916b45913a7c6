"""Contingency tables: how many voxels each ground-truth object shares with each segment.

Every score of partitions in this room is computed from such a table. Tables of disjoint blocks add (``+``) to the
table of their union, exactly and in any order, so a volume of any size is scored one block at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
from numpy.typing import ArrayLike, NDArray

_CHUNK = 1 << 19
_FIRST_CAPACITY = 1 << 12


@dataclasses.dataclass(frozen=True, eq=False)
class Contingency:
    """Sparse table of overlaps, rows in rising order of (label, segment).

    Attributes:
        labels: (P,) uint64, ground-truth id of each pair (0 is kept; the scores leave it out).
        segments: (P,) uint64, segment id of each pair (0 is kept).
        counts: (P,) int64, number of voxels with this pair, at least 1.
        first: (P, 3) int64, the pair's first voxel in raster order (z, y, x), a point that lies in the overlap.
        coordinate_sums: (P, 3) int64, sums of z, y and x over the pair's voxels (for centroids).
    """

    labels: NDArray[np.uint64]
    segments: NDArray[np.uint64]
    counts: NDArray[np.int64]
    first: NDArray[np.int64]
    coordinate_sums: NDArray[np.int64]

    def __add__(self, other: Contingency) -> Contingency:
        """The table of the union of two disjoint sets of voxels."""
        return merge_contingency((self, other))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """Number of voxels counted."""
        return int(self.counts.sum())

    @functools.cached_property
    def label_sizes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Ids of the ground-truth objects, rising, and their voxel counts."""
        return _group_sums(self.labels, self.counts)

    @functools.cached_property
    def segment_sizes(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Ids of the segments, rising, and their voxel counts."""
        return _group_sums(self.segments, self.counts)

    @functools.cached_property
    def size_of_label(self) -> NDArray[np.int64]:
        """(P,) voxel count of each pair's ground-truth object."""
        return _spread(self.labels, *self.label_sizes)

    @functools.cached_property
    def size_of_segment(self) -> NDArray[np.int64]:
        """(P,) voxel count of each pair's segment."""
        return _spread(self.segments, *self.segment_sizes)

    def select(self, keep: NDArray[np.bool_]) -> Contingency:
        """The pairs where ``keep`` (P,) is true."""
        return Contingency(*(array[keep] for array in self._arrays()))

    def without_labels(self, ignore: Iterable[int] = (0,)) -> Contingency:
        """The table without the voxels of these ground-truth ids."""
        drop = _ids(ignore, "ignore")
        return self.select(~np.isin(self.labels, drop)) if len(drop) else self

    def without_segments(self, ignore: Iterable[int] = (0,)) -> Contingency:
        """The table without the voxels of these segment ids."""
        drop = _ids(ignore, "ignore")
        return self.select(~np.isin(self.segments, drop)) if len(drop) else self

    def relabelled(self, ids: ArrayLike, new_ids: ArrayLike) -> Contingency:
        """The table after the segments ``ids`` became ``new_ids`` (others keep their id).

        Scores a merge history at many thresholds from one pass over the volume: count the fragments once, then
        relabel the table with each threshold's lookup table.

        Raises:
            ValueError: ``ids`` and ``new_ids`` differ in length, or ``ids`` holds an id twice.
        """
        old, new = _ids(ids, "ids"), _ids(new_ids, "new_ids")
        if len(old) != len(new):
            raise ValueError(f"ids has {len(old)} entries and new_ids {len(new)}; expected the same number")
        order = np.argsort(old, kind="stable")
        old, new = old[order], new[order]
        if np.any(old[1:] == old[:-1]):
            raise ValueError(f"ids holds {int(old[1:][old[1:] == old[:-1]][0])} twice; expected distinct ids")
        segments = self.segments.copy()
        if len(old):
            place = np.minimum(np.searchsorted(old, segments), len(old) - 1)
            segments = np.where(old[place] == segments, new[place], segments)
        return _reduce(self.labels, segments, self.counts, self.first, self.coordinate_sums)

    def transposed(self) -> Contingency:
        """The table with the parts of ground truth and segmentation exchanged."""
        return _reduce(self.segments, self.labels, self.counts, self.first, self.coordinate_sums)

    def centroids(self) -> NDArray[np.float64]:
        """(P, 3) mean z, y, x of each pair in voxels; may lie outside a curved overlap, unlike ``first``."""
        return self.coordinate_sums / self.counts[:, None]

    def as_arrays(self) -> dict[str, NDArray]:
        """Field name -> array, for ``numpy.savez``; ``Contingency(**arrays)`` reads it back."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _arrays(self) -> tuple[NDArray, ...]:
        return self.labels, self.segments, self.counts, self.first, self.coordinate_sums


def contingency(
    segmentation: NDArray,
    labels: NDArray,
    mask: NDArray | None = None,
    *,
    offset: Sequence[int] = (0, 0, 0),
    threads: int = 1,
) -> Contingency:
    """Counts the pairs (ground-truth id, segment id) of a volume or of one block of it.

    Args:
        segmentation: ids, any integer type, 1 to 3 axes (missing leading axes have length one).
        labels: ground-truth ids, same shape.
        mask: voxels to count where true (any type; 0 is false), same shape; all voxels if None.
        offset: position (z, y, x) of the first voxel in the whole volume, so that coordinates of blocks agree.
        threads: number of threads; the result does not depend on it.

    Returns:
        The table, with ground truth 0 and segment 0 in it.

    Raises:
        ValueError: shapes differ, ids are not integers or negative, ``threads`` below 1.
    """
    segmentation, labels = check_ids(segmentation, "segmentation"), check_ids(labels, "labels")
    same_shape(segmentation, labels, "segmentation", "labels")
    if mask is not None:
        mask = np.asarray(mask)
        same_shape(mask, labels, "mask", "labels")
    if len(offset) != 3:
        raise ValueError(f"offset has {len(offset)} entries; expected 3 (z, y, x)")
    if threads < 1:
        raise ValueError(f"threads is {threads}; expected at least 1")
    shape = (1,) * (3 - labels.ndim) + labels.shape
    segmentation, labels = segmentation.reshape(shape), labels.reshape(shape)
    mask = None if mask is None else mask.reshape(shape)
    rows = shape[0] * shape[1]
    parts = max(1, min(threads, rows))
    bounds = [rows * part // parts for part in range(parts + 1)]
    work = [(segmentation, labels, mask, offset, start, stop) for start, stop in itertools.pairwise(bounds)]
    if parts == 1:
        return _count_part(*work[0])
    with ThreadPoolExecutor(parts) as pool:
        return merge_contingency(pool.map(lambda arguments: _count_part(*arguments), work))


def merge_contingency(tables: Iterable[Contingency]) -> Contingency:
    """The sum of many tables of disjoint voxels; an empty table if there are none."""
    arrays = [table._arrays() for table in tables]
    if not arrays:
        return empty_contingency()
    return _reduce(*(np.concatenate(column) for column in zip(*arrays)))


def empty_contingency() -> Contingency:
    """The table of no voxels (the neutral element of ``+``)."""
    ids = np.zeros(0, np.uint64)
    return Contingency(ids, ids, np.zeros(0, np.int64), np.zeros((0, 3), np.int64), np.zeros((0, 3), np.int64))


def check_ids(array: ArrayLike, name: str) -> NDArray:
    """The array, checked to hold ids: integers (or booleans), at most 3 axes, none negative.

    Raises:
        ValueError: names the argument, what it holds and what is expected.
    """
    array = np.asarray(array)
    if array.dtype.kind not in "uib":
        raise ValueError(f"{name} has type {array.dtype}; expected integer ids")
    if not 1 <= array.ndim <= 3:
        raise ValueError(f"{name} has {array.ndim} axes; expected z, y, x (at most 3)")
    if array.dtype.kind == "i" and array.size and (smallest := array.min()) < 0:
        raise ValueError(f"{name} holds the negative id {smallest}; expected ids >= 0 (0 is background)")
    return array


def same_shape(array: NDArray, other: NDArray, name: str, other_name: str) -> None:
    """Raises a ValueError that names both arguments if the shapes differ."""
    if array.shape != other.shape:
        raise ValueError(f"{name} has shape {array.shape} and {other_name} {other.shape}; expected the same")


def _ids(values: ArrayLike | Iterable[int], name: str) -> NDArray[np.uint64]:
    if isinstance(values, np.ndarray):
        if values.size and values.dtype.kind not in "ui":
            raise ValueError(f"{name} has type {values.dtype}; expected integer ids")
        if values.dtype.kind == "i" and values.size and values.min() < 0:
            raise ValueError(f"{name} holds the negative id {values.min()}; expected ids >= 0")
        return values.astype(np.uint64).ravel()
    # Element by element: NumPy would make floats of a list with both 0 and 2**64 - 1.
    ids = [operator.index(value) for value in values]  # type: ignore[union-attr, arg-type]
    if ids and not 0 <= min(ids) <= max(ids) < 2**64:
        raise ValueError(f"{name} holds {min(ids) if min(ids) < 0 else max(ids)}; expected ids of 0 to 2**64 - 1")
    return np.array(ids, np.uint64)


def _group_sums(ids: NDArray[np.uint64], counts: NDArray[np.int64]):
    unique, inverse = np.unique(ids, return_inverse=True)
    sums = np.zeros(len(unique), np.int64)
    np.add.at(sums, inverse, counts)
    return unique, sums


def _spread(ids: NDArray[np.uint64], unique: NDArray[np.uint64], sums: NDArray[np.int64]) -> NDArray[np.int64]:
    return sums[np.searchsorted(unique, ids)]


def _reduce(labels, segments, counts, first, sums) -> Contingency:
    """Sums rows of equal pairs and sorts; ``first`` is the least in raster order, whatever the order of the rows."""
    order = np.lexsort((segments, labels))
    return Contingency(*_reduce_sorted(order, labels, segments, counts, first, sums))


@numba.njit(nogil=True, cache=True)
def _reduce_sorted(order, labels, segments, counts, first, sums):
    rows = 0
    for place in range(len(order)):
        if place == 0 or (
            labels[order[place]] != labels[order[place - 1]] or segments[order[place]] != segments[order[place - 1]]
        ):
            rows += 1
    new_labels, new_segments = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
    new_counts = np.zeros(rows, np.int64)
    new_first, new_sums = np.empty((rows, 3), np.int64), np.zeros((rows, 3), np.int64)
    row = -1
    for place in range(len(order)):
        old = order[place]
        fresh = row < 0 or labels[old] != new_labels[row] or segments[old] != new_segments[row]
        earlier = fresh
        if fresh:
            row += 1
            new_labels[row], new_segments[row] = labels[old], segments[old]
        else:
            for axis in range(3):
                if first[old, axis] != new_first[row, axis]:
                    earlier = first[old, axis] < new_first[row, axis]
                    break
        new_counts[row] += counts[old]
        for axis in range(3):
            new_sums[row, axis] += sums[old, axis]
            if earlier:
                new_first[row, axis] = first[old, axis]
    return new_labels, new_segments, new_counts, new_first, new_sums


def _count_part(segmentation, labels, mask, offset, first_row: int, last_row: int) -> Contingency:
    """Counts the rows (z, y) number ``first_row`` to ``last_row`` in raster order."""
    height, width = labels.shape[1:]
    # Open addressing; one row holds a pair: label, segment, count, first z, y, x, sums of z, y, x.
    table = np.zeros((_FIRST_CAPACITY, 9), np.int64)
    used = 0
    if width == 0 or height == 0:
        return empty_contingency()
    row = first_row
    rows_per_chunk = max(1, _CHUNK // width)
    while row < last_row:
        z, y = divmod(row, height)
        stop = min(y + rows_per_chunk, height, y + last_row - row)
        here = (z, slice(y, stop))
        # One element type for the kernel: any id type is scored without another compilation.
        a = np.ascontiguousarray(labels[here], np.uint64)
        b = np.ascontiguousarray(segmentation[here], np.uint64)
        m = np.ascontiguousarray(mask[here] != 0) if mask is not None else np.zeros((0, 0), np.bool_)
        done = 0
        while done < len(a):
            done, used = _count_rows(a, b, m, done, used, z + offset[0], y + offset[1], offset[2], table)
            if done < len(a):
                table = _grown(table)
        row += stop - y
    rows = table[table[:, 2] > 0]
    return _reduce(rows[:, 0].astype(np.uint64), rows[:, 1].astype(np.uint64), rows[:, 2], rows[:, 3:6], rows[:, 6:9])


def _grown(table: NDArray[np.int64]) -> NDArray[np.int64]:
    larger = np.zeros((4 * len(table), 9), np.int64)
    _rehash(table, larger)
    return larger


@numba.njit(nogil=True, cache=True)
def _hash(label, segment):
    mixed = (label * np.uint64(0x9E3779B97F4A7C15)) ^ (segment * np.uint64(0xC2B2AE3D27D4EB4F))
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    return mixed ^ (mixed >> np.uint64(32))


@numba.njit(nogil=True, cache=True)
def _rehash(table, larger):
    bits = np.uint64(len(larger) - 1)
    for index in range(len(table)):
        if table[index, 2] > 0:
            slot = _hash(np.uint64(table[index, 0]), np.uint64(table[index, 1])) & bits
            while larger[slot, 2] > 0:
                slot = (slot + np.uint64(1)) & bits
            for column in range(9):
                larger[slot, column] = table[index, column]


@numba.njit(nogil=True, cache=True)
def _count_rows(a, b, mask, start, used, z, y, x, table):
    """Counts rows from ``start`` on; returns the next row and the number of slots used.

    Runs of equal pairs along x are counted at once. Stops before a row that might fill more than half of the table,
    so that the caller can grow it: a growing array inside the loop would cost a reference count per voxel.
    """
    height, width = a.shape
    masked = len(mask) > 0
    limit = len(table) // 2
    bits = np.uint64(len(table) - 1)
    for row in range(start, height):
        if used + width > limit:
            distinct = _runs(a, b, row)
            if used + distinct > limit:
                return row, used
        column = 0
        while column < width:
            if masked and not mask[row, column]:
                column += 1
                continue
            label, segment = a[row, column], b[row, column]
            begin = column
            column += 1
            while (
                column < width
                and a[row, column] == label
                and b[row, column] == segment
                and (not masked or mask[row, column])
            ):
                column += 1
            slot = _hash(label, segment) & bits
            while table[slot, 2] > 0 and (np.uint64(table[slot, 0]) != label or np.uint64(table[slot, 1]) != segment):
                slot = (slot + np.uint64(1)) & bits
            if table[slot, 2] == 0:
                used += 1
                table[slot, 0] = np.int64(label)
                table[slot, 1] = np.int64(segment)
                table[slot, 3] = z
                table[slot, 4] = y + row
                table[slot, 5] = x + begin
            length = column - begin
            table[slot, 2] += length
            table[slot, 6] += z * length
            table[slot, 7] += (y + row) * length
            table[slot, 8] += x * length + (begin + column - 1) * length // 2
    return height, used


@numba.njit(nogil=True, cache=True)
def _runs(a, b, row):
    runs = 1
    for column in range(1, a.shape[1]):
        if a[row, column] != a[row, column - 1] or b[row, column] != b[row, column - 1]:
            runs += 1
    return runs

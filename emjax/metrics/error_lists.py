"""Which objects are split and which segments merge objects: lists with sizes and places, worst first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import numpy as np

from emjax.metrics.contingency import Contingency

Number = TypeVar("Number", int, float)


@dataclasses.dataclass(frozen=True)
class Piece:
    """One part of a broken object.

    Attributes:
        id: segment id in a split list, ground-truth id in a merge list.
        size: voxels of the overlap.
        position: (z, y, x) of a voxel inside the overlap (the first in raster order).
        centroid: (z, y, x) mean of the overlap; may lie outside it.
    """

    id: int
    size: int
    position: tuple[int, int, int]
    centroid: tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class BrokenObject:
    """An object with more than one piece.

    Attributes:
        id: ground-truth id in a split list, segment id in a merge list.
        size: voxels of the object among those that count.
        lost: voxels outside its largest piece.
        bits: its share of VOI split (merge); the shares of all objects add up to VOI split (merge).
        pieces: largest first (ties: smaller id first).
    """

    id: int
    size: int
    lost: int
    bits: float
    pieces: tuple[Piece, ...]


def split_list(
    table: Contingency, ignore: Iterable[int] = (0,), *, min_piece: int = 1, limit: int | None = None
) -> list[BrokenObject]:
    """Ground-truth objects that several segments share, by falling share of VOI split.

    Args:
        table: overlaps.
        ignore: ground-truth ids whose voxels are left out.
        min_piece: pieces below this many voxels are not listed; an object is listed if two pieces remain. Sizes and
            bits still count all voxels.
        limit: length of the list at most; all if None.

    Raises:
        ValueError: ``min_piece`` below 1 or ``limit`` below 0.
    """
    table = table.without_labels(ignore)
    return _broken(table, table.labels, table.segments, table.size_of_label, min_piece, limit)


def merge_list(
    table: Contingency, ignore: Iterable[int] = (0,), *, min_piece: int = 1, limit: int | None = None
) -> list[BrokenObject]:
    """Segments that hold several ground-truth objects, by falling share of VOI merge; arguments of ``split_list``."""
    table = table.without_labels(ignore)
    return _broken(table, table.segments, table.labels, table.size_of_segment, min_piece, limit)


def _broken(table, owners, parts, owner_sizes, min_piece: int, limit: int | None) -> list[BrokenObject]:
    if min_piece < 1:
        raise ValueError(f"min_piece is {min_piece}; expected at least 1 voxel")
    if limit is not None and limit < 0:
        raise ValueError(f"limit is {limit}; expected None or at least 0")
    if not len(table):
        return []
    total = table.total
    # Largest piece first within each owner.
    order = np.lexsort((parts, -table.counts, owners))
    starts = np.flatnonzero(np.concatenate(([True], owners[order][1:] != owners[order][:-1])))
    ends = np.append(starts[1:], len(order))
    bits = -table.counts / total * np.log2(table.counts / owner_sizes)
    bits_of_owner = np.add.reduceat(bits[order], starts)
    listed = np.add.reduceat((table.counts >= min_piece)[order].astype(np.int64), starts)
    candidates = np.flatnonzero(listed >= 2)
    # Rounded, so that a tie in bits is broken by id and not by the order of a sum.
    ranking = np.lexsort((owners[order][starts[candidates]], -np.round(bits_of_owner[candidates], 14)))
    centroids = table.centroids()
    result = []
    for index in candidates[ranking][: limit if limit is not None else None]:
        rows = order[starts[index] : ends[index]]
        size = int(owner_sizes[rows[0]])
        pieces = tuple(
            Piece(
                int(parts[row]),
                int(table.counts[row]),
                _triple(table.first[row].tolist()),
                _triple(centroids[row].tolist()),
            )
            for row in rows[: listed[index]]
        )
        result.append(
            BrokenObject(
                int(owners[rows[0]]), size, size - pieces[0].size, max(float(bits_of_owner[index]), 0.0), pieces
            )
        )
    return result


def _triple(values: list[Number]) -> tuple[Number, Number, Number]:
    z, y, x = values
    return z, y, x

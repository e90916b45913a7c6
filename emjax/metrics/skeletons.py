"""Expected run length: how far one can follow a neuron without meeting an error (Januszewski et al. 2018)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emjax.metrics.border import check_voxel_size


@dataclasses.dataclass(frozen=True)
class RunLength:
    """Expected run length and the verdicts on edges.

    Attributes:
        erl: expected error-free run length from a random point on the skeletons, in the units of the positions (nm).
        perfect_erl: the same without any error.
        normalised_erl: ``erl / perfect_erl``, 1 is best.
        total_length: length of all edges.
        correct, omitted, split, merged: numbers of edges.
        merging_segments: segments that hold nodes of more than one skeleton, rising ids.
    """

    erl: float
    perfect_erl: float
    normalised_erl: float
    total_length: float
    correct: int
    omitted: int
    split: int
    merged: int
    merging_segments: tuple[int, ...]


def expected_run_length(
    positions: ArrayLike, edges: ArrayLike, skeleton_of_node: ArrayLike, segment_of_node: ArrayLike
) -> RunLength:
    """ERL on skeletons as funlib.evaluate and FFN define it, with voxel-size-aware lengths.

    An edge is *omitted* if an end lies in segment 0, else *split* if its ends lie in different segments, else *merged*
    if its segment holds nodes of another skeleton, else correct. With L the length of correct edges of one skeleton in
    one segment and T the length of all skeletons, ERL = sum of L^2 / T.

    Args:
        positions: (N, 3) z, y, x in world units (nm): voxel coordinates times the voxel size.
        edges: (E, 2) pairs of node *numbers* (0 to N - 1), both of one skeleton.
        skeleton_of_node: (N,) skeleton ids.
        segment_of_node: (N,) segment at each node, 0 for none; see ``segments_at``.

    Returns:
        The run lengths; ``erl`` and ``normalised_erl`` are NaN if there are no edges of any length.

    Raises:
        ValueError: shapes do not fit, an edge names a node that is not there or joins two skeletons.
    """
    nodes = np.asarray(positions, np.float64)
    pairs = np.asarray(edges, np.int64).reshape(-1, 2)
    skeletons, segments = np.asarray(skeleton_of_node), np.asarray(segment_of_node)
    _check(nodes, pairs, skeletons, segments)
    lengths = np.sqrt(((nodes[pairs[:, 0]] - nodes[pairs[:, 1]]) ** 2).sum(1))
    total = float(lengths.sum())
    merging = _merging_segments(skeletons, segments)
    one, other = segments[pairs[:, 0]], segments[pairs[:, 1]]
    omitted = (one == 0) | (other == 0)
    split = ~omitted & (one != other)
    merged = ~omitted & ~split & np.isin(one, merging)
    correct = ~(omitted | split | merged)
    of_edge = skeletons[pairs[:, 0]]
    erl = _squared_runs((of_edge[correct], one[correct]), lengths[correct]) / total if total else math.nan
    perfect = _squared_runs((of_edge,), lengths) / total if total else math.nan
    return RunLength(
        erl=erl,
        perfect_erl=perfect,
        normalised_erl=erl / perfect if total else math.nan,
        total_length=total,
        correct=int(correct.sum()),
        omitted=int(omitted.sum()),
        split=int(split.sum()),
        merged=int(merged.sum()),
        merging_segments=tuple(int(segment) for segment in merging),
    )


def segments_at(
    segmentation: NDArray,
    positions: ArrayLike,
    voxel_size: Sequence[float],
    offset: Sequence[int] = (0, 0, 0),
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """Segment ids under skeleton nodes, for a volume or for one block of it.

    Args:
        segmentation: ids, (z, y, x).
        positions: (N, 3) z, y, x in world units.
        voxel_size: z, y, x in the units of ``positions``; a position belongs to voxel floor(position / voxel_size).
        offset: position (z, y, x) of the block's first voxel in the volume, in voxels.

    Returns:
        ids, (N,) uint64, 0 outside the block; and whether each node lies in the block. Over disjoint blocks the ids
        add up to those of the volume.
    """
    segmentation = np.asarray(segmentation)
    size = np.asarray(check_voxel_size(voxel_size))
    voxels = np.floor(np.asarray(positions, np.float64).reshape(-1, 3) / size).astype(np.int64) - np.asarray(offset)
    inside = ((voxels >= 0) & (voxels < segmentation.shape)).all(1)
    ids = np.zeros(len(voxels), np.uint64)
    ids[inside] = segmentation[tuple(voxels[inside].T)]
    return ids, inside


def node_numbers(node_ids: ArrayLike, id_pairs: ArrayLike) -> NDArray[np.int64]:
    """Edges given by node ids (as SWC files and databases store them) -> edges by node numbers, (E, 2).

    Raises:
        ValueError: an id occurs twice, or an edge names an id that no node has.
    """
    ids, pairs = np.asarray(node_ids), np.asarray(id_pairs).reshape(-1, 2)
    order = np.argsort(ids, kind="stable")
    ranked = ids[order]
    if np.any(ranked[1:] == ranked[:-1]):
        raise ValueError(f"node_ids holds {ranked[1:][ranked[1:] == ranked[:-1]][0]} twice; expected distinct ids")
    place = np.minimum(np.searchsorted(ranked, pairs), max(len(ids) - 1, 0))
    unknown = pairs[ranked[place] != pairs] if len(ids) else pairs.ravel()
    if len(unknown):
        raise ValueError(f"id_pairs names node {unknown[0]}, which node_ids does not hold")
    return order[place].astype(np.int64)


def _check(nodes, pairs, skeletons, segments) -> None:
    if nodes.ndim != 2 or nodes.shape[1] != 3:
        raise ValueError(f"positions has shape {nodes.shape}; expected (nodes, 3)")
    for name, array in (("skeleton_of_node", skeletons), ("segment_of_node", segments)):
        if array.shape != (len(nodes),):
            raise ValueError(f"{name} has shape {array.shape}; expected ({len(nodes)},), one per node")
    if not np.isfinite(nodes).all():
        raise ValueError("positions holds values that are not finite")
    if pairs.size and (pairs.min() < 0 or pairs.max() >= len(nodes)):
        raise ValueError(f"edges names node {pairs.max() if pairs.min() >= 0 else pairs.min()} of {len(nodes)} nodes")
    crossing = np.flatnonzero(skeletons[pairs[:, 0]] != skeletons[pairs[:, 1]])
    if len(crossing):
        raise ValueError(f"edges joins two skeletons in row {crossing[0]}: {tuple(pairs[crossing[0]].tolist())}")


def _merging_segments(skeletons: NDArray, segments: NDArray) -> NDArray:
    pairs = np.unique(np.stack([segments.astype(np.uint64), skeletons.astype(np.uint64)], 1), axis=0)
    ids, counts = np.unique(pairs[:, 0], return_counts=True)
    return ids[(counts > 1) & (ids != 0)]


def _squared_runs(keys: Iterable[NDArray], lengths: NDArray[np.float64]) -> float:
    """Sum over groups of (summed length)^2."""
    if not len(lengths):
        return 0.0
    _, group = np.unique(np.stack([key.astype(np.uint64) for key in keys], 1), axis=0, return_inverse=True)
    return float((np.bincount(group.ravel(), lengths) ** 2).sum())

"""Joining instances that were segmented block by block, by the affinities on the faces between the blocks.

AGQ (ICLR 2025), inference: block instances become fragments, and only affinities on block faces speak for a merge.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from emjax.postprocess.agglomerate import MergeTree, agglomerate
from emjax.postprocess.blockwise import block_graph, grid, label_components_blockwise
from emjax.postprocess.components import label_components
from emjax.postprocess.region_graph import affinity_levels, region_graph
from emjax.postprocess.relabel import apply
from emjax.postprocess.volumes import NEAREST, nearest_channels


def block_border(shape: tuple[int, int, int], starts: Sequence[Iterable[int]]) -> np.ndarray:
    """(3, z, y, x) bool: the faces between blocks, channel c on the first plane along axis c of each block.

    Args:
      shape: of the volume, in voxels.
      starts: for each axis, where blocks begin.

    Raises:
      ValueError: not three lists, or a start outside the volume.
    """
    if len(starts) != 3:
        raise ValueError(f"starts has {len(starts)} lists; expected one for each of z, y, x")
    mask = np.zeros((3, *shape), bool)
    for axis, positions in enumerate(starts):
        planes = np.moveaxis(mask[axis], axis, 0)
        for position in positions:
            if not 0 <= position < shape[axis]:
                raise ValueError(f"starts has {position} along {'zyx'[axis]}; expected 0 to {shape[axis] - 1}")
            planes[position] = True
    return mask


def border_affinities(
    affinities: np.ndarray, border: np.ndarray, on_border: float = 0.3, elsewhere: float = 0.0
) -> np.ndarray:
    """(a + on_border) / 2 on the faces between blocks and (a + elsewhere) / 2 inside them, in float32.

    With 0.3 and 0, mean affinity above 0.7 on a face merges at threshold 0.5, and no inner contact ever does.

    Args:
      affinities: (3, z, y, x) float32, or uint8 that stands for value / 255.
      border: (3, z, y, x) bool, see ``block_border``.

    Raises:
      ValueError: shapes that differ.
    """
    affinities = np.asarray(affinities)
    border = np.asarray(border)
    if border.shape != affinities.shape or border.dtype != bool:
        raise ValueError(f"border is {border.dtype} of shape {border.shape}; expected bool of shape {affinities.shape}")
    levels = affinity_levels(affinities.dtype)
    values = levels[affinities] if levels.size else affinities
    return (values + np.where(border, np.float32(on_border), np.float32(elsewhere))) / np.float32(2)


def merge_blocks(
    affinities: np.ndarray,
    labels: np.ndarray,
    border: np.ndarray,
    *,
    on_border: float = 0.3,
    elsewhere: float = 0.0,
    threshold: float = 0.5,
    ties: str = "waterz",
    discretize_queue: int = 256,
    offsets: Sequence[Sequence[int]] = NEAREST,
    threads: int = 1,
) -> np.ndarray:
    """AGQ's merge: 26-connected parts of the block instances are agglomerated by ``border_affinities``.

    Args:
      affinities: (3, z, y, x) float32 or uint8.
      labels: (z, y, x), instances of all blocks in one volume; ids differ between blocks; 0 = background.
      border: (3, z, y, x) bool, the faces between blocks, channels as the affinities.
      on_border, elsewhere: what the affinities are averaged with.
      threshold: parts are merged while 1 - mean is below it.
      ties, discretize_queue: as for ``agglomerate``; the original uses waterz with 256 bins. With "canonical" (and no
        bins) the result equals the block-wise one.

    Returns:
      (z, y, x) uint32; the id of a segment is the smallest id of its parts, which are numbered in raster order.

    Raises:
      ValueError: shapes that do not fit, and what ``region_graph`` and ``agglomerate`` refuse.
    """
    nearest_channels(affinities, offsets)
    values = border_affinities(affinities, border, on_border, elsewhere)
    parts = label_components(labels, 26, threads=threads)
    statistics = ("running_mean",) if ties == "waterz" else ("mean",)
    graph = region_graph(values, parts, statistics, offsets, threads=threads)
    tree = agglomerate(graph, threshold, ties=ties, discretize_queue=discretize_queue if ties == "waterz" else 0)
    return apply(tree.cut(threshold), parts, threads=threads)


def merge_blocks_blockwise(
    affinities: Any,
    labels: Any,
    border: Any,
    block: Sequence[int],
    *,
    on_border: float = 0.3,
    elsewhere: float = 0.0,
    threshold: float = 0.5,
    offsets: Sequence[Sequence[int]] = NEAREST,
    parts: Any = None,
    out: Any = None,
    map_: Callable[[Callable, Iterable], Iterable] = map,
) -> tuple[Any, MergeTree]:
    """``merge_blocks(..., ties="canonical")`` of a volume that need not fit into memory, for any block shape.

    Args:
      affinities, labels, border: as for ``merge_blocks``; arrays, or datasets that give arrays for slices.
      block: shape of the blocks to work in, in voxels; they need not be those of the instances.
      on_border, elsewhere, threshold, offsets: as for ``merge_blocks``.
      parts, out: where to write the connected parts and the segmentation; default new uint32 arrays.
      map_: as for ``segment_blockwise``.

    Returns:
      ``out`` and the merge tree.

    Raises:
      ValueError: as ``merge_blocks``.
    """
    volume = tuple(int(n) for n in labels.shape)
    if tuple(affinities.shape[1:]) != volume or tuple(border.shape) != tuple(affinities.shape):
        raise ValueError(
            f"affinities, border and labels have shapes {tuple(affinities.shape)}, {tuple(border.shape)} and {volume}; "
            "expected (c, z, y, x) twice and (z, y, x)"
        )
    parts, _ = label_components_blockwise(labels, block, 26, out=parts, map_=map_)
    out = np.empty(volume, np.uint32) if out is None else out
    blocks = list(grid(volume, block).values())

    def measure(one):
        box = one.with_halo(1, 0)
        lead = tuple(int(a < b) for a, b in zip(box.start, one.start))
        where = (slice(None), *box.slices)
        values = border_affinities(np.asarray(affinities[where]), np.asarray(border[where]), on_border, elsewhere)
        return block_graph(values, np.asarray(parts[box.slices]), lead, ("mean",), offsets)

    first, *others = map_(measure, blocks)
    tree = agglomerate(first.merge(*others), threshold)
    segments = tree.cut()

    def relabel(one):
        out[one.slices] = apply(segments, np.asarray(parts[one.slices]))

    for _ in map_(relabel, blocks):
        pass
    return out, tree

"""The one door to Google's ``connectomics`` package, whose boxes are x, y, z; everything here is z, y, x.

Only what was checked is let through: :class:`BoundingBox`, ``BoxGenerator``, ``Subvolume`` and two label functions. The
package could be dropped by rewriting this module.
"""

from collections.abc import Sequence

import networkx as nx
import numpy as np
from connectomics.common.bounding_box import BoundingBox
from connectomics.common.box_generator import BoxGenerator
from connectomics.segmentation import labels as _labels
from connectomics.volume.subvolume import Subvolume

from emjax.errors import UserError

Triple = tuple[int, int, int]
Slices = tuple[slice, slice, slice]

__all__ = [
    "BoundingBox",
    "BoxGenerator",
    "Subvolume",
    "block_grid",
    "bounding_box",
    "box_size",
    "box_start",
    "from_slices",
    "merge_enclosed",
    "split_disconnected",
    "subvolume",
    "to_slices",
]


def bounding_box(
    start: Sequence[int], *, size: Sequence[int] | None = None, end: Sequence[int] | None = None
) -> BoundingBox:
    """A connectomics box from z, y, x numbers.

    Raises:
        UserError: not exactly one of ``size`` and ``end``, or not three numbers each.
    """
    given = [value for value in (size, end) if value is not None]
    if len(given) != 1 or any(len(value) != 3 for value in (start, *given)):
        raise UserError(
            f"a box needs a start and either a size or an end, three numbers each; found {start}, {size}, {end}"
        )
    extent = {"size": size[::-1]} if size is not None else {"end": end[::-1]}  # type: ignore[index]
    return BoundingBox(start=tuple(start[::-1]), **extent)


def from_slices(box: Sequence[slice]) -> BoundingBox:
    """A connectomics box from slices z, y, x with explicit start and stop."""
    return bounding_box([part.start for part in box], end=[part.stop for part in box])


def box_start(box: BoundingBox) -> Triple:
    """Lowest corner, zyx."""
    return tuple(int(n) for n in box.start[::-1])  # type: ignore[return-value]


def box_size(box: BoundingBox) -> Triple:
    """Lengths, zyx."""
    return tuple(int(n) for n in box.size[::-1])  # type: ignore[return-value]


def to_slices(box: BoundingBox) -> Slices:
    """Slices z, y, x (plain integers), to index arrays and volumes with."""
    return tuple(slice(a, a + n) for a, n in zip(box_start(box), box_size(box)))  # type: ignore[return-value]


def block_grid(
    shape: Sequence[int], block: Sequence[int], overlap: Sequence[int] = (0, 0, 0), *, start: Sequence[int] = (0, 0, 0)
) -> BoxGenerator:
    """A numbered grid of overlapping blocks over a volume, z, y, x; the last blocks of an axis may be smaller.

    ``grid.generate(i)[1]`` is the box to read, ``grid.index_to_cropped_box(i)`` the part of it to write: these parts
    tile the volume exactly once. Blocks are never shifted back to full size, because then the parts would overlap.

    Args:
        shape: of the volume.
        block: of a block, overlap included.
        overlap: shared by neighbouring blocks; even, as each gives up half of it.
        start: first voxel of the volume.

    Raises:
        UserError: an overlap that is odd, negative or not smaller than the block.
    """
    for length, shared in zip(block, overlap):
        if shared < 0 or shared % 2 or shared >= length:
            raise UserError(
                f"blocks of {tuple(block)} cannot overlap by {tuple(overlap)}: even numbers below the block"
            )
    return BoxGenerator(
        outer_box=bounding_box(start, size=shape),
        box_size=tuple(block[::-1]),
        box_overlap=tuple(overlap[::-1]),
        back_shift_small_boxes=False,
    )


def subvolume(array: np.ndarray, start: Sequence[int]) -> Subvolume:
    """An array (z, y, x or channel, z, y, x) that knows where in the volume it lies (``start``: zyx)."""
    four = array if array.ndim == 4 else array[None]
    return Subvolume(four, bounding_box(start, size=four.shape[1:]))


def split_disconnected(labels: np.ndarray, connectivity: int = 1) -> np.ndarray:
    """Labels (zyx) in which every connected component has an id of its own; background stays 0.

    Args:
        labels: unsigned or signed integers.
        connectivity: 1 (faces), 2 (edges) or 3 (corners).
    """
    return _labels.split_disconnected_components(labels, connectivity=connectivity).astype(labels.dtype)


def merge_enclosed(labels: np.ndarray) -> np.ndarray:
    """Labels (zyx) in which objects that lie wholly inside another one (nuclei, vacuoles) have its id.

    An object is inside another if every path in the region graph from it to the border of the volume, or to
    background, goes through the other. Objects are neighbours if they share a face.
    """
    outside = -1
    graph = nx.Graph()
    borders = [labels[0], labels[-1], labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]]
    for number in np.unique(np.concatenate([np.unique(border) for border in borders])):
        graph.add_edge(int(number) or outside, outside)
    for axis in range(3):
        first, second = np.moveaxis(labels, axis, 0)[:-1], np.moveaxis(labels, axis, 0)[1:]
        change = first != second
        pairs = np.unique(np.stack([first[change], second[change]], axis=1), axis=0)
        graph.add_edges_from((int(a) or outside, int(b) or outside) for a, b in pairs)
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    parts = [set(part) for part in nx.biconnected_components(graph)]
    joints = set(nx.articulation_points(graph))
    inner = [number for number, part in enumerate(parts) if outside not in part]
    merged = _labels.merge_internal_objects(parts, joints, inner)
    if not merged:
        return labels.copy()
    old, numbers = np.unique(labels, return_inverse=True)
    target = {inside: into for number, into in merged.items() for inside in parts[number] if inside != into}
    new = np.array([target.get(int(number), int(number)) for number in old], dtype=labels.dtype)
    return new[numbers].reshape(labels.shape)

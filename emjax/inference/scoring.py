"""Contingency tables of volumes of any size, one block at a time."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from emjax.data.ids import split_ignored
from emjax.data.volume import Volume, blocks
from emjax.errors import UserError
from emjax.metrics import Contingency, contingency, empty_contingency, fill_unlabelled, merge_contingency


def check_ids(volume: Volume, role: str) -> Volume:
    """Refuses volumes that are not labels."""
    volume.require_axes("zyx")
    if volume.dtype.kind not in "uib":
        raise UserError(f"{volume.spec}: {volume.dtype} values are not {role}; expected integer ids")
    return volume


def block_of(volume: Volume, most_voxels: int) -> tuple[int, int, int]:
    """Slabs of whole chunks with at most about ``most_voxels``."""
    shape = volume.spatial_shape
    chunks = tuple(volume.chunks or (1, *shape[1:]))[-3:]
    step = [min(c, n) for c, n in zip(chunks, shape)]
    for axis in (2, 1, 0):
        others = math.prod(step) // step[axis]
        room = max(1, most_voxels // (others * step[axis]))
        step[axis] = min(shape[axis], step[axis] * room)
    return step[0], step[1], step[2]


def read_filled(volume: Volume, box: Sequence[slice], voxel_size: Sequence[float], most_voxels: int) -> np.ndarray:
    """Segments of ``box`` with every 0 replaced by the nearest segment (Euclidean, nm), as if done on the whole volume.

    The surroundings are widened until no voxel that was filled lies nearer to what was not read than to its segment.
    """
    core = volume[tuple(box)]
    if core.all():
        return core
    shape = volume.spatial_shape
    halo = 16 * min(voxel_size)
    while True:
        margin = [math.ceil(halo / size) for size in voxel_size]
        wide = [slice(max(part.start - m, 0), min(part.stop + m, n)) for part, m, n in zip(box, margin, shape)]
        everything = all(part.start == 0 and part.stop == n for part, n in zip(wide, shape))
        if math.prod(part.stop - part.start for part in wide) > most_voxels and not everything:
            # Farther than memory reaches: what is left unlabelled keeps 0, which the caller counts.
            everything = True
        surroundings = volume[tuple(wide)]
        filled = fill_unlabelled(surroundings, voxel_size, max_distance=None if everything else halo)
        inner = filled[tuple(slice(p.start - w.start, p.stop - w.start) for p, w in zip(box, wide))]
        if everything or inner.all():
            return inner
        halo *= 2


@dataclasses.dataclass(frozen=True)
class Filled:
    """A segmentation (z, y, x) whose voxels of 0 read as their nearest segment: what ``fill`` scores, to be drawn."""

    volume: Volume
    voxel_size: tuple[float, float, float]
    most_voxels: int = 1 << 26

    @property
    def shape(self) -> tuple[int, ...]:
        return self.volume.shape

    def __getitem__(self, index: tuple[int, slice, slice]) -> np.ndarray:
        """One section: number, and slices with ends of y and x."""
        z, *window = index
        return read_filled(self.volume, [slice(z, z + 1), *window], self.voxel_size, self.most_voxels)[0]


def count(
    segmentations: Sequence[Volume],
    labels: Volume,
    mask: Volume | None = None,
    *,
    fill: bool = False,
    most_voxels: int = 1 << 27,
    threads: int = 1,
    progress: Callable[[int], None] = lambda voxels: None,
) -> list[Contingency]:
    """Tables of several segmentations against one ground truth, which is read once.

    Args:
        segmentations: of the shape of ``labels``.
        labels: ground truth, 0 (and CREMI's special ids near 2^64) = not scored.
        mask: scored where not 0.
        fill: unlabelled voxels get the nearest segment first.
        most_voxels: of a block.
        threads: of the counting.
        progress: called with the number of voxels after each block.

    Raises:
        UserError: volumes that are not labels, or of different shapes.
    """
    check_ids(labels, "ground truth")
    for volume in segmentations:
        check_ids(volume, "segments")
        _same_shape(volume, labels)
    if mask is not None:
        _same_shape(mask.require_axes("zyx"), labels)
    voxel_size = labels.voxel_size or segmentations[0].voxel_size or (1.0, 1.0, 1.0)
    tables = [[empty_contingency()] for _ in segmentations]
    for box in blocks(labels.spatial_shape, block_of(segmentations[0], most_voxels)):
        truth = split_ignored(labels[box])[0]
        inside = None if mask is None else mask[box]
        offset = tuple(part.start for part in box)
        for volume, parts in zip(segmentations, tables):
            ids = read_filled(volume, box, voxel_size, 4 * most_voxels) if fill else volume[box]
            parts.append(contingency(ids, truth, inside, offset=offset, threads=threads))
            # Summed as they come, so that memory holds one table and not one for each block.
            parts[:] = [merge_contingency(parts)]
        progress(truth.size)
    return [parts[0] for parts in tables]


def _same_shape(volume: Volume, labels: Volume) -> None:
    if volume.spatial_shape != labels.spatial_shape:
        raise UserError(
            f"{volume.spec} has the shape {volume.spatial_shape}, {labels.spec} {labels.spatial_shape} (z, y, x); "
            "expected the same (--align takes the region that both cover, by their offsets)"
        )

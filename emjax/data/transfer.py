"""Copying volumes from one format or place to another, with bounded memory and nothing half-written."""

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from emjax.data.ids import split_ignored
from emjax.data.sources import Box, Source
from emjax.data.volume import Volume, blocks, check_finite, create_volume
from emjax.errors import UserError

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class Summary:
    """What was copied.

    Attributes:
        volume: one-line description of the new volume.
        low, high: least and greatest value; ids without 0 and special ones for labels.
        mean: of the values (images).
        objects: number of ids, 0 not counted (labels).
        background: fraction of voxels that are 0 (labels).
        ignored: fraction of voxels with a special id (labels).
        mask: name of the written ignore mask, if there was anything to ignore.
    """

    volume: str
    low: float
    high: float
    mean: float | None = None
    objects: int | None = None
    background: float | None = None
    ignored: float | None = None
    mask: str | None = None

    def lines(self) -> Iterator[str]:
        yield self.volume
        if self.objects is None:
            yield f"  values {self.low:g} to {self.high:g}, mean {self.mean:.4g}"
            return
        yield f"  {self.objects} objects, ids {self.low:.0f} to {self.high:.0f}, {self.background:.1%} background"
        if self.mask:
            yield f"  {self.ignored:.1%} ignored, written as mask {self.mask}"


def block_shape(shape: Sequence[int], piece: Sequence[int], bytes_per_voxel: int, memory: int) -> tuple[int, ...]:
    """Blocks to copy by: whole pieces (shards), as many along x, then y, then z as fit into ``memory`` bytes."""
    block = [min(s, n) for s, n in zip(piece, shape)]
    for axis in reversed(range(len(block))):
        bytes_now = math.prod(block) * bytes_per_voxel
        times = max(1, min(memory // max(bytes_now, 1), -(-shape[axis] // block[axis])))
        block[axis] = min(block[axis] * times, shape[axis])
        if block[axis] < shape[axis]:
            break
    return tuple(block)


def _boxes(volume: Volume, other: np.dtype, memory: int) -> list[Box]:
    piece = volume.shards or volume.chunks or volume.shape
    return list(
        blocks(volume.shape, block_shape(volume.shape, piece, max(volume.dtype.itemsize, other.itemsize), memory))
    )


def _read_ahead(volume: Volume, boxes: Sequence[Box]) -> Iterator[tuple[Box, np.ndarray]]:
    """Blocks one after the other, the next one being read while one is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(volume.__getitem__, boxes[0])
        for number, box in enumerate(boxes):
            block = waiting.result()
            if number + 1 < len(boxes):
                waiting = pool.submit(volume.__getitem__, boxes[number + 1])
            yield box, block


def copy_volume(
    source: Volume,
    path: str,
    *,
    attributes: Mapping[str, Any] | None = None,
    dtype: Any = None,
    convert: Callable[[np.ndarray, Box], np.ndarray] | None = None,
    memory: int = 512 << 20,
    progress: Progress | None = None,
    **options: Any,
) -> Summary:
    """Write an image (or anything else that is not labels) to another volume.

    Args:
        source: what to copy.
        path: where to; the other options are those of ``create_volume``.
        attributes: added to those of the source.
        dtype: of the new volume; None: that of the source. Values must fit.
        convert: makes what is written from a block and its box, e.g. another range of values.
        memory: bytes of a block; three are in memory at a time.
        progress: called with the number of finished blocks and of all.

    Raises:
        UserError: reading or writing fails, NaN in the source; nothing is left behind then.
    """
    low, high, total, count = math.inf, -math.inf, 0.0, 0
    notes = {**source.attributes, **(attributes or {})}
    made = create_volume(
        path,
        source.shape,
        source.dtype if dtype is None else dtype,
        voxel_size=source.require_voxel_size(),
        offset=source.offset,
        attributes=notes,
        **options,
    )
    with made as out:
        boxes = _boxes(out, source.dtype, memory)
        for done, (box, block) in enumerate(_read_ahead(source, boxes)):
            check_finite(block, source.spec)
            block = block if convert is None else convert(block, box)
            out[box] = block
            low, high = min(low, float(block.min())), max(high, float(block.max()))
            total, count = total + float(block.sum(dtype=np.float64)), count + block.size
            if progress:
                progress(done + 1, len(boxes))
        described = dataclasses.replace(out, complete=True).describe()
    return Summary(described, low, high, mean=total / count)


def _largest_id(source: Volume, memory: int) -> int:
    largest = 0
    for _, block in _read_ahead(source, _boxes(source, source.dtype, memory)):
        largest = max(largest, int(split_ignored(block)[0].max()))
    return largest


def copy_labels(
    source: Volume,
    path: str,
    mask_path: str,
    *,
    attributes: Mapping[str, Any] | None = None,
    dtype: Any = None,
    convert: Callable[[np.ndarray], np.ndarray] | None = None,
    memory: int = 512 << 20,
    progress: Progress | None = None,
    **options: Any,
) -> Summary:
    """Write labels to another volume: special ids become 0, and a mask (1 = ignore) if there are any.

    Args:
        source: integer labels, axes zyx.
        path: where to; the other options are those of ``create_volume``.
        mask_path: where the mask goes.
        attributes: added to those of the source.
        dtype: of the new volume; None: uint32 if all ids fit (a first pass looks), else uint64.
        convert: applied to each block, e.g. a lookup of ids.
        memory: bytes of a block.
        progress: called with the number of finished blocks and of all.

    Raises:
        UserError: no integers, ids that do not fit, reading or writing fails; nothing half-written is left behind.
    """
    source.require_axes("zyx")
    if source.dtype.kind not in "iub":
        raise UserError(f"{source.spec}: labels are integers, found {source.dtype.name}")
    if dtype is None:
        wide = source.dtype.itemsize == 8 and (convert is not None or _largest_id(source, memory) >= 2**32)
        dtype = np.uint64 if wide else np.uint32
    geometry: dict[str, Any] = {"voxel_size": source.require_voxel_size(), "offset": source.offset}
    notes = {**source.attributes, **(attributes or {})}
    shared: dict[str, Any] = {key: options[key] for key in ("overwrite", "format") if key in options}
    mask: Volume | None = None
    low, high, zeros, ignored_count, ids = math.inf, -math.inf, 0, 0, np.zeros(0, np.uint64)
    with create_volume(path, source.shape, dtype, attributes=notes, **geometry, **options) as out:
        boxes = _boxes(out, source.dtype, memory)
        try:
            for done, (box, block) in enumerate(_read_ahead(source, boxes)):
                labels, ignored = split_ignored(block)
                labels = labels if convert is None else convert(labels)
                out[box] = labels
                if ignored.any():
                    if mask is None:
                        mask = create_volume(mask_path, source.shape, np.uint8, **geometry, **shared)
                    mask[box] = ignored
                    ignored_count += int(ignored.sum())
                found = np.unique(labels)
                zeros += int((labels == 0).sum()) - int(ignored.sum())
                found = found[found > 0].astype(np.uint64)
                if found.size:
                    low, high = min(low, float(found[0])), max(high, float(found[-1]))
                    ids = np.union1d(ids, found)
                if progress:
                    progress(done + 1, len(boxes))
        except BaseException as error:
            if mask is not None:
                mask.__exit__(type(error), error, None)
            raise
        if mask is not None:
            mask.__exit__(None, None, None)
        described = dataclasses.replace(out, complete=True).describe()
    size = math.prod(source.shape)
    return Summary(
        described,
        low if ids.size else 0.0,
        high if ids.size else 0.0,
        objects=int(ids.size),
        background=zeros / size,
        ignored=ignored_count / size,
        mask=mask_path if mask is not None else None,
    )


@dataclasses.dataclass(frozen=True)
class _White:
    """Colour or grey images of objects drawn in white, as labels of one id."""

    inner: Source

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape[-3:]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8)

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return self.inner.chunks and self.inner.chunks[-3:]

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self.inner.shards and self.inner.shards[-3:]

    def read(self, box: Box) -> np.ndarray:
        colours = len(self.inner.shape) == 4
        block = self.inner.read((slice(0, self.inner.shape[0]), *box) if colours else box)
        white = block == np.iinfo(block.dtype).max
        return (white.all(axis=0) if colours else white).astype(np.uint8)

    def write(self, box: Box, array: np.ndarray) -> None:
        raise UserError("labels shown as white cannot be written")


def white_as_label(volume: Volume) -> Volume:
    """Where an image is white (all channels at the top of their range), the label 1; elsewhere 0. Axes zyx."""
    if volume.dtype.kind != "u":
        raise UserError(f"{volume.spec}: drawn labels are unsigned images, found {volume.dtype.name}")
    return dataclasses.replace(volume, source=_White(volume.source), axes="zyx", output=None)

"""Where the voxels of a volume come from: the small interface that every format fills in, and the views on top of it.

A source is array-like in the axis order in which it is stored. ``read`` and ``write`` take a box: one ``slice`` with
explicit, in-range ``start`` and ``stop`` and step 1 per stored axis. Sources drop their handles when pickled and open
them again on first use, so that a volume can be sent to another process.
"""

import collections
import dataclasses
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Box = tuple[slice, ...]


class Source(Protocol):
    """An array that is read, and perhaps written, box by box."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Smallest block that is read at once, if there is one."""

    @property
    def shards(self) -> tuple[int, ...] | None:
        """Smallest block that is written at once, if there is one."""

    def read(self, box: Box) -> np.ndarray:
        """The voxels of ``box``, in stored axis order."""

    def write(self, box: Box, array: np.ndarray) -> None:
        """Store ``array`` (of the box's shape) at ``box``."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """What a format reader found: the source, its stored axes and its metadata (nm, z y x).

    ``keep_channel``: written as four axes by emjax, so that a single channel is meant to stay an axis.
    """

    source: Source
    axes: str
    voxel_size: tuple[float, float, float] | None = None
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)
    complete: bool = True
    keep_channel: bool = False


def resolve_index(index: Any, shape: Sequence[int]) -> tuple[Box, tuple[Any, ...]]:
    """Split a NumPy-style index into the box to read and the index to apply to what was read.

    Integers, slices of any step and one ``...`` are understood, with NumPy's meaning of negative and too large numbers.

    Raises:
        IndexError: an index of another kind, too many indices, or an integer out of range.
    """
    items = list(index) if isinstance(index, tuple) else [index]
    if sum(item is Ellipsis for item in items) > 1:
        raise IndexError("an index may hold one ellipsis")
    if any(item is Ellipsis for item in items):
        place = next(i for i, item in enumerate(items) if item is Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    if len(items) > len(shape):
        raise IndexError(f"{len(items)} indices for {len(shape)} axes")
    items += [slice(None)] * (len(shape) - len(items))
    box: list[slice] = []
    after: list[Any] = []
    for item, length in zip(items, shape):
        if isinstance(item, slice):
            picked = range(*item.indices(length))
            low, high = (min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1) if len(picked) else (0, 0)
            box.append(slice(low, high))
            after.append(slice(None, None, picked.step) if len(picked) else slice(None))
        elif hasattr(item, "__index__"):
            number = item.__index__()
            if not -length <= number < length:
                raise IndexError(f"index {number} is out of range for an axis of {length}")
            number %= length
            box.append(slice(number, number + 1))
            after.append(0)
        else:
            raise IndexError(f"cannot index a volume with {type(item).__name__}; use slices and integers")
    return tuple(box), tuple(after)


def box_shape(box: Box) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in box)


def describe_box(box: Box) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in box) + "]"


def whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, length) for length in shape)


@dataclasses.dataclass(frozen=True)
class View:
    """Another source with its axes reordered, cut and dropped.

    Attributes:
        inner: the source behind.
        order: for each axis of the view, the axis of ``inner`` that it shows.
        region: for each axis of ``inner``, the part that is visible; axes that ``order`` lacks must have length 1.
    """

    inner: Source
    order: tuple[int, ...]
    region: Box

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = box_shape(self.region)
        return tuple(sizes[axis] for axis in self.order)

    @property
    def dtype(self) -> np.dtype:
        return self.inner.dtype

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return self.inner.chunks and tuple(self.inner.chunks[axis] for axis in self.order)

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self.inner.shards and tuple(self.inner.shards[axis] for axis in self.order)

    def _box(self, box: Box) -> Box:
        inner = list(self.region)
        for part, axis in zip(box, self.order):
            first = self.region[axis].start
            inner[axis] = slice(first + part.start, first + part.stop)
        return tuple(inner)

    def _dropped(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.region)) if axis not in self.order)

    def read(self, box: Box) -> np.ndarray:
        block = self.inner.read(self._box(box))
        return block.transpose(self.order + self._dropped()).reshape(box_shape(box))

    def write(self, box: Box, array: np.ndarray) -> None:
        dropped = self._dropped()
        expanded = array.reshape(array.shape + (1,) * len(dropped))
        self.inner.write(self._box(box), expanded.transpose(np.argsort(self.order + dropped)))


class InMemory:
    """A whole source held in RAM; read on first use, and read again (not copied) in another process."""

    def __init__(self, inner: Source):
        self.inner = inner
        self.shape, self.dtype, self.chunks, self.shards = inner.shape, inner.dtype, inner.chunks, inner.shards
        self._array: np.ndarray | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["inner"])  # type: ignore[misc]

    def array(self) -> np.ndarray:
        with self._lock:
            if self._array is None:
                self._array = np.ascontiguousarray(self.inner.read(whole(self.shape)))
            return self._array

    def read(self, box: Box) -> np.ndarray:
        return self.array()[box].copy()

    def write(self, box: Box, array: np.ndarray) -> None:
        raise TypeError("a volume cached for reading cannot be written")


class ChunkCache:
    """A source read chunk by chunk, with the most recently used chunks kept in at most ``budget_bytes`` of RAM."""

    def __init__(self, inner: Source, budget_bytes: int):
        self.inner = inner
        self.shape, self.dtype, self.shards = inner.shape, inner.dtype, inner.shards
        self.chunks: tuple[int, ...] = tuple(
            min(c, n) for c, n in zip(inner.chunks or self._default_chunks(inner.shape), inner.shape)
        )
        self.budget_bytes = budget_bytes
        self._clear()

    @staticmethod
    def _default_chunks(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * (len(shape) - 3) + (32, 128, 128)

    def _clear(self) -> None:
        self.held_bytes = 0
        self._chunks: collections.OrderedDict[tuple[int, ...], np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()
        self._loading: dict[tuple[int, ...], threading.Lock] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"inner": self.inner, "budget_bytes": self.budget_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["inner"], state["budget_bytes"])  # type: ignore[misc]

    def _held(self, key: tuple[int, ...]) -> np.ndarray | None:
        with self._lock:
            if key in self._chunks:
                self._chunks.move_to_end(key)
            return self._chunks.get(key)

    def _chunk(self, key: tuple[int, ...]) -> np.ndarray:
        if (held := self._held(key)) is not None:
            return held
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        # One lock per chunk: threads that want the same chunk read it once, others are not held up.
        with loading:
            if (held := self._held(key)) is not None:
                return held
            box = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(key, self.chunks, self.shape))
            block = np.ascontiguousarray(self.inner.read(box))
            with self._lock:
                self._loading.pop(key, None)
                while self._chunks and self.held_bytes + block.nbytes > self.budget_bytes:
                    self.held_bytes -= self._chunks.popitem(last=False)[1].nbytes
                if block.nbytes <= self.budget_bytes:
                    self._chunks[key] = block
                    self.held_bytes += block.nbytes
            return block

    def read(self, box: Box) -> np.ndarray:
        out = np.empty(box_shape(box), self.dtype)
        if not out.size:
            return out
        ranges = [range(part.start // c, math.ceil(part.stop / c)) for part, c in zip(box, self.chunks)]
        for key in itertools.product(*ranges):
            corner = [i * c for i, c in zip(key, self.chunks)]
            block = self._chunk(key)
            low = [max(part.start, start) for part, start in zip(box, corner)]
            high = [min(part.stop, start + size) for part, start, size in zip(box, corner, block.shape)]
            target = tuple(slice(a - part.start, b - part.start) for a, b, part in zip(low, high, box))
            out[target] = block[tuple(slice(a - start, b - start) for a, b, start in zip(low, high, corner))]
        return out

    def write(self, box: Box, array: np.ndarray) -> None:
        raise TypeError("a volume cached for reading cannot be written")

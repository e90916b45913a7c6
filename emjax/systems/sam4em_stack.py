"""SAM4EM over whole volumes: tiles in plane, slices one after the other, memory carried along z.

Every tile has its own memory and its own mask prompt, which begin anew with the volume and go from slab to slab, so that
the length of a slab changes nothing. Probabilities of overlapping tiles are blended. The device holds ``batch`` tiles, the
host the memories of all tiles of a plane and the probabilities of a slab. The published code has no inference.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.models.functional import Collections, Definition
from emjax.systems.protocol import Block, Layer, Slab, Streaming

log = logging.getLogger(__name__)

SCALE = 255
"""Probabilities are stored as whole numbers 0 to this."""
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a volume is cut.

    Attributes:
        tile: pixels (y, x) of a tile at most; planes smaller than that are one tile.
        overlap: pixels (y, x) that neighbouring tiles share at least; blended linearly.
        slab: slices that are encoded at once.
        batch: tiles that are worked on at once.
        multiple: a tile's sides are multiples of this.
    """

    tile: Pair
    overlap: Pair
    slab: int = 8
    batch: int = 1
    multiple: int = 32

    def validate(self) -> None:
        """Raises ``UserError`` for values that cannot work."""
        if any(side < self.multiple or side % self.multiple for side in self.tile):
            raise UserError(f"tiles of {self.tile} (y, x) pixels: expected multiples of {self.multiple}")
        if any(not 0 <= overlap < side for overlap, side in zip(self.overlap, self.tile)):
            raise UserError(f"tiles of {self.tile} pixels overlap by {self.overlap}: expected less than their size")
        if self.slab < 1 or self.batch < 1:
            raise UserError(f"slab {self.slab} and batch {self.batch}: expected 1 or more")


def plan_of(block: Block, multiple: int, batch: int = 1) -> Plan:
    """The plan that a block of prediction says: size and stride in plane, slices of a slab."""
    slab, height, width = block.size
    overlap = (height - block.stride[1], width - block.stride[2])
    return Plan(tile=(height, width), overlap=overlap, slab=slab, batch=batch, multiple=multiple)


def _line(size: int, tile: int, overlap: int, multiple: int) -> tuple[int, list[int]]:
    """Length of tiles along one axis of ``size`` pixels, and their first pixels; the last ends with the axis."""
    length = min(tile, -(-size // multiple) * multiple)
    if size <= length:
        return length, [0]
    starts = list(range(0, size - length, length - overlap))
    return length, [*starts, size - length]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of one size over planes of ``shape`` (y, x), by their first pixels; ``weight`` (y, x) float32 of a tile."""

    shape: Pair
    size: Pair
    starts: tuple[Pair, ...]
    weight: np.ndarray

    def cut(self, slices: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
        """Tiles (z, tile, y, x) of slices (z, y, x), mirrored where they reach out of the plane."""
        margins = [(0, max(0, tile - have)) for tile, have in zip(self.size, self.shape)]
        padded = np.pad(slices, [(0, 0), *margins], mode="symmetric") if any(sum(margins, ())) else slices
        height, width = self.size
        found = (self.starts[number] for number in numbers)
        return np.stack([padded[:, y : y + height, x : x + width] for y, x in found], 1)

    def window(self, number: int) -> tuple[slice, slice]:
        """The part of the plane that a tile covers."""
        return tuple(  # type: ignore[return-value]
            slice(start, min(start + side, have))
            for start, side, have in zip(self.starts[number], self.size, self.shape)
        )


def tiles_of(plan: Plan, shape: Pair) -> Tiles:
    """The tiles of planes of ``shape`` (y, x)."""
    (height, ys), (width, xs) = (
        _line(n, tile, overlap, plan.multiple) for n, tile, overlap in zip(shape, plan.tile, plan.overlap)
    )

    def ramp(side: int, overlap: int) -> np.ndarray:
        place = np.arange(side, dtype=np.float32)
        return np.minimum(np.minimum(place, side - 1 - place) + 1, overlap + 1) / np.float32(overlap + 1)

    weight = np.outer(ramp(height, plan.overlap[0]), ramp(width, plan.overlap[1]))
    return Tiles(shape, (height, width), tuple((y, x) for y in ys for x in xs), weight)


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A network with its variables, and what is asked of it; the functions are pure and take the module first.

    Attributes:
        classes: number of masks.
        definition, collections: the network.
        encode: slices (n, y, x), uint8 or 0..1, to features (n, ...), each by itself.
        start: features (batch, ...) of a first slice, and its masks (batch, y, x, classes) or None, to a state.
        scan: a state, features (z, batch, ...) and the tiles' size (y, x), to the state after them, and probabilities
            (z, batch, y, x, classes).
    """

    classes: int
    definition: Definition
    collections: Collections
    encode: Callable[[Any, jax.Array], jax.Array]
    start: Callable[[Any, jax.Array, jax.Array | None], Any]
    scan: Callable[[Any, Any, jax.Array, Pair], tuple[Any, jax.Array]]


class Stack:
    """One volume: the network, the tiles, and the compiled work on a slab of a group of tiles."""

    def __init__(
        self,
        plan: Plan,
        net: Net,
        read: Callable[[int, int], np.ndarray],
        shape: tuple[int, int, int],
        truth: np.ndarray | None = None,
    ):
        """``read(z0, z1)`` gives slices (z1 - z0, y, x), uint8 or 0..1, of a volume of ``shape``; ``truth`` are the
        masks (y, x, classes) of the first slice, for a network that wants to be prompted with them."""
        plan.validate()
        self.plan, self.net, self.read, self.shape, self.truth = plan, net, read, shape, truth
        self.tiles = tiles_of(plan, (shape[1], shape[2]))
        self.slab = min(plan.slab, shape[0])
        numbers = list(range(len(self.tiles.starts)))
        self._batch = min(plan.batch, len(numbers))
        self.groups = [numbers[i : i + self._batch] for i in range(0, len(numbers), self._batch)]
        self._advance = jax.jit(self._advance_tiles)
        self._start = jax.jit(self._start_tiles)

    def _start_tiles(self, collections: Collections, grey: jax.Array, truth: jax.Array | None) -> Any:
        model = self.net.definition.bind(collections)
        return self.net.start(model, self.net.encode(model, grey), truth)

    def _advance_tiles(self, collections: Collections, state: Any, grey: jax.Array) -> tuple[Any, jax.Array]:
        """Tiles (z, tile, y, x) of a slab: the state after it, and probabilities (z, tile, y, x, classes)."""
        model = self.net.definition.bind(collections)
        features = self.net.encode(model, grey.reshape(-1, *grey.shape[2:]))
        return self.net.scan(model, state, features.reshape(*grey.shape[:2], *features.shape[1:]), self.tiles.size)

    def _filled(self, numbers: Sequence[int]) -> list[int]:
        """A group of tiles filled up to the compiled number."""
        return [*numbers, *[numbers[-1]] * (self._batch - len(numbers))]

    def _first(self, numbers: Sequence[int]) -> tuple[Collections, jax.Array, jax.Array | None]:
        """What the state of a group begins with."""
        grey = jnp.asarray(self.tiles.cut(self.read(0, 1), self._filled(numbers))[0])
        if self.truth is None:
            return self.net.collections, grey, None
        planes = self.tiles.cut(np.moveaxis(self.truth, -1, 0), self._filled(numbers))
        return self.net.collections, grey, jnp.asarray(np.moveaxis(planes, 0, -1), jnp.float32)

    def start(self) -> list[Any]:
        """The states before the first slice, of every group of tiles."""
        return [self._start(*self._first(numbers)) for numbers in self.groups]

    def restored(self, kept: Sequence[Sequence[Any]]) -> list[Any]:
        """States of all groups from the leaves that were kept."""
        form = jax.tree.structure(jax.eval_shape(self._start_tiles, *self._first(self.groups[0])))
        return [jax.tree.unflatten(form, [jnp.asarray(leaf) for leaf in leaves]) for leaves in kept]

    def advance(self, states: Sequence[Any], begin: int) -> tuple[list[Any], np.ndarray]:
        """The slab from slice ``begin`` on: new states, and probabilities (classes, z, y, x) float32."""
        end = min(begin + self.slab, self.shape[0])
        grey = self.read(begin, end)
        # The last slab is filled up, which is without effect on the slices before.
        grey = np.concatenate([grey, np.repeat(grey[-1:], self.slab - len(grey), axis=0)])
        total = np.zeros((self.net.classes, end - begin, *self.shape[1:]), np.float32)
        weights = np.zeros(self.shape[1:], np.float32)
        after = []
        for numbers, state in zip(self.groups, states):
            tiles = jnp.asarray(self.tiles.cut(grey, self._filled(numbers)))
            state, found = self._advance(self.net.collections, state, tiles)
            # Kept on the host: a plane of many tiles has more memory than a device.
            after.append(jax.device_get(state))
            values = np.moveaxis(np.asarray(found)[: end - begin], -1, 0)
            for place, number in enumerate(numbers):
                rows, columns = self.tiles.window(number)
                weight = self.tiles.weight[: rows.stop - rows.start, : columns.stop - columns.start]
                total[:, :, rows, columns] += values[:, :, place, : weight.shape[0], : weight.shape[1]] * weight
                weights[rows, columns] += weight
        return after, total / weights

    def probabilities(self) -> np.ndarray:
        """The whole volume (classes, z, y, x), float32; for volumes that fit into memory."""
        states, parts = self.start(), []
        for begin in range(0, self.shape[0], self.slab):
            states, found = self.advance(states, begin)
            parts.append(found)
        return np.concatenate(parts, 1)


def stored(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities as they are stored, uint8."""
    return np.rint(probabilities * np.float32(SCALE)).astype(np.uint8)


def segment_volume(plan: Plan, net: Net, image: Volume, decode: Callable[[np.ndarray], np.ndarray]) -> Streaming:
    """``labels`` and ``probabilities`` of a volume (z, y, x), uint8 or 0..1, slab by slab.

    ``decode``: labels uint32 (z, y, x) of probabilities (classes, z, y, x) as they are stored, slice by slice.

    Raises:
        UserError: a plan that cannot work.
    """
    plan.validate()
    shape = image.spatial_shape
    tiles = tiles_of(plan, (shape[1], shape[2]))
    if any(side > have for side, have in zip(tiles.size, shape[1:])):
        log.info("slices of %d x %d pixels are padded to %d x %d, and cropped again", *shape[1:], *tiles.size)
    slab = min(plan.slab, shape[0])

    def run(written: Mapping[str, Any], state: Any) -> Iterator[Slab]:
        stack = Stack(plan, net, lambda z0, z1: image[z0:z1], shape)
        begin = 0 if state is None else int(state["slices"])
        states = stack.start() if state is None else stack.restored(state["tiles"])
        for z in range(begin, shape[0], slab):
            states, found = stack.advance(states, z)
            kept = stored(found)
            arrays = [("labels", z, decode(kept)), ("probabilities", z, kept)]
            yield Slab(arrays, {"slices": z + slab, "tiles": [jax.tree.leaves(part) for part in states]})

    return Streaming(
        run=run,
        steps=math.ceil(shape[0] / slab),
        layers={
            "labels": Layer(dtype=np.uint32),
            "probabilities": Layer(dtype=np.uint8, channels=net.classes, attributes={"scale": 1 / SCALE}),
        },
        slab=slab,
    )

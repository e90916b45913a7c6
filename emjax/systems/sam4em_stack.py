"""SAM4EM over whole volumes: tiles in plane, slices one after the other, memory carried along z.

Every tile has its own memory and its own mask prompt, which begin anew with the volume and go from slab to slab, so that
the length of a slab changes nothing. Probabilities of overlapping tiles are blended. The published code has no inference.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.models import sam4em
from emjax.models.functional import Collections, Definition
from emjax.models.sam2.config import STRIDE
from emjax.systems.protocol import Layer, Slab, Streaming

log = logging.getLogger(__name__)

SCALE = 255
"""Probabilities are stored as whole numbers 0 to this."""
Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How a volume is cut.

    Attributes:
        tile: pixels (y, x) of a tile at most, multiples of 32; planes smaller than that are one tile.
        overlap: pixels (y, x) that neighbouring tiles share at least; blended linearly.
        slab: slices that are encoded at once.
        batch: tiles that are worked on at once.
        first_mask: prompt of a volume's first slice: ``"empty"``, or ``"predicted"``, the mask that the first slice gets
            with an empty prompt. (The published evaluation gives it the truth; that is in ``eval/sam4em.py`` alone.)
    """

    tile: Pair = (512, 512)
    overlap: Pair = (128, 128)
    slab: int = 8
    batch: int = 2
    first_mask: Literal["empty", "predicted"] = "empty"

    def validate(self) -> None:
        """Raises ``UserError`` for values that cannot work."""
        if len(self.tile) != 2 or any(side < STRIDE or side % STRIDE for side in self.tile):
            raise UserError(f"stack.tile {self.tile}: expected two multiples of {STRIDE} (y, x)")
        if len(self.overlap) != 2 or any(not 0 <= o < side for o, side in zip(self.overlap, self.tile)):
            raise UserError(f"stack.overlap {self.overlap}: expected from 0 to less than stack.tile {self.tile}")
        if self.slab < 1 or self.batch < 1:
            raise UserError(f"stack.slab {self.slab} and stack.batch {self.batch}: expected 1 or more")
        if self.first_mask not in ("empty", "predicted"):
            raise UserError(f"stack.first_mask {self.first_mask!r}: expected 'empty' or 'predicted'")


def _line(size: int, tile: int, overlap: int) -> tuple[int, list[int]]:
    """Length of tiles along one axis of ``size`` pixels, and their first pixels; the last ends with the axis."""
    length = min(tile, -(-size // STRIDE) * STRIDE)
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
    (height, ys), (width, xs) = (_line(n, tile, o) for n, tile, o in zip(shape, plan.tile, plan.overlap))

    def ramp(side: int, overlap: int) -> np.ndarray:
        place = np.arange(side, dtype=np.float32)
        return np.minimum(np.minimum(place, side - 1 - place) + 1, overlap + 1) / np.float32(overlap + 1)

    weight = np.outer(ramp(height, plan.overlap[0]), ramp(width, plan.overlap[1]))
    return Tiles(shape, (height, width), tuple((y, x) for y in ys for x in xs), weight)


@dataclasses.dataclass(frozen=True, eq=False)
class Net:
    """A network with its variables.

    Attributes:
        config, definition, collections: the network.
        prepare: slices (n, y, x), uint8 or 0..1, to its input (n, y, x, 3).
    """

    config: sam4em.Config
    definition: Definition
    collections: Collections
    prepare: Callable[[jax.Array], jax.Array]


class Stack:
    """One volume: the network, the tiles, and the compiled work on a slab of a group of tiles."""

    def __init__(
        self,
        plan: Plan,
        net: Net,
        read: Callable[[int, int], np.ndarray],
        shape: tuple[int, int, int],
        first: np.ndarray | None = None,
    ):
        """``read(z0, z1)`` gives slices (z1 - z0, y, x), uint8 or 0..1, of a volume of ``shape``; ``first`` is the mask
        (y, x, classes) that prompts the first slice, instead of ``plan.first_mask``."""
        plan.validate()
        self.plan, self.net, self.read, self.shape, self.first = plan, net, read, shape, first
        self.tiles = tiles_of(plan, shape[1:])
        self.slab = min(plan.slab, shape[0])
        batch = min(plan.batch, len(self.tiles.starts))
        numbers = list(range(len(self.tiles.starts)))
        self.groups = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
        self._batch = batch
        self._advance = jax.jit(self._advance_tiles)
        self._start = jax.jit(lambda prompt: self._model(net.collections).initial_state(batch, self.tiles.size, prompt))

    def _model(self, collections: Collections) -> sam4em.SAM4EM:
        return self.net.definition.bind(collections)

    def _advance_tiles(self, collections: Collections, state: Any, grey: jax.Array) -> tuple[Any, jax.Array]:
        """Tiles (z, tile, y, x) of a slab: the state after it, and probabilities (z, tile, y, x, classes)."""
        model = self._model(collections)
        slices, batch = grey.shape[:2]
        features = model.encode(self.net.prepare(grey.reshape(-1, *grey.shape[2:])))
        state, masks = model.scan(state, features.reshape(slices, batch, *features.shape[1:]))
        return state, jax.nn.sigmoid(masks.result(self.net.config))

    def _filled(self, numbers: Sequence[int]) -> list[int]:
        """A group of tiles filled up to the compiled number."""
        return [*numbers, *[numbers[-1]] * (self._batch - len(numbers))]

    def start(self) -> list[Any]:
        """The states before the first slice, of every group of tiles."""
        classes = self.net.config.classes
        states = []
        for numbers in self.groups:
            prompt = np.zeros((self._batch, *self.tiles.size, classes), np.float32)
            if self.first is not None:
                planes = np.moveaxis(np.asarray(self.first, np.float32), -1, 0)
                prompt = np.moveaxis(self.tiles.cut(planes, self._filled(numbers)), 0, -1)
            state = self._start(jnp.asarray(prompt))
            if self.first is None and self.plan.first_mask == "predicted":
                grey = self.tiles.cut(self.read(0, 1), self._filled(numbers))
                after, _ = self._advance(self.net.collections, state, jnp.asarray(grey))
                state = self._start(after.prompt)
            states.append(state)
        return states

    def advance(self, states: Sequence[Any], begin: int) -> tuple[list[Any], np.ndarray]:
        """The slab from slice ``begin`` on: new states, and probabilities (classes, z, y, x) float32."""
        end = min(begin + self.slab, self.shape[0])
        grey = self.read(begin, end)
        # The last slab is filled up, which is without effect on the slices before.
        grey = np.concatenate([grey, np.repeat(grey[-1:], self.slab - len(grey), axis=0)])
        total = np.zeros((self.net.config.classes, end - begin, *self.shape[1:]), np.float32)
        weights = np.zeros(self.shape[1:], np.float32)
        after = []
        for numbers, state in zip(self.groups, states):
            tiles = jnp.asarray(self.tiles.cut(grey, self._filled(numbers)))
            state, found = self._advance(self.net.collections, state, tiles)
            after.append(state)
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


def classes_of(probabilities: np.ndarray, threshold: float = 0.5, values: Sequence[int] | None = None) -> np.ndarray:
    """Labels uint32 (z, y, x) from probabilities (classes, z, y, x), uint8 or 0..1: the class with the largest, where it
    is above ``threshold``, else 0. ``values`` are the label values of the classes; 1, 2, ... if None."""
    lut = np.asarray([0, *(range(1, len(probabilities) + 1) if values is None else values)], np.uint32)
    limit = threshold * SCALE if probabilities.dtype == np.uint8 else threshold
    best = probabilities.argmax(0)
    return lut[np.where(probabilities.max(0) > limit, best + 1, 0)]


def segment_volume(
    plan: Plan, net: Net, image: Volume, *, threshold: float = 0.5, values: Sequence[int] | None = None
) -> Streaming:
    """``labels`` and ``probabilities`` of a volume (z, y, x), uint8 or 0..1, slab by slab.

    Raises:
        UserError: a plan that cannot work.
    """
    plan.validate()
    shape = image.spatial_shape
    tiles = tiles_of(plan, shape[1:])
    if any(side > have for side, have in zip(tiles.size, shape[1:])):
        log.info("slices of %d x %d pixels are padded to %d x %d, and cropped again", *shape[1:], *tiles.size)
    slab = min(plan.slab, shape[0])

    def run(written: Mapping[str, Any], state: Any) -> Iterator[Slab]:
        stack = Stack(plan, net, lambda z0, z1: image[z0:z1], shape)
        states = stack.start()
        begin = 0
        if state is not None:
            begin = int(state["slices"])
            form = jax.tree.structure(states[0])
            states = [jax.tree.unflatten(form, [jnp.asarray(leaf) for leaf in kept]) for kept in state["tiles"]]
        for z in range(begin, shape[0], slab):
            states, found = stack.advance(states, z)
            kept = stored(found)
            labels = classes_of(kept, threshold, values)
            arrays = [("labels", z, labels), ("probabilities", z, kept)]
            yield Slab(arrays, {"slices": z + slab, "tiles": [jax.tree.leaves(part) for part in states]})

    return Streaming(
        run=run,
        steps=math.ceil(shape[0] / slab),
        layers={
            "labels": Layer(dtype=np.uint32),
            "probabilities": Layer(dtype=np.uint8, channels=net.config.classes, attributes={"scale": 1 / SCALE}),
        },
        slab=slab,
    )

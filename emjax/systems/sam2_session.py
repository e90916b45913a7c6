"""SAM 2 at work on images and stacks: compiled steps, single images, and interactive sessions with corrections."""

import dataclasses
import functools
import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import scipy.ndimage

from emjax.errors import UserError
from emjax.models.functional import Collections, define
from emjax.models.layers.resize import resize
from emjax.models.sam2.config import SAM2Config, check_size
from emjax.models.sam2.model import NO_OBJECT, SAM2, Features, Heads
from emjax.models.sam2.neck import grey_input
from emjax.models.sam2.stack import (
    BACKWARD,
    FORWARD,
    Memory,
    Tracked,
    TrackOptions,
    bank,
    empty_memory,
    prompt_points,
    propagate,
    remembered,
)


def normalised(grey: jax.Array) -> jax.Array:
    """Slices (n, h, w), uint8 or 0..1 float, as the network's input (n, h, w, 3) float32.

    Raises :class:`UserError` for other integers, which need a window first.
    """
    if grey.dtype == jnp.uint8:
        grey = grey.astype(jnp.float32) / 255
    elif not jnp.issubdtype(grey.dtype, jnp.floating):
        raise UserError(f"slices are {grey.dtype}; expected uint8, or a window of grey values (--window LOW,HIGH)")
    return grey_input(grey)


def fill_holes(logits: np.ndarray, most: int) -> np.ndarray:
    """Background parts (8-connected) of at most ``most`` pixels get the logit 0.1, in each (h, w) of ``logits``."""
    if most < 1:
        return logits
    filled = np.array(logits)
    for plane in filled.reshape(-1, *logits.shape[-2:]):
        parts, _ = scipy.ndimage.label(plane <= 0, np.ones((3, 3)))
        small = np.bincount(parts.ravel()) <= most
        small[0] = False
        plane[small[parts]] = 0.1
    return filled


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """A SAM 2 with its weights and its compiled steps. All arrays in and out are as in ``emjax.models.sam2``."""

    config: SAM2Config
    variables: Collections
    options: TrackOptions = TrackOptions()

    @functools.cached_property
    def _definition(self):
        return define(lambda rngs: SAM2(self.config, rngs))

    def compiled(self, function: Callable) -> Callable:
        """``function(model, *arrays)`` compiled, with this network's variables bound."""
        run = jax.jit(lambda variables, *arrays: function(self._definition.bind(variables), *arrays))
        return lambda *arrays: run(self.variables, *arrays)

    @functools.cached_property
    def encode(self) -> Callable[[jax.Array], Features]:
        """Slices (n, H, W), uint8 or 0..1, to features."""
        return self.compiled(lambda model, grey: model.encode(normalised(grey)))

    @functools.cached_property
    def click(self) -> Callable[..., Heads]:
        """(features, points, labels, previous or None) to heads, without memory."""

        def run(model, features, points, labels, previous):
            return prompt_points(model, self.options, features, points, labels, previous=previous)

        return self.compiled(run)

    @functools.cached_property
    def correct(self) -> Callable[..., Heads]:
        """(features, points, labels, previous, memory, z, direction, slices) to heads, with memory."""

        def run(model, features, points, labels, previous, memory, z, direction, slices):
            recalled = model.recall(features, bank(model, self.options, memory, z, direction, slices))
            return prompt_points(model, self.options, features, points, labels, recalled=recalled, previous=previous)

        return self.compiled(run)

    @functools.cached_property
    def take_mask(self) -> Callable[[Features, jax.Array], Heads]:
        """(features, masks (n, H, W)) to heads."""
        return self.compiled(lambda model, features, masks: model.take_mask(features, masks)[0])

    @functools.cached_property
    def remember_prompted(self) -> Callable[[Features, Heads], Tracked]:
        """(features, heads) of a prompted slice to what is remembered of it."""
        return self.compiled(
            lambda model, features, heads: remembered(model, self.options, features, heads, prompted=True)
        )

    @functools.cached_property
    def _propagate(self) -> dict[bool, Callable]:
        def run(keep, model, memory, features, order, start, direction, slices):
            return propagate(model, self.options, memory, features, order, start, direction, slices, keep)

        return {keep: self.compiled(functools.partial(run, keep)) for keep in (False, True)}

    def propagate(self, *arguments: Any, keep: bool = False) -> tuple[Memory, Tracked]:
        """(memory, features, order, start, direction, slices) as :func:`emjax.models.sam2.stack.propagate`."""
        return self._propagate[keep](*arguments)

    def empty_memory(self, objects: int, conditioning: int, grid: tuple[int, int]) -> Memory:
        return empty_memory(self._definition.bind(self.variables), self.options, objects, conditioning, grid)


def padded_count(conditioning: int) -> int:
    """Places for conditioning slices in powers of two, so that few shapes are compiled."""
    return 1 << max(0, conditioning - 1).bit_length()


def points_for_network(
    points: np.ndarray, labels: np.ndarray, box: np.ndarray | None, size: tuple[int, int], given: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Points (m, 2) and a box (4,), rows before columns in pixels of an image of size ``given``, as the network takes
    them: (1, m, 2) x, y in pixels of its input of size ``size``, a box as two points ahead, and labels (1, m)."""
    points, labels = np.reshape(points, (-1, 2)).astype(np.float32), np.reshape(labels, -1).astype(np.int32)
    if box is not None:
        points = np.concatenate([np.reshape(box, (2, 2)).astype(np.float32), points])
        labels = np.concatenate([np.asarray([2, 3], np.int32), labels])
    unit = points[:, ::-1] / np.asarray(given[::-1], np.float32)
    return (unit * np.asarray(size[::-1], np.float32))[None], labels[None]


def mask_for_network(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A binary mask (rows, columns) at the network's input size, by antialiased resampling and a threshold of 0.5."""
    mask = np.asarray(mask, bool).astype(np.float32)
    return np.asarray(resize(jnp.asarray(mask), size, axes=(0, 1), antialias=True)) >= 0.5


class ImagePredictor:
    """Prompts on one image, resized to the network's input (no padding), as SAM 2's image predictor does."""

    def __init__(self, network: Network, image: np.ndarray, size: tuple[int, int] = (1024, 1024)):
        """``image`` (rows, columns) uint8 or 0..1. Raises ``ValueError`` for a size that is no multiple of 32."""
        check_size(*size)
        self.network, self.size, self.shape = network, size, image.shape

        def encode(model, grey):
            grey = grey.astype(jnp.float32) / 255 if grey.dtype == jnp.uint8 else grey
            images = normalised(resize(grey[None], size, axes=(1, 2), antialias=True))
            return images, model.encode(images)

        self.input, self.features = network.compiled(encode)(jnp.asarray(image))
        self._predict = {several: network.compiled(functools.partial(self._run, several)) for several in (False, True)}

    def _run(self, several, model, features, points, labels, mask):
        return model.predict_masks(
            model.without_memory(features),
            features,
            None if points is None else (points, labels),
            mask,
            several=several,
            stability_threshold=self.network.options.stability_threshold,
            stability_delta=self.network.options.stability_delta,
            hide_absent=False,
        )

    def predict(
        self,
        points: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        box: np.ndarray | None = None,
        mask: np.ndarray | None = None,
        several: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Logits (k, rows, columns), predicted IoUs (k,), low-resolution logits (k, h / 4, w / 4) limited to +-32.

        ``points`` (m, 2) row, column with ``labels`` (m,); ``box`` row, column, row, column; ``mask`` low-resolution
        logits of a former call. k is 3, or 1 with ``several=False``. Raises :class:`UserError` without any prompt.
        """
        if points is None and box is None and mask is None:
            raise UserError("no prompt is given; expected points, a box, or a mask")
        given: tuple[Any, Any] = (None, None)
        if points is not None or box is not None:
            clicks = np.zeros((0, 2)) if points is None else np.asarray(points)
            marks = np.ones(len(clicks)) if labels is None else np.asarray(labels)
            given = points_for_network(clicks, marks, box, self.size, self.shape)
        heads = self._predict[several](self.features, *given, None if mask is None else jnp.asarray(mask)[None])
        logits = resize(heads.candidates[0], self.shape, axes=(-2, -1))
        return np.asarray(logits), np.asarray(heads.ious[0]), np.clip(np.asarray(heads.candidates[0]), -32, 32)


@dataclasses.dataclass
class Record:
    """What is known of one object on one slice."""

    low: np.ndarray
    pointer: np.ndarray
    score: float
    iou: float
    features: np.ndarray | None = None


def conditioning_memory(
    network: Network, grid: tuple[int, int], prompted: Sequence[Mapping[int, Record]], places: int
) -> Memory:
    """The memory of objects with given conditioning slices (by slice number) and nothing recent."""
    memory = jax.tree.map(np.array, network.empty_memory(len(prompted), places, grid))
    for row, records in enumerate(prompted):
        for place, (z, record) in enumerate(records.items()):
            memory.prompted[row, place] = z
            memory.prompted_features[row, place] = record.features
            memory.prompted_pointers[row, place] = record.pointer
            memory.prompted_low[row, place] = record.low
            memory.prompted_scores[row, place] = record.score
    return jax.tree.map(jnp.asarray, memory)


class _Trail:
    """Records of one object on the slices of a stack, on disk, so that memory does not grow with the stack."""

    def __init__(self, folder: pathlib.Path, name: str, grid: tuple[int, int], features: int, pointer: int):
        self._shape, self._low = (*grid, features), (4 * grid[0], 4 * grid[1])
        self._sizes = [2 * int(np.prod(self._shape)), 4 * int(np.prod(self._low)), 4 * pointer, 8]
        self._file = os.open(folder / name, os.O_RDWR | os.O_CREAT)
        self.slices: set[int] = set()

    def __setitem__(self, z: int, record: Record) -> None:
        assert record.features is not None
        parts = [
            np.asarray(record.features).astype(ml_dtypes.bfloat16),
            np.asarray(record.low, np.float32),
            np.asarray(record.pointer, np.float32),
            np.asarray([record.score, record.iou], np.float32),
        ]
        os.pwrite(self._file, b"".join(part.tobytes() for part in parts), z * sum(self._sizes))
        self.slices.add(z)

    def __getitem__(self, z: int) -> Record:
        data = os.pread(self._file, sum(self._sizes), z * sum(self._sizes))
        cuts = np.cumsum([0, *self._sizes])
        parts = [data[a:b] for a, b in itertools.pairwise(cuts)]
        score, iou = np.frombuffer(parts[3], np.float32)
        features = np.frombuffer(parts[0], ml_dtypes.bfloat16).reshape(self._shape)
        low = np.frombuffer(parts[1], np.float32).reshape(self._low)
        return Record(low, np.frombuffer(parts[2], np.float32), float(score), float(iou), features)

    def discard(self, z: int) -> None:
        self.slices.discard(z)

    def close(self) -> None:
        os.close(self._file)


@dataclasses.dataclass
class _Object:
    """``prompted``: conditioning slices; ``tracked``: the others; ``pending``: prompts not yet in the memory, with
    whether they become conditioning slices; ``points``: clicks by slice; ``direction``: how a slice was tracked."""

    tracked: _Trail
    prompted: dict[int, Record] = dataclasses.field(default_factory=dict)
    pending: dict[int, tuple[Heads, bool]] = dataclasses.field(default_factory=dict)
    points: dict[int, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    direction: dict[int, int] = dataclasses.field(default_factory=dict)


class Session:
    """An interactive run over a stack: prompts on any slice, propagation either way, corrections, any order.

    A slice that gets a prompt before it was tracked is a conditioning slice. A correction of a tracked slice becomes
    one as well, so that it sticks; with ``corrections_stick=False`` the next propagation over it loses it, as the
    reference does by default. Slices are read one by one; what is known of tracked slices is kept in a temporary
    folder, so that memory is bounded by the number of objects and prompts, whatever the length of the stack.
    """

    def __init__(
        self,
        network: Network,
        read: Callable[[int], np.ndarray],
        slices: int,
        size: tuple[int, int],
        shape: tuple[int, int] | None = None,
        *,
        corrections_stick: bool = True,
        holes: int = 8,
        folder: str | pathlib.Path | None = None,
    ):
        """``read(z)`` gives a slice at the network's input ``size``, uint8 or 0..1; ``shape``: rows and columns of the
        volume (by default ``size``), in which prompts and results are; ``holes``: background parts up to this many
        low-resolution pixels are filled. Raises ``ValueError`` for a size that is no multiple of 32."""
        check_size(*size)
        self.network, self.slices, self.size, self.shape = network, slices, size, shape or size
        self.corrections_stick, self.holes = corrections_stick, holes
        self.grid = size[0] // 16, size[1] // 16
        self._read = read
        self._objects: dict[int, _Object] = {}
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="emjax-session-")
        self._folder = pathlib.Path(self._temporary.name if self._temporary else str(folder))
        self._last: tuple[int, Features] | None = None

    def close(self) -> None:
        """Removes the temporary folder."""
        for one in self._objects.values():
            one.tracked.close()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def objects(self) -> list[int]:
        """Ids in the order of the results."""
        return list(self._objects)

    def _features(self, z: int) -> Features:
        if self._last is None or self._last[0] != z:
            self._last = z, self.network.encode(jnp.asarray(self._read(z))[None])
        return self._last[1]

    def _object(self, number: int, z: int) -> _Object:
        if not 0 <= z < self.slices:
            raise UserError(f"a prompt of object {number} is on slice {z}; the stack has slices 0 to {self.slices - 1}")
        if number not in self._objects:
            config = self.network.config
            trail = _Trail(self._folder, f"object{number}", self.grid, config.memory_features, config.features)
            self._objects[number] = _Object(trail)
        return self._objects[number]

    def _known(self, one: _Object, z: int) -> np.ndarray | None:
        """The object's latest low-resolution logits on a slice."""
        if z in one.pending:
            return np.asarray(one.pending[z][0].low[0])
        if z in one.prompted:
            return one.prompted[z].low
        return one.tracked[z].low if z in one.tracked.slices else None

    def _memory(self, numbers: list[int], z: int, direction: int) -> Memory:
        """The fixed-size memory of objects as they reach slice ``z``."""
        objects = [self._objects[number] for number in numbers]
        places = padded_count(max((len(one.prompted) for one in objects), default=1))
        memory = conditioning_memory(self.network, self.grid, [one.prompted for one in objects], places)
        memory = jax.tree.map(np.array, memory)
        for row, one in enumerate(objects):
            reach = max(memory.recent.shape[1], memory.pointed.shape[1])
            for distance in range(1, reach + 1):
                behind = z - direction * distance
                if behind not in one.tracked.slices:
                    continue
                record = one.tracked[behind]
                if distance <= memory.recent.shape[1]:
                    place = behind % memory.recent.shape[1]
                    memory.recent[row, place], memory.recent_features[row, place] = behind, record.features
                if distance <= memory.pointed.shape[1]:
                    place = behind % memory.pointed.shape[1]
                    memory.pointed[row, place], memory.pointers[row, place] = behind, record.pointer
        return jax.tree.map(jnp.asarray, memory)

    def _hold(self, one: _Object, z: int, heads: Heads, conditioning: bool) -> None:
        low = fill_holes(np.asarray(heads.low), self.holes)
        one.pending[z] = heads._replace(low=jnp.asarray(low)), conditioning

    def add_points(
        self,
        number: int,
        z: int,
        points: np.ndarray,
        labels: np.ndarray,
        box: np.ndarray | None = None,
        *,
        keep_points: bool = False,
    ) -> np.ndarray:
        """Clicks (m, 2) row, column with labels (m,) 1 inside, 0 outside, and a box (row, column, row, column).

        ``keep_points`` adds to the clicks that the slice already has. Returns the logits (objects, rows, columns) of
        slice ``z``. Raises :class:`UserError` for a slice or a point outside of the stack, or without any prompt.
        """
        points, labels = np.reshape(points, (-1, 2)), np.reshape(labels, -1)
        check_points(number, z, points, labels, box, self.shape)
        one = self._object(number, z)
        given = points_for_network(points, labels, box, self.size, self.shape)
        if keep_points and z in one.points:
            given = tuple(np.concatenate(pair, axis=1) for pair in zip(one.points[z], given))  # type: ignore[assignment]
        one.points[z] = given
        features, known = self._features(z), self._known(one, z)
        previous = None if known is None else jnp.asarray(known)[None]
        if z in one.direction:
            memory = self._memory([number], z, one.direction[z])
            heads = self.network.correct(features, *given, previous, memory, z, one.direction[z], self.slices)
        else:
            heads = self.network.click(features, *given, previous)
        self._hold(one, z, heads, z not in one.direction or self.corrections_stick)
        return self.logits(z)

    def add_mask(self, number: int, z: int, mask: np.ndarray) -> np.ndarray:
        """A binary mask (rows, columns) as the object's result on slice ``z``; returns logits as :meth:`add_points`."""
        if mask.shape != self.shape:
            raise UserError(f"the mask of object {number} on slice {z} is {mask.shape}; slices are {self.shape}")
        one = self._object(number, z)
        one.points.pop(z, None)
        heads = self.network.take_mask(self._features(z), jnp.asarray(mask_for_network(mask, self.size))[None])
        self._hold(one, z, heads, z not in one.direction or self.corrections_stick)
        return self.logits(z)

    def logits(self, z: int) -> np.ndarray:
        """Mask logits (objects, rows, columns) of a slice; -1024 where an object is not known."""
        known = [self._known(one, z) for one in self._objects.values()]
        empty = np.full((4 * self.grid[0], 4 * self.grid[1]), NO_OBJECT, np.float32)
        low = np.stack([empty if logits is None else logits for logits in known])
        return np.asarray(resize(jnp.asarray(low), self.shape, axes=(-2, -1)))

    def record(self, number: int, z: int) -> tuple[float, np.ndarray]:
        """Object score and pointer of a slice that was prompted or tracked. Raises ``KeyError`` for another."""
        one = self._objects[number]
        if z not in one.prompted and z not in one.tracked.slices:
            raise KeyError((number, z))
        known = one.prompted[z] if z in one.prompted else one.tracked[z]
        return known.score, known.pointer

    def _settle(self) -> None:
        """Makes memories of the prompts since the last propagation."""
        for one in self._objects.values():
            for z, (heads, conditioning) in one.pending.items():
                made = self.network.remember_prompted(self._features(z), heads)
                record = Record(
                    np.asarray(heads.low[0]),
                    np.asarray(made.pointer[0]),
                    float(made.score[0]),
                    float(made.iou[0]),
                    np.asarray(made.features[0].astype(self.network.options.memory_dtype)),
                )
                if conditioning:
                    one.prompted[z] = record
                    one.tracked.discard(z)
                else:
                    one.tracked[z] = record
            one.pending.clear()

    def propagate(
        self, start: int | None = None, direction: int = FORWARD, most: int | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Tracks all objects from slice ``start`` (default: the first conditioning slice) on; yields (z, logits).

        ``most`` slices beyond the first at most. Raises :class:`UserError` before any prompt was given.
        """
        if direction not in (FORWARD, BACKWARD):
            raise ValueError(f"direction is {direction}; expected {FORWARD} (forward) or {BACKWARD} (backward)")
        self._settle()
        bare = [number for number, one in self._objects.items() if not one.prompted]
        if bare or not self._objects:
            raise UserError(f"no prompt is given for {'any object' if not self._objects else f'objects {bare}'}")
        if start is None:
            start = min(z for one in self._objects.values() for z in one.prompted)
        last = self.slices - 1 if direction > 0 else 0
        end = last if most is None else int(np.clip(start + direction * most, 0, self.slices - 1))
        numbers = self.objects
        memory = self._memory(numbers, start, direction)
        everywhere = np.full(len(numbers), start, np.int32)
        for z in range(start, end + direction, direction):
            memory, found = self.network.propagate(
                memory, self._features(z), np.asarray([z], np.int32), everywhere, direction, self.slices, keep=True
            )
            for row, number in enumerate(numbers):
                one = self._objects[number]
                one.direction[z] = direction
                if z not in one.prompted:
                    one.tracked[z] = Record(
                        fill_holes(np.asarray(found.low[0, row]), self.holes),
                        np.asarray(found.pointer[0, row]),
                        float(found.score[0, row]),
                        float(found.iou[0, row]),
                        np.asarray(found.features[0, row].astype(self.network.options.memory_dtype)),
                    )
            yield z, self.logits(z)


def check_points(
    number: int, z: int, points: np.ndarray, labels: np.ndarray, box: np.ndarray | None, shape: tuple[int, int]
) -> None:
    """Raises :class:`UserError` unless points and box lie inside the slice, labels fit, and there is at least one."""
    where = f"object {number} on slice {z}"
    if len(points) == 0 and box is None:
        raise UserError(f"{where} has neither a point nor a box")
    if len(points) != len(labels):
        raise UserError(f"{where} has {len(points)} points and {len(labels)} labels")
    if not set(np.asarray(labels).tolist()) <= {0, 1}:
        raise UserError(
            f"{where} has labels {sorted(set(np.asarray(labels).tolist()))}; expected 1 (inside), 0 (outside)"
        )
    corners = np.zeros((0, 2)) if box is None else np.reshape(box, (2, 2))
    for row, column in [*np.reshape(points, (-1, 2)), *corners]:
        if not (0 <= row <= shape[0] and 0 <= column <= shape[1]):
            raise UserError(
                f"{where} has a prompt at row {row:g}, column {column:g}; slices have {shape[0]} rows and "
                f"{shape[1]} columns"
            )
    if box is not None and not (corners[0] < corners[1]).all():
        raise UserError(
            f"{where} has the box {np.ravel(box).tolist()}; expected row, column, row, column, smaller first"
        )

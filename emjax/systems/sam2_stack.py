"""Objects followed through a stack by SAM 2, from prompts on any slices: labels out, in one pass each way.

Slices are streamed from the volume, encoded in batches, and tracked under ``lax.scan`` with a memory of fixed size, so
that peak memory depends on the size of a slice and the number of objects, not on the length of the stack.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.models.functional import Collections, initialise
from emjax.models.layers.resize import resize
from emjax.models.sam2.config import STRIDE, SAM2Config, sam2_config
from emjax.models.sam2.model import SAM2, Features
from emjax.models.sam2.stack import BACKWARD, EMPTY, FORWARD, Memory, TrackOptions
from emjax.systems.protocol import Layer, Slab, Streaming, unit_grey
from emjax.systems.sam2_prompts import Prompt, check_prompts, from_layer, read_json
from emjax.systems.sam2_session import (
    Network,
    Record,
    conditioning_memory,
    fill_holes,
    mask_for_network,
    normalised,
    padded_count,
    points_for_network,
)
from emjax.weights.family import read_checkpoint
from emjax.weights.sam2 import FAMILY, config_of

log = logging.getLogger(__name__)

Read = Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tracking through a stack.

    Attributes:
        checkpoint: SAM 2 weights, official, Hugging Face, safetensors or Orbax; "" draws random ones from ``seed``,
            whose masks mean nothing.
        size, version: of the network; "" takes the checkpoint's, or tiny 2.1 of a random one.
        seed: of random weights.
        dtype: of activations, "float32" or "bfloat16".
        prompts: JSON file, or a volume of labels whose objects are followed.
        prompt_slices: slices of the label volume that are prompts; () takes each object where it is largest.
        input_size: rows and columns that slices are resized to, multiples of 32; (0, 0) pads them instead. The
            published weights were trained at (1024, 1024).
        batch: slices encoded and tracked per step.
        objects: objects tracked at once.
        reference_order: track every object from the earliest prompted slice of all, as the reference does, instead of
            each from its own first.
        holes: background parts up to this many low-resolution pixels are filled; 0 switches it off.
        threshold: logit above which a pixel is the object's.
        tracking: how memories are chosen and made.
    """

    checkpoint: str = ""
    size: Literal["", "tiny", "small", "base_plus", "large"] = ""
    version: Literal["", "2.0", "2.1"] = ""
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompts: str = ""
    prompt_slices: tuple[int, ...] = ()
    input_size: tuple[int, int] = (1024, 1024)
    batch: int = 4
    objects: int = 16
    reference_order: bool = False
    holes: int = 8
    threshold: float = 0.0
    tracking: TrackOptions = TrackOptions()


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    if any(n < 0 or n % STRIDE for n in config.input_size) or (0 in config.input_size and any(config.input_size)):
        raise UserError(
            f"input_size {config.input_size}: both must be multiples of {STRIDE}, or (0, 0) to pad slices to the next"
        )
    for name in ("batch", "objects"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} {getattr(config, name)}: expected at least 1")
    if config.holes < 0:
        raise UserError(f"holes {config.holes}: expected 0 or more")


def build(config: Config, rngs: nnx.Rngs) -> SAM2:
    """The network that the configuration names (of a checkpoint: :func:`network`)."""
    return SAM2(_sizes(config), rngs)


def _sizes(config: Config) -> SAM2Config:
    return sam2_config(config.size or "tiny", config.version or "2.1", dtype=config.dtype)


def network(config: Config, collections: Collections | None = None) -> Network:
    """The network with ``collections``, or the weights that the configuration names.

    Raises ``UserError`` for a checkpoint that is not wholly a SAM 2.
    """
    if collections is not None:
        return Network(_sizes(config), collections, config.tracking)
    if config.checkpoint:
        checkpoint = read_checkpoint(config.checkpoint, [FAMILY])
        for name in ("size", "version"):
            asked, found = getattr(config, name), checkpoint.settings[name]
            if asked and asked != found:
                raise UserError(f"{config.checkpoint} is of {name} {found}, but {name}={asked} is asked for")
        made: SAM2Config = config_of(checkpoint.settings, dtype=config.dtype)
        if made.image_only:
            raise UserError(f"{config.checkpoint} is for single images only: it has no memory, which a stack needs")
        return Network(made, jax.tree.map(jnp.asarray, checkpoint.collections), config.tracking)
    log.warning("no checkpoint is given: the weights are random and the masks mean nothing")
    made = _sizes(config)
    # Not compiled as a whole: hundreds of random draws in one program take minutes to compile.
    variables = initialise(lambda rngs: SAM2(made, rngs), jax.random.key(config.seed))
    return Network(made, variables, config.tracking)


@dataclasses.dataclass(frozen=True)
class Frame:
    """How slices of ``shape`` (rows, columns) become inputs of ``size``: resized, or padded at the bottom and right."""

    shape: tuple[int, int]
    size: tuple[int, int]
    padded: bool

    @property
    def extent(self) -> tuple[int, int]:
        """The part of the input's plane that prompts and masks refer to, in volume pixels."""
        return self.size if self.padded else self.shape

    def fit(self, grey: jax.Array) -> jax.Array:
        """Slices (n, rows, columns), uint8 or 0..1, at the network's size, 0..1 float32."""
        unit = unit_grey(grey)
        if self.padded:
            margins = [(0, 0), *((0, size - n) for size, n in zip(self.size, self.shape))]
            return jnp.pad(unit, margins, mode="edge")
        return resize(unit, self.size, axes=(1, 2), antialias=True)

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """A binary mask of the volume at the network's size."""
        margins = [(0, extent - n) for extent, n in zip(self.extent, self.shape)]
        return mask_for_network(np.pad(mask, margins), self.size)


def frame_of(config: Config, shape: tuple[int, int]) -> Frame:
    if any(config.input_size):
        return Frame(shape, config.input_size, padded=False)
    return Frame(shape, (-(-shape[0] // STRIDE) * STRIDE, -(-shape[1] // STRIDE) * STRIDE), padded=True)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """In what order slices are tracked: backward, then forward, in pieces of at most ``batch`` slices.

    ``first``: by object, the slice from which it is followed both ways; ``slices``: length of the stack.
    """

    first: Mapping[int, int]
    slices: int
    batch: int

    @property
    def overlap(self) -> range:
        """Slices that both passes reach."""
        return range(min(self.first.values()), max(self.first.values()))

    def parts(self, direction: int) -> list[range]:
        """The slices of a pass, ascending, in pieces cut at multiples of ``batch``; the pieces in the pass's order."""
        overlap, batch = self.overlap, self.batch
        begin, end = (overlap.start, self.slices) if direction > 0 else (0, overlap.stop)
        cuts = range(begin // batch * batch, end, batch)
        pieces = [range(max(begin, cut), min(end, cut + batch)) for cut in cuts]
        return pieces if direction > 0 else pieces[::-1]

    @property
    def steps(self) -> list[tuple[int, range]]:
        """Direction and slices of each piece."""
        return [(direction, part) for direction in (BACKWARD, FORWARD) for part in self.parts(direction)]


def schedule_of(config: Config, prompts: Sequence[Prompt], slices: int) -> Schedule:
    """Every object from its first prompted slice on, or all from the first of all (``config.reference_order``)."""
    numbers = sorted({prompt.number for prompt in prompts})
    first = {n: min(p.z for p in prompts if p.number == n) for n in numbers}
    if config.reference_order:
        first = dict.fromkeys(numbers, min(first.values()))
    return Schedule(first, slices, config.batch)


class Tracker:
    """One run: the network, the geometry, and the objects in groups that are tracked at once."""

    def __init__(
        self, config: Config, net: Network, read: Read, shape: tuple[int, int, int], prompts: Sequence[Prompt]
    ):
        """``read(z0, z1)`` gives slices (z1 - z0, rows, columns), uint8 or 0..1, of a stack of ``shape`` (z, y, x)."""
        validate(config)
        check_prompts(prompts, shape, "the list of prompts")
        self.config, self.net, self.read, self.shape = config, net, read, shape
        self.frame = frame_of(config, shape[1:])
        self.schedule = schedule_of(config, prompts, shape[0])
        self.first = self.schedule.first
        self.numbers = list(self.first)
        self._encode = net.compiled(lambda model, grey: model.encode(normalised(self.frame.fit(grey))))
        self._paint = jax.jit(self._paint_objects)
        records = self._prompted(prompts)
        self.groups = [self.numbers[i : i + config.objects] for i in range(0, len(self.numbers), config.objects)]
        # Groups of one shape share one compiled step: the last one is filled up with objects that are never active.
        places = padded_count(max(len(found) for found in records.values()))
        width = min(config.objects, len(self.numbers))
        grid = self.frame.size[0] // 16, self.frame.size[1] // 16
        self.start_memories = [
            conditioning_memory(
                net, grid, [*(records[n] for n in group), *({} for _ in range(width - len(group)))], places
            )
            for group in self.groups
        ]

    def _prompted(self, prompts: Sequence[Prompt]) -> dict[int, dict[int, Record]]:
        """Every object's conditioning slices, prompts of one kind on one slice batched."""
        found: dict[int, dict[int, Record]] = {number: {} for number in self.numbers}
        for z in sorted({prompt.z for prompt in prompts}):
            features = self._encode(jnp.asarray(self.read(z, z + 1)))
            kinds: dict[Any, list[Prompt]] = {}
            for prompt in (p for p in prompts if p.z == z):
                kind = "mask" if prompt.mask else (len(prompt.points), prompt.box is not None)
                kinds.setdefault(kind, []).append(prompt)
            for kind, alike in kinds.items():
                for i in range(0, len(alike), self.config.objects):
                    part = alike[i : i + self.config.objects]
                    for prompt, record in zip(part, self._answer(features, kind, part)):
                        found[prompt.number][z] = record
        return found

    def _answer(self, features: Features, kind: Any, prompts: Sequence[Prompt]) -> list[Record]:
        spare = padded_count(len(prompts)) - len(prompts)
        filled = [*prompts, *[prompts[-1]] * spare]
        if kind == "mask":
            masks = np.stack([self.frame.mask(prompt.mask()) for prompt in filled if prompt.mask])
            heads = self.net.take_mask(features, jnp.asarray(masks))
        else:
            given = [points_for_network(p.points, p.labels, p.box, self.frame.size, self.frame.extent) for p in filled]
            points, labels = (np.concatenate(parts) for parts in zip(*given))
            heads = self.net.click(features, jnp.asarray(points), jnp.asarray(labels), None)
        heads = heads._replace(low=jnp.asarray(fill_holes(np.asarray(heads.low), self.config.holes)))
        made = self.net.remember_prompted(features, heads)
        kept = jax.tree.map(np.asarray, made)
        return [
            Record(kept.low[i], kept.pointer[i], float(kept.score[i]), float(kept.iou[i]), kept.features[i])
            for i in range(len(prompts))
        ]

    def _paint_objects(self, low: jax.Array, ids: jax.Array, best: jax.Array, owner: jax.Array):
        """Adds the objects' logits (n, h / 4, w / 4) to the largest so far and its owner, (rows, columns) each."""

        def one(state, now):
            best, owner = state
            logits, number = now
            full = resize(logits, self.frame.extent, axes=(0, 1))[: self.frame.shape[0], : self.frame.shape[1]]
            larger = full > best
            return (jnp.where(larger, full, best), jnp.where(larger, number, owner)), None

        return jax.lax.scan(one, (best, owner), (low, ids))[0]

    def track(self, memories: Sequence[Memory], part: range, direction: int) -> tuple[list[Memory], list[np.ndarray]]:
        """Tracks the slices of ``part`` in ``direction``: memories, and logits (z, n, h / 4, w / 4) of each group."""
        never = self.shape[0] if direction > 0 else -1
        shift = 0 if direction > 0 else -1
        width = memories[0].prompted.shape[0]
        missing = self.config.batch - len(part)
        order = list(part)[::direction]
        grey = self.read(part.start, part.stop)[::direction]
        features = self._encode(jnp.asarray(np.concatenate([grey, np.repeat(grey[-1:], missing, axis=0)])))
        slices = np.asarray(order + [EMPTY] * missing, np.int32)
        after, lows = [], []
        for memory, group in zip(memories, self.groups):
            start = [self.first[n] + shift for n in group] + [never] * (width - len(group))
            memory, found = self.net.propagate(
                memory, features, slices, np.asarray(start, np.int32), direction, self.shape[0]
            )
            after.append(memory)
            low = np.asarray(found.low)[: len(part), : len(group)][::direction]
            lows.append(fill_holes(low, self.config.holes))
        return after, lows

    def paint(self, lows: Sequence[np.ndarray], best: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logit and index (from 1, 0 for none) of the strongest object at each pixel, starting from given ones."""
        state = jnp.asarray(best), jnp.asarray(owner)
        after = 0
        for low, group in zip(lows, self.groups):
            ids = jnp.arange(after + 1, after + 1 + len(group), dtype=jnp.int32)
            after += len(group)
            state = self._paint(jnp.asarray(low), ids, *state)
        return np.asarray(state[0]), np.asarray(state[1])

    def painted(
        self, part: range, direction: int, lows: Sequence[np.ndarray], written: Mapping[str, Any]
    ) -> list[tuple[str, int, np.ndarray]]:
        """What is written of the slices of ``part``: labels, or of slices that the other pass reaches too, the largest
        ``logit`` and its ``owner``, which the forward pass takes up."""
        overlap = self.schedule.overlap
        shared = range(max(part.start, overlap.start), min(part.stop, overlap.stop))
        inside = slice(shared.start - part.start, shared.stop - part.start) if shared else slice(0, 0)
        best = np.full((len(part), *self.shape[1:]), self.config.threshold, np.float32)
        owner = np.zeros(best.shape, np.int32)
        if direction == FORWARD and shared:
            best[inside] = written["logit"][shared.start : shared.stop]
            owner[inside] = written["owner"][shared.start : shared.stop]
        for k in range(len(part)):
            best[k], owner[k] = self.paint([low[k] for low in lows], best[k], owner[k])
        arrays: list[tuple[str, int, np.ndarray]] = []
        if direction == BACKWARD and shared:
            arrays += [("logit", shared.start, best[inside]), ("owner", shared.start, owner[inside])]
        final = len(part) if direction == FORWARD or not shared else shared.start - part.start
        if final:
            ids = np.asarray([0, *self.numbers], np.uint32)
            arrays.append(("labels", part.start, ids[owner[:final]]))
        return arrays

    def slabs(self, written: Mapping[str, Any], state: Any = None) -> Iterator[Slab]:
        """Tracks backward, then forward: ``labels`` uint32 of object ids, every slice once; overlaps go to the largest
        logit. ``written[layer][z0:z1]`` gives back what was given; ``state`` is that of a slab, to go on behind it."""
        steps = self.schedule.steps
        before = 0 if state is None else state["done"]
        memories = list(self.start_memories)
        if state is not None:
            memories = [Memory(*(jnp.asarray(array) for array in kept)) for kept in state["memories"]]
        for done, (direction, part) in enumerate(steps[before:], before + 1):
            if done == 1 or steps[done - 2][0] != direction:
                memories = list(self.start_memories)
            memories, lows = self.track(memories, part, direction)
            arrays = self.painted(part, direction, lows, written)
            yield Slab(arrays, {"done": done, "memories": [list(memory) for memory in memories]})


def prompts_of(config: Config, shape: tuple[int, int, int]) -> list[Prompt]:
    """The prompts that the configuration names. Raises ``UserError`` if there are none or they do not fit."""
    if not config.prompts:
        raise UserError("no prompts are given: --config.system.prompts=prompts.json, or a volume of labels")
    if pathlib.Path(config.prompts).suffix == ".json":
        return read_json(config.prompts, shape)
    return from_layer(config.prompts, shape, config.prompt_slices)


def segment_volume(config: Config, collections: Collections | None, image: Volume) -> Streaming:
    """Follows the prompted objects through ``image`` (axes zyx, uint8 or 0..1).

    ``collections``: variables of the network, instead of ``config.checkpoint``. Raises ``UserError`` before any work
    for prompts, sizes or weights that do not fit.
    """
    validate(config)
    shape = image.spatial_shape
    prompts = prompts_of(config, shape)
    net = network(config, collections)
    schedule = schedule_of(config, prompts, shape[0])
    layers = {"labels": Layer(dtype=np.uint32)}
    if schedule.overlap:
        layers |= {"logit": Layer(dtype=np.float32, kept=False), "owner": Layer(dtype=np.int32, kept=False)}

    def run(written: Mapping[str, Any], state: Any) -> Iterator[Slab]:
        yield from Tracker(config, net, lambda z0, z1: image[z0:z1], shape, prompts).slabs(written, state)

    return Streaming(
        run=run,
        steps=len(schedule.steps),
        layers=layers,
        slab=config.batch,
        sources=[source for source in (config.prompts, config.checkpoint) if source],
    )

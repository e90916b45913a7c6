"""Objects followed through a stack by SAM 2, from prompts on any slices: labels out, in one pass each way.

Slices are streamed from the volume, encoded in batches, and tracked under ``lax.scan`` with a memory of fixed size, so
that peak memory depends on the size of a slice and the number of objects, not on the length of the stack.
"""

import dataclasses
import logging
import math
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.intensity import as_uint8
from emjax.data.volume import Volume, create_volume
from emjax.errors import UserError
from emjax.models.functional import initialise
from emjax.models.layers.resize import resize
from emjax.models.sam2.config import STRIDE, SAM2Config, sam2_config
from emjax.models.sam2.model import SAM2, Features
from emjax.models.sam2.stack import BACKWARD, EMPTY, FORWARD, Memory, TrackOptions
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
Write = Callable[[int, np.ndarray], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tracking through a stack.

    Attributes:
        checkpoint: SAM 2 weights, official, Hugging Face, safetensors or Orbax; "" draws random ones from ``seed``,
            whose masks mean nothing.
        size, version: of the random network; a checkpoint says its own.
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
        overlays: pictures of that many slices, evenly spread, beside the output.
        tracking: how memories are chosen and made.
    """

    checkpoint: str = ""
    size: Literal["tiny", "small", "base_plus", "large"] = "tiny"
    version: Literal["2.0", "2.1"] = "2.1"
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
    overlays: int = 4
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
    for name in ("holes", "overlays"):
        if getattr(config, name) < 0:
            raise UserError(f"{name} {getattr(config, name)}: expected 0 or more")


def build(config: Config, rngs: nnx.Rngs) -> SAM2:
    """The network that the configuration names (of a checkpoint: :func:`network`)."""
    return SAM2(sam2_config(config.size, config.version, dtype=config.dtype), rngs)


def network(config: Config) -> Network:
    """The network with its weights. Raises ``UserError`` for a checkpoint that is not wholly a SAM 2."""
    if config.checkpoint:
        checkpoint = read_checkpoint(config.checkpoint, [FAMILY])
        made: SAM2Config = config_of(checkpoint.settings, dtype=config.dtype)
        if made.image_only:
            raise UserError(f"{config.checkpoint} is for single images only: it has no memory, which a stack needs")
        return Network(made, jax.tree.map(jnp.asarray, checkpoint.collections), config.tracking)
    log.warning("no checkpoint is given: the weights are random and the masks mean nothing")
    made = sam2_config(config.size, config.version, dtype=config.dtype)
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
        """uint8 slices (n, rows, columns) at the network's size, 0..1 float32."""
        unit = grey.astype(jnp.float32) / 255
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


class Tracker:
    """One run: the network, the geometry, and the objects in groups that are tracked at once."""

    def __init__(
        self, config: Config, net: Network, read: Read, shape: tuple[int, int, int], prompts: Sequence[Prompt]
    ):
        """``read(z0, z1)`` gives uint8 slices (z1 - z0, rows, columns) of a stack of ``shape`` (z, y, x)."""
        validate(config)
        check_prompts(prompts, shape, "the list of prompts")
        self.config, self.net, self.read, self.shape = config, net, read, shape
        self.frame = frame_of(config, shape[1:])
        self.numbers = sorted({prompt.number for prompt in prompts})
        self.first = {n: min(p.z for p in prompts if p.number == n) for n in self.numbers}
        if config.reference_order:
            self.first = dict.fromkeys(self.numbers, min(self.first.values()))
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
            masks = np.stack([self.frame.mask(prompt.mask()) for prompt in filled])
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

    def run(self, direction: int) -> Iterator[tuple[int, list[np.ndarray]]]:
        """Slice by slice in ``direction``: (z, low-resolution logits (n, h / 4, w / 4) of each group)."""
        firsts = list(self.first.values())
        begin, end = (min(firsts), self.shape[0]) if direction > 0 else (max(firsts) - 1, -1)
        order = range(begin, end, direction)
        never = self.shape[0] if direction > 0 else -1
        shift = 0 if direction > 0 else -1
        memories: list[Memory] = list(self.start_memories)
        width = memories[0].prompted.shape[0]
        starts = [
            np.int32([self.first[n] + shift for n in group] + [never] * (width - len(group))) for group in self.groups
        ]
        batch = self.config.batch
        for i in range(0, len(order), batch):
            part = list(order[i : i + batch])
            low_z, high_z = min(part), max(part) + 1
            grey = self.read(low_z, high_z)[[z - low_z for z in part]]
            missing = batch - len(part)
            grey = np.concatenate([grey, np.repeat(grey[-1:], missing, axis=0)])
            slices = np.int32(part + [EMPTY] * missing)
            features = self._encode(jnp.asarray(grey))
            lows = []
            for g, start in enumerate(starts):
                memories[g], found = self.net.propagate(memories[g], features, slices, start, direction, self.shape[0])
                lows.append(np.asarray(found.low))
            for k, z in enumerate(part):
                yield z, [fill_holes(low[k, : len(group)], self.config.holes) for low, group in zip(lows, self.groups)]

    def paint(self, lows: Sequence[np.ndarray], best: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Logit and index (from 1, 0 for none) of the strongest object at each pixel, starting from given ones."""
        state = jnp.asarray(best), jnp.asarray(owner)
        after = 0
        for low, group in zip(lows, self.groups):
            ids = jnp.arange(after + 1, after + 1 + len(group), dtype=jnp.int32)
            after += len(group)
            state = self._paint(jnp.asarray(low), ids, *state)
        return np.asarray(state[0]), np.asarray(state[1])

    def labels(self, write: Write, progress: Callable[[int], None] = lambda done: None) -> None:
        """Tracks both ways and gives ``write(z, labels)`` every slice once, uint32 (rows, columns) of object ids.

        Where objects overlap, the largest logit wins. Slices that both ways reach wait in a temporary file.
        """
        ids = np.uint32([0, *self.numbers])
        blank = np.full(self.shape[1:], self.config.threshold, np.float32), np.zeros(self.shape[1:], np.int32)
        low, high = min(self.first.values()), max(self.first.values())
        done = 0
        with tempfile.TemporaryFile() as file:
            room = math.prod(self.shape[1:]) * 4
            for z, lows in self.run(BACKWARD):
                best, owner = self.paint(lows, *blank)
                if z < low:
                    write(z, ids[owner])
                    done += 1
                    progress(done)
                    continue
                file.seek((z - low) * 2 * room)
                file.write(np.ascontiguousarray(best).tobytes() + np.ascontiguousarray(owner).tobytes())
            for z, lows in self.run(FORWARD):
                start = blank
                if z < high:
                    file.seek((z - low) * 2 * room)
                    start = tuple(  # type: ignore[assignment]
                        np.frombuffer(file.read(room), kind).reshape(self.shape[1:]) for kind in (np.float32, np.int32)
                    )
                write(z, ids[self.paint(lows, *start)[1]])
                done += 1
                progress(done)


def prompts_of(config: Config, shape: tuple[int, int, int]) -> list[Prompt]:
    """The prompts that the configuration names. Raises ``UserError`` if there are none or they do not fit."""
    if not config.prompts:
        raise UserError("no prompts are given: --config.system.prompts=prompts.json, or a volume of labels")
    if pathlib.Path(config.prompts).suffix == ".json":
        return read_json(config.prompts, shape)
    return from_layer(config.prompts, shape, config.prompt_slices)


def segment_stack(
    config: Config,
    volume: Volume,
    output: str,
    *,
    window: tuple[float, float] | None = None,
    overwrite: bool = False,
    pictures: str | pathlib.Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Mapping[str, int]:
    """Follows the prompted objects through ``volume`` (axes zyx) and writes labels uint32 to ``output``.

    ``window``: grey values that become 0 and 255, needed unless the volume is uint8. ``pictures``: folder for overlays.
    Returns the voxels of each object. Raises ``UserError`` before anything is written if something does not fit.
    """
    validate(config)
    volume.require_axes("zyx")
    if volume.dtype != np.uint8 and window is None:
        raise UserError(
            f"{volume.spec} is {volume.dtype}: SAM 2 needs 8 bits; say which grey values become black and white: "
            "--window LOW,HIGH"
        )
    grey = volume if volume.dtype == np.uint8 and window is None else as_uint8(volume, window)
    shape = volume.spatial_shape
    prompts = prompts_of(config, shape)
    tracker = Tracker(config, network(config), lambda z0, z1: grey[z0:z1], shape, prompts)
    shown = set(np.linspace(0, shape[0] - 1, min(config.overlays, shape[0])).astype(int).tolist())
    counts: dict[str, int] = {str(number): 0 for number in tracker.numbers}
    chunks = (1, min(shape[1], 512), min(shape[2], 512))
    with create_volume(
        output,
        shape,
        np.uint32,
        voxel_size=volume.require_voxel_size(),
        offset=volume.offset,
        chunks=chunks,
        shards=chunks,
        attributes={"source": volume.spec, "method": "sam2 stack"},
        overwrite=overwrite,
    ) as out:

        def write(z: int, labels: np.ndarray) -> None:
            out[z : z + 1] = labels[None]
            for number, count in zip(*np.unique(labels[labels > 0], return_counts=True)):
                counts[str(number)] += int(count)
            if pictures is not None and z in shown:
                _picture(pathlib.Path(pictures), z, grey[z], labels)

        tracker.labels(write, progress)
    return counts


def _picture(folder: pathlib.Path, z: int, section: np.ndarray, labels: np.ndarray) -> None:
    from PIL import Image

    from emjax.view.overlay import labels_over

    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels_over(section, labels)).save(folder / f"slice_{z:05d}.png")

"""Predicts volumes of any size, one written block at a time, in bounded memory.

A written block is a pure function of the job and its index: its input is read once (reflected at the border of the
volume), cut into the network's blocks, predicted in batches over the local devices, blended in float32, and written as
whole shards. So any block can be computed by any process, in any order, again and again.
"""

import dataclasses
import itertools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from emjax.data.volume import Volume, check_finite, create_volume, open_volume
from emjax.errors import UserError
from emjax.inference.blocks import Axis, Box, Grid, blocks_for, input_box, plan_axes
from emjax.inference.executor import Stopped
from emjax.models.functional import Collections, define
from emjax.systems.protocol import Block, Output, Triple, system_of

INSTANCE_BITS = 20
"""Instances of one network block are numbered below 2**20; the block's number stands above them."""


def flip_sets(axes: str) -> tuple[tuple[int, ...], ...]:
    """All subsets of the axes named in ``axes`` (letters of "zyx"), as axis numbers; the empty one first.

    Raises:
        UserError: another letter.
    """
    letters = "".join(dict.fromkeys(axes.lower()))
    if set(letters) - set("zyx"):
        raise UserError(f"--flips {axes}: expected letters of zyx, such as yx")
    numbers = sorted("zyx".index(letter) for letter in letters)
    return tuple(subset for count in range(len(numbers) + 1) for subset in itertools.combinations(numbers, count))


class Network:
    """A system's ``predict``, compiled once for a batch of blocks spread over the local devices.

    Args:
        config: the system's ``Config``.
        collections: its variables.
        size: what the network sees (z, y, x).
        batch: blocks per call; rounded up to a whole number for each device.
        flips: of :func:`flip_sets`; predictions of flipped blocks are turned back and averaged.
        devices: local devices; all if None.
    """

    def __init__(
        self,
        config: Any,
        collections: Collections,
        size: Triple,
        batch: int = 1,
        flips: Sequence[tuple[int, ...]] = ((),),
        devices: Sequence[jax.Device] | None = None,
    ):
        devices = list(jax.local_devices() if devices is None else devices)
        system = system_of(config)
        self.batch = math.ceil(batch / len(devices)) * len(devices)
        self.size, self.flips, self.outputs = size, tuple(flips), system.outputs(config)
        mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
        self._rows = NamedSharding(mesh, P("data"))
        self._collections = jax.device_put(collections, NamedSharding(mesh, P()))
        definition = define(lambda rngs: system.build(config, rngs))

        def predict(collections: Collections, image: jax.Array) -> dict[str, jax.Array]:
            return system.predict(config, definition.bind(collections), image)

        def turn(image: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return jnp.flip(image, [axis + 1 for axis in axes])

        def turn_back(outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
            return system.flip_back(config, outputs, axes)

        def add(total: dict[str, jax.Array], more: dict[str, jax.Array]) -> dict[str, jax.Array]:
            return jax.tree.map(jnp.add, total, more)

        # The network is compiled once, not once for each flip.
        self._predict = jax.jit(predict, out_shardings=self._rows)
        self._turn = jax.jit(turn, static_argnums=1)
        self._turn_back = jax.jit(turn_back, static_argnums=1)
        self._add = jax.jit(add, donate_argnums=0)

    def place(self, images: np.ndarray) -> jax.Array:
        """Blocks (b, z, y, x), b at most ``batch``, on the devices; missing rows are filled with the last one."""
        if len(images) < self.batch:
            images = np.concatenate([images, np.repeat(images[-1:], self.batch - len(images), 0)])
        return jax.device_put(images, self._rows)

    def __call__(self, images: np.ndarray) -> dict[str, jax.Array]:
        """Outputs (batch, z, y, x, channel) of :meth:`place`'s blocks. Returns before they are computed."""
        image = self.place(images)
        total = self._predict(self._collections, image)
        for axes in self.flips:
            if axes:
                more = self._turn_back(self._predict(self._collections, self._turn(image, axes)), axes)
                total = self._add(total, more)
        return {name: value / len(self.flips) for name, value in total.items()} if len(self.flips) > 1 else total

    def temporary_bytes(self, dtype: Any) -> int:
        """Device memory of one call beside the variables, per device, as the compiler plans it."""
        image = jax.ShapeDtypeStruct((self.batch, *self.size), dtype, sharding=self._rows)
        analysis = self._predict.lower(self._collections, image).compile().memory_analysis()
        return 0 if analysis is None else int(analysis.temp_size_in_bytes + analysis.output_size_in_bytes)


def fitting_batch(make: Callable[[int], Network], dtype: Any, most: int = 16) -> Network:
    """The network with the largest power of two as batch per device that fits its memory; 1 where that is unknown."""
    devices = jax.local_devices()
    statistics = devices[0].memory_stats() or {}
    limit = statistics.get("bytes_limit")
    if not limit:
        return make(len(devices))
    free = 0.8 * (limit - statistics.get("bytes_in_use", 0))
    while most > 1:
        network = make(most * len(devices))
        if network.temporary_bytes(dtype) <= free:
            return network
        most //= 2
    return make(len(devices))


@dataclasses.dataclass(frozen=True)
class Window:
    """Grey values ``low`` and ``high`` become 0 and 1, as float32; values beyond are clipped."""

    low: float
    high: float

    def __call__(self, image: np.ndarray) -> np.ndarray:
        scaled = (image.astype(np.float32) - np.float32(self.low)) * np.float32(1 / (self.high - self.low))
        return np.clip(scaled, 0, 1, out=scaled)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """All that a worker needs to predict any block; travels to other processes by pickle.

    Attributes:
        load: gives (system configuration, variables); called once per process.
        input: arguments of ``open_volume``: spec and keyword arguments.
        output: location of the output; one output of the system is an image there, several are images inside, by name.
        region: of the input that is predicted.
        plan: the network's blocks.
        grid: written blocks, in voxels of the region.
        batch: blocks per call; 0 takes what fits the device.
        flips: letters of "zyx" whose flips are averaged.
        window: grey values; None for uint8 volumes, which are taken as they are.
        key: unique to the plan; a worker keeps what it loaded for it.
    """

    key: str
    load: Callable[[], tuple[Any, Collections]]
    input: tuple[str, Mapping[str, Any]]
    output: str
    region: Box
    plan: Block
    grid: Grid
    batch: int = 0
    flips: str = ""
    window: Window | None = None


def output_spec(location: str, outputs: Mapping[str, Output], name: str) -> str:
    """Where one of a system's outputs is stored."""
    return location if len(outputs) == 1 else f"{location}:{name}"


def create_outputs(
    job: Job, outputs: Mapping[str, Output], image: Volume, overwrite: bool, attributes: Mapping[str, Any]
) -> dict[str, Volume]:
    """Creates the volumes of all outputs, empty and marked unfinished; leaves nothing behind if one cannot be made."""
    voxel_size = image.require_voxel_size()
    offset = tuple(o + part.start * v for o, part, v in zip(image.offset, job.region, voxel_size))
    made: dict[str, Volume] = {}
    try:
        for name, output in outputs.items():
            made[name] = create_volume(
                output_spec(job.output, outputs, name),
                (output.channels, *job.grid.shape),
                np.uint64 if output.kind == "instances" else np.uint8,
                voxel_size=voxel_size,
                offset=offset,
                chunks=(1, *job.grid.chunks),
                shards=(1, *job.grid.step),
                overwrite=overwrite and not made,
                attributes={
                    **({"instance_bits": INSTANCE_BITS} if output.kind == "instances" else {"scale": 1 / 255}),
                    "kind": output.kind,
                    **output.attributes,
                    **attributes,
                },
            )
    except BaseException:
        for volume in made.values():
            if volume.output is not None:
                volume.output.discard()
        raise
    return made


def reflected(index: np.ndarray, length: int) -> np.ndarray:
    """Positions mirrored about the first and last voxel of [0, length), as often as needed."""
    if length == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * (length - 1))
    return np.where(index >= length, 2 * (length - 1) - index, index)


def read_reflected(volume: Any, box: Box) -> np.ndarray:
    """Voxels of ``box`` (z, y, x), which may reach over the border of ``volume``; there the volume is mirrored."""
    lines = [reflected(np.arange(part.start, part.stop), length) for part, length in zip(box, volume.shape[-3:])]
    lows = [int(line.min()) for line in lines]
    highs = [int(line.max()) + 1 for line in lines]
    inner = volume[tuple(slice(low, high) for low, high in zip(lows, highs))]
    if all(len(line) == high - low for line, low, high in zip(lines, lows, highs)):
        return inner
    return inner[np.ix_(*(line - low for line, low in zip(lines, lows)))]


class Blender:
    """Blended outputs of one written block: a weighted mean where blocks overlap, the chosen block for instances."""

    def __init__(self, axes: Sequence[Axis], box: Box, outputs: Mapping[str, Output]):
        self.axes, self.box, self.outputs = axes, box, outputs
        shape = tuple(part.stop - part.start for part in box)
        self._sums: dict[str, np.ndarray] = {
            name: np.zeros((output.channels, *shape), np.uint64 if output.kind == "instances" else np.float32)
            for name, output in outputs.items()
        }
        # Weights are separable, so is their sum: three lines instead of a volume, unless there is a rule.
        self._totals = [np.zeros(length, np.float32) for length in shape]
        self._rule, self._floor = axes[0].rule, np.float32(axes[0].floor)
        self._total = np.zeros(shape, np.float32) if self._rule else None
        self._seen: list[set[int]] = [set(), set(), set()]

    def add(self, block: Triple, predicted: Mapping[str, np.ndarray]) -> None:
        """Adds the outputs (z, y, x, channel) of one network block."""
        targets, sources, weights = [], [], []
        for place, (axis, number, part) in enumerate(zip(self.axes, block, self.box)):
            first = axis.starts[number]
            low, high = max(part.start, first), min(part.stop, first + axis.size)
            line = axis.weights[number, low - first : high - first]
            used = np.flatnonzero(line)
            low, high, line = low + used[0], low + used[-1] + 1, line[used[0] : used[-1] + 1]
            targets.append(slice(low - part.start, high - part.start))
            sources.append(slice(low - first, high - first))
            weights.append(line)
            if number not in self._seen[place]:
                self._seen[place].add(number)
                self._totals[place][targets[-1]] += line
        plain = not self._rule and all((line == 1).all() for line in weights)
        weight = weights[0][:, None, None] * weights[1][:, None] * weights[2]
        if self._total is not None:
            weight = weight + self._floor if self._rule == "plus" else np.maximum(weight, self._floor)
            self._total[tuple(targets)] += weight
        for name, values in predicted.items():
            chosen = values[tuple(sources)]
            if self.outputs[name].kind == "instances":
                place_of = int(np.ravel_multi_index(block, [len(axis.starts) for axis in self.axes]))
                self._number_instances(name, place_of, chosen, tuple(targets))
                continue
            for channel, total in enumerate(self._sums[name]):
                part_of = chosen[..., channel]
                total[tuple(targets)] += part_of if plain else part_of * weight

    def _number_instances(self, name: str, number: int, local: np.ndarray, target: tuple[slice, ...]) -> None:
        if local.size and (local.min() < 0 or local.max() >> INSTANCE_BITS):
            raise ValueError(
                f"{name}: an instance id of {local.max()} in one block, expected 0 to 2**{INSTANCE_BITS}-1"
            )
        for channel, total in enumerate(self._sums[name]):
            ids = local[..., channel].astype(np.uint64)
            total[target] = np.where(ids > 0, ids | np.uint64((number + 1) << INSTANCE_BITS), 0)

    def result(self) -> dict[str, np.ndarray]:
        """Outputs (channel, z, y, x) as stored: uint8 (0..1 times 255, rounded), or uint64 instances."""
        done = {}
        z, y, x = self._totals
        for name, total in self._sums.items():
            if self.outputs[name].kind == "instances":
                done[name] = total
                continue
            stored = np.empty(total.shape, np.uint8)
            for channel, values in enumerate(total):
                for plane, row in enumerate(values):
                    scaled = row / (z[plane] * y[:, None] * x if self._total is None else self._total[plane])
                    stored[channel, plane] = np.clip(np.rint(scaled * np.float32(255)), 0, 255)
            done[name] = stored
        return done


class BlockPredictor:
    """The function of a job: predicts and writes the block of an index. Threads may call it at the same time.

    While one thread computes, others read the next block and write the last one.
    """

    def __init__(
        self,
        job: Job,
        stop: threading.Event | None = None,
        network: Network | None = None,
        tick: Callable[[float], None] = lambda voxels: None,
    ):
        self.job, self.tick = job, tick
        self.stop = stop or threading.Event()
        self._network = network
        self._prepared: Any = None
        self._setup, self._compute = threading.Lock(), threading.Lock()

    def __reduce__(self) -> tuple:
        return _of_this_process, (self.job,)

    def prepare(self) -> tuple[Network, Mapping[str, Output], Volume, dict[str, Volume], tuple[Axis, Axis, Axis]]:
        """Loads the network and opens the volumes, on the first call."""
        with self._setup:
            if self._prepared is None:
                self._prepared = _open(self.job, self._network)
            return self._prepared

    def __call__(self, index: Triple) -> dict[str, Any]:
        network, outputs, image, volumes, axes = self.prepare()
        box = self.job.grid.box(index)
        blocks = blocks_for(axes, box)
        needed = input_box(axes, blocks)
        read = tuple(
            slice(part.start + origin.start, part.stop + origin.start) for part, origin in zip(needed, self.job.region)
        )
        pixels = check_finite(read_reflected(image, read), image.spec)  # type: ignore[arg-type]
        if self.job.window is not None:
            pixels = self.job.window(pixels)
        blender = Blender(axes, box, outputs)
        with self._compute:
            waiting: list[tuple[Sequence[Triple], dict[str, jax.Array]]] = []
            for batch in _batched(blocks, network.batch):
                if self.stop.is_set():
                    raise Stopped
                crops = [self._crop(pixels, axes, needed, block) for block in batch]
                waiting.append((batch, network(np.stack(crops))))
                # One batch is being computed while the one before is fetched and blended.
                if len(waiting) > 1:
                    self._blend(blender, outputs, *waiting.pop(0))
                self.tick(self.job.grid.voxels(index) * len(batch) / len(blocks))
            for batch, predicted in waiting:
                self._blend(blender, outputs, batch, predicted)
        result = blender.result()
        if self.stop.is_set():
            raise Stopped
        for name, values in result.items():
            volume = volumes[name]
            volume[(slice(None), *box) if volume.ndim == 4 else box] = values if volume.ndim == 4 else values[0]
        return {"voxels": self.job.grid.voxels(index), "blocks": len(blocks)}

    @staticmethod
    def _crop(pixels: np.ndarray, axes: Sequence[Axis], needed: Box, block: Triple) -> np.ndarray:
        starts = [axis.starts[number] - part.start for axis, number, part in zip(axes, block, needed)]
        return pixels[tuple(slice(start, start + axis.size) for start, axis in zip(starts, axes))]

    @staticmethod
    def _blend(
        blender: Blender, outputs: Mapping[str, Output], batch: Sequence[Triple], predicted: Mapping[str, jax.Array]
    ) -> None:
        fetched = {name: np.asarray(predicted[name]) for name in outputs}
        for name, values in fetched.items():
            if values.dtype.kind == "f" and not np.isfinite(values[: len(batch)]).all():
                raise ValueError(f"the network's {name} are not finite; is the checkpoint of a run that diverged?")
        for row, block in enumerate(batch):
            blender.add(block, {name: values[row] for name, values in fetched.items()})


def _batched(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    return [items[start : start + count] for start in range(0, len(items), count)]


_predictors: dict[str, BlockPredictor] = {}
_predictors_lock = threading.Lock()


def _of_this_process(job: Job) -> BlockPredictor:
    """What a pickled predictor becomes: one per job and process, so that a worker compiles once, not for each block."""
    with _predictors_lock:
        if job.key not in _predictors:
            _predictors.clear()
            _predictors[job.key] = BlockPredictor(job)
        return _predictors[job.key]


def make_network(job: Job, loaded: tuple[Any, Collections] | None = None) -> Network:
    """The job's network, with the batch that it asks for or that fits."""
    config, collections = job.load() if loaded is None else loaded
    flips = flip_sets(job.flips)
    make = lambda batch: Network(config, collections, job.plan.size, batch, flips)  # noqa: E731
    return make(job.batch) if job.batch else fitting_batch(make, np.uint8 if job.window is None else np.float32)


def _open(job: Job, network: Network | None) -> tuple:
    network = network or make_network(job)
    spec, options = job.input
    image = open_volume(spec, **options)
    outputs = network.outputs
    volumes = {name: open_volume(output_spec(job.output, outputs, name), writable=True) for name in outputs}
    return network, outputs, image, volumes, plan_axes(job.grid.shape, job.plan)


def bytes_per_voxel(outputs: Mapping[str, Output]) -> int:
    """Working memory of one voxel of a written block: sums, stored values, pixels and their copies."""
    wide = sum(output.channels * (8 if output.kind == "instances" else 4) for output in outputs.values())
    return 2 * wide + 8

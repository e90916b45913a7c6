"""One training run from the first step, or from where it was stopped, to the last."""

import dataclasses
import logging
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from emjax.config import Experiment, from_json, to_json, validate
from emjax.data.pipeline import Loader
from emjax.data.volume import open_volume
from emjax.errors import UserError
from emjax.models.functional import paths
from emjax.systems.protocol import system_of
from emjax.training import flops, sharding
from emjax.training.checkpoints import FOLDER, Checkpoints, differences, initial_variables
from emjax.training.distributed import Stop
from emjax.training.records import Progress, Records
from emjax.training.state import (
    State,
    definition,
    fresh,
    make_evaluation_step,
    make_prediction,
    make_train_step,
    split_trainable,
    with_given,
    with_parameters,
)
from emjax.view import overlay

logger = logging.getLogger(__name__)

VALIDATION_SEED = 20_000


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done, whether all of them, and the last validation scalars."""

    step: int
    finished: bool
    validation: Mapping[str, float]


def make_loader(config: Experiment) -> Loader:
    """The training loader of this process."""
    data = config.data
    compose = getattr(system_of(config.system), "compose", None)
    return Loader(
        data.train,
        data.crop,
        data.batch_size,
        data.augment,
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=data.threads,
        cache_bytes=int(data.cache_gb * 2**30),
        transport=data.transport,
        split_components=data.split_components,
        min_labelled=data.min_labelled,
        **({"compose": compose(config.system)} if compose else {}),
    )


def make_validation_loader(config: Experiment) -> Loader | None:
    """The loader of fixed, unaugmented crops, or None without validation volumes."""
    data = config.data
    if not data.validation or not config.train.validate_every:
        return None
    return Loader(
        data.validation,
        data.crop,
        data.batch_size,
        (),
        VALIDATION_SEED,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=data.threads,
        cache_bytes=int(data.cache_gb * 2**30),
        transport=data.transport,
        split_components=data.split_components,
    )


def batch_shapes(config: Experiment, loader: Loader | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch: as the loader makes it, or as the configuration says where no data are at hand."""
    rows, crop = config.data.batch_size, config.data.crop
    if loader is not None:
        local = loader.batch(0)
        return {name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype) for name, array in local.items()}
    shapes = {"image": jax.ShapeDtypeStruct((rows, *crop), np.dtype(config.data.transport))}
    if config.data.train[0].labels is not None:
        shapes["labels"] = jax.ShapeDtypeStruct((rows, *crop), np.int32)
    if any(source.mask or source.ignore or source.ignore_labels for source in config.data.train):
        shapes["mask"] = jax.ShapeDtypeStruct((rows, *crop), np.uint8)
    return shapes


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
    """The step functions of a run, laid over its mesh. ``step`` is compiled ahead of time."""

    mesh: Any
    shardings: Any
    batch_shardings: Mapping[str, Any]
    step: Any
    state_shapes: Any
    flops: float


def compile_step(config: Experiment, batch: Mapping[str, jax.ShapeDtypeStruct]) -> Compiled:
    """Lays the state over the mesh and compiles the training step for it."""
    network = definition(config)
    mesh = sharding.make_mesh(config.mesh)
    shapes = jax.eval_shape(lambda: fresh(config, jax.random.key(0)))
    shardings = sharding.state_shardings(config.mesh, mesh, shapes)
    over_batch = sharding.batch_shardings(config.mesh, mesh, batch)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    step = make_train_step(config, network)
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)  # noqa: E731
    key = jax.eval_shape(lambda: jax.random.key(0))
    compiled = (
        jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))
        .lower(
            jax.tree.map(place, shapes, shardings),
            {name: place(leaf, over_batch[name]) for name, leaf in batch.items()},
            place(key, everywhere),
        )
        .compile()
    )
    operations = flops.count(step, shapes, dict(batch), key)
    return Compiled(mesh, shardings, over_batch, compiled, jax.tree.map(place, shapes, shardings), operations)


def describe(config: Experiment, compiled: Compiled) -> str:
    """Table of parameters per part of the network, then operations and memory of a step."""
    params = compiled.state_shapes["params"]
    chosen, _ = split_trainable(config, params)
    trainable = set(paths(chosen))
    rows: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = sharding.dotted(path)
        row = rows.setdefault(name.split(".")[0], [0, 0, 0])
        row[0] += math.prod(leaf.shape)
        row[1] += math.prod(leaf.shape) if name in trainable else 0
        row[2] += math.prod(leaf.sharding.shard_shape(leaf.shape))
    total = [sum(row[index] for row in rows.values()) for index in range(3)]
    lines = [f"{'part':<24}{'parameters':>14}{'trainable':>14}{'per device':>14}"]
    lines += [f"{name:<24}{row[0]:>14,}{row[1]:>14,}{row[2]:>14,}" for name, row in [*rows.items(), ("total", total)]]
    memory = compiled.step.memory_analysis()
    lines.append(f"mesh {dict(compiled.mesh.shape)} on {jax.devices()[0].device_kind}")
    lines.append(f"one step: {compiled.flops / 1e9:,.1f} GFLOP")
    if memory is not None:
        gib = 2**30
        lines.append(
            f"memory per device: arguments {memory.argument_size_in_bytes / gib:.2f} GiB, "
            f"temporary {memory.temp_size_in_bytes / gib:.2f} GiB"
        )
    return "\n".join(lines)


def _pretrained(config: Experiment, workdir: pathlib.Path) -> Mapping[str, Any] | None:
    """Parameters of the system's own choice that a fresh run starts from; None where there is none to be read."""
    pretrained = getattr(system_of(config.system), "pretrained", None)
    begun = any((workdir / FOLDER).glob("*/meta"))
    return None if pretrained is None or begun or config.train.init_from else pretrained(config.system)


def _warn_of_voxels(config: Experiment) -> None:
    """Logs what the system has to say to the voxel sizes of the training volumes."""
    domain = getattr(system_of(config.system), "domain", None)
    for source in config.data.train if domain is not None else ():
        size = source.voxel_size or open_volume(source.raw).voxel_size
        if size is not None and (text := domain(config.system, size)):  # type: ignore[misc]
            logger.warning("%s: %s", source.title, text)


def _start(
    config: Experiment, compiled: Compiled, checkpoints: Checkpoints, given: Mapping[str, Any] | None
) -> tuple[State, int]:
    """The state to go on from, and its step: own checkpoint, else ``init_from``, else fresh but for ``given``."""
    latest = checkpoints.latest()
    if latest is not None:
        return checkpoints.restore(latest, compiled.state_shapes), latest
    if config.train.init_from or given is not None:
        begun = with_given(config, given) if given is not None else initial_variables(config.train.init_from, config)
        # As host arrays, which every process may hand to a program over all devices.
        variables = jax.device_get(begun)
        begin = jax.jit(lambda values: with_parameters(config, values), out_shardings=compiled.shardings)
        return begin(variables), 0
    make = jax.jit(lambda key: fresh(config, key), out_shardings=compiled.shardings)
    return make(jax.random.key(config.seed)), 0


def _check_workdir(config: Experiment, workdir: pathlib.Path) -> None:
    """Creates the work directory and writes ``config.json``; refuses one that belongs to another network."""
    stored = workdir / "config.json"
    if stored.is_file():
        before = from_json(stored.read_text())
        changed = differences(before, config)
        network = [text for text in changed if text.startswith(("system.model", "system:"))]
        if network:
            raise UserError(f"--workdir {workdir}: holds a run of another model ({network[0]}); use another --workdir")
        for text in changed:
            logger.warning("changed since the run began: %s", text)
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / "config.json.tmp"
        temporary.write_text(to_json(config))
        temporary.replace(stored)
    except OSError as error:
        raise UserError(f"--workdir {workdir}: cannot be written ({error.strerror})") from None


def validate_run(config: Experiment) -> None:
    """Checks the configuration against the devices and processes at hand."""
    validate(config, jax.device_count(), jax.process_count())


def run(config: Experiment, workdir: pathlib.Path) -> Outcome:
    """Trains; the same call goes on with a run that was stopped, with the same result as if it had not been.

    Raises ``UserError`` for bad input before any work starts, ``FloatingPointError`` after ``train.most_skipped``
    consecutive steps without a finite loss.
    """
    validate_run(config)
    given = _pretrained(config, workdir)
    loader = make_loader(config)
    validation = make_validation_loader(config)
    _check_workdir(config, workdir)
    _warn_of_voxels(config)
    for line in loader.sampler.describe():
        logger.info("train on %s", line)
    compiled = compile_step(config, batch_shapes(config, loader))
    logger.info("%s", describe(config, compiled))
    checkpoints = Checkpoints(workdir, config)
    try:
        state, step = _start(config, compiled, checkpoints, given)
        if step:
            logger.info("going on from step %d", step)
        return _train(config, workdir, compiled, checkpoints, loader, validation, state, step)
    finally:
        checkpoints.close()


def _train(
    config: Experiment,
    workdir: pathlib.Path,
    compiled: Compiled,
    checkpoints: Checkpoints,
    loader: Loader,
    validation: Loader | None,
    state: State,
    step: int,
) -> Outcome:
    train = config.train
    lead = jax.process_index() == 0
    records = Records(workdir, step, active=lead)
    validator = _Validator(config, compiled, validation, records) if validation is not None else None
    progress = Progress(step, train.steps, config.data.batch_size * math.prod(config.data.crop))
    stop = Stop()
    everywhere = jax.sharding.NamedSharding(compiled.mesh, jax.sharding.PartitionSpec())
    key = jax.jit(lambda: jax.random.key(config.seed + 1), out_shardings=everywhere)()
    batches = loader.iterate(step) if step < train.steps else iter(())
    waiting: tuple[int, dict] | None = None
    scores: Mapping[str, float] = {}
    profiler = _Profiler(config, workdir)
    stopped = False
    while step < train.steps and not stopped:
        batch = _next(batches, progress)
        with profiler.step(step, state):
            on_devices = sharding.to_devices(batch, compiled.batch_shardings, config.data.batch_size)
            state, scalars = compiled.step(state, on_devices, key)
        step += 1
        if waiting is not None:
            # Read one logged step late, so that the devices never wait for the host.
            _log(*waiting, records, progress, train.most_skipped, lead)
            waiting = None
        if step % train.log_every == 0 or step == train.steps:
            waiting = (step, scalars)
        stopped = stop.at(step)
        last = step == train.steps or stopped
        best = None
        if validator is not None and (step % train.validate_every == 0 or step == train.steps):
            scores = validator(state, step)
            if train.best not in scores:
                raise UserError(f"train.best {train.best!r} is not a validation scalar; there are {', '.join(scores)}")
            best = scores[train.best]
        if step % train.save_every == 0 or last:
            _check_alive(state, train.most_skipped)
            checkpoints.save(step, state, best)
    if waiting is not None:
        _log(*waiting, records, progress, train.most_skipped, lead)
    profiler.close(state)
    records.close()
    return Outcome(step, step >= train.steps, scores)


def _next(batches: Iterator, progress: Progress) -> dict[str, np.ndarray]:
    start = time.monotonic()
    batch = next(batches)
    progress.waited += time.monotonic() - start
    return batch


def _log(step: int, scalars: Mapping, records: Records, progress: Progress, most_skipped: int, lead: bool) -> None:
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    records.scalars(step, values)
    if lead:
        logger.info("%s", progress.line(step, values))
    if values["skipped"] >= most_skipped:
        raise FloatingPointError(
            f"{values['skipped']:.0f} steps in a row (up to step {step}) had a loss or gradient that is not finite; "
            "lower optimizer.lr or look at the data"
        )


def _check_alive(state: State, most_skipped: int) -> None:
    skipped = int(state["skipped"])
    if skipped >= most_skipped:
        raise FloatingPointError(
            f"{skipped} steps in a row had a loss or gradient that is not finite; nothing is saved"
        )


class _Validator:
    """Scores fixed crops, and draws some of them."""

    def __init__(self, config: Experiment, compiled: Compiled, loader: Loader, records: Records):
        network = definition(config)
        self.config, self.compiled, self.records = config, compiled, records
        self.evaluate = jax.jit(make_evaluation_step(config, network))
        self.predict = jax.jit(make_prediction(config, network))
        self.batches = [loader.batch(number) for number in range(config.data.validation_batches)]

    def __call__(self, state: State, step: int) -> dict[str, float]:
        total: dict[str, float] = {}
        for batch in self.batches:
            on_devices = sharding.to_devices(batch, self.compiled.batch_shardings, self.config.data.batch_size)
            for name, value in jax.device_get(self.evaluate(state, on_devices)).items():
                total[name] = total.get(name, 0.0) + float(value) / len(self.batches)
        self.records.scalars(step, total, "validation")
        if jax.process_index() == 0:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in total.items())
            logger.info("validation at step %d: %s", step, shown)
        # Drawing needs the blocks of one process only, and predictions are not split over processes.
        if jax.process_count() == 1 and self.config.train.overlays:
            self._draw(state, step)
        return total

    def _draw(self, state: State, step: int) -> None:
        batch = self.batches[0]
        devices = sharding.to_devices(
            {"image": batch["image"]}, self.compiled.batch_shardings, self.config.data.batch_size
        )
        outputs = jax.device_get(self.predict(state, devices["image"]))
        kinds = system_of(self.config.system).outputs(self.config.system)
        for row in range(min(self.config.train.overlays, len(batch["image"]))):
            picture = overlay.training_panel(
                batch["image"][row],
                {name: (kinds[name], outputs[name][row]) for name in outputs},
                batch["labels"][row] if "labels" in batch else None,
            )
            self.records.image(step, f"validation/crop_{row}", picture)


class _Profiler:
    """Traces ``train.profile`` steps with the JAX profiler into ``workdir/profile``.

    Steps are dispatched ahead of the device: the trace begins and ends when the device has reached the state, so that it
    holds the work of the steps asked for and of no others.
    """

    def __init__(self, config: Experiment, workdir: pathlib.Path):
        self.first, self.count = config.train.profile
        self.folder = workdir / "profile"
        self.running = False

    def step(self, step: int, state: State):
        if self.count and step == self.first and not self.running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        if self.running and step >= self.first + self.count:
            self.close(state)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def close(self, state: State) -> None:
        if self.running:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self.running = False
            logger.info("profile written to %s", self.folder)

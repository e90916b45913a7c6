"""From an image and a system to stored predictions: plan, output, ledger, run."""

import argparse
import contextlib
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from emjax import __version__
from emjax.data.folder import Folder
from emjax.data.intensity import percentile_window
from emjax.data.volume import Volume, check_finite, mark_complete, open_volume
from emjax.errors import UserError
from emjax.inference import ledger
from emjax.inference.blocks import name_of, plan_axes, plan_grid, redundancy
from emjax.inference.executor import StageResult, Stripes, Threads, run_stage, stopping
from emjax.inference.options import add_executor_options, bounding_box, byte_size, executor_of, whole_triple
from emjax.inference.predictor import (
    BlockPredictor,
    Job,
    Window,
    bytes_per_voxel,
    create_outputs,
    flip_sets,
    make_network,
    output_spec,
)
from emjax.inference.progress import ProgressLine, duration
from emjax.models.functional import Collections
from emjax.systems.protocol import Output, system_of

Loader = Callable[[], tuple[Any, Collections]]


def digest(collections: Collections) -> str:
    """16 hexadecimal digits that change with any bit of the variables."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(collections):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()[:16]


def check_image(volume: Volume, block: tuple[int, int, int]) -> None:
    """Refuses volumes that cannot be an image for blocks of this size."""
    volume.require_axes("zyx").require_voxel_size()
    for axis, length, size in zip("zyx", volume.shape, block):
        if length < math.ceil(size / 8):
            raise UserError(
                f"{volume.spec}: {length} voxels along {axis} are too few for a network that sees {size}; "
                f"expected at least {math.ceil(size / 8)}"
            )


def voxel_size_warning(volume: Volume, config: Any) -> str | None:
    """A warning if the model was made for other voxels; ``UserError`` if the system says that it cannot work."""
    domain = getattr(system_of(config), "domain", None)
    if domain is not None and (warning := domain(config, volume.require_voxel_size())) is not None:
        return warning
    wanted, found = getattr(config, "voxel_size", None), volume.require_voxel_size()
    if wanted is None or np.allclose(wanted, found, rtol=0.05):
        return None
    here, there = (" x ".join(f"{v:g}" for v in size) for size in (found, wanted))
    return (
        f"warning: {volume.spec} has voxels of {here} nm (z, y, x), the model was trained on {there} nm: "
        "expect worse results, or resample"
    )


def choose_window(volume: Volume, text: str | None, trained: tuple[float, float] | None = None) -> Window | None:
    """The grey values that become 0 and 1, the same for all blocks.

    Args:
        volume: the image.
        text: ``"LOW,HIGH"``; ``"auto"`` for the 0.5 and 99.5 percentile; None for the rule of training: uint8 as it is,
            other integers by the range of their type, floats by 0 to 1, or what the run's sources say.
        trained: ``intensity_range`` of the run's sources.

    Raises:
        UserError: malformed text, NaN, floats outside of 0..1 without a window, or a volume of one grey value.
    """
    if text not in (None, "auto"):
        try:
            low, high = (float(part) for part in str(text).split(","))
        except ValueError:
            low, high = 1.0, 0.0
        if not low < high:
            raise UserError(f"--window {text}: expected two grey values LOW,HIGH with LOW < HIGH, or auto")
        return Window(low, high)
    if text is None and volume.dtype.kind in "iu":
        if trained is not None:
            return Window(*trained)
        return None if volume.dtype == np.uint8 else Window(0.0, float(np.iinfo(volume.dtype).max))
    if volume.dtype.kind == "f" and volume.nbytes <= 1 << 29:
        check_finite(volume[...], volume.spec)
    if text == "auto":
        return Window(*percentile_window(volume))
    if trained is not None:
        return Window(*trained)
    low, high = percentile_window(volume, (0.0, 100.0))
    if low < 0 or high > 1:
        raise UserError(
            f"{volume.spec}: grey values {low:g} to {high:g} of {volume.dtype}, expected 0 to 1; give "
            "--window LOW,HIGH or --window auto"
        )
    return Window(0.0, 1.0)


def input_generation(spec: str) -> list[list[Any]]:
    """By what a changed local input is recognised: sizes and times of the file or of the store's metadata."""
    path = spec.removeprefix("precomputed://").removeprefix("file://")
    candidates = [path] + [path.rpartition(":")[0]] * (":" in path)
    names = ("", "zarr.json", ".zattrs", "0/zarr.json", ".zarray", "0/.zarray", "attributes.json", "info")
    places = (os.path.join(base, name) if name else base for base in candidates if base for name in names)
    return ledger.file_generation(places)


def predict_volume(
    load: Loader,
    spec: str,
    output: str,
    *,
    options: argparse.Namespace,
    trained: tuple[float, float] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[dict[str, str], Any]:
    """Predicts a volume; returns where each of the system's outputs lies, by name, and the system's configuration.

    An unfinished output of the same plan is completed; one of another plan is an error. ``options`` are those of
    :func:`add_prediction_options`, ``trained`` is for :func:`choose_window`.

    Raises:
        UserError: wrong input; nothing half-written is left.
        RuntimeError: blocks that failed three times; the others are done.
    """
    _check_output_name(output)
    volume_options = {
        name: value
        for name, value in (
            ("dataset", options.dataset),
            ("voxel_size", options.voxel_size),
            ("axes", options.axes),
        )
        if value is not None
    }
    image = open_volume(spec, **volume_options)
    say(image.describe())
    config, collections = load()
    system = system_of(config)
    outputs, plan = system.outputs(config), system.block(config)
    check_image(image, plan.size)
    if (warning := voxel_size_warning(image, config)) is not None:
        say(warning)
    _check_flips(options.flips, outputs)
    window = choose_window(image, options.window, trained)
    if window is not None:
        say(f"grey values {window.low:g} to {window.high:g} of {image.dtype} become 0 to 1 (--window changes this)")
    region = bounding_box(options.bbox, image.shape, image.spec)
    shape = tuple(part.stop - part.start for part in region)
    memory = byte_size(options.memory) // max(options.threads, 1)
    chunks = (16, 128, 128) if image.require_voxel_size()[0] >= 3 * image.require_voxel_size()[2] else (64, 64, 64)
    grid = plan_grid(shape, plan, bytes_per_voxel(outputs), memory, chunks, whole_triple(options.block, "--block"))
    content = {
        "emjax": __version__,
        "system": type(config).__module__,
        "model": digest(collections),
        "configuration": repr(config),
        "input": spec if "://" in spec else os.path.abspath(spec),
        "input options": volume_options,
        "input generation": input_generation(spec),
        "input shape": list(image.shape),
        "voxel size": list(image.require_voxel_size()),
        "region": [[part.start, part.stop] for part in region],
        "window": window and [window.low, window.high],
        "flips": "".join(sorted(options.flips)),
        "block": list(grid.step),
        "chunks": list(grid.chunks),
    }
    job = Job(
        key=ledger.content_hash({**content, "output": os.path.abspath(output)}),
        load=load,
        input=(spec, volume_options),
        output=output,
        region=region,
        plan=plan,
        grid=grid,
        batch=options.batch,
        flips=options.flips,
        window=window,
    )
    places = {name: output_spec(output, outputs, name) for name in outputs}
    executor = executor_of(options)
    try:
        created = _begin(job, content, outputs, image, executor, options.overwrite)
        book = ledger.Ledger(output, "predict", ledger.content_hash(content))
        indices = grid.indices()
        finished = book.done()
        before = sum(grid.voxels(index) for index in indices if name_of(index) in finished)
        total = math.prod(shape)
        if before == total:
            say(f"{output}: already finished, nothing to do (--overwrite begins anew)")
            _finish(places, book, len(grid))
            return places, config
        say(
            f"{len(grid)} blocks of {' x '.join(map(str, grid.step))} voxels, network blocks of "
            f"{' x '.join(map(str, plan.size))} ({redundancy(plan_axes(shape, plan), grid):.2f} computed per voxel), "
            + (f"{len(finished)} done before, " if finished else "")
            + executor.describe()
        )
        try:
            result = _run(job, book, executor, (config, collections), total - before, before, say)
        except UserError:
            if created and not book.done():
                _discard(output, places)
            raise
    finally:
        executor.close()
    if result.failed:
        name, error = next(iter(result.failed.items()))
        raise RuntimeError(
            f"{len(result.failed)} of {len(grid)} blocks failed {ledger.MOST_ATTEMPTS} times, first {name}: {error}; "
            f"see python -m emjax.status {output}; the same command tries them again"
        )
    _finish(places, book, len(grid))
    return places, config


def _run(
    job: Job, book: ledger.Ledger, executor: Any, loaded: Any, total: float, before: float, say: Any
) -> StageResult:
    stop = threading.Event()
    here = isinstance(executor, Threads | Stripes)
    line = ProgressLine("predict", total, before)
    network = None
    if here:
        network = make_network(job, loaded)
        devices = jax.local_devices()
        say(f"batch {network.batch} on {len(devices)} {devices[0].device_kind} device{'s' * (len(devices) > 1)}")
    predictor = BlockPredictor(job, stop, network, tick=line.add)

    def report(index: Any, done: int, count: int) -> None:
        if not here:
            line.add(job.grid.voxels(index))

    with stopping(stop):
        result = run_stage(executor, predictor, job.grid.indices(), name_of, book, report, stop)
    line.finish()
    return result


def _check_output_name(output: str) -> None:
    if not output.rstrip("/").endswith(".zarr"):
        raise UserError(f"--output {output}: predictions are written block by block to a store named something.zarr")


def _check_flips(flips: str, outputs: Mapping[str, Output]) -> None:
    flip_sets(flips)
    for name, output in outputs.items():
        if flips and output.kind == "instances":
            raise UserError(f"--flips {flips}: instances ({name}) cannot be averaged over flips")
        for offset in output.attributes.get("offsets", []):
            mixed = [letter for letter, step in zip("zyx", offset) if step]
            if 0 < len(set(mixed) & set(flips)) < len(mixed):
                raise UserError(
                    f"--flips {flips}: no mirror image of offset {offset} is predicted; flip {mixed} together"
                )


def _begin(
    job: Job, content: Mapping[str, Any], outputs: Mapping[str, Output], image: Volume, executor: Any, overwrite: bool
) -> bool:
    """Creates the output and its plan, or checks that they are this run's; True if created."""
    leader = not isinstance(executor, Stripes) or executor.index == 0
    if not leader:
        _wait_for_plan(job.output, content)
        return False
    stored = ledger.read_plan(job.output)
    if stored is not None and overwrite:
        Folder(job.output, write=True).remove()
        stored = None
    if stored is not None:
        ledger.check_same_plan(job.output, stored, content)
        return False
    digest_ = ledger.content_hash(content)
    create_outputs(job, outputs, image, overwrite, {"source": content["input"], "plan": digest_})
    try:
        stages = {"predict": {"hash": digest_, "blocks": len(job.grid), "voxels": math.prod(job.grid.shape)}}
        ledger.write_plan(job.output, {"content": content, "stages": stages, "begun": time.time()})
    except UserError:
        _discard(job.output, {})
        raise
    return True


def _wait_for_plan(output: str, content: Mapping[str, Any], seconds: float = 600) -> None:
    """Other stripes wait for the first one to create the output."""
    end = time.monotonic() + seconds
    while True:
        stored = ledger.read_plan(output)
        if stored is not None and stored.get("hash") == ledger.content_hash(content):
            return
        if time.monotonic() > end:
            if stored is not None:
                ledger.check_same_plan(output, stored, content)
            raise UserError(f"{output}: stripe 0 has not created it within {duration(seconds)}")
        time.sleep(0.5)


def _discard(output: str, places: Mapping[str, str]) -> None:
    """Removes an output of which no block was finished."""
    with contextlib.suppress(UserError):
        Folder(output, write=True).remove()


def _finish(places: Mapping[str, str], book: ledger.Ledger, blocks: int) -> None:
    """Marks the outputs as whole once every block is (the last of several stripes does)."""
    if len(book.done()) == blocks:
        for place in places.values():
            mark_complete(place)


def add_prediction_options(parser: argparse.ArgumentParser) -> None:
    """Options of the prediction itself, shared with ``emjax.segment``."""
    parser.add_argument("--which", default="best", help="best, latest or a step (default: %(default)s)")
    parser.add_argument("--dataset", help="dataset inside the input, where its name does not say it")
    parser.add_argument("--voxel-size", metavar="Z,Y,X", help="nm; wins over what the input says")
    parser.add_argument("--axes", help="stored order of the input's axes, where it is silent or wrong, such as xyz")
    parser.add_argument("--window", metavar="LOW,HIGH", help="grey values that become 0 and 1, or auto (percentiles)")
    parser.add_argument("--bbox", metavar="Z0:Z1,Y0:Y1,X0:X1", help="part of the input to work on, in voxels")
    parser.add_argument("--batch", type=int, default=0, help="network blocks per call (default: what fits the device)")
    parser.add_argument(
        "--flips",
        nargs="?",
        const="zyx",
        default="",
        metavar="AXES",
        help="average over predictions of flipped blocks: all 8 (no value), or along these axes, such as yx (4)",
    )
    parser.add_argument("--block", metavar="Z,Y,X", help="voxels written at once (default: by --memory)")
    parser.add_argument("--memory", default="4GB", help="working memory for blocks (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is there")
    add_executor_options(parser)

"""``python -m emjax.segment``: affinities, or a checkpoint and an image, become labels.

Examples::

    python -m emjax.segment --input affinities.zarr --output labels.zarr --threshold 0.5
    python -m emjax.segment --checkpoint runs/fib25 --input raw.h5:raw --output labels.zarr
    python -m emjax.segment --config configs/sam2/stack.py --input raw.h5:raw --output labels.zarr \\
        --config.system.prompts=prompts.json        (SAM 2 follows objects through the stack)
    python -m emjax.segment --output labels.zarr --threshold 0.3        (cuts again, from what lies beside labels.zarr)
"""

import argparse
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emjax import __version__, cli
from emjax import config as configuration
from emjax.data.folder import is_remote
from emjax.data.pyramid import write_pyramid
from emjax.data.volume import Volume, is_complete, open_volume, save_volume
from emjax.errors import UserError
from emjax.inference import segmentation
from emjax.inference.blockwise import block_shape, segment_blockwise
from emjax.inference.decoding import decode_blockwise
from emjax.inference.executor import Stripes
from emjax.inference.ledger import content_hash
from emjax.inference.options import bounding_box, byte_size, executor_of, memory_of_machine, numbers, whole_triple
from emjax.inference.prediction import add_prediction_options, choose_window, digest, predict_volume
from emjax.inference.predictor import output_spec
from emjax.inference.segmentation import Places, Settings
from emjax.inference.streaming import Run, generation, stream, windowed
from emjax.postprocess import region_sizes
from emjax.systems.protocol import system_of
from emjax.training.loading import load_system, trained_window

_UNUSED_BY_STREAMS = (
    *("threshold", "thresholds", "fragments", "regrow", "score", "low", "high", "history", "dust", "mask"),
    *("memory_whole", "segment_block", "batch", "flips", "block", "memory", "executor"),
)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    overrides = [text[len("--config.") :] for text in arguments if text.startswith("--config.")]
    options = _parser().parse_args([text for text in arguments if not text.startswith("--config.")])
    if overrides and not (options.config or options.checkpoint):
        raise UserError("--config.field=value needs --config FILE.py, or --checkpoint, whose configuration it changes")
    places = Places(options.output)
    config = _configuration(options, overrides)
    defaults = _defaults(config)
    settings = Settings(
        fragments=options.fragments or defaults["fragments"],
        low=defaults["low"] if options.low is None else options.low,
        high=defaults["high"] if options.high is None else options.high,
        regrow=defaults["regrow"] if options.regrow is None else options.regrow,
        score=options.score or defaults["score"],
        history=options.history,
    )
    settings.validate()
    whole = _whole_only(settings)
    if whole and (options.segment_block or options.executor != "local"):
        given = "--segment-block" if options.segment_block else f"--executor {options.executor}"
        raise UserError(
            f"{given} works block by block, {whole} on the whole volume at once; give --fragments watershed --regrow 0, "
            "or predict first and segment in one process"
        )
    thresholds = _thresholds(options, defaults, settings)
    if options.pyramid and not (options.output.rstrip("/").endswith(".zarr") or "precomputed://" in options.output):
        raise UserError(f"--pyramid: {options.output} has no levels; write NAME.zarr or precomputed://")
    if options.input is None:
        if options.checkpoint:
            raise UserError("--checkpoint needs --input IMAGE")
        merges = segmentation.load_merges(places.merges)
        _write(places, merges, thresholds, options, replace=True)
        return cli.DONE
    system = system_of(config) if config is not None else None
    refuse = getattr(system, "refuse_segmentation", None)
    if refuse is not None:
        refuse(config)
    if hasattr(system, "segment_volume"):
        _stream(config, options, places)
        return cli.DONE
    prediction = _predict(options, places, () if options.config else overrides) if options.checkpoint else None
    if system is not None and (options.method == "system" or not hasattr(system, "agglomeration")):
        _check_free(options)
        _decode(config, options, prediction)
        return cli.DONE
    if options.method == "system":
        raise UserError("--method system needs --config or --checkpoint, which say what the system is")
    spec = options.input if prediction is None else prediction["affinities"]
    _agglomerate(spec, {} if prediction else _input_options(options), options, settings, places, thresholds)
    return cli.DONE


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("segment", __doc__ or "")
    parser.add_argument("--input", metavar="VOLUME", help="affinities; with --checkpoint, an image")
    parser.add_argument("--output", required=True, metavar="LABELS.zarr", help="labels; also .h5, .tif, precomputed://")
    parser.add_argument("--checkpoint", metavar="DIR", help="predict first, with this work directory's checkpoint")
    parser.add_argument("--config", metavar="FILE.py[:variant]", help="settings of a system's own post-processing")
    parser.add_argument("--threshold", type=float, help="pairs merge while 1 - affinity is below it (default: 0.5)")
    parser.add_argument("--thresholds", metavar="T,T,...", help="several; written as LABELS.zarr:T")
    parser.add_argument("--score", help="mean, max, hist_quant_50, aff85_his256, ... (default: mean)")
    parser.add_argument(
        "--fragments",
        choices=("watershed", "mutex"),
        help="watershed of the nearest affinities (default), or mutex watershed of all offsets; not block by block",
    )
    parser.add_argument("--low", type=float, help="affinities at or below never join (default: 0.0001)")
    parser.add_argument("--high", type=float, help="affinities of at least this always join (default: 0.9999)")
    parser.add_argument(
        "--regrow", type=int, metavar="VOXELS", help="smaller fragments give way to the others; not block by block"
    )
    parser.add_argument(
        "--history", type=float, default=1.0, help="keep merges up to this threshold (default: %(default)s)"
    )
    parser.add_argument("--dust", type=int, default=0, metavar="VOXELS", help="smaller segments become 0")
    parser.add_argument("--pyramid", action="store_true", help="also write coarser levels, for viewers")
    parser.add_argument("--overlays", type=int, metavar="N", help="pictures of N slices, of systems that track (4)")
    parser.add_argument("--mask", metavar="VOLUME", help="segment only where this is not 0")
    parser.add_argument(
        "--method",
        choices=("agglomerate", "system"),
        default="agglomerate",
        help="watershed and agglomeration, or the system's own decoding (default: what the system is made for)",
    )
    parser.add_argument(
        "--memory-whole", metavar="SIZE", help="segment block by block above this (default: 70%% of free)"
    )
    parser.add_argument("--segment-block", metavar="Z,Y,X", help="segment block by block, with blocks of this size")
    add_prediction_options(parser)
    return parser


def _configuration(options: argparse.Namespace, overrides: Sequence[str]) -> Any:
    """The system's configuration from ``--config`` (which wins) or ``--checkpoint``, or None."""
    changes = () if options.config else tuple(overrides)
    stored = load_system(options.checkpoint, options.which, changes)[0] if options.checkpoint else None
    if not options.config:
        return stored
    experiment = configuration.load(options.config, overrides)
    given = getattr(experiment, "system", experiment)
    if stored is not None and type(given) is not type(stored):
        raise UserError(
            f"--config {options.config} is of {type(given).__module__}, --checkpoint {options.checkpoint} of "
            f"{type(stored).__module__}; expected the same system"
        )
    return given


def _defaults(config: Any) -> dict[str, Any]:
    system = None if config is None else system_of(config)
    chosen = system.agglomeration(config) if hasattr(system, "agglomeration") else Settings()  # type: ignore[union-attr]
    return {
        "fragments": getattr(chosen, "fragments", "watershed"),
        "low": chosen.low,
        "high": chosen.high,
        "regrow": getattr(chosen, "regrow", 0),
        "score": chosen.score,
        "threshold": getattr(chosen, "threshold", 0.5),
    }


def _whole_only(settings: Settings) -> str:
    """The setting that cannot work block by block, or nothing."""
    if settings.fragments == "mutex":
        return "--fragments mutex"
    return f"--regrow {settings.regrow}" if settings.regrow else ""


def _thresholds(options: argparse.Namespace, defaults: Mapping[str, Any], settings: Settings) -> list[float]:
    if options.threshold is not None and options.thresholds:
        raise UserError("give --threshold or --thresholds, not both")
    chosen = numbers(options.thresholds, "--thresholds") if options.thresholds else []
    if not chosen:
        chosen = [defaults["threshold"] if options.threshold is None else options.threshold]
    if not all(0 <= threshold <= settings.history for threshold in chosen):
        raise UserError(f"--threshold {max(chosen):g}: expected 0 to --history ({settings.history:g})")
    return chosen


def _check_free(options: argparse.Namespace) -> None:
    """Refuses before any work what would be refused at the end."""
    if not options.overwrite and (os.path.exists(options.output) or is_complete(options.output)):
        raise UserError(f"{options.output} exists; choose another output, or pass --overwrite")


def _predict(options: argparse.Namespace, places: Places, overrides: Sequence[str]) -> dict[str, str]:
    load = functools.partial(load_system, options.checkpoint, options.which, tuple(overrides))
    trained = trained_window(options.checkpoint, options.which)
    image = open_volume(options.input, **_input_options(options))
    if image.axes == "czyx":
        raise UserError(f"{image.spec} has {image.shape[0]} channels: with --checkpoint, --input is the image")
    found, _ = predict_volume(load, options.input, places.prediction, options=options, trained=trained)
    return found


def _input_options(options: argparse.Namespace) -> dict[str, Any]:
    named = {"dataset": options.dataset, "voxel_size": options.voxel_size, "axes": options.axes}
    return {name: value for name, value in named.items() if value is not None}


def _whole_memory(options: argparse.Namespace) -> int:
    if options.memory_whole:
        return byte_size(options.memory_whole, "--memory-whole")
    return int(0.7 * memory_of_machine())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _agglomerate(
    spec: str,
    input_options: dict[str, Any],
    options: argparse.Namespace,
    settings: Settings,
    places: Places,
    thresholds: Sequence[float],
) -> None:
    volume, channels = segmentation.nearest_affinities(spec, **input_options)
    print(volume.describe())
    volume.require_voxel_size()
    if settings.fragments == "mutex" and volume.shape[0] == 3:
        raise UserError(
            f"{volume.spec} has the nearest affinities only, --fragments mutex needs further offsets; an affinity U-Net "
            "predicts them with --config.system.predicted=all"
        )
    mask = open_volume(options.mask).require_axes("zyx") if options.mask else None
    if mask is not None and mask.shape != volume.spatial_shape:
        raise UserError(f"{mask.spec} has shape {mask.shape}, {volume.spec} {volume.spatial_shape}; expected the same")
    plan = segmentation.plan_of(volume, mask, settings, {})
    there = os.path.isfile(places.merges) and is_complete(places.fragments)
    if there and not options.overwrite:
        merges = segmentation.load_merges(places.merges)
        if merges.hash != content_hash(plan):
            changed = [key for key in plan if merges.plan.get(key) != plan[key]]
            raise UserError(
                f"{places.merges} was made with another {', '.join(changed) or 'version'}; choose another --output, or "
                "pass --overwrite"
            )
        print(f"fragments and merges are there: {places.fragments}, {places.merges}")
        _write(places, merges, thresholds, options, replace=True)
        return
    _check_free(options)
    needed, most = segmentation.bytes_needed(volume, settings), _whole_memory(options)
    if needed > most or options.segment_block or options.executor != "local":
        if whole := _whole_only(settings):
            raise UserError(
                f"{whole} works on the whole volume at once, which needs about {needed / 1e9:.1f} GB; {most / 1e9:.1f} GB "
                "are allowed (--memory-whole). --fragments watershed --regrow 0 go block by block"
            )
        executor = executor_of(options)
        block = whole_triple(options.segment_block, "--segment-block")
        block = block or block_shape(volume.spatial_shape, byte_size(options.memory) // max(executor.workers(), 1))
        z, y, x = (min(b, n) for b, n in zip(block, volume.spatial_shape))
        try:
            segment_blockwise(volume, (spec, input_options), mask, settings, places, plan, (z, y, x), executor)
        finally:
            executor.close()
        if isinstance(executor, Stripes) and executor.index > 0:
            return
    else:
        fragments, tree = segmentation.segment_whole(volume, channels, settings, mask, _cores())
        segmentation.write_fragments(volume, fragments, places.fragments, {"plan": content_hash(plan), "source": spec})
        segmentation.save_merges(places.merges, tree, region_sizes(fragments), plan)
        del fragments
    _write(places, segmentation.load_merges(places.merges), thresholds, options, replace=options.overwrite)


def _write(
    places: Places,
    merges: segmentation.Merges,
    thresholds: Sequence[float],
    options: argparse.Namespace,
    replace: bool,
) -> None:
    fragments = open_volume(places.fragments)
    for threshold in thresholds:
        target = places.labels if len(thresholds) == 1 else places.for_threshold(threshold)
        lut = segmentation.lookup_at(merges, threshold, options.dust)
        attributes = {
            "fragments": os.path.basename(places.fragments),
            "merges": os.path.basename(places.merges),
            "threshold": threshold,
            "score": merges.plan["score"],
            "dust": options.dust,
            "source": merges.plan["affinities"],
        }
        count = segmentation.write_labels(fragments, lut, target, attributes, replace, _cores())
        if options.pyramid:
            write_pyramid(target)
        print(f"{target}: {count} segments at threshold {threshold:g}")


def _stream(config: Any, options: argparse.Namespace, places: Places) -> None:
    """For systems that go through the whole image slab by slab, such as tracking through a stack."""
    system: Any = system_of(config)
    parser = _parser()
    for name in _UNUSED_BY_STREAMS:
        if getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')} is not for {system.__name__}, which gives labels itself")
    volume = open_volume(options.input, **_input_options(options)).require_axes("zyx")
    volume.require_voxel_size()
    print(volume.describe())
    trained, collections = None, None
    if options.checkpoint:
        trained = trained_window(options.checkpoint, options.which)
        _, collections = load_system(options.checkpoint, options.which)
    elif options.window is None and volume.dtype != np.uint8 and volume.dtype.kind != "f":
        raise UserError(
            f"{volume.spec} is {volume.dtype}, and nothing says which grey values are black and white: give "
            "--window LOW,HIGH or --window auto"
        )
    window = choose_window(volume, options.window, trained)
    region = bounding_box(options.bbox, volume.shape, volume.spec)
    image = windowed(volume.crop(region), window)
    streaming = system.segment_volume(config, collections, image)
    content = {
        "emjax": __version__,
        "system": type(config).__module__,
        "model": None if collections is None else digest(collections),
        "configuration": repr(config),
        "sources": {source: generation(source) for source in streaming.sources},
        "input": options.input if "://" in options.input else os.path.abspath(options.input),
        "input options": _input_options(options),
        "input generation": generation(options.input),
        "input shape": list(volume.shape),
        "voxel size": list(volume.require_voxel_size()),
        "region": [[part.start, part.stop] for part in region],
        "window": window and [window.low, window.high],
    }
    overlays = (0 if is_remote(options.output) else 4) if options.overlays is None else options.overlays
    run = Run(streaming, image, places, content, options.overwrite)
    stream(run, pyramid=options.pyramid, overlays=overlays)


def _decode(config: Any, options: argparse.Namespace, prediction: Mapping[str, str] | None) -> None:
    """The system's own post-processing of a whole prediction."""
    system = system_of(config)
    outputs = system.outputs(config)
    found = prediction or {name: output_spec(options.input, outputs, name) for name in outputs}
    volumes = {name: open_volume(place) for name, place in found.items()}
    first = next(iter(volumes.values()))
    for name, volume in volumes.items():
        print(volume.describe())
        channels = volume.shape[0] if volume.axes == "czyx" else 1
        if channels != outputs[name].channels:
            raise UserError(f"{volume.spec}: {channels} channels, expected {outputs[name].channels} of output {name}")
    # Twice the outputs, and labels.
    needed = 2 * sum(volume.nbytes for volume in volumes.values()) + 8 * math.prod(first.spatial_shape)
    most = _whole_memory(options)
    by_blocks = hasattr(system, "block_decoder")
    if by_blocks and (needed > most or options.segment_block or options.executor != "local"):
        _decode_by_blocks(config, options, volumes)
        return
    if needed > most:
        raise UserError(
            f"{options.input}: decoding at once needs about {needed / 1e9:.1f} GB, {most / 1e9:.1f} GB are allowed "
            "(--memory-whole)"
        )
    arrays = {name: volume[...].reshape(-1, *volume.spatial_shape) for name, volume in volumes.items()}
    labels = system.decode(config, arrays)
    _save_labels(options, first, labels)


def _decode_by_blocks(config: Any, options: argparse.Namespace, volumes: Mapping[str, Volume]) -> None:
    """The system's own post-processing, block by block; a killed run goes on."""
    system: Any = system_of(config)
    decoder, shape = system.block_decoder(config), next(iter(volumes.values())).spatial_shape
    executor = executor_of(options)
    memory = byte_size(options.memory) // max(executor.workers(), 1)
    z, y, x = whole_triple(options.segment_block, "--segment-block") or block_shape(
        shape, memory, bytes_per_voxel=decoder.bytes_per_voxel
    )
    if decoder.whole_sections:
        area = shape[1] * shape[2]
        z = z if options.segment_block else max(1, memory // decoder.bytes_per_voxel // area)
        y, x = shape[1:]
    attributes = {"source": options.input, "method": "system"}
    try:
        count = decode_blockwise(
            decoder,
            volumes,
            Places(options.output),
            {"prediction": {name: volume.attributes.get("plan") for name, volume in volumes.items()}},
            (min(z, shape[0]), min(y, shape[1]), min(x, shape[2])),
            executor,
            attributes=attributes,
            overwrite=options.overwrite,
            threads=_cores(),
        )
    finally:
        executor.close()
    if count is None:
        return
    if options.pyramid:
        write_pyramid(options.output)
    print(f"{options.output}: {count} segments")


def _save_labels(options: argparse.Namespace, volume: Volume, labels: np.ndarray) -> None:
    if labels.shape != volume.spatial_shape:
        raise RuntimeError(f"the system gave labels of shape {labels.shape} for {volume.spatial_shape}")
    save_volume(
        options.output,
        labels.astype(np.uint32, copy=False),
        voxel_size=volume.require_voxel_size(),
        offset=volume.offset,
        attributes={"source": options.input, "method": "system"},
        overwrite=options.overwrite,
    )
    if options.pyramid:
        write_pyramid(options.output)
    print(f"{options.output}: {len(np.unique(labels[labels > 0]))} segments")


if __name__ == "__main__":
    cli.run(main)

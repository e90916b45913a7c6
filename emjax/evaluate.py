"""``python -m emjax.evaluate``: how good a segmentation is, against ground truth, and where it is wrong.

    python -m emjax.evaluate --segmentation labels.zarr --labels truth.h5:labels --fill --report report/

VOI in bits (log base 2), ARAND as CREMI and scikit-image define it; ground truth 0 is not scored; segment 0 is one
ordinary segment, or filled with the nearest segment (``--fill``). Every number says its variant.

Classes instead of objects (mitochondria, synapses)::

    python -m emjax.evaluate --segmentation classes.zarr --labels truth.h5:labels --classes mito=1,glia=2
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import sys

import numpy as np

from emjax import __version__, cli
from emjax.data.volume import Volume, common_region, open_volume, require_same_grid
from emjax.errors import UserError
from emjax.inference.evaluation import DEFAULT_CURVE, Evaluation, Where, as_json, evaluate, variant_text
from emjax.inference.evaluation_report import report_page
from emjax.inference.options import bounding_box, byte_size, numbers
from emjax.inference.progress import ProgressLine
from emjax.inference.scoring import Filled
from emjax.inference.segmentation import Merges, load_merges
from emjax.inference.semantic import as_json as classes_as_json
from emjax.inference.semantic import classes_in, evaluate_classes, parse_classes, table
from emjax.inference.semantic_report import semantic_page
from emjax.view import report


def print_scores(evaluation: Evaluation, title: str) -> None:
    """The numbers, each with its variant."""
    scores = evaluation.scores
    print(f"{title} [{evaluation.variant}]")
    print(f"  VOI split   {scores.voi_split:.4f} bits")
    print(f"  VOI merge   {scores.voi_merge:.4f} bits")
    print(f"  VOI         {scores.voi_sum:.4f} bits")
    print(f"  ARAND       {scores.arand_skimage:.4f} (scikit-image)   {scores.arand_cremi:.4f} (CREMI)")
    print(
        f"  {scores.segments} segments, {scores.objects} objects, {scores.voxels} voxels scored, "
        f"{scores.unlabelled_fraction:.2%} of them unlabelled"
    )


def print_curve(evaluation: Evaluation) -> None:
    """The threshold curve as a table, its best marked."""
    if not evaluation.curve:
        return
    print(f"threshold  segments  VOI split  VOI merge  VOI (bits)  ARAND (scikit-image)   [{evaluation.variant}]")
    for point in evaluation.curve:
        mark = "  <- least VOI" if point is evaluation.best else ""
        print(
            f"{point.threshold:9.3f} {point.segments:9d} {point.voi_split:10.4f} {point.voi_merge:10.4f} "
            f"{point.voi_sum:11.4f} {point.arand:8.4f}{mark}"
        )


def print_errors(evaluation: Evaluation, count_: int = 5) -> None:
    """The worst splits and merges with the places of their pieces."""
    for title, entries, owner, piece_name in (
        ("worst splits", evaluation.splits, "object", "segment"),
        ("worst merges", evaluation.merges, "segment", "object"),
    ):
        if entries:
            print(f"{title} (position z,y,x in voxels):")
        for entry in entries[:count_]:
            pieces = ", ".join(
                f"{piece_name} {piece.id} at {','.join(map(str, piece.position))} ({piece.size})"
                for piece in entry.pieces[:3]
            )
            more = f" and {len(entry.pieces) - 3} more" if len(entry.pieces) > 3 else ""
            print(f"  {owner} {entry.id}: {entry.bits:.4f} bits, {entry.size} voxels in {pieces}{more}")


def history_of(segmentation: Volume, spec: str, given: str | None) -> tuple[Volume, Merges] | None:
    """Fragments and merge history of a segmentation: beside ``given``, or beside the segmentation itself."""
    folder = os.path.dirname(os.path.abspath(spec.rpartition(":")[0] or spec) if "://" not in spec else spec)
    names = {key: segmentation.attributes.get(key) for key in ("fragments", "merges")}
    if given is not None:
        folder, base = os.path.split(os.path.abspath(given))
        names = {"merges": base, "fragments": base.removesuffix(".merges.npz") + ".fragments.zarr"}
    if not all(isinstance(name, str) for name in names.values()):
        return None
    merges_path, fragments_path = (os.path.join(folder, str(names[key])) for key in ("merges", "fragments"))
    if given is None and not (os.path.isfile(merges_path) and os.path.isdir(fragments_path)):
        return None
    return open_volume(fragments_path), load_merges(merges_path)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    segmentation = open_volume(options.segmentation, voxel_size=options.voxel_size)
    labels = open_volume(options.labels, voxel_size=options.voxel_size)
    for volume in (segmentation, labels):
        print(volume.describe())
    if options.mask and options.ignore:
        raise UserError("give --mask (score where not 0) or --ignore (score where 0), not both")
    mask = None
    if options.mask or options.ignore:
        mask = open_volume(options.mask or options.ignore, voxel_size=options.voxel_size).require_axes("zyx")
        mask = dataclasses.replace(mask, source=Where(mask.source, not options.ignore))
    history = history_of(segmentation, options.segmentation, options.history)
    thresholds = numbers(options.thresholds, "--thresholds") if options.thresholds else DEFAULT_CURVE
    if options.thresholds and history is None:
        raise UserError(
            f"--thresholds: {options.segmentation} has no merge history beside it; give --history NAME.merges.npz"
        )
    fragments = history[0] if history else None
    image = open_volume(options.image, voxel_size=options.voxel_size) if options.image else None
    affinities = open_volume(options.affinities, voxel_size=options.voxel_size) if options.affinities else None
    if options.align:
        whole = segmentation
        segmentation, labels = common_region(segmentation, labels)
        mask, image, affinities, fragments = (
            None if volume is None else common_region(labels, volume)[1]
            for volume in (mask, image, affinities, fragments)
        )
        print(f"common region: {segmentation.shape} of {whole.shape} voxels")
    elif segmentation.shape == labels.shape:
        _warn_of_other_grid(segmentation, labels)
    if options.bbox:
        box = bounding_box(options.bbox, labels.shape, labels.spec)
        for other in (segmentation, mask, fragments):
            if other is not None and other.spatial_shape != labels.spatial_shape:
                raise UserError(
                    f"{other.spec} has the shape {other.spatial_shape}, {labels.spec} {labels.spatial_shape} (z, y, x)"
                )
        segmentation, labels = segmentation.crop(box), labels.crop(box)
        mask, image, affinities, fragments = (
            None if volume is None else volume.crop(box) for volume in (mask, image, affinities, fragments)
        )
    for extra in (image, affinities):
        if extra is not None and extra.spatial_shape != labels.spatial_shape:
            raise UserError(f"{extra.spec} has the shape {extra.spatial_shape}, {labels.spec} {labels.spatial_shape}")
    if options.classes or options.semantic:
        return _evaluate_classes(options, arguments, segmentation, labels, mask, image)
    places = 1 + (fragments is not None)
    line = ProgressLine("evaluate", float(np.prod(labels.shape, dtype=np.int64)))
    evaluation = evaluate(
        segmentation,
        labels,
        mask,
        fill=options.fill,
        fragments=fragments,
        merges=history[1] if history else None,
        thresholds=thresholds,
        variant=variant_text(options.fill, options.mask, options.ignore, options.bbox),
        most_voxels=max(1 << 20, byte_size(options.memory) // (24 * places)),
        limit=options.limit,
        threads=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        progress=line.add,
    )
    print_scores(evaluation, options.segmentation)
    print_curve(evaluation)
    print_errors(evaluation)
    context = {
        "segmentation": options.segmentation,
        "labels": options.labels,
        "mask": options.mask,
        "ignore": options.ignore,
        "command": shlex.join(["python", "-m", "emjax.evaluate", *arguments]),
        "emjax": __version__,
    }
    numbers_ = as_json(evaluation, **context)
    if options.json:
        _write_text(options.json, json.dumps(numbers_, indent=1))
        print(f"numbers: {options.json}")
    if options.report:
        named = {"image": options.image, "affinities": options.affinities}
        named |= {"segmentation": options.segmentation, "ground truth": options.labels}
        size = evaluation.voxel_size or (1.0, 1.0, 1.0)
        drawn = report.Drawn(
            Filled(segmentation, size) if options.fill else segmentation, labels, evaluation.table, image, affinities
        )
        page = report_page(evaluation, numbers_, drawn, {name: spec for name, spec in named.items() if spec})
        folder = pathlib.Path(options.report)
        _write_text(str(folder / "scores.json"), json.dumps(numbers_, indent=1))
        _write_text(str(folder / "index.html"), page)
        print(f"report: {folder / 'index.html'}")
    return cli.DONE


def _evaluate_classes(
    options: argparse.Namespace,
    arguments: list[str],
    segmentation: Volume,
    labels: Volume,
    mask: Volume | None,
    image: Volume | None,
) -> int:
    """Scores classes rather than objects."""
    for name in ("fill", "history", "thresholds", "affinities"):
        if getattr(options, name):
            raise UserError(f"--{name} is for objects, not for classes (--classes, --semantic)")
    # Labels of 8 bytes twice, masks of classes, distances.
    most = max(1 << 20, byte_size(options.memory) // 40)
    classes = parse_classes(options.classes) if options.classes else classes_in(labels, most)
    variant = "all voxels of the volume together"
    if options.mask or options.ignore:
        where = f"only where {options.mask} is" if options.mask else f"not where {options.ignore} is"
        variant += f"; {where} not 0"
    if options.bbox:
        variant += f"; bbox {options.bbox}"
    line = ProgressLine("evaluate", float(np.prod(labels.shape, dtype=np.int64)))
    evaluation = evaluate_classes(
        segmentation, labels, classes, mask, variant=variant, most_voxels=most, progress=line.add
    )
    print(f"{options.segmentation} [{variant}]")
    for text in table(evaluation):
        print(f"  {text}")
    for note in evaluation.notes:
        print(f"  note: {note}", file=sys.stderr)
    command = shlex.join(["python", "-m", "emjax.evaluate", *arguments])
    facts = {
        name: getattr(options, name)
        for name in ("segmentation", "labels", "image", "mask", "ignore")
        if getattr(options, name)
    }
    numbers_ = classes_as_json(evaluation, **facts, command=command, emjax=__version__)
    if options.json:
        _write_text(options.json, json.dumps(numbers_, indent=1))
        print(f"numbers: {options.json}")
    if options.report:
        folder = pathlib.Path(options.report)
        page = semantic_page(evaluation, classes, segmentation, labels, image, facts, command)
        _write_text(str(folder / "scores.json"), json.dumps(numbers_, indent=1))
        _write_text(str(folder / "index.html"), page)
        print(f"report: {folder / 'index.html'}")
    return cli.DONE


def _warn_of_other_grid(segmentation: Volume, labels: Volume) -> None:
    try:
        require_same_grid(segmentation, labels)
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)


def _write_text(path: str, text: str) -> None:
    target = pathlib.Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("evaluate", __doc__ or "")
    parser.add_argument("--segmentation", required=True, metavar="VOLUME")
    parser.add_argument("--labels", required=True, metavar="VOLUME", help="ground truth; 0 is not scored")
    parser.add_argument("--mask", metavar="VOLUME", help="score only where it is not 0")
    parser.add_argument("--ignore", metavar="VOLUME", help="do not score where it is not 0")
    parser.add_argument("--fill", action="store_true", help="give segment 0 to the nearest segment before scoring")
    parser.add_argument(
        "--classes", metavar="NAME=VALUE[:TRUE],...", help="score classes: label values, or NAME=1:any for object ids"
    )
    parser.add_argument("--semantic", action="store_true", help="score every value of the ground truth as a class")
    parser.add_argument("--bbox", metavar="Z0:Z1,Y0:Y1,X0:X1", help="score this part, in voxels")
    parser.add_argument("--align", action="store_true", help="score the region that both cover, by their offsets in nm")
    parser.add_argument("--voxel-size", metavar="Z,Y,X", help="nm; wins over what the volumes say")
    parser.add_argument("--history", metavar="NAME.merges.npz", help="merge history (default: beside the segmentation)")
    parser.add_argument("--thresholds", metavar="T,T,...", help="of the curve (default: 0.05 to 0.95)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers and lists")
    parser.add_argument("--report", metavar="DIR", help="write an HTML page with pictures")
    parser.add_argument("--image", metavar="VOLUME", help="raw image, for the report")
    parser.add_argument("--affinities", metavar="VOLUME", help="affinities, for the report")
    parser.add_argument("--limit", type=int, default=50, help="length of the lists of errors (default: %(default)s)")
    parser.add_argument("--memory", default="4GB", help="working memory for blocks (default: %(default)s)")
    return parser


if __name__ == "__main__":
    cli.run(main)

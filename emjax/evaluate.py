"""``python -m emjax.evaluate``: how good a segmentation is, against ground truth, and where it is wrong.

    python -m emjax.evaluate --segmentation labels.zarr --labels truth.h5:labels --fill --report report/

VOI in bits (log base 2), ARAND as CREMI and scikit-image define it; ground truth 0 is not scored; segment 0 is one
ordinary segment, or filled with the nearest segment (``--fill``). Every number says its variant.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from emjax import __version__, cli
from emjax.data.volume import Volume, common_region, open_volume, require_same_grid
from emjax.errors import UserError
from emjax.inference.options import bounding_box, byte_size, numbers
from emjax.inference.progress import ProgressLine
from emjax.inference.scoring import Filled, count
from emjax.inference.segmentation import Merges, load_merges
from emjax.metrics import BrokenObject, Contingency, Scores, merge_list, score_table, split_list
from emjax.view import neuroglancer, report

DEFAULT_PORT = 9000
DEFAULT_CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))

DEFINITIONS = {
    "voi_split": "VOI split, H(segmentation | ground truth), bits",
    "voi_merge": "VOI merge, H(ground truth | segmentation), bits",
    "voi_sum": "VOI, sum of split and merge, bits",
    "arand_skimage": "adapted Rand error, 1 - F1 over pairs of voxels (scikit-image, SNEMI3D; self-pairs left out)",
    "arand_cremi": "adapted Rand error as CREMI computes it (segment-0 voxels stand alone)",
    "cremi_score": "CREMI score, geometric mean of VOI and ARAND (CREMI)",
    "arand_skimage_precision": "fraction of joined pairs of voxels that are true (scikit-image's name)",
    "arand_skimage_recall": "fraction of true pairs of voxels that are joined (scikit-image's name)",
    "arand_cremi_precision": "as CREMI names it, which is scikit-image's recall",
    "arand_cremi_recall": "as CREMI names it, which is scikit-image's precision",
    "rand_split": "Rand split: fraction of true pairs that are joined, 1 is best",
    "rand_merge": "Rand merge: fraction of joined pairs that are true, 1 is best",
    "nvi_split": "VOI split divided by the joint entropy",
    "nvi_merge": "VOI merge divided by the joint entropy",
    "nid": "normalised information distance, 1 - mutual information / larger entropy",
    "voxels": "voxels that were scored",
    "unlabelled_fraction": "share of scored voxels in segment 0",
    "objects": "ground-truth objects",
    "segments": "segments that touch a scored voxel",
}


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """Scores of the fragments merged up to a threshold."""

    threshold: float
    segments: int
    voi_split: float
    voi_merge: float
    voi_sum: float
    arand: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All that was measured.

    Attributes:
        scores: named numbers.
        variant: in words, how they were computed.
        curve: over thresholds of the merge history, rising; empty without one.
        splits, merges: broken objects, worst first.
        voxel_size: nm, zyx, or None.
        offset: of the region that was scored, nm, zyx.
        table: the overlaps of segments and objects.
    """

    scores: Scores
    variant: str
    curve: tuple[CurvePoint, ...]
    splits: tuple[BrokenObject, ...]
    merges: tuple[BrokenObject, ...]
    voxel_size: tuple[float, float, float] | None
    offset: tuple[float, float, float]
    table: Contingency

    @property
    def best(self) -> CurvePoint | None:
        """The threshold with the least VOI."""
        return min(self.curve, key=lambda point: point.voi_sum, default=None)


def variant_text(fill: bool, mask: str | None, ignore: str | None, bbox: str | None) -> str:
    """How a number was computed, for every place where it is printed."""
    parts = ["log base 2", "ground truth 0 not scored"]
    parts.append("segment 0 filled with the nearest segment" if fill else "segment 0 as one ordinary segment")
    if mask or ignore:
        parts.append(f"only where {mask} is not 0" if mask else f"not where {ignore} is not 0")
    else:
        parts.append("no mask")
    if bbox:
        parts.append(f"bbox {bbox}")
    return "; ".join(parts)


def score_curve(table: Contingency, merges: Merges, thresholds: Sequence[float]) -> tuple[CurvePoint, ...]:
    """Scores of a table of fragments at many thresholds, by relabelling the table, not the volume."""
    points = []
    for threshold in thresholds:
        if threshold > merges.tree.threshold:
            continue
        lut = merges.tree.cut(threshold)
        ids = np.arange(len(lut), dtype=np.uint64)
        scores = score_table(table.relabelled(ids, lut.astype(np.uint64)))
        points.append(
            CurvePoint(
                float(threshold),
                scores.segments,
                scores.voi_split,
                scores.voi_merge,
                scores.voi_sum,
                scores.arand_skimage,
            )
        )
    return tuple(points)


def evaluate(
    segmentation: Volume,
    labels: Volume,
    mask: Volume | None = None,
    *,
    fill: bool = False,
    fragments: Volume | None = None,
    merges: Merges | None = None,
    thresholds: Sequence[float] = DEFAULT_CURVE,
    variant: str = "",
    most_voxels: int = 1 << 27,
    limit: int = 50,
    threads: int = 1,
    progress: Any = lambda voxels: None,
) -> Evaluation:
    """Scores a segmentation by blocks; memory is bounded by ``most_voxels`` and the number of overlapping pairs."""
    volumes = [segmentation] if fragments is None or merges is None else [segmentation, fragments]
    tables = count(volumes, labels, mask, fill=fill, most_voxels=most_voxels, threads=threads, progress=progress)
    scores = score_table(tables[0])
    if not scores.voxels:
        raise UserError(f"{labels.spec}: no labelled voxel to score" + (f" inside {mask.spec}" if mask else ""))
    curve = score_curve(tables[1], merges, thresholds) if merges is not None and len(tables) > 1 else ()
    return Evaluation(
        scores,
        variant or variant_text(fill, mask.spec if mask else None, None, None),
        curve,
        tuple(split_list(tables[0], limit=limit)),
        tuple(merge_list(tables[0], limit=limit)),
        labels.voxel_size or segmentation.voxel_size,
        labels.offset if labels.voxel_size else segmentation.offset,
        tables[0],
    )


def as_json(evaluation: Evaluation, **context: Any) -> dict[str, Any]:
    """The evaluation as plain values."""
    return {
        **context,
        "variant": evaluation.variant,
        "definitions": DEFINITIONS,
        "scores": evaluation.scores.as_dict(),
        "curve": [dataclasses.asdict(point) for point in evaluation.curve],
        "best_threshold": None if evaluation.best is None else dataclasses.asdict(evaluation.best),
        "splits": [_plain(entry, evaluation) for entry in evaluation.splits],
        "merges": [_plain(entry, evaluation) for entry in evaluation.merges],
    }


def _plain(entry: BrokenObject, evaluation: Evaluation) -> dict[str, Any]:
    found = dataclasses.asdict(entry)
    for piece in found["pieces"]:
        piece["position_voxel"] = piece.pop("position")
        if evaluation.voxel_size is not None:
            piece["position_nm"] = in_nanometres(piece["position_voxel"], evaluation.voxel_size, evaluation.offset)
    return found


def in_nanometres(position: Sequence[int], voxel_size: Sequence[float], offset: Sequence[float]) -> list[float]:
    """Place of a voxel in nm, zyx: ``offset`` is that of voxel (0, 0, 0)."""
    return [round(o + p * size, 3) for p, size, o in zip(position, voxel_size, offset)]


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
        mask = dataclasses.replace(mask, source=_Where(mask.source, not options.ignore))
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
        segmentation, labels, mask, image, affinities, fragments = (
            None if volume is None else volume.crop(box)
            for volume in (segmentation, labels, mask, image, affinities, fragments)
        )
    for extra in (image, affinities):
        if extra is not None and extra.spatial_shape != labels.spatial_shape:
            raise UserError(f"{extra.spec} has the shape {extra.spatial_shape}, {labels.spec} {labels.spatial_shape}")
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


def report_page(
    evaluation: Evaluation, numbers_: dict[str, Any], drawn: report.Drawn, named: dict[str, str], config: str = ""
) -> str:
    """The HTML report; ``named`` are the volumes by layer name, for the viewer."""
    scores, size = evaluation.scores, evaluation.voxel_size or (1.0, 1.0, 1.0)
    kinds = {"image": "image", "affinities": "affinities"}
    base = f"http://127.0.0.1:{DEFAULT_PORT}"
    layers = [
        neuroglancer.layer(name, f"precomputed://{base}/{layer_path(name)}", kinds.get(name, "segmentation"))
        for name in named
    ]

    def link_to(place: Sequence[int]) -> str:
        position = [p + 0.5 + o / s for p, o, s in zip(place, evaluation.offset, size)]
        return neuroglancer.link(neuroglancer.state(layers, size, position, drawn.segmentation.shape))

    groups = (
        (
            "Worst merges",
            "merges",
            "segment",
            "objects",
            "Segments that join several objects, by their share of VOI merge.",
        ),
        (
            "Worst splits",
            "splits",
            "object",
            "segments",
            "Objects that several segments share, by their share of VOI split.",
        ),
    )
    serve = ["python", "-m", "emjax.view", "--port", str(DEFAULT_PORT)]
    serve += [
        f"{layer_path(name)}={os.path.abspath(spec) if '://' not in spec else spec}" for name, spec in named.items()
    ]
    return report.render(
        {
            "title": os.path.basename(named["segmentation"].rstrip("/")) or named["segmentation"],
            "truth_name": named["ground truth"],
            "shape": " x ".join(map(str, drawn.segmentation.shape)),
            "voxel_size": " x ".join(f"{v:g}" for v in evaluation.voxel_size) if evaluation.voxel_size else "",
            "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            "variant": evaluation.variant,
            "headline": [
                {"name": "VOI, bits", "value": f"{scores.voi_sum:.3f}"},
                {"name": "VOI split, bits", "value": f"{scores.voi_split:.3f}"},
                {"name": "VOI merge, bits", "value": f"{scores.voi_merge:.3f}"},
                {"name": "ARAND (scikit-image)", "value": f"{scores.arand_skimage:.3f}"},
                {"name": f"segments for {scores.objects} objects", "value": str(scores.segments)},
            ],
            "sections": report.section_rows(drawn),
            "curve": numbers_["curve"],
            "curve_svg": report.curve_svg(numbers_["curve"], evaluation.best.threshold if evaluation.best else None),
            "best": numbers_["best_threshold"],
            "errors": [
                {
                    "title": title,
                    "owner": owner,
                    "pieces": pieces,
                    "note": note,
                    "entries": numbers_[key],
                    "cards": report.error_cards(drawn, numbers_[key], key[:-1], link_to),
                }
                for title, key, owner, pieces, note in groups
            ],
            "score_rows": [
                {
                    "name": name,
                    "value": f"{value:.4f}" if isinstance(value, float) else f"{value}",
                    "definition": DEFINITIONS.get(name, ""),
                }
                for name, value in numbers_["scores"].items()
            ],
            "serve_command": shlex.join(serve),
            "neuroglancer_link": link_to([n // 2 for n in drawn.segmentation.shape]),
            "command": numbers_["command"],
            "facts": {
                **named,
                **{name: numbers_[name] for name in ("mask", "ignore") if numbers_[name]},
                "emjax": __version__,
            },
            "config": config,
        }
    )


def layer_path(name: str) -> str:
    """A layer's name in addresses."""
    return name.replace(" ", "_")


@dataclasses.dataclass(frozen=True)
class _Where:
    """A mask volume read as 0 and 1, or the other way round."""

    inner: Any
    wanted: bool

    dtype = np.dtype(np.uint8)
    shape = property(lambda self: self.inner.shape)
    chunks = property(lambda self: self.inner.chunks)
    shards = property(lambda self: self.inner.shards)

    def read(self, box: tuple[slice, ...]) -> np.ndarray:
        return ((self.inner.read(box) != 0) == self.wanted).astype(np.uint8)


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

"""Scores of a stored segmentation, computed by blocks, with the curve of its merge history and its worst errors."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.inference.scoring import count
from emjax.inference.segmentation import Merges
from emjax.metrics import BrokenObject, Contingency, Scores, merge_list, score_table, split_list

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


@dataclasses.dataclass(frozen=True)
class Where:
    """A mask volume read as 0 and 1, or the other way round."""

    inner: Any
    wanted: bool

    dtype = np.dtype(np.uint8)
    shape = property(lambda self: self.inner.shape)
    chunks = property(lambda self: self.inner.chunks)
    shards = property(lambda self: self.inner.shards)

    def read(self, box: tuple[slice, ...]) -> np.ndarray:
        return ((self.inner.read(box) != 0) == self.wanted).astype(np.uint8)

    def write(self, box: tuple[slice, ...], array: np.ndarray) -> None:
        raise UserError("a mask that is being read cannot be written")

"""Matching of whole instances (mitochondria, nuclei, neurons) at thresholds of intersection over union."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from emjax.metrics.contingency import Contingency

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclasses.dataclass(frozen=True)
class Matching:
    """One-to-one matching of predicted and true instances at one IoU threshold.

    Attributes:
        threshold: the IoU that a pair must reach (``>=``).
        true_positives, false_positives, false_negatives: numbers of instances.
        mean_iou: mean IoU of the matched pairs (0 without any): the segmentation quality.
        pairs: (true id, predicted id, IoU) of the matches, by falling IoU.
    """

    threshold: float
    true_positives: int
    false_positives: int
    false_negatives: int
    mean_iou: float
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.false_negatives)

    @property
    def accuracy(self) -> float:
        """TP / (TP + FP + FN): what cell-segmentation papers (DSB 2018, StarDist) call "average precision"."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)

    @property
    def panoptic_quality(self) -> float:
        """F1 times mean IoU of the matches (Kirillov et al. 2019)."""
        return self.f1 * self.mean_iou


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """Average precision (area under the precision-recall curve of ranked predictions), one per threshold."""

    thresholds: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the thresholds: "AP" or "mAP" of COCO if these are 0.5, 0.55, ... 0.95."""
        return float(np.mean(self.values))

    def at(self, threshold: float) -> float:
        """AP at one threshold, such as ``at(0.75)``.

        Raises:
            ValueError: the threshold was not asked for.
        """
        for known, value in zip(self.thresholds, self.values):
            if math.isclose(known, threshold):
                return value
        raise ValueError(f"threshold {threshold} is not among {self.thresholds}")


def match_instances(table: Contingency, threshold: float = 0.5) -> Matching:
    """Matches instances by IoU, pairs of highest IoU first.

    Unlike the scores of partitions, ground truth 0 counts here: it is background, and a predicted instance that
    covers it pays with a larger union. Leave ignore regions out with the mask of ``contingency``.

    Args:
        table: overlaps of instances (0 = background on both sides).
        threshold: least IoU of a match, in (0, 1].

    Returns:
        The matching. At thresholds >= 0.5 it is the only possible one (up to pairs at exactly 0.5); below it is greedy.

    Raises:
        ValueError: the threshold is not in (0, 1].
    """
    threshold = _threshold(threshold)
    labels, segments, iou = _ious(table)
    order = np.lexsort((segments, labels, -iou))
    used_labels: set[int] = set()
    used_segments: set[int] = set()
    pairs = []
    for row in order[: np.count_nonzero(iou >= threshold)]:
        label, segment = int(labels[row]), int(segments[row])
        if label not in used_labels and segment not in used_segments:
            used_labels.add(label)
            used_segments.add(segment)
            pairs.append((label, segment, float(iou[row])))
    return Matching(
        threshold=threshold,
        true_positives=len(pairs),
        false_positives=int(np.count_nonzero(table.segment_sizes[0])) - len(pairs),
        false_negatives=int(np.count_nonzero(table.label_sizes[0])) - len(pairs),
        mean_iou=float(np.mean([pair[2] for pair in pairs])) if pairs else 0.0,
        pairs=tuple(pairs),
    )


def average_precision(
    table: Contingency,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    confidence: Mapping[int, float] | None = None,
) -> AveragePrecision:
    """COCO's average precision with 3D IoU, as MitoEM reports it (AP-50, AP-75, AP-50:95).

    Predictions are ranked by confidence; each takes the best still unmatched object with IoU >= threshold. Precision
    is made monotone and averaged at recalls 0, 0.01, ... 1 (COCO's 101 points).

    Args:
        table: overlaps of instances (0 = background on both sides), see ``match_instances``.
        thresholds: IoU thresholds in (0, 1].
        confidence: predicted id -> confidence. By default the number of voxels, so that the largest come first.

    Returns:
        One value per threshold; NaN if there is no true instance.

    Raises:
        ValueError: a threshold outside (0, 1], none at all, or a prediction without confidence.
    """
    limits = tuple(_threshold(value) for value in thresholds)
    if not limits:
        raise ValueError("thresholds is empty; expected at least one IoU threshold")
    ids, sizes = table.segment_sizes
    ids, sizes = ids[ids != 0], sizes[ids != 0]
    if confidence is None:
        rank_by = sizes.astype(np.float64)
    else:
        missing = [int(segment) for segment in ids if int(segment) not in confidence]
        if missing:
            raise ValueError(f"confidence lacks predicted instance {missing[0]}")
        rank_by = np.array([confidence[int(segment)] for segment in ids], np.float64)
    objects = int(np.count_nonzero(table.label_sizes[0]))
    ranking = ids[np.lexsort((ids, -rank_by))]
    labels, segments, iou = _ious(table)
    order = np.lexsort((labels, -iou, segments))
    labels, segments, iou = labels[order], segments[order], iou[order]
    starts, ends = np.searchsorted(segments, ranking, "left"), np.searchsorted(segments, ranking, "right")
    values = []
    for limit in limits:
        taken: set[int] = set()
        hits = np.zeros(len(ranking), bool)
        for place, (start, end) in enumerate(zip(starts, ends)):
            for row in range(start, end):
                if iou[row] < limit:
                    break
                if int(labels[row]) not in taken:
                    taken.add(int(labels[row]))
                    hits[place] = True
                    break
        values.append(_area(hits, objects))
    return AveragePrecision(limits, tuple(values))


def _ious(table: Contingency) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.float64]]:
    keep = (table.labels != 0) & (table.segments != 0)
    shared = table.counts[keep]
    union = table.size_of_label[keep] + table.size_of_segment[keep] - shared
    return table.labels[keep], table.segments[keep], shared / union


def _area(hits: NDArray[np.bool_], objects: int) -> float:
    if objects == 0:
        return math.nan
    found = np.cumsum(hits)
    recall, precision = found / objects, found / np.arange(1, len(hits) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    # The small allowance keeps recalls such as 3/10 on the right side of their grid point.
    place = np.searchsorted(recall, np.linspace(0, 1, 101) - 1e-12)
    return float(np.append(precision, 0.0)[np.minimum(place, len(hits))].mean())


def _threshold(value: float) -> float:
    if not 0 < value <= 1:
        raise ValueError(f"threshold is {value}; expected an IoU in (0, 1]")
    return float(value)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

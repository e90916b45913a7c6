"""Dice and IoU of classes (binary masks and semantic labels), from counts that add over blocks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emjax.metrics.contingency import same_shape


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Voxel counts of one class against the rest; ``+`` adds disjoint blocks.

    The ratios are 1 where prediction and truth are both empty, 0 where only one is.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    @property
    def dice(self) -> float:
        wrong = self.false_positives + self.false_negatives
        return _ratio(2 * self.true_positives, 2 * self.true_positives + wrong)

    @property
    def iou(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives + self.false_negatives)

    @property
    def precision(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def accuracy(self) -> float:
        return _ratio(self.true_positives + self.true_negatives, sum(dataclasses.astuple(self)))


def overlap(prediction: NDArray, labels: NDArray, mask: NDArray | None = None) -> Overlap:
    """Counts of a binary class.

    Args:
        prediction: foreground where not 0, any shape and type.
        labels: truth, same shape.
        mask: voxels to count where not 0; all if None.

    Raises:
        ValueError: shapes differ.
    """
    predicted, true = _foreground(prediction, labels)
    if mask is not None:
        mask = np.asarray(mask)
        same_shape(mask, true, "mask", "labels")
        predicted, true = predicted[mask != 0], true[mask != 0]
    both = int(np.count_nonzero(predicted & true))
    in_prediction, in_truth = int(np.count_nonzero(predicted)), int(np.count_nonzero(true))
    return Overlap(both, in_prediction - both, in_truth - both, true.size - in_prediction - in_truth + both)


def class_overlaps(
    prediction: NDArray, labels: NDArray, classes: Sequence[int], mask: NDArray | None = None
) -> dict[int, Overlap]:
    """``overlap`` of each class of a semantic segmentation, class id -> counts."""
    prediction, labels = np.asarray(prediction), np.asarray(labels)
    return {int(c): overlap(prediction == c, labels == c, mask) for c in classes}


def per_slice_overlap(prediction: NDArray, labels: NDArray) -> list[Overlap]:
    """``overlap`` of every section (first axis)."""
    predicted, true = _foreground(prediction, labels)
    return [overlap(*pair) for pair in zip(predicted, true)]


def soft_dice(probability: ArrayLike, target: ArrayLike, smooth: float = 0.0) -> float:
    """(2 sum(p t) + smooth) / (sum p + sum t + smooth) over all voxels; 1 if that is 0/0."""
    p, t = np.asarray(probability, np.float64), np.asarray(target, np.float64)
    same_shape(p, t, "probability", "target")
    return _ratio(2 * float((p * t).sum()) + smooth, float(p.sum() + t.sum()) + smooth)


@dataclasses.dataclass(frozen=True)
class ReferenceEvaluation:
    """What SAM4EM's evaluator reports, defects included; prefer ``overlap`` and ``per_slice_overlap``."""

    iou: float
    dice: float
    accuracy: float


def reference_sam4em_evaluation(
    prediction: NDArray, labels: NDArray, batches: Sequence[int] | None = None
) -> ReferenceEvaluation:
    """SAM4EM's numbers: means over slices of IoU and Dice that are 0 where either side is empty, and its accuracy.

    The reference compares every prediction with every label of its batch (shapes (B, 1, H, W) and (B, H, W)
    broadcast), so its accuracy depends on the batch sizes.

    Args:
        prediction: (slices, y, x), foreground where not 0.
        labels: same shape.
        batches: slices per batch, in order; one batch of all slices if None.

    Raises:
        ValueError: shapes differ or are not (slices, y, x), or ``batches`` do not add up to the slices.
    """
    predicted, true = _foreground(prediction, labels)
    if predicted.ndim != 3:
        raise ValueError(f"prediction has {predicted.ndim} axes; expected (slices, y, x)")
    sizes = [len(true)] if batches is None else [int(size) for size in batches]
    if sum(sizes) != len(true) or min(sizes, default=0) < 0:
        raise ValueError(f"batches {sizes} do not add up to {len(true)} slices")
    slices = per_slice_overlap(predicted, true)
    emptied = [part.true_positives == 0 for part in slices]
    # The reference keeps its accuracy in float32.
    accuracy, start = np.float32(0), 0
    for size in sizes:
        stop = start + size
        pairs = [np.mean(one == other) for one in predicted[start:stop] for other in true[start:stop]]
        accuracy += np.float32(size) * np.float32(np.mean(pairs)) if pairs else np.float32(0)
        start = stop
    return ReferenceEvaluation(
        iou=float(np.mean([0.0 if empty else part.iou for part, empty in zip(slices, emptied)])),
        dice=float(np.mean([0.0 if empty else part.dice for part, empty in zip(slices, emptied)])),
        accuracy=float(accuracy / np.float32(len(true))) if len(true) else math.nan,
    )


def _foreground(prediction: NDArray, labels: NDArray) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    prediction, labels = np.asarray(prediction), np.asarray(labels)
    same_shape(prediction, labels, "prediction", "labels")
    return prediction != 0, labels != 0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 1.0

"""Scores of semantic volumes, class by class: read slab by slab, surfaces and objects where a volume fits into memory."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emjax.data.volume import Volume, blocks
from emjax.errors import UserError
from emjax.inference.scoring import block_of, check_ids
from emjax.metrics import ClassScores, Shapes, SliceCounts, class_shapes

DEFINITIONS = {
    "dice": "Dice of all voxels of the volume together; 1 if both sides are empty",
    "iou": "intersection over union, likewise",
    "precision": "share of the predicted voxels that are true",
    "recall": "share of the true voxels that are predicted",
    "slice_dice": "mean Dice over slices, 1 where a slice is rightly empty",
    "slice_iou": "mean IoU over slices, likewise",
    "reference_slice_dice": "mean Dice over slices as SAM4EM's evaluator has it, 0 where a slice is rightly empty",
    "reference_slice_iou": "mean IoU over slices, likewise",
    "hd95": "95th percentile of the distances between surfaces, nm (MedPy); infinite if one side is empty",
    "assd": "average symmetric surface distance, nm (MedPy)",
    "ap50": "COCO's average precision of connected components (26 neighbours) at an IoU of 0.5, ranked by size",
    "ap75": "the same at 0.75",
    "ap": "the same, mean over 0.5, 0.55, ... 0.95",
    "true_objects": "connected components of the truth",
    "predicted_objects": "connected components of the prediction",
    "true_voxels": "voxels of the class in the truth",
    "predicted_voxels": "voxels of the class in the prediction",
}
ANY = -1
"""Stands for every label but 0."""


@dataclasses.dataclass(frozen=True)
class SemanticClass:
    """A class and the label values that stand for it; :data:`ANY` is every value but 0."""

    name: str
    predicted: int
    true: int

    def of_prediction(self, labels: np.ndarray) -> np.ndarray:
        return _where(labels, self.predicted)

    def of_truth(self, labels: np.ndarray) -> np.ndarray:
        return _where(labels, self.true)


def _where(labels: np.ndarray, value: int) -> np.ndarray:
    return labels != 0 if value == ANY else labels == value


def parse_classes(text: str) -> tuple[SemanticClass, ...]:
    """Classes from ``mito=1,glia=2``; ``mito=1:7`` where the truth says 7, ``mito=1:any`` where it holds object ids.

    Raises:
        UserError: not of this form, or a name or a predicted value is there twice.
    """
    found = []
    for part in text.split(","):
        name, equals, values = part.strip().partition("=")
        predicted, colon, true = values.partition(":")
        try:
            if not name or not equals:
                raise ValueError
            found.append(SemanticClass(name, _value(predicted), _value(true if colon else predicted)))
        except ValueError:
            raise UserError(
                f"--classes {text}: {part.strip()!r} is not NAME=VALUE or NAME=VALUE:TRUE (a label value, or any)"
            ) from None
    for field in ("name", "predicted"):
        values_ = [getattr(one, field) for one in found]
        twice = next((value for value in values_ if values_.count(value) > 1), None)
        if twice is not None:
            raise UserError(f"--classes {text}: {twice!r} is there twice")
    return tuple(found)


def _value(text: str) -> int:
    if text == "any":
        return ANY
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def classes_in(labels: Volume, most_voxels: int = 1 << 27, most_classes: int = 64) -> tuple[SemanticClass, ...]:
    """Every value of a semantic ground truth but 0, as a class of its own.

    Raises:
        UserError: not labels, none but 0, or so many values that they are objects.
    """
    check_ids(labels, "classes")
    values: set[int] = set()
    for box in blocks(labels.spatial_shape, block_of(labels, most_voxels)):
        values.update(np.unique(labels[box]).tolist())
        if len(values) > most_classes + 1:
            raise UserError(
                f"{labels.spec}: more than {most_classes} label values, which are objects rather than classes; name "
                "what to score with --classes, such as --classes mito=1:any"
            )
    values.discard(0)
    if not values:
        raise UserError(f"{labels.spec}: no voxel of any class")
    return tuple(SemanticClass(f"class {value}", value, value) for value in sorted(values))


@dataclasses.dataclass(frozen=True)
class SemanticEvaluation:
    """Scores by class name; ``notes`` say what was not computed or is odd."""

    scores: Mapping[str, ClassScores]
    variant: str
    notes: tuple[str, ...]
    voxel_size: tuple[float, float, float]


def evaluate_classes(
    segmentation: Volume,
    labels: Volume,
    classes: Sequence[SemanticClass],
    mask: Volume | None = None,
    *,
    variant: str = "",
    most_voxels: int = 1 << 27,
    progress: Callable[[int], None] = lambda voxels: None,
) -> SemanticEvaluation:
    """Scores ``classes`` of ``segmentation`` against ``labels``.

    Voxels outside of ``mask`` are background on both sides. Surfaces and objects need the whole volume at once and are
    left out above ``most_voxels``.

    Raises:
        UserError: volumes that are not labels, of different shapes, or without a voxel size.
    """
    for volume, role in ((segmentation, "classes"), (labels, "classes")):
        check_ids(volume, role)
    for volume in (segmentation, *([mask] if mask is not None else [])):
        if volume.spatial_shape != labels.spatial_shape:
            raise UserError(
                f"{volume.spec} has the shape {volume.spatial_shape}, {labels.spec} {labels.spatial_shape} (z, y, x); "
                "expected the same (--align takes the region that both cover, by their offsets)"
            )
    known = labels if labels.voxel_size is not None else segmentation
    size = known.require_voxel_size()
    depth, height, width = labels.spatial_shape
    step = max(1, min(depth, most_voxels // (height * width)))
    whole = step == depth
    counts = {one.name: SliceCounts() for one in classes}
    shapes = {one.name: Shapes() for one in classes}
    for begin in range(0, depth, step):
        part = slice(begin, min(begin + step, depth))
        predicted, true = segmentation[part], labels[part]
        if mask is not None:
            inside = mask[part] != 0
            predicted, true = np.where(inside, predicted, 0), np.where(inside, true, 0)
        for one in classes:
            pair = one.of_prediction(predicted), one.of_truth(true)
            counts[one.name] += SliceCounts.of(*pair)
            if whole:
                shapes[one.name] = class_shapes(*pair, size)
        progress(true.size)
    notes = []
    if not whole:
        notes.append(f"distances and objects are left out: {depth * height * width} voxels do not fit into --memory")
    scores = {name: found.scores(shapes[name]) for name, found in counts.items()}
    for one in classes:
        found = scores[one.name]
        if not found.true_voxels:
            other = "either" if not found.predicted_voxels else "the ground truth"
            notes.append(f"class {one.name} is not in {other}")
    return SemanticEvaluation(scores, variant, tuple(notes), size)


def table(evaluation: SemanticEvaluation) -> list[str]:
    """The numbers as lines of text."""
    head = f"{'class':<12}{'Dice':>8}{'IoU':>8}{'precision':>11}{'recall':>8}{'Dice/slice':>12}{'HD95 nm':>10}"
    lines = [f"{head}{'ASSD nm':>10}{'AP-50':>8}{'AP':>8}{'objects':>14}"]
    for name, found in evaluation.scores.items():
        objects = f"{found.predicted_objects} for {found.true_objects}" if found.true_objects >= 0 else "-"
        lines.append(
            f"{name:<12}{found.dice:8.4f}{found.iou:8.4f}{found.precision:11.4f}{found.recall:8.4f}"
            f"{found.slice_dice:12.4f}{found.hd95:10.1f}{found.assd:10.2f}{found.ap50:8.3f}{found.ap:8.3f}{objects:>14}"
        )
    return lines


def as_json(evaluation: SemanticEvaluation, **context: Any) -> dict[str, Any]:
    """The evaluation as plain values; what is infinite or not a number is None."""
    scores = {
        name: {key: value if np.isfinite(value) else None for key, value in found.as_dict().items()}
        for name, found in evaluation.scores.items()
    }
    return {
        **context,
        "variant": evaluation.variant,
        "voxel_size": list(evaluation.voxel_size),
        "definitions": DEFINITIONS,
        "classes": scores,
        "notes": list(evaluation.notes),
    }

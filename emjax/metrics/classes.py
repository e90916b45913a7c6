"""The named numbers of one class of a semantic segmentation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emjax.metrics.contingency import contingency
from emjax.metrics.instances import average_precision
from emjax.metrics.overlap import Overlap, per_slice_overlap
from emjax.metrics.surface import surface_distances


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """One class against the rest; the name says the definition (see ``docs/metrics.md``).

    Attributes:
        dice, iou, precision, recall: of all voxels of the volume together.
        slice_dice, slice_iou: means over slices; 1 where a slice is rightly empty, 0 where one side alone is.
        reference_slice_dice, reference_slice_iou: as SAM4EM's evaluator has them: 0 also where a slice is rightly empty.
        hd95, assd: distances of surfaces in the unit of the voxel size (nm); infinite if one side is empty, NaN where
            they were not computed.
        ap50, ap75, ap: COCO's average precision of connected components (26 neighbours) at an IoU of 0.5, 0.75, and the
            mean over 0.5 to 0.95; NaN without true objects, or where they were not computed.
        true_objects, predicted_objects: numbers of components; -1 where they were not counted.
        true_voxels, predicted_voxels: voxels of the class.
    """

    dice: float
    iou: float
    precision: float
    recall: float
    slice_dice: float
    slice_iou: float
    reference_slice_dice: float
    reference_slice_iou: float
    hd95: float
    assd: float
    ap50: float
    ap75: float
    ap: float
    true_objects: int
    predicted_objects: int
    true_voxels: int
    predicted_voxels: int

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What needs the whole volume at once: surfaces and objects of a class; see :class:`ClassScores`."""

    hd95: float = math.nan
    assd: float = math.nan
    ap50: float = math.nan
    ap75: float = math.nan
    ap: float = math.nan
    true_objects: int = -1
    predicted_objects: int = -1


def components(mask: NDArray) -> NDArray[np.int32]:
    """Connected components (26 neighbours, or 8 in plane) of what is not 0, numbered from 1."""
    mask = np.asarray(mask) != 0
    return ndimage.label(mask, np.ones((3,) * mask.ndim))[0].astype(np.int32)


def class_shapes(prediction: NDArray, labels: NDArray, voxel_size: Sequence[float] | None = None) -> Shapes:
    """Surfaces and objects of a class, (z, y, x), foreground where not 0.

    Raises:
        ValueError: shapes differ, or ``voxel_size`` is not one positive number per axis.
    """
    distances = surface_distances(prediction, labels, voxel_size)
    table = contingency(components(prediction), components(labels))
    precision = average_precision(table)
    return Shapes(
        distances.hd95,
        distances.assd,
        precision.at(0.5),
        precision.at(0.75),
        precision.mean,
        int(np.count_nonzero(table.label_sizes[0])),
        int(np.count_nonzero(table.segment_sizes[0])),
    )


@dataclasses.dataclass(frozen=True)
class SliceCounts:
    """Counts of one class slice by slice; ``+`` puts stacks one behind the other."""

    slices: tuple[Overlap, ...] = ()

    def __add__(self, other: SliceCounts) -> SliceCounts:
        return SliceCounts(self.slices + other.slices)

    @classmethod
    def of(cls, prediction: NDArray, labels: NDArray) -> SliceCounts:
        """Of two stacks (z, y, x), foreground where not 0."""
        return cls(tuple(per_slice_overlap(prediction, labels)))

    def scores(self, shapes: Shapes) -> ClassScores:
        """All numbers together. Raises ``ValueError`` without a slice."""
        if not self.slices:
            raise ValueError("no slice was counted")
        total = sum(self.slices[1:], self.slices[0])
        hits = [part.true_positives > 0 for part in self.slices]
        return ClassScores(
            dice=total.dice,
            iou=total.iou,
            precision=total.precision,
            recall=total.recall,
            slice_dice=_mean([part.dice for part in self.slices]),
            slice_iou=_mean([part.iou for part in self.slices]),
            reference_slice_dice=_mean([part.dice if hit else 0.0 for part, hit in zip(self.slices, hits)]),
            reference_slice_iou=_mean([part.iou if hit else 0.0 for part, hit in zip(self.slices, hits)]),
            true_voxels=total.true_positives + total.false_negatives,
            predicted_voxels=total.true_positives + total.false_positives,
            **dataclasses.asdict(shapes),
        )


def score_class(
    prediction: NDArray,
    labels: NDArray,
    mask: NDArray | None = None,
    *,
    voxel_size: Sequence[float] | None = None,
) -> ClassScores:
    """Scores of one class of a volume that fits into memory.

    Args:
        prediction: (z, y, x), foreground where not 0.
        labels: truth, same shape.
        mask: voxels to count where not 0; elsewhere both sides are taken as background.
        voxel_size: nm (z, y, x); 1 if None, so that distances are in voxels.

    Raises:
        ValueError: shapes differ, no slice, or a wrong ``voxel_size``.
    """
    predicted, true = np.asarray(prediction) != 0, np.asarray(labels) != 0
    if mask is not None:
        predicted, true = predicted & (np.asarray(mask) != 0), true & (np.asarray(mask) != 0)
    return SliceCounts.of(predicted, true).scores(class_shapes(predicted, true, voxel_size))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))

"""Scores of segmentations. Usable alone: NumPy, SciPy and Numba are all it needs. Definitions: ``docs/metrics.md``."""

from emjax.metrics.border import border_mask
from emjax.metrics.classes import ClassScores, Shapes, SliceCounts, class_shapes, components, score_class
from emjax.metrics.contingency import Contingency, contingency, empty_contingency, merge_contingency
from emjax.metrics.error_lists import BrokenObject, Piece, merge_list, split_list
from emjax.metrics.fill import fill_unlabelled
from emjax.metrics.information import (
    NormalisedInformation,
    VariationOfInformation,
    normalised_information,
    variation_of_information,
)
from emjax.metrics.instances import (
    COCO_THRESHOLDS,
    AveragePrecision,
    Matching,
    average_precision,
    match_instances,
)
from emjax.metrics.overlap import (
    Overlap,
    ReferenceEvaluation,
    class_overlaps,
    overlap,
    per_slice_overlap,
    reference_sam4em_evaluation,
    soft_dice,
)
from emjax.metrics.rand import (
    AdaptedRand,
    RandSplitMerge,
    adapted_rand_cremi,
    adapted_rand_skimage,
    rand_split_merge,
)
from emjax.metrics.score import Scores, score, score_table
from emjax.metrics.skeletons import RunLength, expected_run_length, node_numbers, segments_at
from emjax.metrics.surface import SurfaceDistances, surface_distances

__all__ = [
    "COCO_THRESHOLDS",
    "AdaptedRand",
    "AveragePrecision",
    "BrokenObject",
    "ClassScores",
    "Contingency",
    "Matching",
    "NormalisedInformation",
    "Overlap",
    "Piece",
    "RandSplitMerge",
    "ReferenceEvaluation",
    "RunLength",
    "Scores",
    "Shapes",
    "SliceCounts",
    "SurfaceDistances",
    "VariationOfInformation",
    "adapted_rand_cremi",
    "adapted_rand_skimage",
    "average_precision",
    "border_mask",
    "class_overlaps",
    "class_shapes",
    "components",
    "contingency",
    "empty_contingency",
    "expected_run_length",
    "fill_unlabelled",
    "match_instances",
    "merge_contingency",
    "merge_list",
    "node_numbers",
    "normalised_information",
    "overlap",
    "per_slice_overlap",
    "rand_split_merge",
    "reference_sam4em_evaluation",
    "score",
    "score_class",
    "score_table",
    "segments_at",
    "soft_dice",
    "split_list",
    "surface_distances",
    "variation_of_information",
]

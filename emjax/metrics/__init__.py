"""Scores of segmentations. Usable alone: NumPy, SciPy and Numba are all it needs. Definitions: ``docs/metrics.md``."""

from emjax.metrics.contingency import Contingency, contingency, empty_contingency, merge_contingency
from emjax.metrics.error_lists import BrokenObject, Piece, merge_list, split_list
from emjax.metrics.information import (
    NormalisedInformation,
    VariationOfInformation,
    normalised_information,
    variation_of_information,
)
from emjax.metrics.rand import (
    AdaptedRand,
    RandSplitMerge,
    adapted_rand_cremi,
    adapted_rand_skimage,
    rand_split_merge,
)
from emjax.metrics.score import Scores, score, score_table

__all__ = [
    "AdaptedRand",
    "BrokenObject",
    "Contingency",
    "NormalisedInformation",
    "Piece",
    "RandSplitMerge",
    "Scores",
    "VariationOfInformation",
    "adapted_rand_cremi",
    "adapted_rand_skimage",
    "contingency",
    "empty_contingency",
    "merge_contingency",
    "merge_list",
    "normalised_information",
    "rand_split_merge",
    "score",
    "score_table",
    "split_list",
    "variation_of_information",
]

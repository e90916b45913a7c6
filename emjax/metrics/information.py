"""Variation of information and what is derived from the same entropies. Logarithms to base 2: bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from emjax.metrics.contingency import Contingency


@dataclasses.dataclass(frozen=True)
class VariationOfInformation:
    """Conditional entropies in bits; ``split`` = H(segmentation | truth), ``merge`` = H(truth | segmentation)."""

    split: float
    merge: float

    @property
    def sum(self) -> float:
        return self.split + self.merge


@dataclasses.dataclass(frozen=True)
class NormalisedInformation:
    """funlib.evaluate's forms: VOI over the joint entropy, and the normalised information distance; no unit, 0 is best.

    NaN if the joint entropy (the larger entropy) is 0, as with a single object and a single segment.
    """

    nvi_split: float
    nvi_merge: float
    nid: float

    @property
    def nvi_sum(self) -> float:
        return self.nvi_split + self.nvi_merge


def variation_of_information(table: Contingency, ignore: Iterable[int] = (0,)) -> VariationOfInformation:
    """VOI split and merge in bits (Meila 2007, "Comparing clusterings").

    Args:
        table: overlaps.
        ignore: ground-truth ids whose voxels are left out; ``()`` keeps all. Segment 0 is one ordinary segment.

    Returns:
        Both parts; NaN if no voxel is left.
    """
    table = table.without_labels(ignore)
    if not len(table):
        return VariationOfInformation(math.nan, math.nan)
    return VariationOfInformation(
        _conditional_entropy(table.counts, table.size_of_label),
        _conditional_entropy(table.counts, table.size_of_segment),
    )


def normalised_information(table: Contingency, ignore: Iterable[int] = (0,)) -> NormalisedInformation:
    """NVI split and merge and NID (funlib.evaluate ``rand_voi``; Vinh, Epps, Bailey 2010).

    nvi = VOI / H(truth, segmentation); nid = 1 - I(truth; segmentation) / max(H(truth), H(segmentation)).
    """
    table = table.without_labels(ignore)
    if not len(table):
        return NormalisedInformation(math.nan, math.nan, math.nan)
    voi = variation_of_information(table, ())
    joint = _entropy(table.counts)
    of_labels, of_segments = _entropy(table.label_sizes[1]), _entropy(table.segment_sizes[1])
    if joint == 0:
        return NormalisedInformation(math.nan, math.nan, math.nan)
    shared = of_segments - voi.split
    return NormalisedInformation(voi.split / joint, voi.merge / joint, 1 - shared / max(of_labels, of_segments))


def _entropy(counts: np.ndarray) -> float:
    share = counts / counts.sum()
    return float(-np.sum(share * np.log2(share))) + 0.0


def _conditional_entropy(counts: np.ndarray, given: np.ndarray) -> float:
    # One logarithm of a ratio per pair, not a difference of two entropies: equal partitions give exactly 0.
    return float(-np.sum(counts / counts.sum() * np.log2(counts / given))) + 0.0

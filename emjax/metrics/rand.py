"""Rand scores over pairs of voxels, in the four definitions that papers report.

They differ in the fourth digit or more, and "precision" and "recall" change places between them, so every result
says which definition it follows. With p the table of overlaps, a the sizes of ground-truth objects and b the sizes of
segments (each over the voxels that count):

=============  ===============================  ===============================
definition     precision                        recall
=============  ===============================  ===============================
scikit-image   sum p(p-1) / sum a(a-1)          sum p(p-1) / sum b(b-1)
CREMI          sum p^2 / sum b^2                sum p^2 / sum a^2
waterz,funlib  ``merge``: sum p^2 / sum b^2     ``split``: sum p^2 / sum a^2
=============  ===============================  ===============================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np

from emjax.metrics.contingency import Contingency


@dataclasses.dataclass(frozen=True)
class AdaptedRand:
    """Adapted Rand error (0 is best) with the precision and recall of the *same* definition (1 is best)."""

    error: float
    precision: float
    recall: float


@dataclasses.dataclass(frozen=True)
class RandSplitMerge:
    """waterz's Rand scores (1 is best): ``split`` falls with split objects, ``merge`` with merged ones."""

    split: float
    merge: float


def adapted_rand_skimage(table: Contingency, ignore: Iterable[int] = (0,)) -> AdaptedRand:
    """``skimage.metrics.adapted_rand_error``: the pairs of a voxel with itself are not counted; segment 0 is ordinary.

    ``precision`` and ``recall`` are named as scikit-image names them: precision falls with *splits*.

    Args:
        table: overlaps.
        ignore: ground-truth ids whose voxels are left out.

    Returns:
        Error, precision and recall; NaN where nothing is left to compare (0/0).
    """
    table = table.without_labels(ignore)
    pairs = _pairs(table.counts)
    of_labels, of_segments = _pairs(table.label_sizes[1]), _pairs(table.segment_sizes[1])
    return AdaptedRand(
        1 - _ratio(2 * pairs, of_labels + of_segments), _ratio(pairs, of_labels), _ratio(pairs, of_segments)
    )


def adapted_rand_cremi(table: Contingency, ignore: Iterable[int] = (0,)) -> AdaptedRand:
    """The adapted Rand error of the CREMI and SNEMI3D challenges (Arganda-Carreras et al. 2015).

    Self-pairs are counted, and every voxel with segment 0 stands for a segment of its own. ``precision`` falls with
    *merges*. NaN if no voxel is left.

    As in the challenge's evaluation, those lone voxels enter as c / n, c their number and n the number of *all* voxels
    of the table, those with ignored ground truth too.
    """
    voxels = table.total
    table = table.without_labels(ignore)
    if not len(table):
        return AdaptedRand(math.nan, math.nan, math.nan)
    labelled = table.without_segments((0,))
    singles = float(table.total - labelled.total) / voxels
    of_labels = _squares(table.label_sizes[1])
    of_segments = _squares(labelled.segment_sizes[1]) + singles
    both = _squares(labelled.counts) + singles
    precision, recall = _ratio(both, of_segments), _ratio(both, of_labels)
    return AdaptedRand(1 - _ratio(2 * precision * recall, precision + recall), precision, recall)


def rand_split_merge(table: Contingency, ignore: Iterable[int] = (0,)) -> RandSplitMerge:
    """waterz's and funlib.evaluate's ``rand_split`` and ``rand_merge``; NaN if no voxel is left."""
    table = table.without_labels(ignore)
    both = _squares(table.counts)
    return RandSplitMerge(_ratio(both, _squares(table.label_sizes[1])), _ratio(both, _squares(table.segment_sizes[1])))


def _squares(counts: np.ndarray) -> float:
    # float64: the square of a segment of 4e9 voxels leaves int64.
    values = counts.astype(np.float64)
    return float(values @ values)


def _pairs(counts: np.ndarray) -> float:
    values = counts.astype(np.float64)
    return float(values @ (values - 1))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan

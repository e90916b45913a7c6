"""The named numbers of a segmentation, all from one contingency table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

from numpy.typing import NDArray

from emjax.metrics.contingency import Contingency, contingency
from emjax.metrics.information import normalised_information, variation_of_information
from emjax.metrics.rand import adapted_rand_cremi, adapted_rand_skimage, rand_split_merge


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of one segmentation; the name says the definition (see ``docs/metrics.md``).

    VOI in bits; the others have no unit. Ground truth 0 is left out; segment 0 is one ordinary segment, except in
    ``arand_cremi`` where each of its voxels stands alone. Errors: 0 is best; precision, recall, rand: 1 is best.
    """

    voi_split: float
    voi_merge: float
    voi_sum: float
    arand_skimage: float
    arand_skimage_precision: float
    arand_skimage_recall: float
    arand_cremi: float
    arand_cremi_precision: float
    arand_cremi_recall: float
    cremi_score: float
    rand_split: float
    rand_merge: float
    nvi_split: float
    nvi_merge: float
    nid: float
    voxels: int
    unlabelled_fraction: float
    objects: int
    segments: int

    def as_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def score(
    segmentation: NDArray,
    labels: NDArray,
    mask: NDArray | None = None,
    *,
    ignore: Iterable[int] = (0,),
    threads: int = 1,
) -> Scores:
    """Scores a segmentation that fits into memory; ``score_table`` takes the sum of the blocks' tables instead.

    Args:
        segmentation: segment ids, (z, y, x), any integer type.
        labels: ground-truth ids, same shape.
        mask: voxels to score where true; all if None.
        ignore: ground-truth ids whose voxels are left out.
        threads: number of threads of the counting pass.

    Raises:
        ValueError: shapes differ, or ids are negative or not integers.
    """
    return score_table(contingency(segmentation, labels, mask, threads=threads), ignore)


def score_table(table: Contingency, ignore: Iterable[int] = (0,)) -> Scores:
    """The scores of a table (of a volume, or the sum of its blocks' tables); NaN if no voxel counts."""
    ignore = tuple(ignore)
    cremi = adapted_rand_cremi(table, ignore)
    table = table.without_labels(ignore)
    voi = variation_of_information(table, ())
    skimage, rand = adapted_rand_skimage(table, ()), rand_split_merge(table, ())
    normalised = normalised_information(table, ())
    total = table.total
    return Scores(
        voi_split=voi.split,
        voi_merge=voi.merge,
        voi_sum=voi.sum,
        arand_skimage=skimage.error,
        arand_skimage_precision=skimage.precision,
        arand_skimage_recall=skimage.recall,
        arand_cremi=cremi.error,
        arand_cremi_precision=cremi.precision,
        arand_cremi_recall=cremi.recall,
        cremi_score=math.sqrt(voi.sum * cremi.error) if total else math.nan,
        rand_split=rand.split,
        rand_merge=rand.merge,
        nvi_split=normalised.nvi_split,
        nvi_merge=normalised.nvi_merge,
        nid=normalised.nid,
        voxels=total,
        unlabelled_fraction=1 - table.without_segments((0,)).total / total if total else math.nan,
        objects=len(table.label_sizes[0]),
        segments=len(table.segment_sizes[0]),
    )

"""Distances between surfaces of masks: Hausdorff, its 95th percentile, and the mean (MedPy's definitions)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emjax.metrics.border import check_voxel_size
from emjax.metrics.contingency import same_shape


@dataclasses.dataclass(frozen=True)
class SurfaceDistances:
    """In the units of the voxel size.

    Attributes:
        hd: Hausdorff distance, the largest surface distance in either direction.
        hd95: 95th percentile of the distances of both directions together (MedPy; other tools take the larger of the
            two directions' percentiles).
        assd: mean of the distances of both directions together (MedPy since 0.5; before, and in other tools, the mean
            of the two directions' means, which is ``(asd_prediction + asd_labels) / 2``).
        asd_prediction: mean distance from the prediction's surface to the truth's.
        asd_labels: mean distance from the truth's surface to the prediction's.
    """

    hd: float
    hd95: float
    assd: float
    asd_prediction: float
    asd_labels: float


def surface_distances(
    prediction: NDArray, labels: NDArray, voxel_size: Sequence[float] | None = None, connectivity: int = 1
) -> SurfaceDistances:
    """HD, HD95 and ASSD of two masks, as ``medpy.metric.binary`` computes them.

    The surface is what a binary erosion takes away; voxels on the edge of the array belong to it.

    Args:
        prediction: foreground where not 0, any number of axes.
        labels: truth, same shape.
        voxel_size: one per axis (nm); 1 if None, which gives voxels.
        connectivity: of the erosion's structuring element (1 = faces).

    Returns:
        Distances; 0 if both masks are empty, infinite if only one is.

    Raises:
        ValueError: shapes differ, ``voxel_size`` is not one positive number per axis, ``connectivity`` out of range.
    """
    predicted, true = np.asarray(prediction) != 0, np.asarray(labels) != 0
    same_shape(predicted, true, "prediction", "labels")
    size = check_voxel_size((1.0,) * true.ndim if voxel_size is None else voxel_size, true.ndim)
    if not 1 <= connectivity <= max(true.ndim, 1):
        raise ValueError(f"connectivity is {connectivity}; expected 1 to {true.ndim}")
    if not predicted.any() or not true.any():
        value = 0.0 if predicted.any() == true.any() else math.inf
        return SurfaceDistances(value, value, value, value, value)
    box = ndimage.find_objects((predicted | true).astype(np.uint8))[0]
    predicted, true = _surface(predicted[box], connectivity), _surface(true[box], connectivity)
    forth = ndimage.distance_transform_edt(~true, sampling=size)[predicted]
    back = ndimage.distance_transform_edt(~predicted, sampling=size)[true]
    both = np.concatenate([forth, back])
    return SurfaceDistances(
        hd=float(both.max()),
        hd95=float(np.percentile(both, 95)),
        assd=float(both.mean()),
        asd_prediction=float(forth.mean()),
        asd_labels=float(back.mean()),
    )


def _surface(mask: NDArray[np.bool_], connectivity: int) -> NDArray[np.bool_]:
    structure = ndimage.generate_binary_structure(mask.ndim, connectivity)
    return mask ^ ndimage.binary_erosion(mask, structure)

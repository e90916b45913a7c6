"""Unlabelled voxels of a segmentation, given away before scoring (the "filled" variant)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from emjax.metrics.border import check_voxel_size
from emjax.metrics.contingency import check_ids


def fill_unlabelled(
    segmentation: NDArray,
    voxel_size: Sequence[float] = (1.0, 1.0, 1.0),
    *,
    mask: NDArray | None = None,
    max_distance: float | None = None,
) -> NDArray:
    """Gives every voxel of segment 0 the id of the nearest labelled voxel (Euclidean).

    Methods that leave membranes or uncertain voxels unlabelled (flood-filling networks, instance queries) are scored
    with 0 as one ordinary segment or filled; papers differ, and so do the numbers.

    Args:
        segmentation: ids, (z, y, x).
        voxel_size: z, y, x in nm; decides what "nearest" means.
        mask: fill only where true; everywhere if None.
        max_distance: leave voxels farther than this (units of ``voxel_size``) unlabelled; no limit if None.

    Returns:
        New array of the same type; a copy if nothing or everything is labelled.

    Raises:
        ValueError: ids not integers or negative, ``voxel_size`` not one positive number per axis, shapes differ.
    """
    segmentation = check_ids(segmentation, "segmentation")
    size = check_voxel_size(voxel_size, segmentation.ndim) if len(voxel_size) != 3 else check_voxel_size(voxel_size)
    size = size[-segmentation.ndim :]
    if mask is not None and np.shape(mask) != segmentation.shape:
        raise ValueError(f"mask has shape {np.shape(mask)} and segmentation {segmentation.shape}; expected the same")
    unlabelled = segmentation == 0
    if not unlabelled.any() or unlabelled.all():
        return segmentation.copy()
    distance, nearest = ndimage.distance_transform_edt(unlabelled, sampling=size, return_indices=True)
    chosen = unlabelled if mask is None else unlabelled & (np.asarray(mask) != 0)
    if max_distance is not None:
        chosen &= distance <= max_distance
    filled = segmentation.copy()
    filled[chosen] = segmentation[tuple(axis[chosen] for axis in nearest)]
    return filled

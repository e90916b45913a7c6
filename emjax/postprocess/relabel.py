"""Look-up tables over label volumes."""

import numpy as np
from numba import njit

from emjax.postprocess.threads import check_threads, each, ranges
from emjax.postprocess.volumes import check_labels


@njit(nogil=True, cache=True)
def _look_up(labels, lut, out, start, stop):
    """Returns the first place whose label the table lacks, or -1."""
    for i in range(start, stop):
        label = labels[i]
        if label >= lut.size:
            return i
        out[i] = lut[label]
    return -1


def apply(lut: np.ndarray, labels: np.ndarray, out: np.ndarray | None = None, *, threads: int = 1) -> np.ndarray:
    """``lut[labels]``: the segment of each fragment's voxels.

    Args:
      lut: (n,) whole numbers, such as ``MergeTree.cut`` gives.
      labels: whole numbers below n, any shape.
      out: where to write; may be ``labels`` itself if the dtypes agree.

    Returns:
      An array of the shape of ``labels`` and the dtype of ``lut``.

    Raises:
      ValueError: labels that the table lacks, negative ones, or an ``out`` of another shape or dtype.
    """
    threads = check_threads(threads)
    lut = np.ascontiguousarray(lut)
    if lut.ndim != 1 or lut.dtype.kind not in "ui":
        raise ValueError(f"lut is {lut.dtype} of shape {lut.shape}; expected one axis of whole numbers")
    given = np.asarray(labels)
    labels = check_labels(given, "labels", ndim=None)
    if out is None:
        out = np.empty(labels.shape, lut.dtype)
    elif out.shape != labels.shape or out.dtype != lut.dtype or not out.flags.c_contiguous:
        raise ValueError(
            f"out is {out.dtype} of shape {out.shape}; expected C-contiguous {lut.dtype} of shape {labels.shape}"
        )
    flat, flat_out = labels.reshape(-1), out.reshape(-1)
    parts = ranges(flat.size, threads)
    wrong = [i for i in each(lambda a, b: _look_up(flat, lut, flat_out, a, b), parts, threads) if i >= 0]
    if wrong:
        raise ValueError(f"labels holds the id {flat[wrong[0]]}; lut has {lut.size} entries: expected smaller ids")
    return out

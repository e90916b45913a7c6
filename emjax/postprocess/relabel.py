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


@njit(nogil=True, cache=True)
def _renumber(labels, out, table, ids, limit):
    """Numbers labels 1, 2, ... as they come; stops at ``limit`` different ones. Returns (labels done, how many ids)."""
    mask = np.uint64(table.shape[0] - 1)
    count = np.int64(0)
    previous = labels.dtype.type(0)
    number = np.uint32(0)
    for i in range(labels.size):
        label = labels[i]
        if label != previous:
            previous = label
            number = np.uint32(0)
            if label != 0:
                mixed = np.uint64(label) * np.uint64(0x9E3779B97F4A7C15)
                slot = (mixed ^ (mixed >> np.uint64(32))) & mask
                while table[slot] != 0 and ids[table[slot]] != label:
                    slot = (slot + np.uint64(1)) & mask
                if table[slot] == 0:
                    if count == limit:
                        return i, count
                    count += 1
                    table[slot] = count
                    ids[count] = label
                number = table[slot]
        out[i] = number
    return labels.size, count


def renumber(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels as 1, 2, ... in order of their first voxel, and what each of them was.

    Args:
      labels: whole numbers, any shape; 0 stays 0.

    Returns:
      uint32 of the shape of ``labels``, and (n + 1,) ids of the dtype of ``labels``, so that ``ids[new]`` is
      ``labels``.

    Raises:
      ValueError: not whole numbers, negative ones, or an axis of length zero.
    """
    labels = check_labels(labels, "labels", ndim=None)
    flat = labels.reshape(-1)
    out = np.empty(flat.size, np.uint32)
    # Large enough for most volumes of fragments; if not, started again with a table four times the size.
    limit = min(flat.size, max(1024, flat.size // 16))
    while True:
        ids = np.zeros(limit + 1, labels.dtype)
        table = np.zeros(1 << max(4, (2 * limit).bit_length()), np.uint32)
        done, count = _renumber(flat, out, table, ids, limit)
        if done == flat.size:
            return out.reshape(labels.shape), ids[: count + 1].copy()
        limit = min(flat.size, 4 * limit)

"""Label ids: special ids become an explicit ignore mask, large ids become int32."""

import numpy as np

from emjax.errors import UserError

# The four largest uint64 are not ids: CREMI's "no label" is 2^64 - 1, BigDataViewer and Paintera use it for
# transparent, 2^64 - 2 for invalid and 2^64 - 3 for outside, and end their ids at 2^64 - 4.
FIRST_SPECIAL = 2**64 - 3


def split_ignored(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels with special ids set to 0, and the mask of the voxels that had one.

    Args:
        labels: integer array of any shape. uint64: ids from 2^64 - 3 are special; signed types: negative ids are.

    Returns:
        Labels of the same dtype and a bool array, True where the label says "ignore". Without special ids the labels
        are the array that was given.
    """
    if labels.dtype == np.uint64:
        ignored = labels >= np.uint64(FIRST_SPECIAL)
    elif labels.dtype.kind == "i":
        ignored = labels < 0
    else:
        return labels, np.zeros(labels.shape, bool)
    if not ignored.any():
        return labels, ignored
    return np.where(ignored, labels.dtype.type(0), labels), ignored


def compact_labels(labels: np.ndarray, *, always: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels as int32, the type in which ids travel to the model; 0 stays 0.

    Args:
        labels: integer array of any shape, special ids already split off.
        always: renumber to 1, 2, ... in rising order of id even where the ids fit.

    Returns:
        int32 labels, and the table of the original ids (``table[new] = old``, ``table[0] = 0``), or None if the ids are
        kept.

    Raises:
        UserError: negative labels, or no integers.
    """
    if labels.dtype.kind not in "iub":
        raise UserError(f"labels are {labels.dtype.name}, expected integers")
    if not labels.size:
        return labels.astype(np.int32), None
    if labels.dtype.kind == "i" and int(labels.min()) < 0:
        raise UserError(f"labels hold negative ids, the least is {int(labels.min())}; split_ignored makes them a mask")
    if not always and (labels.dtype.itemsize < 4 or int(labels.max()) <= np.iinfo(np.int32).max):
        return labels.astype(np.int32, copy=False), None
    # Ids come in runs along x, so sorting the first voxel of each run is enough.
    flat = np.ascontiguousarray(labels).ravel()
    starts = np.flatnonzero(np.concatenate(([True], flat[1:] != flat[:-1])))
    table, numbers = np.unique(flat[starts], return_inverse=True)
    if table[0] != 0:
        table, numbers = np.concatenate((np.zeros(1, table.dtype), table)), numbers + 1
    lengths = np.diff(np.append(starts, flat.size))
    return np.repeat(numbers.astype(np.int32), lengths).reshape(labels.shape), table

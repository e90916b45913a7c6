"""Stable radix sort of keys with their places, for queues and edges that must come in exact order."""

import numba
import numpy as np


def radix_sort(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorts unsigned integers, rising, and carries values along; equal keys keep their order.

    Args:
      keys: (n,) uint32 or uint64; overwritten.
      values: (n,) of any type; overwritten.

    Returns:
      Sorted keys and their values: the arrays given, or as large ones that were made on the way.
    """
    if keys.dtype == np.uint32 and values.dtype == np.uint32:
        pairs = _sorted_pairs(_packed(keys, values))
        return (pairs >> np.uint64(32)).astype(np.uint32), pairs.astype(np.uint32)
    other_keys, other_values = np.empty_like(keys), np.empty_like(values)
    for shift in range(0, 8 * keys.itemsize, 11):
        if _pass(keys, values, other_keys, other_values, shift):
            keys, other_keys = other_keys, keys
            values, other_values = other_values, values
    return keys, values


def ordered_keys(values: np.ndarray) -> np.ndarray:
    """Unsigned integers in the order of real numbers; -0 and +0 share one.

    Args:
      values: any shape, integers or floats up to 64 bits, no NaN.

    Returns:
      (n,) uint32 for floats that float32 holds exactly, else uint64, in raster order.
    """
    if values.dtype.kind == "f":
        narrow = np.ascontiguousarray(values, np.float32)
        if values.dtype.itemsize <= 4 or np.array_equal(narrow, values):
            keys: np.ndarray = np.empty(values.size, np.uint32)
            _float_keys(narrow.reshape(-1).view(np.uint32), np.uint32(1 << 31), keys)
        else:
            keys = np.empty(values.size, np.uint64)
            wide = np.ascontiguousarray(values, np.float64)
            _float_keys(wide.reshape(-1).view(np.uint64), np.uint64(1 << 63), keys)
        return keys
    keys = values.astype(np.uint64).reshape(-1)
    return keys ^ np.uint64(1 << 63) if values.dtype.kind == "i" else keys


def dense_ranks(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The rank of each value among the distinct values, uint32 of the same shape; and the number of distinct values."""
    keys = ordered_keys(values)
    ranks = np.empty(values.size, np.uint32)
    if keys.dtype == np.uint32 and values.size < 2**32:
        pairs = _sorted_pairs(_packed(keys, np.arange(values.size, dtype=np.uint32)))
        return ranks.reshape(values.shape), int(_number_pairs(pairs, ranks))
    keys, order = radix_sort(keys, np.arange(values.size, dtype=np.int64))
    return ranks.reshape(values.shape), int(_number_sorted(keys, order, ranks))


def _sorted_pairs(pairs: np.ndarray) -> np.ndarray:
    """Stable by the upper halves; one stream through memory for key and value together."""
    other = np.empty_like(pairs)
    for shift in (32, 43, 54):
        if _pass_pairs(pairs, other, shift):
            pairs, other = other, pairs
    return pairs


@numba.njit(nogil=True, cache=True)
def _packed(keys, values):
    pairs = np.empty(len(keys), np.uint64)
    for place in range(len(keys)):
        pairs[place] = np.uint64(keys[place]) << np.uint64(32) | np.uint64(values[place])
    return pairs


@numba.njit(nogil=True, cache=True)
def _pass_pairs(pairs, sorted_pairs, shift):
    """As ``_pass``, key and value in one number."""
    starts = np.zeros(2048, np.uint64)
    by, digits = np.uint64(shift), np.uint64(2047)
    for pair in pairs:
        starts[(pair >> by) & digits] += np.uint64(1)
    if starts.max() == len(pairs):
        return False
    total = np.uint64(0)
    for digit in range(2048):
        here = starts[digit]
        starts[digit] = total
        total += here
    for pair in pairs:
        digit = (pair >> by) & digits
        sorted_pairs[starts[digit]] = pair
        starts[digit] += np.uint64(1)
    return True


@numba.njit(nogil=True, cache=True)
def _number_pairs(pairs, ranks):
    rank = 0
    last = pairs[0] >> np.uint64(32) if len(pairs) else np.uint64(0)
    for pair in pairs:
        key = pair >> np.uint64(32)
        if key != last:
            rank += 1
            last = key
        ranks[pair & np.uint64(0xFFFFFFFF)] = rank
    return rank + 1


@numba.njit(nogil=True, cache=True)
def _float_keys(pattern, sign, keys):
    for place in range(len(pattern)):
        bits = pattern[place]
        keys[place] = bits | sign if bits & sign == 0 or bits == sign else ~bits


@numba.njit(nogil=True, cache=True)
def _pass(keys, values, new_keys, new_values, shift):
    """One stable counting pass over 11 bits; False, with nothing moved, if all keys share them."""
    starts = np.zeros(2048, np.int64)
    for place in range(len(keys)):
        starts[(keys[place] >> shift) & 2047] += 1
    if starts.max() == len(keys):
        return False
    total = 0
    for digit in range(2048):
        here = starts[digit]
        starts[digit] = total
        total += here
    for place in range(len(keys)):
        digit = (keys[place] >> shift) & 2047
        target = starts[digit]
        starts[digit] = target + 1
        new_keys[target] = keys[place]
        new_values[target] = values[place]
    return True


@numba.njit(nogil=True, cache=True)
def _number_sorted(keys, order, ranks):
    rank = 0
    for place in range(len(keys)):
        if place > 0 and keys[place] != keys[place - 1]:
            rank += 1
        ranks[order[place]] = rank
    return rank + 1

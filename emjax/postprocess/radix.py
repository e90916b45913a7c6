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
        pairs = sorted_pairs(keys, values)
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


def sorted_pairs(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Keys in the upper and values in the lower half of one number each, stably sorted by key.

    Args:
      keys: (n,) uint32.
      values: (n,) uint32.

    Returns:
      (n,) uint64. One stream through memory for both is what makes it faster than two arrays.
    """
    pairs = packed(keys, values)
    if len(keys) == 0:
        return pairs
    # Bits above the highest that differs need no pass: floats of 0 to 1 differ in 30 at most.
    bits = int(_differing(keys)).bit_length()
    passes = -(-bits // 11)
    if passes == 0:
        return pairs
    width = -(-bits // passes)
    counts = _digit_counts(keys, passes, width)
    other = np.empty_like(pairs)
    for index in range(passes):
        _pass_pairs(pairs, other, 32 + index * width, counts[index])
        pairs, other = other, pairs
    return pairs


@numba.njit(nogil=True, cache=True)
def packed(keys, values):
    """``sorted_pairs`` without the sort."""
    pairs = np.empty(len(keys), np.uint64)
    for place in range(len(keys)):
        pairs[place] = np.uint64(keys[place]) << np.uint64(32) | np.uint64(values[place])
    return pairs


@numba.njit(nogil=True, cache=True)
def _differing(keys):
    first, bits = keys[0], np.uint32(0)
    for key in keys:
        bits |= key ^ first
    return bits


@numba.njit(nogil=True, cache=True)
def _digit_counts(keys, passes, width):
    """How often each digit occurs, for all passes in one reading."""
    counts = np.zeros((passes, 1 << width), np.uint64)
    by, digits = np.uint64(width), np.uint64((1 << width) - 1)
    for key in keys:
        rest = np.uint64(key)
        for index in range(passes):
            counts[index, rest & digits] += np.uint64(1)
            rest >>= by
    return counts


@numba.njit(nogil=True, cache=True)
def _pass_pairs(pairs, sorted_pairs, shift, counts):
    """One stable counting pass; ``counts`` of the digits become the ends of their runs."""
    by, digits = np.uint64(shift), np.uint64(len(counts) - 1)
    total = np.uint64(0)
    for digit in range(len(counts)):
        here = counts[digit]
        counts[digit] = total
        total += here
    for pair in pairs:
        digit = (pair >> by) & digits
        sorted_pairs[counts[digit]] = pair
        counts[digit] += np.uint64(1)


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

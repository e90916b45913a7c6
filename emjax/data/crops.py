"""A crop on its way to the network: a dict of arrays of one shape, and the pure operations on it.

``image`` is uint8 (0..255) or float32 (0..1), ``labels`` int32 ids, ``mask`` uint8 (1 = counts in the loss). Whatever
is not called ``image`` holds ids, and is never interpolated.
"""

import math
from typing import Any

import numba
import numpy as np
from scipy import ndimage

from emjax.errors import UserError

Shape = tuple[int, int, int]
Sample = dict[str, np.ndarray]
# The random part of one augmentation as plain values and arrays; None leaves the sample as it is.
Draws = dict[str, Any] | None

INT32_MAX = np.iinfo(np.int32).max


def check_probability(owner: object, p: float) -> None:
    """Raises UserError unless 0 <= p <= 1."""
    if not 0.0 <= p <= 1.0:
        raise UserError(f"{type(owner).__name__}.p: found {p}, expected a probability between 0 and 1")


def check_range(owner: object, name: str, value: tuple[float, float], low: float, high: float = math.inf) -> None:
    """Raises UserError unless ``value`` is (smallest, largest) with low <= smallest <= largest <= high."""
    if len(value) != 2 or not low <= value[0] <= value[1] <= high:
        limits = f"from {low:g} up" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise UserError(
            f"{type(owner).__name__}.{name}: found {tuple(value)}, expected (smallest, largest) in order, {limits}"
        )


def check_choice(owner: object, name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise UserError(f"{type(owner).__name__}.{name}: found {value!r}, expected one of {', '.join(choices)}")


def shape_of(sample: Sample) -> Shape:
    """The common (z, y, x) of a sample."""
    z, y, x = sample["image"].shape
    return z, y, x


def centre_crop(sample: Sample, shape: Shape) -> Sample:
    """The middle ``shape`` (z, y, x) of every array, as views; of an odd rest the larger half goes to the end."""
    have = shape_of(sample)
    if have == tuple(shape):
        return sample
    if any(n < m for n, m in zip(have, shape)):
        raise ValueError(f"centre_crop: sample of {have} is smaller than {tuple(shape)}")
    window = tuple(slice((n - m) // 2, (n - m) // 2 + m) for n, m in zip(have, shape))
    return {name: array[window] for name, array in sample.items()}


def as_float(image: np.ndarray) -> np.ndarray:
    """The image as float32 in 0..1; uint8 is divided by 255, float32 is returned as it is."""
    if image.dtype == np.uint8:
        return np.multiply(image, np.float32(1 / 255), dtype=np.float32)
    return image


def as_uint8(image: np.ndarray) -> np.ndarray:
    """The image as uint8, contiguous; 0..1 floats are clipped, scaled by 255 and rounded."""
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    return _quantise(np.ascontiguousarray(image))


@numba.njit(nogil=True, cache=True)
def _quantise(image):
    out = np.empty(image.shape, np.uint8)
    flat, result = image.ravel(), out.ravel()
    for i in range(flat.size):
        result[i] = np.uint8(min(max(flat[i], np.float32(0)), np.float32(1)) * np.float32(255) + np.float32(0.5))
    return out


def as_int32_ids(labels: np.ndarray) -> np.ndarray:
    """Ids as int32. Ids that do not fit are renumbered 1, 2, ... within this array, 0 stays 0."""
    if labels.dtype == np.int32:
        return labels
    if labels.dtype.kind not in "iub":
        raise UserError(f"labels: found dtype {labels.dtype}, expected integers")
    if labels.dtype.itemsize >= 4 and labels.size and labels.max() > INT32_MAX:
        found, inverse = np.unique(labels, return_inverse=True)
        shift = 0 if found[0] == 0 else 1
        return (inverse.reshape(labels.shape) + shift).astype(np.int32)
    return labels.astype(np.int32)


def with_membrane(labels: np.ndarray, window: Shape) -> np.ndarray:
    """``emjax.data.targets.widen_borders`` of an int32 crop (z, y, x), on the host: 0 where the window holds two ids."""
    high = ndimage.maximum_filter(labels, window, mode="nearest")
    low = ndimage.minimum_filter(np.where(labels > 0, labels, INT32_MAX), window, mode="nearest")
    return np.where((high > 0) & (low < high), 0, labels)


@numba.njit(nogil=True, cache=True)
def _root(parent, i):
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@numba.njit(nogil=True, cache=True)
def _components(labels, full):
    depth, height, width = labels.shape
    provisional = np.zeros(labels.shape, np.int32)
    parent = np.zeros(labels.size + 1, np.int32)
    count = 0
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                own = labels[z, y, x]
                if own <= 0:
                    continue
                best = 0
                for dz in range(-1, 1):
                    for dy in range(-1, 2 if dz < 0 else 1):
                        for dx in range(-1, 2 if (dz < 0 or dy < 0) else 0):
                            if not full and abs(dz) + abs(dy) + abs(dx) != 1:
                                continue
                            nz, ny, nx = z + dz, y + dy, x + dx
                            if nz < 0 or ny < 0 or nx < 0 or ny >= height or nx >= width:
                                continue
                            if labels[nz, ny, nx] != own:
                                continue
                            other = _root(parent, provisional[nz, ny, nx])
                            if best == 0:
                                best = other
                            elif other < best:
                                parent[best] = other
                                best = other
                            elif other > best:
                                parent[other] = best
                if best == 0:
                    count += 1
                    parent[count] = count
                    best = count
                provisional[z, y, x] = best
    final = np.zeros(count + 1, np.int32)
    parts = 0
    for i in range(1, count + 1):
        root = _root(parent, i)
        if root == i:
            parts += 1
            final[i] = parts
        else:
            # The root is the smallest of its set, so it has its number already.
            final[i] = final[root]
    for z in range(depth):
        for y in range(height):
            for x in range(width):
                provisional[z, y, x] = final[provisional[z, y, x]]
    return provisional, parts


def split_components(labels: np.ndarray, connectivity: int = 26) -> np.ndarray:
    """Every connected part of every positive id as an object of its own, numbered 1, 2, ... in raster order; int32.

    Cropping cuts objects apart; without this two far ends of a neuron that meets outside of the crop count as one
    (AGQ and the evaluation of crops need it). ``connectivity`` is 6 or 26.
    """
    if connectivity not in (6, 26):
        raise UserError(f"connectivity: found {connectivity}, expected 6 or 26")
    return _components(np.ascontiguousarray(labels), connectivity == 26)[0]

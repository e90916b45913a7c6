"""Slices resized exactly as OpenCV and SciPy do it, for networks that were trained on slices resized by them (SAM4EM)."""

import numpy as np

_ONE = 2048
"""Interpolation weights are whole numbers of 1/2048."""


def _taps(size: int, out: int, clamped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Both source pixels of every target pixel along an axis, and their weights.

    Along rows (``clamped``) a pixel beyond the border gives its whole weight to the border's; along columns both taps
    are the border's pixel, and its two weights are rounded apart.
    """
    centre = ((np.arange(out) + 0.5) * (size / out) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(np.int64)
    share = centre - first.astype(np.float32)
    if clamped:
        share = np.where((first < 0) | (first >= size - 1), np.float32(0), share)
    low, high = (np.rint(part * np.float32(_ONE)).astype(np.int64) for part in (np.float32(1) - share, share))
    return np.clip(first, 0, size - 1), np.clip(first + 1, 0, size - 1), low, high


def resize_grey(image: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A uint8 slice (y, x) resized to ``shape``, bit for bit as OpenCV's ``INTER_LINEAR`` (its vectorised form)."""
    if image.dtype != np.uint8 or image.ndim != 2:
        raise ValueError(f"image: found {image.dtype} of {image.ndim} axes, expected uint8 (y, x)")
    top, bottom, upper, lower = _taps(image.shape[0], shape[0], clamped=False)
    left, right, near, far = _taps(image.shape[1], shape[1], clamped=True)
    wide = image.astype(np.int64)
    rows = wide[:, left] * near + wide[:, right] * far

    def weighted(part: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return (weight[:, None] * (part >> 4)) >> 16

    return ((weighted(rows[top], upper) + weighted(rows[bottom], lower) + 2) >> 2).astype(np.uint8)


def resize_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels (y, x) resized to ``shape`` by the nearest pixel at or before, as OpenCV's ``INTER_NEAREST``."""
    rows, columns = (
        np.minimum(np.floor(np.arange(out) * (size / out)).astype(np.int64), size - 1)
        for size, out in zip(labels.shape, shape)
    )
    return labels[rows][:, columns]


def zoom_labels(labels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels (y, x) at ``shape``, corner pixels on corner pixels, as ``scipy.ndimage.zoom`` of order 0."""
    rows, columns = (
        np.floor(np.arange(out) * ((size - 1) / max(out - 1, 1)) + 0.5).astype(np.int64)
        for size, out in zip(labels.shape, shape)
    )
    return labels[rows][:, columns]

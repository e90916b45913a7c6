"""Tilings of a whole volume in memory by overlapping windows, and their blending: the published variants of SegNeuron.

``centred`` is what ``emjax.predict`` does block by block (``Block.placement``); the others are its ancestor, which
clamped the last window, and that of its notebook, which pads only what is smaller than a window.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

Triple = tuple[int, int, int]
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Variant = Literal["centred", "clamped", "notebook"]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Attributes:
    shape: of the volume (z, y, x).
    size: of a window.
    padding: voxels (before, after) added on each axis.
    mode: ``"reflect"`` (without repeating the edge) or ``"edge"``.
    starts: of the windows along z, y, x, in the padded volume.
    weight: (z, y, x) float32, of the voxels of a window.
    """

    shape: Triple
    size: Triple
    padding: Padding
    mode: Literal["reflect", "edge"]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    weight: np.ndarray

    @property
    def padded_shape(self) -> Triple:
        z, y, x = (size + before + after for size, (before, after) in zip(self.shape, self.padding))
        return z, y, x

    def windows(self) -> list[Triple]:
        """Starts of all windows, z slowest."""
        return list(itertools.product(*self.starts))


def gaussian_weight(size: Triple, sigma: float, floor: float, rule: Literal["add", "max"]) -> np.ndarray:
    """exp(-r^2 / 2 sigma^2) with coordinates -1..1 from border to border, plus ``floor`` or not below it; float32."""
    lines = [np.linspace(-1, 1, n, dtype=np.float32) ** 2 for n in size]
    squared = lines[0][:, None, None] + lines[1][:, None] + lines[2]
    weight = np.exp(-squared / np.float32(2 * sigma**2), dtype=np.float32)
    return weight + np.float32(floor) if rule == "add" else np.maximum(weight, np.float32(floor))


def _centred_axis(length: int, size: int, stride: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    count = max(1, (length - size) // stride + 2)
    extra = size + (count - 1) * stride - length
    return (extra // 2, extra - extra // 2), tuple(stride * number for number in range(count))


def _clamped_axis(length: int, size: int, stride: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    (before, _), starts = _centred_axis(length, size, stride)
    last = length + 2 * before - size
    if last < 0:
        raise ValueError(f"clamped tiling: {length} voxels and a window of {size} leave a voxel uncovered")
    return (before, before), tuple(min(start, last) for start in starts)


def _flush_axis(length: int, size: int, stride: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    if length <= size:
        return (0, size - length), (0,)
    starts = [*range(0, length - size + 1, stride)]
    if starts[-1] != length - size:
        starts.append(length - size)
    return (0, 0), tuple(starts)


def tiling(
    shape: Sequence[int],
    variant: Variant = "centred",
    size: Triple = (20, 128, 128),
    stride: Triple = (10, 64, 64),
) -> Tiling:
    """The windows of a volume of ``shape`` (z, y, x).

    ``centred``: whole strides, reflected padding split evenly, sharp Gaussian (0.2) plus 1e-6. ``clamped``: the same
    padding rounded down on both sides and the last window moved back. ``notebook``: windows every stride and one flush
    with the end, Gaussian (0.5) of at least 1e-3; volumes smaller than a window are continued by their edge.
    """
    axis = {"centred": _centred_axis, "clamped": _clamped_axis, "notebook": _flush_axis}[variant]
    parts = [axis(length, window, step) for length, window, step in zip(shape, size, stride)]
    notebook = variant == "notebook"
    return Tiling(
        tuple(shape),  # type: ignore[arg-type]
        size,
        tuple(part[0] for part in parts),  # type: ignore[arg-type]
        "edge" if notebook else "reflect",
        tuple(part[1] for part in parts),  # type: ignore[arg-type]
        gaussian_weight(size, 0.5, 1e-3, "max") if notebook else gaussian_weight(size, 0.2, 1e-6, "add"),
    )


def blend(
    volume: np.ndarray,
    plan: Tiling,
    predict: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    batch: int = 1,
) -> dict[str, np.ndarray]:
    """Weighted mean of the predictions of all windows, accumulated in float32.

    Args:
        volume: (z, y, x), as ``predict`` takes it.
        plan: of a volume of that shape.
        predict: (batch, z, y, x) -> named outputs (batch, z, y, x, channel).
        batch: windows per call; the result does not depend on it.

    Returns:
        Named outputs (channel, z, y, x) float32.
    """
    if volume.shape != plan.shape:
        raise ValueError(f"volume has shape {volume.shape}; the tiling is of {plan.shape}")
    padded = np.pad(volume, plan.padding, mode=plan.mode)
    total = np.zeros(plan.padded_shape, np.float32)
    sums: dict[str, np.ndarray] = {}
    windows = plan.windows()
    for first in range(0, len(windows), batch):
        places = [
            tuple(slice(start, start + size) for start, size in zip(window, plan.size))
            for window in windows[first : first + batch]
        ]
        predicted = {name: np.asarray(part) for name, part in predict(np.stack([padded[p] for p in places])).items()}
        for row, place in enumerate(places):
            total[place] += plan.weight
            for name, values in predicted.items():
                if name not in sums:
                    sums[name] = np.zeros((values.shape[-1], *plan.padded_shape), np.float32)
                for channel, kept in enumerate(sums[name]):
                    kept[place] += values[row, ..., channel] * plan.weight
    inside = tuple(slice(before, before + size) for (before, _), size in zip(plan.padding, plan.shape))
    return {name: kept[(slice(None), *inside)] / total[inside] for name, kept in sums.items()}

"""Grey values of more than 8 bits: one window per volume, chosen once, stored with the volume, never per block."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from emjax.data.sources import Box, Source
from emjax.data.volume import Volume, check_finite
from emjax.errors import UserError

Window = tuple[float, float]


def percentile_window(
    volume: Volume, percentiles: tuple[float, float] = (0.5, 99.5), *, samples: int = 64, side: int = 64
) -> Window:
    """Grey values at two percentiles of a volume, from blocks spread evenly over it (the same every time).

    Args:
        volume: axes zyx.
        percentiles: of the window's ends.
        samples: most blocks that are read.
        side: most voxels of a block along each axis.

    Raises:
        UserError: NaN in the volume, or one value everywhere.
    """
    volume.require_axes("zyx")
    per_axis = max(1, round(samples ** (1 / 3)))
    block = [min(side, n) for n in volume.shape]
    starts = [
        np.unique(np.linspace(0, n - b, min(per_axis, -(-n // b))).astype(int)) for n, b in zip(volume.shape, block)
    ]
    found = [
        check_finite(volume[z : z + block[0], y : y + block[1], x : x + block[2]], volume.spec).ravel()
        for z in starts[0]
        for y in starts[1]
        for x in starts[2]
    ]
    low, high = (float(value) for value in np.percentile(np.concatenate(found), percentiles))
    if not low < high:
        raise UserError(
            f"{volume.spec}: the grey values at {percentiles} percent are both {low:g}: there is no contrast"
        )
    return low, high


def to_uint8(block: np.ndarray, window: Sequence[float]) -> np.ndarray:
    """Grey values of ``window`` spread over 0 to 255, those outside cut off; any numeric dtype to uint8."""
    low, high = window
    scaled = (block.astype(np.float32) - np.float32(low)) * np.float32(255.0 / (high - low))
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Shown:
    """A volume's source, read only, each block changed by ``change``, which makes it ``dtype``."""

    inner: Source
    change: Callable[[np.ndarray], np.ndarray]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return self.inner.chunks

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self.inner.shards

    def read(self, box: Box) -> np.ndarray:
        return self.change(self.inner.read(box))

    def write(self, box: Box, array: np.ndarray) -> None:
        raise UserError("a volume shown through a window cannot be written")


def as_uint8(volume: Volume, window: Sequence[float] | None = None) -> Volume:
    """The volume as uint8, converted block by block through one window.

    Args:
        volume: uint8 volumes are returned as they are, unless a window is given.
        window: lowest and highest grey value; None: the ``window`` attribute that the volume carries.

    Raises:
        UserError: neither is there, or the window is not two rising numbers.
    """
    if window is None:
        if volume.dtype == np.uint8:
            return volume
        window = volume.attributes.get("window")
    if window is None:
        raise UserError(
            f"{volume.spec} holds {volume.dtype.name} and no window; say which grey values become 0 and 255 "
            "(--window LOW,HIGH), or convert it: python -m emjax.prepare volume --window auto"
        )
    try:
        low, high = (float(value) for value in window)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not low < high:
        raise UserError(f"{volume.spec}: the window {window!r} is not two rising numbers")
    kept = {key: value for key, value in volume.attributes.items() if key != "window"}
    kept["window_of_source"] = [low, high]
    source = Shown(volume.source, functools.partial(to_uint8, window=(low, high)), np.dtype(np.uint8))
    return dataclasses.replace(volume, source=source, attributes=kept, output=None)

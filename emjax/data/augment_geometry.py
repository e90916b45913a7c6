"""Augmentations that move voxels: image and ids together, ids by nearest neighbour.

Each has two pure parts. ``draw(rng, shape)`` makes every random choice for a sample of ``shape`` and returns it as
plain values (None: leave the sample alone); ``apply(sample, draws)`` has no randomness, so recorded draws can be
replayed.
``grow(shape)`` is the sample that must go in for at least ``shape`` to come out.
"""

import dataclasses
import functools
import math
from typing import Literal

import numba
import numpy as np
import scipy.ndimage

from emjax.data.crops import Draws, Sample, Shape, check_choice, check_probability, check_range, shape_of
from emjax.errors import UserError

Border = Literal["edge", "reflect", "zero"]
BORDERS = ("edge", "reflect", "zero")


@numba.njit(nogil=True, cache=True)
def _inside(i, n, border, reach):
    # Index i of a line of n voxels mapped into 0..n-1; -1 is "outside": for border 2 (zero) all, else beyond reach.
    if 0 <= i < n:
        return i
    if border == 2 or i < -reach or i > n - 1 + reach:
        return -1
    if border == 0 or n == 1:
        return min(max(i, 0), n - 1)
    period = 2 * (n - 1)
    i = i % period
    return period - i if i >= n else i


@numba.njit(nogil=True, cache=True)
def _linear_table(ys, xs, height, width, border, reach):
    # Four source positions (flat in the section) and weights for each target pixel, computed once for all sections.
    index = np.empty((ys.size, 4), np.int32)
    weight = np.empty((ys.size, 4), np.float32)
    flat_y, flat_x = ys.ravel(), xs.ravel()
    for i in range(flat_y.size):
        fy, fx = math.floor(flat_y[i]), math.floor(flat_x[i])
        ry, rx = flat_y[i] - fy, flat_x[i] - fx
        for corner in range(4):
            dy, dx = corner >> 1, corner & 1
            y = _inside(int(fy) + dy, height, border, reach)
            x = _inside(int(fx) + dx, width, border, reach)
            w = (ry if dy else 1.0 - ry) * (rx if dx else 1.0 - rx)
            if y < 0 or x < 0:
                index[i, corner] = 0
                weight[i, corner] = 0.0
            else:
                index[i, corner] = y * width + x
                weight[i, corner] = w
    return index, weight


@numba.njit(nogil=True, cache=True)
def _nearest_table(ys, xs, height, width, border, reach):
    index = np.empty(ys.size, np.int32)
    flat_y, flat_x = ys.ravel(), xs.ravel()
    for i in range(flat_y.size):
        y = _inside(math.floor(flat_y[i] + 0.5), height, border, reach)
        x = _inside(math.floor(flat_x[i] + 0.5), width, border, reach)
        index[i] = -1 if y < 0 or x < 0 else y * width + x
    return index


@numba.njit(nogil=True, cache=True)
def _gather_linear(source, index, weight, out, half):
    for z in range(source.shape[0]):
        line = source[z].ravel()
        target = out[z].ravel()
        for i in range(target.size):
            value = np.float32(0.0)
            for corner in range(4):
                value += weight[i, corner] * line[index[i, corner]]
            target[i] = value + half


@numba.njit(nogil=True, cache=True)
def _gather_nearest(source, index, out):
    for z in range(source.shape[0]):
        line = source[z].ravel()
        target = out[z].ravel()
        for i in range(target.size):
            j = index[i]
            target[i] = line[j] if j >= 0 else 0


def warp_sections(
    sample: Sample,
    ys: np.ndarray,
    xs: np.ndarray,
    border: Border = "edge",
    image_nearest: bool = False,
    reach: int = 1 << 30,
) -> Sample:
    """Every section resampled at in-plane source coordinates.

    Args:
        sample: arrays of (z, y, x); ``image`` is interpolated linearly (unless ``image_nearest``), all others by the
            nearest voxel (halves upwards).
        ys, xs: float64, (y', x') for all sections alike or (z, y', x') for each its own.
        border: what lies outside: the edge voxel, the mirror image (edge voxel not repeated), or 0.
        reach: voxels outside to which ``border`` applies; beyond them is 0.

    Returns:
        Arrays of (z, y', x') of unchanged dtype.
    """
    mode = BORDERS.index(border)
    depth, height, width = shape_of(sample)
    half = {name: np.float32(0.5 if array.dtype == np.uint8 else 0.0) for name, array in sample.items()}
    source = {name: np.ascontiguousarray(array) for name, array in sample.items()}
    out = {name: np.empty((depth,) + ys.shape[-2:], array.dtype) for name, array in sample.items()}
    ys, xs = np.ascontiguousarray(ys), np.ascontiguousarray(xs)
    groups = [(slice(None), ys, xs)] if ys.ndim == 2 else [(slice(z, z + 1), ys[z], xs[z]) for z in range(depth)]
    for sections, group_y, group_x in groups:
        nearest = _nearest_table(group_y, group_x, height, width, mode, reach)
        for name, array in source.items():
            if name == "image" and not image_nearest:
                index, weight = _linear_table(group_y, group_x, height, width, mode, reach)
                _gather_linear(array[sections], index, weight, out[name][sections], half[name])
            else:
                _gather_nearest(array[sections], nearest, out[name][sections])
    return out


def _identity(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    ys, xs = np.meshgrid(np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij")
    return ys, xs


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlipTranspose:
    """Each of ``axes`` mirrored with probability one half, then axes exchanged.

    Attributes:
        p: probability that anything is done.
        axes: which axes may be mirrored, 0 = z, 1 = y, 2 = x.
        transpose: ``"yx"`` exchanges y and x with probability one half, ``"all"`` draws any order of the three axes
            (isotropic data), ``"none"`` keeps the order.

    Draws: ``flips`` three bools (z, y, x), ``order`` the axis that each new axis is taken from.
    """

    p: float = 1.0
    axes: tuple[int, ...] = (0, 1, 2)
    transpose: Literal["none", "yx", "all"] = "yx"

    def __post_init__(self):
        check_probability(self, self.p)
        check_choice(self, "transpose", self.transpose, ("none", "yx", "all"))
        if not set(self.axes) <= {0, 1, 2}:
            raise UserError(f"FlipTranspose.axes: found {self.axes}, expected some of 0 (z), 1 (y), 2 (x)")

    def grow(self, shape: Shape) -> Shape:
        return _square(shape, self.transpose)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        coins = rng.random(3) < 0.5
        flips = tuple(bool(coins[axis]) and axis in self.axes for axis in range(3))
        swap = rng.random() < 0.5
        order: tuple[int, ...] = (0, 1, 2)
        if self.transpose == "yx" and swap:
            order = (0, 2, 1)
        elif self.transpose == "all":
            order = tuple(int(axis) for axis in rng.permutation(3))
        return {"flips": flips, "order": order}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        window = tuple(slice(None, None, -1 if flip else 1) for flip in draws["flips"])
        return {name: array[window].transpose(draws["order"]) for name, array in sample.items()}


def _square(shape: Shape, exchanged: str) -> Shape:
    # Axes that may be exchanged must be equally long, or the crop would not be covered after the exchange.
    z, y, x = shape
    if exchanged == "none":
        return shape
    if exchanged == "yx":
        return (z, max(y, x), max(y, x))
    side = max(shape)
    return (side, side, side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate90:
    """Rotation by a random multiple of 90 degrees, in plane or (``planes="all"``, isotropic data) about every axis.

    Draws: ``turns``, quarter turns in the planes (y, x), (z, x), (z, y), applied in this order.
    """

    p: float = 1.0
    planes: Literal["yx", "all"] = "yx"

    def __post_init__(self):
        check_probability(self, self.p)
        check_choice(self, "planes", self.planes, ("yx", "all"))

    def grow(self, shape: Shape) -> Shape:
        return _square(shape, self.planes)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        turns = [int(k) for k in rng.integers(0, 4, 3)]
        return {"turns": tuple(turns) if self.planes == "all" else (turns[0], 0, 0)}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        out = sample
        for turns, plane in zip(draws["turns"], ((1, 2), (0, 2), (0, 1))):
            if turns:
                out = {name: np.rot90(array, turns, plane) for name, array in out.items()}
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotate:
    """In-plane rotation of the whole block about its centre by any angle up to ``degrees`` either way.

    With ``margin`` a crop is read that is large enough for no voxel to come from outside; without it the border is
    continued as ``border`` says, which costs nothing.

    Draws: ``radians``.
    """

    p: float = 0.5
    degrees: float = 180.0
    margin: bool = True
    border: Border = "reflect"

    def __post_init__(self):
        check_probability(self, self.p)
        check_choice(self, "border", self.border, BORDERS)
        if not 0 <= self.degrees <= 180:
            raise UserError(f"Rotate.degrees: found {self.degrees}, expected 0 to 180")

    def grow(self, shape: Shape) -> Shape:
        if not self.margin:
            return shape
        z, y, x = shape

        def reach(along: int, across: int) -> int:
            angle = min(math.radians(self.degrees), math.atan2(across, along))
            return math.ceil(along * math.cos(angle) + across * math.sin(angle)) + 2

        return (z, max(reach(y, x), y), max(reach(x, y), x))

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        return {"radians": float(math.radians(rng.uniform(-self.degrees, self.degrees)))}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        return warp_sections(sample, *rotated(shape_of(sample), draws["radians"]), self.border)


def rotated(shape: Shape, radians: float) -> tuple[np.ndarray, np.ndarray]:
    """Source coordinates (y, x), float64, of a section of ``shape`` turned by ``radians`` about its centre."""
    ys, xs = _identity(*shape[1:])
    cy, cx = (shape[1] - 1) / 2, (shape[2] - 1) / 2
    cos, sin = math.cos(radians), math.sin(radians)
    return cy + cos * (ys - cy) - sin * (xs - cx), cx + sin * (ys - cy) + cos * (xs - cx)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescale:
    """Zoom in plane by factors between ``low`` and ``high``, y and x independently unless ``same``.

    Draws: ``factors`` (y, x), above 1 = content becomes larger.
    """

    p: float = 0.5
    low: float = 0.8
    high: float = 1.25
    same: bool = False

    def __post_init__(self):
        check_probability(self, self.p)
        check_range(self, "(low, high)", (self.low, self.high), 0.1, 10.0)

    def grow(self, shape: Shape) -> Shape:
        z, y, x = shape
        least = min(self.low, 1.0)
        return (z, math.ceil(y / least), math.ceil(x / least))

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        fy, fx = (float(factor) for factor in rng.uniform(self.low, self.high, 2))
        return {"factors": (fy, fy) if self.same else (fy, fx)}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        _, height, width = shape_of(sample)
        least = min(self.low, 1.0)
        lines = []
        for size, factor in zip((height, width), draws["factors"]):
            # 1e-9: a product such as 0.8 * 5 that rounds to 3.9999 must not lose a voxel.
            out_size = math.floor(size * least + 1e-9)
            lines.append((size - 1) / 2 + (np.arange(out_size) - (out_size - 1) / 2) / factor)
        ys, xs = np.meshgrid(*lines, indexing="ij")
        return warp_sections(sample, ys, xs, "edge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elastic:
    """One smooth random displacement field in plane for all sections (Simard et al. 2003).

    Uniform noise in -1..1 smoothed by a Gaussian of ``sigma`` voxels and multiplied by ``alpha`` voxels (16 and 4 in
    AGQ and PyTorch Connectomics: displacements of about one voxel).

    Attributes:
        margin: voxels read beyond the crop on each side in plane, so that no voxel comes from outside.
        border: what lies outside of the sample.

    Draws: ``displacement`` float32 (2, y, x), source minus target coordinates.
    """

    p: float = 0.5
    alpha: float = 16.0
    sigma: float = 4.0
    margin: int = 0
    border: Border = "edge"

    def __post_init__(self):
        check_probability(self, self.p)
        check_choice(self, "border", self.border, BORDERS)
        if self.alpha < 0 or self.sigma <= 0 or self.margin < 0:
            raise UserError(
                f"Elastic: found alpha {self.alpha}, sigma {self.sigma}, margin {self.margin}, "
                "expected alpha and margin from 0 up and sigma above 0"
            )

    def grow(self, shape: Shape) -> Shape:
        z, y, x = shape
        return (z, y + 2 * self.margin, x + 2 * self.margin)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        noise = rng.random((2,) + shape[1:], dtype=np.float32) * 2 - 1
        smooth = scipy.ndimage.gaussian_filter(noise, (0, self.sigma, self.sigma), mode="constant")
        return {"displacement": smooth * np.float32(self.alpha)}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        _, height, width = shape_of(sample)
        ys, xs = _identity(height, width)
        ys += draws["displacement"][0]
        xs += draws["displacement"][1]
        m = self.margin
        window = np.s_[m : height - m, m : width - m]
        return warp_sections(sample, ys[window], xs[window], self.border)


@functools.lru_cache(maxsize=64)
def _spline_matrix(controls: int, size: int) -> np.ndarray:
    # Spline zoom is linear in the control values and separable, so one small matrix per axis does it.
    return scipy.ndimage.zoom(np.eye(controls), (size / controls, 1), order=3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElasticGrid:
    """Random displacements on a coarse control grid, cubic splines between, own for every section.

    The sample is mirrored by ``pad`` voxels in plane first, so that displaced voxels near the border show tissue.

    Attributes:
        spacing: distance of control points in voxels (z, y, x).
        sigma: standard deviation of the displacement of a control point in voxels (y, x); z is never displaced.
        image_nearest: take the nearest voxel for the image too (as SegNeuron does) instead of interpolating.

    Draws: ``offsets`` float64 (2, controls z, y, x), displacement (y, x) at the control points.
    """

    p: float = 0.5
    spacing: tuple[int, int, int] = (4, 40, 40)
    sigma: tuple[float, float] = (2.0, 2.0)
    pad: int = 20
    image_nearest: bool = False

    def __post_init__(self):
        check_probability(self, self.p)
        if len(self.spacing) != 3 or min(self.spacing) < 1 or len(self.sigma) != 2 or min(self.sigma) < 0:
            raise UserError(
                f"ElasticGrid: found spacing {self.spacing} and sigma {self.sigma}, "
                "expected three distances (z, y, x) from 1 up and two deviations (y, x) from 0 up"
            )
        if self.pad < 0:
            raise UserError(f"ElasticGrid.pad: found {self.pad}, expected 0 or more voxels")

    def grow(self, shape: Shape) -> Shape:
        return shape

    def _padded(self, shape: Shape) -> Shape:
        z, y, x = shape
        return (z, y + 2 * self.pad, x + 2 * self.pad)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        controls = tuple(max(1, round(size / step)) for size, step in zip(self._padded(shape), self.spacing))
        offsets = rng.standard_normal((2,) + controls)
        return {"offsets": offsets * np.asarray(self.sigma)[:, None, None, None]}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        depth, height, width = shape_of(sample)
        dy, dx = grid_displacement(draws["offsets"], self._padded((depth, height, width)), self.pad)
        ys, xs = _identity(height, width)
        return warp_sections(sample, ys + dy, xs + dx, "reflect", self.image_nearest, self.pad)


def grid_displacement(offsets: np.ndarray, shape: Shape, cut: int = 0) -> np.ndarray:
    """Cubic-spline zoom of control displacements (2, cz, cy, cx) to float64 (2, z, y, x), end points aligned.

    ``shape`` is that of the zoom; ``cut`` voxels are left away on each side in y and x.
    """
    mz, my, mx = (_spline_matrix(controls, size) for controls, size in zip(offsets.shape[1:], shape))
    my, mx = my[cut : shape[1] - cut], mx[cut : shape[2] - cut]
    sections = np.tensordot(mz, offsets.astype(np.float64), (1, 1))
    return np.moveaxis(my @ sections @ mx.T, 1, 0)

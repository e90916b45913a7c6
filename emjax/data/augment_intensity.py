"""Augmentations of the grey values; ids are not touched.

``draw(rng, shape)`` makes every random choice, ``apply(sample, draws)`` has no randomness. Images come as uint8
(0..255) or float32 (0..1) and leave as float32, except where said otherwise.
"""

import dataclasses

import numba
import numpy as np
import scipy.ndimage

from emjax.data.crops import Draws, Sample, Shape, as_float, check_probability, check_range
from emjax.errors import UserError


def _same_shape(shape: Shape) -> Shape:
    return shape


def _with_image(sample: Sample, image: np.ndarray) -> Sample:
    return {**sample, "image": image}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grayscale:
    """Contrast, brightness and gamma, alike for the block ("3D") or drawn anew for each section.

    x (1 + (u1 - 1/2) contrast) + (u2 - 1/2) brightness, clipped to 0..1, to the power 2^(gamma (2 u3 - 1)), with
    u1, u2, u3 uniform in 0..1. AGQ: 0.3, 0.3, 1, always the block; SegNeuron: 0.1, 0.1, 1, sections in 3 of 4 cases.

    Attributes:
        contrast, brightness, gamma: strengths; 0 = none.
        sections: probability that every section has its own draws.
        invert: probability that the image is inverted (dark on light and light on dark stains).

    Draws: ``uniforms`` float64 (1 or z, 3), ``invert`` bool.
    """

    p: float = 0.75
    contrast: float = 0.3
    brightness: float = 0.3
    gamma: float = 1.0
    sections: float = 0.0
    invert: float = 0.0

    def __post_init__(self):
        check_probability(self, self.p)
        if not 0 <= self.sections <= 1 or not 0 <= self.invert <= 1:
            raise UserError(
                f"Grayscale: found sections {self.sections}, invert {self.invert}, expected probabilities (0 to 1)"
            )
        if min(self.contrast, self.brightness, self.gamma) < 0:
            raise UserError("Grayscale: contrast, brightness and gamma must be 0 or more")

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        count = shape[0] if rng.random() < self.sections else 1
        invert = bool(rng.random() < self.invert)
        return {"uniforms": rng.random((count, 3)), "invert": invert}

    def _curve(self, grey: np.ndarray, uniforms: np.ndarray, invert: bool) -> np.ndarray:
        u1, u2, u3 = (float(u) for u in uniforms)
        out = grey * np.float32(1 + (u1 - 0.5) * self.contrast)
        out += np.float32((u2 - 0.5) * self.brightness)
        np.clip(out, 0, 1, out=out)
        if self.gamma > 0:
            np.power(out, np.float32(2.0 ** (self.gamma * (2 * u3 - 1))), out=out)
        return np.subtract(np.float32(1), out, out=out) if invert else out

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image, uniforms, invert = sample["image"], draws["uniforms"], draws["invert"]
        if len(uniforms) > 1:
            sections = [(slice(z, z + 1), u) for z, u in enumerate(uniforms)]
        else:
            sections = [(slice(None), uniforms[0])]
        out = np.empty(image.shape, np.float32)
        # 256 grey values make a table: the curve is evaluated 256 times, without loss.
        greys = as_float(np.arange(256, dtype=np.uint8)) if image.dtype == np.uint8 else None
        for window, u in sections:
            if greys is not None:
                _look_up(np.ascontiguousarray(image[window]), self._curve(greys, u, invert), out[window])
            else:
                out[window] = self._curve(image[window], u, invert)
        return _with_image(sample, out)


@numba.njit(nogil=True, cache=True)
def _look_up(image, table, out):
    flat, result = image.ravel(), out.ravel()
    for i in range(flat.size):
        result[i] = table[flat[i]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaussianNoise:
    """Independent Gaussian noise of a deviation uniform in ``sigma`` (grey range 0..1), clipped to 0..1.

    Draws: ``sigma``, ``noise`` float32 (z, y, x) of unit deviation.
    """

    p: float = 0.25
    sigma: tuple[float, float] = (0.01, 0.2)

    def __post_init__(self):
        check_probability(self, self.p)
        check_range(self, "sigma", self.sigma, 0.0)

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        sigma = float(rng.uniform(*self.sigma))
        # The bulk of the numbers comes from the fastest generator, itself seeded from the one at hand.
        fast = np.random.Generator(np.random.SFC64(rng.integers(0, 2**63, 2)))
        return {"sigma": sigma, "noise": fast.standard_normal(shape, dtype=np.float32)}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        out = draws["noise"] * np.float32(draws["sigma"])
        out += as_float(sample["image"])
        return _with_image(sample, np.clip(out, 0, 1, out=out))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blur:
    """Gaussian blur in plane: a kernel of 2 radius + 1 voxels, the same for all sections, mirrored at the border.

    exp(-x^2 / (2 sigma^2)) cut to the kernel and normalised; sigma 0 takes the kernel's own (:func:`gaussian_kernel`).
    ``radius`` and ``sigma`` are ranges (smallest, largest).

    Draws: ``radius``, ``sigma``.
    """

    p: float = 0.25
    radius: tuple[int, int] = (1, 4)
    sigma: tuple[float, float] = (0.0, 2.0)

    def __post_init__(self):
        check_probability(self, self.p)
        check_range(self, "radius", self.radius, 1, 64)
        check_range(self, "sigma", self.sigma, 0.0)

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        return {
            "radius": int(rng.integers(self.radius[0], self.radius[1] + 1)),
            "sigma": float(rng.uniform(*self.sigma)),
        }

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image = np.ascontiguousarray(as_float(sample["image"]))
        blurred = _blur_sections(image, gaussian_kernel(draws["radius"], draws["sigma"]))
        return _with_image(sample, np.clip(blurred, 0, 1, out=blurred))


# Binomial-like kernels in 1/256 by which OpenCV replaces a Gaussian of sigma 0.
_SMALL_KERNELS = {1: (64, 128, 64), 2: (16, 64, 96, 64, 16), 3: (8, 28, 56, 72, 56, 28, 8)}


def gaussian_kernel(radius: int, sigma: float) -> np.ndarray:
    """Normalised float32 kernel of 2 radius + 1 values; sigma 0 means OpenCV's choice for that size."""
    if sigma <= 0 and radius in _SMALL_KERNELS:
        return np.array(_SMALL_KERNELS[radius], np.float32) / np.float32(256)
    sigma = sigma if sigma > 0 else 0.3 * (radius - 1) + 0.8
    kernel = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return (kernel / kernel.sum()).astype(np.float32)


@numba.njit(nogil=True, cache=True)
def _mirror(i, n):
    if n == 1:
        return 0
    i = i % (2 * (n - 1))
    return 2 * (n - 1) - i if i >= n else i


@numba.njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _blur_sections(image, kernel):
    depth, height, width = image.shape
    radius = kernel.size // 2
    out = np.empty_like(image)
    rows = np.empty(width, np.float32)
    line = np.empty(width + 2 * radius, np.float32)
    for z in range(depth):
        for y in range(height):
            rows[:] = 0
            for k in range(kernel.size):
                source = image[z, _mirror(y + k - radius, height)]
                weight = kernel[k]
                for x in range(width):
                    rows[x] += weight * source[x]
            for x in range(width):
                line[radius + x] = rows[x]
            for k in range(1, radius + 1):
                line[radius - k] = rows[_mirror(-k, width)]
                line[radius + width - 1 + k] = rows[_mirror(width - 1 + k, width)]
            target = out[z, y]
            target[:] = 0
            for k in range(kernel.size):
                weight = kernel[k]
                for x in range(width):
                    target[x] += weight * line[x + k]
    return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class MotionBlur:
    """``count`` sections smeared along y or x by a box of ``size`` voxels (stage drift), mirrored at the border.

    Draws: ``sections``, ``axes`` (1 = y, 2 = x), one of each per smeared section.
    """

    p: float = 0.5
    count: int = 2
    size: int = 11

    def __post_init__(self):
        check_probability(self, self.p)
        if self.count < 1 or self.size < 2:
            raise UserError(f"MotionBlur: found count {self.count}, size {self.size}, expected 1 and 2 at least")

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        count = min(self.count, shape[0])
        sections = sorted(int(z) for z in rng.choice(shape[0], count, replace=False))
        return {"sections": tuple(sections), "axes": tuple(int(axis) for axis in rng.integers(1, 3, count))}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image = np.array(as_float(sample["image"]))
        for z, axis in zip(draws["sections"], draws["axes"]):
            image[z] = scipy.ndimage.uniform_filter1d(image[z], self.size, axis - 1, mode="mirror")
        return _with_image(sample, image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cutout:
    """Boxes blanked with ``value``: a number and one size, both uniform in their ranges, inside the block.

    The dtype of the image is kept. Defaults: SegNeuron.

    Draws: ``size`` (z, y, x), ``corners`` int (count, 3).
    """

    p: float = 0.25
    count: tuple[int, int] = (20, 50)
    size_z: tuple[int, int] = (5, 10)
    size_xy: tuple[int, int] = (15, 25)
    value: float = 0.0

    def __post_init__(self):
        check_probability(self, self.p)
        check_range(self, "count", self.count, 0)
        check_range(self, "size_z", self.size_z, 1)
        check_range(self, "size_xy", self.size_xy, 1)
        if not 0 <= self.value <= 1:
            raise UserError(f"Cutout.value: found {self.value}, expected a grey value between 0 and 1")

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        count, size_z, size_xy = (
            int(rng.integers(low, high + 1)) for low, high in (self.count, self.size_z, self.size_xy)
        )
        size = tuple(min(a, b) for a, b in zip((size_z, size_xy, size_xy), shape))
        room = [n - m for n, m in zip(shape, size)]
        corners = rng.integers(0, room, (count, 3), endpoint=True)
        return {"size": size, "corners": corners}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image = np.array(sample["image"], order="C")
        value = round(self.value * 255) if image.dtype == np.uint8 else self.value
        for corner in draws["corners"]:
            image[tuple(slice(a, a + n) for a, n in zip(corner, draws["size"]))] = value
        return _with_image(sample, image)


def _box(rng: np.random.Generator, shape: Shape, ratio: float) -> tuple[Shape, Shape]:
    size = tuple(max(1, int(n * ratio)) for n in shape)
    corner = tuple(int(rng.integers(0, n - m + 1)) for n, m in zip(shape, size))
    return corner, size  # type: ignore[return-value]


def _check_ratio(owner: object, ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise UserError(f"{type(owner).__name__}.ratio: found {ratio}, expected a fraction above 0 and up to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutNoise:
    """Uniform noise in -scale..scale added within one box of ``ratio`` of the block's length along each axis.

    Draws: ``corner``, ``noise`` float32 in -1..1 of the shape of the box.
    """

    p: float = 0.75
    ratio: float = 0.4
    scale: float = 0.3

    def __post_init__(self):
        check_probability(self, self.p)
        _check_ratio(self, self.ratio)
        if self.scale < 0:
            raise UserError(f"CutNoise.scale: found {self.scale}, expected 0 or more")

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        corner, size = _box(rng, shape, self.ratio)
        return {"corner": corner, "noise": rng.random(size, dtype=np.float32) * 2 - 1}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image = np.array(as_float(sample["image"]))
        noise = draws["noise"]
        box = image[tuple(slice(a, a + n) for a, n in zip(draws["corner"], noise.shape))]
        box += noise * np.float32(self.scale)
        np.clip(box, 0, 1, out=box)
        return _with_image(sample, image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutBlur:
    """One box of ``ratio`` of the block's length along each axis at a lower resolution in plane.

    The box is reduced in y and x by a factor uniform in ``factor`` with a triangle filter of that support (linear,
    antialiased) and brought back by the nearest voxel.

    Draws: ``corner``, ``size`` (z, y, x), ``factor``.
    """

    p: float = 0.5
    ratio: float = 0.4
    factor: tuple[float, float] = (2.0, 8.0)

    def __post_init__(self):
        check_probability(self, self.p)
        _check_ratio(self, self.ratio)
        check_range(self, "factor", self.factor, 1.0)

    def grow(self, shape: Shape) -> Shape:
        return _same_shape(shape)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        corner, size = _box(rng, shape, self.ratio)
        return {"corner": corner, "size": size, "factor": float(rng.uniform(*self.factor))}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image = np.array(as_float(sample["image"]))
        box = image[tuple(slice(a, a + n) for a, n in zip(draws["corner"], draws["size"]))]
        down_y, up_y = _reduction(draws["size"][1], draws["factor"])
        down_x, up_x = _reduction(draws["size"][2], draws["factor"])
        small = np.einsum("ay,zyx,bx->zab", down_y, box, down_x, optimize=True)
        box[...] = small[:, up_y][:, :, up_x]
        return _with_image(sample, image)


def _reduction(size: int, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (small, size) of a triangle filter, and for each of ``size`` voxels the small voxel nearest to it."""
    small = max(1, round(size / factor))
    step = size / small
    centres = (np.arange(small) + 0.5) * step - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(size)[None] - centres[:, None]) / step)
    weights /= weights.sum(1, keepdims=True)
    nearest = np.minimum(((np.arange(size) + 0.5) / step).astype(int), small - 1)
    return weights.astype(np.float32), nearest

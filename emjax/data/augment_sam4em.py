"""SAM4EM's augmentation of slices: elastic deformation, or contrast and brightness, or motion blur, or nothing.

The published code draws for every slice by itself, which tears a volume apart along z; here one draw holds for the chunk
unless ``independent`` asks for the published way. Labels follow by the nearest voxel (the published code interpolates them).
"""

import dataclasses
from typing import Any

import numpy as np
import scipy.ndimage

from emjax.data.augment_geometry import warp_sections
from emjax.data.crops import Draws, Sample, Shape, as_float, check_probability, check_range, shape_of
from emjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sam4emSlices:
    """The published chain: each kind is tried only where those before it were not drawn.

    Attributes:
        elastic_p: probability of an elastic deformation: three anchor points are moved by up to ``affine`` times the
            width, then a field of displacements (uniform noise smoothed with ``sigma`` times the width, times ``alpha``
            times the width; Simard et al. 2003).
        jitter_p: of contrast and brightness, by factors within ``jitter``.
        blur_p: of a motion blur, a line of ``blur`` pixels in a random direction.
        independent: draw anew for every slice, as published.

    Draws: ``slices``, one dict for all slices or one for each; ``kind`` and what it needs.
    """

    elastic_p: float = 0.65
    jitter_p: float = 0.45
    blur_p: float = 0.35
    affine: float = 0.08
    alpha: float = 2.0
    sigma: float = 0.08
    jitter: tuple[float, float] = (0.8, 1.5)
    blur: int = 11
    independent: bool = False

    def __post_init__(self):
        for p in (self.elastic_p, self.jitter_p, self.blur_p):
            check_probability(self, p)
        check_range(self, "jitter", self.jitter, 0.0)
        if min(self.affine, self.alpha) < 0 or self.sigma <= 0 or self.blur < 1:
            raise UserError(
                f"Sam4emSlices: found affine {self.affine}, alpha {self.alpha}, sigma {self.sigma}, blur {self.blur}, "
                "expected affine and alpha from 0, sigma above 0 and blur from 1 up"
            )

    def grow(self, shape: Shape) -> Shape:
        return shape

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        count = shape[0] if self.independent else 1
        drawn = [self._draw_one(rng, shape[1:]) for _ in range(count)]
        return None if all(one["kind"] == "none" for one in drawn) else {"slices": drawn}

    def _draw_one(self, rng: np.random.Generator, plane: tuple[int, int]) -> dict[str, Any]:
        height, width = plane
        if rng.random() < self.elastic_p:
            reach = self.affine * width
            noise = rng.random((2, height, width), dtype=np.float32) * 2 - 1
            smooth = scipy.ndimage.gaussian_filter(noise, (0, self.sigma * width, self.sigma * width), mode="constant")
            return {
                "kind": "elastic",
                "anchors": rng.uniform(-reach, reach, (3, 2)),
                "displacement": smooth * np.float32(self.alpha * width),
            }
        if rng.random() < self.jitter_p:
            contrast, brightness = (float(factor) for factor in rng.uniform(*self.jitter, 2))
            return {"kind": "jitter", "contrast": contrast, "brightness": brightness}
        if rng.random() < self.blur_p:
            return {"kind": "blur", "radians": float(rng.uniform(0, np.pi))}
        return {"kind": "none"}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        drawn = draws["slices"]
        if len(drawn) == 1:
            return self._apply_one(sample, drawn[0])
        parts = [
            self._apply_one({name: array[z : z + 1] for name, array in sample.items()}, one)
            for z, one in enumerate(drawn)
        ]
        # Some slices may be float by now and others uint8.
        kind = np.result_type(*[part["image"].dtype for part in parts])
        for part in parts:
            part["image"] = as_float(part["image"]) if kind == np.float32 else part["image"]
        return {name: np.concatenate([part[name] for part in parts]) for name in sample}

    def _apply_one(self, sample: Sample, one: dict[str, Any]) -> Sample:
        sample = dict(sample)
        if one["kind"] == "elastic":
            return warp_sections(sample, *elastic_coordinates(shape_of(sample)[1:], **_field(one)), "reflect")
        if one["kind"] == "jitter":
            image = as_float(sample["image"])
            mean = image.mean((1, 2), keepdims=True)
            image = np.clip(mean + (image - mean) * np.float32(one["contrast"]), 0, 1)
            sample["image"] = np.clip(image * np.float32(one["brightness"]), 0, 1)
        elif one["kind"] == "blur":
            kernel = motion_kernel(self.blur, one["radians"])
            sample["image"] = scipy.ndimage.correlate(as_float(sample["image"]), kernel[None], mode="mirror")
        return sample


def _field(one: dict[str, Any]) -> dict[str, np.ndarray]:
    return {"anchors": one["anchors"], "displacement": one["displacement"]}


def elastic_coordinates(
    plane: tuple[int, int], anchors: np.ndarray, displacement: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Source coordinates (y, x), float64, of an affine map and a field of displacements after it.

    ``anchors`` (3, 2): by how much (y, x) three points about the centre of the plane move; ``displacement`` (2, y, x).
    """
    height, width = plane
    side = min(plane) // 3
    centre = np.array([height // 2, width // 2], np.float64)
    points = centre + side * np.array([[1, 1], [-1, 1], [-1, -1]], np.float64)
    moved = np.concatenate([points + anchors, np.ones((3, 1))], 1)
    # Rows of y, x, 1 at the target times this matrix are y, x at the source.
    back = np.linalg.solve(moved, points)
    ys, xs = np.meshgrid(np.arange(height, dtype=np.float64), np.arange(width, dtype=np.float64), indexing="ij")
    ys, xs = ys + displacement[0], xs + displacement[1]
    return back[0, 0] * ys + back[1, 0] * xs + back[2, 0], back[0, 1] * ys + back[1, 1] * xs + back[2, 1]


def motion_kernel(size: int, radians: float) -> np.ndarray:
    """A line of ``size`` pixels through the middle, float32 (size, size), sum 1."""
    kernel = np.zeros((size, size), np.float32)
    steps = np.linspace(-(size - 1) / 2, (size - 1) / 2, 4 * size)
    rows = np.rint((size - 1) / 2 + steps * np.sin(radians)).astype(int)
    columns = np.rint((size - 1) / 2 + steps * np.cos(radians)).astype(int)
    kernel[rows, columns] = 1
    return kernel / kernel.sum()

"""Augmentations that imitate defects of cutting and imaging: lost sections, lost parts, sections out of place.

``draw(rng, shape)`` makes every random choice, ``apply(sample, draws)`` has no randomness, ``grow(shape)`` is the
sample that must go in for ``shape`` to come out. Tissue that a defect only hides keeps its ids.
"""

import dataclasses
import math
from typing import Literal

import numba
import numpy as np

from emjax.data.augment_geometry import rotated, warp_sections
from emjax.data.crops import Draws, Sample, Shape, check_choice, check_probability, shape_of
from emjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingSection:
    """``count`` sections, never the first or last, lost.

    Attributes:
        mode: ``"delete"`` takes them out of image and ids (the next sections move up: what an alignment of a series
            with a gap looks like); ``"blank"`` sets the image to ``value`` and keeps the ids.

    Draws: ``sections``.
    """

    p: float = 0.5
    count: int = 2
    mode: Literal["delete", "blank"] = "delete"
    value: float = 0.0

    def __post_init__(self):
        check_probability(self, self.p)
        check_choice(self, "mode", self.mode, ("delete", "blank"))
        if self.count < 1:
            raise UserError(f"MissingSection.count: found {self.count}, expected 1 or more")
        if not 0 <= self.value <= 1:
            raise UserError(f"MissingSection.value: found {self.value}, expected a grey value between 0 and 1")

    def grow(self, shape: Shape) -> Shape:
        z, y, x = shape
        return (z + self.count, y, x) if self.mode == "delete" else shape

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if shape[0] < self.count + 2:
            raise UserError(
                f"MissingSection: a crop of {shape[0]} sections has no {self.count} inner sections to lose; "
                "use a deeper crop or leave it out"
            )
        if rng.random() >= self.p:
            return None
        sections = 1 + rng.choice(shape[0] - 2, self.count, replace=False)
        return {"sections": tuple(sorted(int(z) for z in sections))}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        lost = list(draws["sections"])
        if self.mode == "delete":
            kept = np.delete(np.arange(shape_of(sample)[0]), lost)
            return {name: array[kept] for name, array in sample.items()}
        image = np.array(sample["image"], order="C")
        image[lost] = round(self.value * 255) if image.dtype == np.uint8 else self.value
        return {**sample, "image": image}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MissingParts:
    """Bands of sections blanked with the section's mean: folds, cracks, tape edges.

    Going through the sections, each has a band with probability ``section_p``, and the section after one with a band is
    left alone. A band is what lies within ``width`` voxels (steps along the axes) of a line from edge to edge.

    Draws: ``bands``, tuples (section, ends) with ends ((y, x), (y, x)) of the line.
    """

    p: float = 0.5
    section_p: float = 0.9
    width: int = 64

    def __post_init__(self):
        check_probability(self, self.p)
        if not 0 <= self.section_p <= 1:
            raise UserError(f"MissingParts.section_p: found {self.section_p}, expected a probability between 0 and 1")
        if self.width < 0:
            raise UserError(f"MissingParts.width: found {self.width}, expected 0 or more voxels")

    def grow(self, shape: Shape) -> Shape:
        return shape

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        depth, height, width = shape
        bands = []
        z = 0
        while z < depth:
            if rng.random() < self.section_p:
                if rng.random() < 0.5:
                    ends = ((0, int(rng.integers(width))), (height - 1, int(rng.integers(width))))
                else:
                    ends = ((int(rng.integers(height)), 0), (int(rng.integers(height)), width - 1))
                bands.append((z, ends))
                z += 1
            z += 1
        return {"bands": tuple(bands)}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        image = np.array(sample["image"], order="C")
        for z, ((y0, x0), (y1, x1)) in draws["bands"]:
            _blank_band(image[z], float(y0), float(x0), float(y1), float(x1), float(self.width))
        return {**sample, "image": image}


@numba.njit(nogil=True, cache=True)
def _blank_band(section, y0, x0, y1, x1, width):
    # Distance in steps along the axes from a point to a line is |n . v| / max |n| for the line's normal n.
    ny, nx = x1 - x0, y0 - y1
    reach = width * max(abs(ny), abs(nx), 1.0)
    total = 0.0
    for y in range(section.shape[0]):
        for x in range(section.shape[1]):
            total += section[y, x]
    mean = total / section.size
    for y in range(section.shape[0]):
        for x in range(section.shape[1]):
            if abs(ny * (y - y0) + nx * (x - x0)) <= reach:
                section[y, x] = mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misalignment:
    """Sections out of place: one section alone ("slip") or all from one on ("translation"); image and ids together.

    With probability ``rotate`` the sections are turned about the centre, by at most the angle that moves a corner by
    half of ``displacement`` (2 asin(d/2 / (0.71 side)), as in PyTorch Connectomics), else shifted by up to
    ``displacement`` - 1 voxels in y and x. The sample becomes ``displacement`` smaller in y and x.

    Draws: ``section``, ``slip`` bool, and ``radians`` or ``starts`` ((y, x) of the others, (y, x) of the displaced).
    """

    p: float = 0.5
    displacement: int = 16
    rotate: float = 0.5
    slip: float = 0.5

    def __post_init__(self):
        check_probability(self, self.p)
        if self.displacement < 1:
            raise UserError(f"Misalignment.displacement: found {self.displacement}, expected 1 voxel or more")
        if not 0 <= self.rotate <= 1 or not 0 <= self.slip <= 1:
            raise UserError(f"Misalignment: found rotate {self.rotate}, slip {self.slip}, expected probabilities")

    def grow(self, shape: Shape) -> Shape:
        z, y, x = shape
        return (z, y + self.displacement, x + self.displacement)

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        if rng.random() >= self.p:
            return None
        depth, height, width = shape
        slip = bool(rng.random() < self.slip)
        section = int(rng.integers(1, max(depth - 1, 2))) if depth > 1 else 0
        if rng.random() < self.rotate:
            side = max(1, min(height, width) - self.displacement)
            most = 2 * math.asin(min(1.0, self.displacement / 2 / (0.71 * side)))
            return {"section": section, "slip": slip, "radians": float(rng.uniform(-most, most))}
        starts = tuple((int(y), int(x)) for y, x in rng.integers(0, self.displacement, (2, 2)))
        return {"section": section, "slip": slip, "starts": starts}

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        if draws is None:
            return sample
        depth, height, width = shape_of(sample)
        out_height, out_width = height - self.displacement, width - self.displacement
        section = draws["section"]
        moved = slice(section, section + 1 if draws["slip"] else depth)
        if "radians" in draws:
            half = self.displacement // 2
            window = np.s_[:, half : half + out_height, half : half + out_width]
            out = {name: np.array(array[window]) for name, array in sample.items()}
            ys, xs = (line[window[1:]] for line in rotated((depth, height, width), draws["radians"]))
            turned = warp_sections({name: array[moved] for name, array in sample.items()}, ys, xs, "edge")
        else:
            (y0, x0), (y1, x1) = draws["starts"]
            out = {
                name: np.array(array[:, y0 : y0 + out_height, x0 : x0 + out_width]) for name, array in sample.items()
            }
            turned = {name: array[moved, y1 : y1 + out_height, x1 : x1 + out_width] for name, array in sample.items()}
        for name, array in out.items():
            array[moved] = turned[name]
        return out

"""Chains of augmentations: how large a crop they need, their random draws, their application.

A chain is a tuple of augmentations in order of application. Sizes are known before anything is drawn: a crop of
:func:`needed_shape` is read, every augmentation gets exactly the shape that the rest of the chain needs, and the
network's crop comes out. Draws depend on the shapes and the generator alone, never on the grey values.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from emjax.data.augment_defects import Misalignment, MissingParts, MissingSection
from emjax.data.augment_geometry import Elastic, ElasticGrid, FlipTranspose, Rescale, Rotate, Rotate90
from emjax.data.augment_intensity import Blur, CutBlur, CutNoise, Cutout, GaussianNoise, Grayscale, MotionBlur
from emjax.data.augment_sam4em import Sam4emSlices
from emjax.data.crops import Draws, Sample, Shape, centre_crop

__all__ = [
    "Augmentation",
    "Blur",
    "CutBlur",
    "CutNoise",
    "Cutout",
    "Elastic",
    "ElasticGrid",
    "FlipTranspose",
    "GaussianNoise",
    "Grayscale",
    "Misalignment",
    "MissingParts",
    "MissingSection",
    "MotionBlur",
    "Rescale",
    "Rotate",
    "Rotate90",
    "Sam4emSlices",
    "apply_draws",
    "augment",
    "chain_shapes",
    "draw_chain",
    "needed_shape",
    "standard_chain",
]


class Augmentation(Protocol):
    """What an augmentation is: a frozen dataclass of parameters with these three pure methods."""

    def grow(self, shape: Shape) -> Shape:
        """The smallest sample (z, y, x) that must go in for at least ``shape`` to come out."""
        ...

    def draw(self, rng: np.random.Generator, shape: Shape) -> Draws:
        """All random choices for a sample of ``shape`` as plain values; None to leave it alone."""
        ...

    def apply(self, sample: Sample, draws: Draws) -> Sample:
        """The augmented sample; a pure function that never writes into its input."""
        ...


def chain_shapes(chain: Sequence[Augmentation], crop: Shape) -> list[Shape]:
    """Shapes of the sample before each augmentation and, last, after all of them (= ``crop``)."""
    z, y, x = crop
    shapes = [(z, y, x)]
    for augmentation in reversed(chain):
        shapes.append(augmentation.grow(shapes[-1]))
    return shapes[::-1]


def needed_shape(chain: Sequence[Augmentation], crop: Shape) -> Shape:
    """The crop (z, y, x) to be read for ``crop`` to come out of the chain."""
    return chain_shapes(chain, crop)[0]


def draw_chain(chain: Sequence[Augmentation], crop: Shape, rng: np.random.Generator) -> list[Draws]:
    """The draws of every augmentation of the chain, in order."""
    shapes = chain_shapes(chain, crop)
    return [augmentation.draw(rng, shape) for augmentation, shape in zip(chain, shapes)]


def apply_draws(chain: Sequence[Augmentation], crop: Shape, sample: Sample, draws: Sequence[Draws]) -> Sample:
    """The chain applied to a sample of :func:`needed_shape` (or larger: the middle is taken); ``crop`` comes out."""
    shapes = chain_shapes(chain, crop)
    sample = centre_crop(sample, shapes[0])
    for augmentation, drawn, after in zip(chain, draws, shapes[1:]):
        if drawn is not None:
            sample = augmentation.apply(sample, drawn)
        sample = centre_crop(sample, after)
    return sample


def augment(chain: Sequence[Augmentation], crop: Shape, sample: Sample, rng: np.random.Generator) -> Sample:
    """Draw and apply in one go."""
    return apply_draws(chain, crop, sample, draw_chain(chain, crop, rng))


def standard_chain(crop: Shape, anisotropic: bool) -> tuple[Augmentation, ...]:
    """A moderate chain for dense neuron segmentation, for sectioned (anisotropic) or isotropic volumes.

    Axes are only exchanged where ``crop`` is equally long along them, so that no larger crop is needed for it.
    """
    square = crop[1] == crop[2]
    order: tuple[Augmentation, ...]
    if anisotropic:
        order = (
            FlipTranspose(transpose="yx" if square else "none"),
            MissingSection(p=0.2, count=1),
            Misalignment(p=0.2, displacement=8),
        )
    else:
        order = (FlipTranspose(transpose="all" if len(set(crop)) == 1 else "yx" if square else "none"),)
    return order + (
        Elastic(p=0.25),
        Grayscale(p=0.75, sections=0.5 if anisotropic else 0.0),
        GaussianNoise(p=0.25, sigma=(0.01, 0.1)),
        Blur(p=0.15),
        Cutout(p=0.25, count=(2, 6), size_z=(2, 6), size_xy=(10, 30)),
    )

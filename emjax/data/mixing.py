"""Domain mixing of SegNeuron's fine-tuning: one training sample out of up to three crops of different volumes.

Frequency mixing lends the grey-value statistics of another data set (Yang and Soatto 2020, section by section), spatial
mixing pastes a square of another sample with its labels (Yun et al. 2019).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emjax.data.augment import apply_draws, draw_chain
from emjax.data.crops import Draws, Sample, as_float
from emjax.data.pipeline import CropDraws, SampleDraws, Sampler
from emjax.errors import UserError

AFFINITY_BITS = "affinity_bits"


def half_width(shape: Sequence[int], share: float) -> int:
    """Half-width in frequencies of the exchanged square: floor(smaller side * ``share``)."""
    return int(np.floor(min(shape[-2:]) * share))


def mix_frequencies(source: np.ndarray, partner: np.ndarray, share: float) -> np.ndarray:
    """``source`` (z, y, x) with the low-frequency amplitudes of ``partner``, section by section, phases kept.

    Args:
        source, partner: one shape; uint8, or floats 0..1.
        share: 0 to 0.5; amplitudes of frequencies up to ``floor(min(y, x) * share)`` either way along both axes are
            exchanged. Below 1 / min(y, x), as in the published 0.001, only the mean of each section moves.

    Returns:
        float32, not clipped.
    """
    if source.shape != partner.shape:
        raise ValueError(f"partner has shape {partner.shape}, source {source.shape}; expected the same")
    if not 0 <= share <= 0.5:
        raise ValueError(f"share is {share}; expected 0 to 0.5")
    ours, theirs = (as_float(np.asarray(image)).astype(np.float64) for image in (source, partner))
    width = half_width(source.shape, share)
    if width == 0:
        # Grey values are not negative, so the phase of the mean is 0.
        shift = theirs.mean((1, 2), keepdims=True) - ours.mean((1, 2), keepdims=True)
        return (ours + shift).astype(np.float32)
    height, length = source.shape[1:]
    # Only the exchanged frequencies are transformed: two small matrices in place of whole Fourier transforms.
    along_y = np.exp(-2j * np.pi * np.outer(_frequencies(height, width), np.arange(height)) / height)
    along_x = np.exp(-2j * np.pi * np.outer(_frequencies(length, width), np.arange(length)) / length)
    own, lent = (along_y @ image @ along_x.T for image in (ours, theirs))
    size = np.abs(own)
    phase = np.divide(own, size, out=np.ones_like(own), where=size > 0)
    change = (np.abs(lent) - size) * phase
    back = np.conj(along_y.T) @ change @ np.conj(along_x) / (height * length)
    return (ours + back.real).astype(np.float32)


def _frequencies(size: int, width: int) -> np.ndarray:
    """-width..width without counting the highest frequency of an even size twice."""
    found = np.arange(-width, width + 1)
    return found[:-1] if 2 * width == size else found


def paste(below: Sample, above: Sample, corner: tuple[int, int], size: int) -> Sample:
    """``below`` with the square of side ``size`` at ``corner`` (y, x), through all sections, taken from ``above``."""
    y, x = corner
    window = np.s_[:, y : y + size, x : x + size]
    mixed = {}
    for name, array in below.items():
        mixed[name] = np.array(array)
        mixed[name][window] = above[name][window]
    return mixed


def affinity_bits(labels: np.ndarray) -> np.ndarray:
    """The three nearest affinities of ids (z, y, x) in the bits 0, 1, 2 (z, y, x) of one uint8.

    They say what ``emjax.data.targets.affinities`` with ``border="replicate"`` says, but survive pasting: at a seam
    each voxel keeps what its own crop said.
    """
    positive = labels > 0
    bits = np.zeros(labels.shape, np.uint8)
    for axis in range(3):
        same = positive.copy()
        inner, before = [slice(None)] * 3, [slice(None)] * 3
        inner[axis], before[axis] = slice(1, None), slice(None, -1)
        same[tuple(inner)] &= labels[tuple(inner)] == labels[tuple(before)]
        bits |= same.astype(np.uint8) << axis
    return bits


def counted(labels: np.ndarray, ignored: Sequence[int], mask: np.ndarray | None = None) -> np.ndarray:
    """uint8 loss mask: 0 where the label is one of ``ignored`` or ``mask`` is 0."""
    keep = np.ones(labels.shape, np.uint8) if mask is None else (np.asarray(mask) != 0).astype(np.uint8)
    if len(ignored):
        keep[np.isin(labels, np.asarray(ignored))] = 0
    return keep


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
    """How samples are mixed. Sources of one data set share the part of their name before "/".

    Attributes:
        frequency_p: probability of frequency mixing with a crop of another data set.
        frequency_share: see :func:`mix_frequencies`.
        spatial_p: probability of pasting a square of a second sample.
        square: side of the square in voxels.
        other_p: probability that the second sample comes from another data set, else from the same volume.
        recompute_seam: affinities from the pasted labels; otherwise (published) each side of the seam keeps its own.
        reference: reproduce the published code's slips: the last data set is never a partner, and where one of the
            crops ignores label 10000 no other label is ignored.
    """

    frequency_p: float = 0.25
    frequency_share: float = 0.001
    spatial_p: float = 0.25
    square: int = 70
    other_p: float = 0.5
    recompute_seam: bool = False
    reference: bool = False

    def validate(self) -> None:
        """Raises ``UserError`` for settings that cannot work."""
        for name in ("frequency_p", "spatial_p", "other_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"mixing.{name}: found {getattr(self, name)}, expected a probability between 0 and 1")
        if not 0 <= self.frequency_share <= 0.5:
            raise UserError(f"mixing.frequency_share: found {self.frequency_share}, expected 0 to 0.5")
        if self.square < 1:
            raise UserError(f"mixing.square: found {self.square}, expected 1 voxel or more")


@dataclasses.dataclass(frozen=True)
class MixDraws:
    """Everything random about one mixed sample.

    ``frequency``: crop that lends its amplitudes; ``second``: sample that a square is taken from, with ``corner``
    (y, x) of the square.
    """

    main: SampleDraws
    frequency: CropDraws | None = None
    second: SampleDraws | None = None
    corner: tuple[int, int] = (0, 0)


def _data_set(name: str) -> str:
    return name.rpartition("/")[0] or name


def partners(names: Sequence[str], number: int, reference: bool = False) -> list[list[int]]:
    """Sources of the data sets that source ``number`` may be mixed with, one list for each data set."""
    groups: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(_data_set(name), []).append(index)
    own = _data_set(names[number])
    found = list(groups.items())
    return [members for key, members in (found[:-1] if reference else found) if key != own]


def draw_mix(sampler: Sampler, settings: Mixing, rng: np.random.Generator) -> MixDraws:
    """Draws a mixed sample. Partners from other data sets are read at every section, whatever their ``z_steps``."""
    main = sampler.draw(rng)
    others = partners([source.title for source in sampler.sources], main.crop.source, settings.reference)

    def elsewhere() -> CropDraws:
        members = others[rng.integers(len(others))]
        return sampler.draw_crop(rng, members, z_step=1)

    frequency = elsewhere() if rng.random() < settings.frequency_p and others else None
    if not rng.random() < settings.spatial_p:
        return MixDraws(main, frequency)
    if rng.random() < settings.other_p and others:
        crop = elsewhere()
    else:
        crop = sampler.draw_crop(rng, [main.crop.source], z_step=main.crop.z_step)
    second = SampleDraws(crop, draw_chain(sampler.chain, sampler.crop, rng))
    size = min(settings.square, *sampler.crop[1:])
    y, x = (int(rng.integers(0, side - size + 1)) for side in sampler.crop[1:])
    return MixDraws(main, frequency, second, (y, x))


def assemble(
    main: Sample,
    lender: np.ndarray | None,
    second: Sample | None,
    corner: tuple[int, int],
    settings: Mixing,
    ignored: Sequence[int] = (),
    augment_main: Callable[[Sample], Sample] = lambda sample: sample,
    augment_second: Callable[[Sample], Sample] = lambda sample: sample,
) -> Sample:
    """One sample from crops as they were read, in the published order.

    Frequency mixing (clipped to 0..1), augmentation, affinities, pasting, loss mask.

    Returns:
        ``image`` float32, ``labels``, ``mask`` uint8, and ``affinity_bits`` unless the seam is recomputed.
    """
    image = as_float(main["image"])
    if lender is not None:
        image = np.clip(mix_frequencies(image, lender, settings.frequency_share), 0, 1)
    sample = augment_main({**main, "image": image})
    if not settings.recompute_seam:
        sample = {**sample, AFFINITY_BITS: affinity_bits(sample["labels"])}
    if second is not None:
        above = augment_second({**second, "image": as_float(second["image"])})
        if not settings.recompute_seam:
            above = {**above, AFFINITY_BITS: affinity_bits(above["labels"])}
        above = {**above, "image": as_float(above["image"])}
        sample = paste({**sample, "image": as_float(sample["image"])}, above, corner, settings.square)
    return {**sample, "mask": counted(sample["labels"], ignored, sample.get("mask"))}


def ignored_by(sets: Sequence[Sequence[int]], reference: bool = False) -> tuple[int, ...]:
    """Labels ignored in a sample made of volumes that each ignore one of ``sets``: all of them.

    The published code looks at 10000 first, and at nothing else where that is found.
    """
    union = tuple(sorted({label for labels in sets for label in labels}))
    return (10000,) if reference and 10000 in union else union


def make_mix(sampler: Sampler, settings: Mixing, draws: MixDraws) -> Sample:
    """The mixed sample of recorded draws."""
    used = [draws.main.crop.source] + ([] if draws.second is None else [draws.second.crop.source])

    def augment(chain: list[Draws]) -> Callable[[Sample], Sample]:
        return lambda sample: apply_draws(sampler.chain, sampler.crop, sample, chain)

    nothing: Any = lambda sample: sample  # noqa: E731
    return assemble(
        sampler.read(draws.main.crop),
        None if draws.frequency is None else as_float(sampler.read(draws.frequency)["image"]),
        None if draws.second is None else sampler.read(draws.second.crop),
        draws.corner,
        settings,
        ignored_by([sampler.sources[number].ignore_labels for number in used], settings.reference),
        augment(draws.main.chain),
        nothing if draws.second is None else augment(draws.second.chain),
    )


def mixed_sample(settings: Mixing, sampler: Sampler, rng: np.random.Generator) -> Sample:
    """Draw and make in one go; with ``functools.partial(mixed_sample, settings)`` a ``compose`` for the loader."""
    return make_mix(sampler, settings, draw_mix(sampler, settings, rng))

"""One picture of what each augmentation does to a crop, image and labels side by side.

    python eval/augmentation_pictures.py --out augmentations.png                     # on a phantom
    python eval/augmentation_pictures.py --raw data/train.h5:raw --labels data/train.h5:labels --out augmentations.png

Every row is one augmentation (p = 1): two neighbouring sections, the same with their labels in colour, and a cut along
z. ``--seed`` draws others. With ``--chain`` the rows are samples of the standard chain instead.
"""

import argparse
import dataclasses
import sys

import numpy as np
from PIL import Image, ImageDraw

from emjax.data.augment import (
    Augmentation,
    Blur,
    CutBlur,
    CutNoise,
    Cutout,
    Elastic,
    ElasticGrid,
    FlipTranspose,
    GaussianNoise,
    Grayscale,
    Misalignment,
    MissingParts,
    MissingSection,
    MotionBlur,
    Rescale,
    Rotate,
    Rotate90,
    augment,
    needed_shape,
    standard_chain,
)
from emjax.data.crops import Sample, Shape, as_uint8
from emjax.data.phantom import make_phantom, sectioned
from emjax.data.pipeline import Sampler, Source
from emjax.errors import UserError

ROWS: tuple[Augmentation, ...] = (
    FlipTranspose(),
    Rotate90(),
    Rotate(),
    Rescale(),
    Elastic(alpha=120.0, sigma=8.0),
    ElasticGrid(sigma=(6.0, 6.0)),
    Grayscale(),
    Grayscale(sections=1.0),
    GaussianNoise(sigma=(0.1, 0.2)),
    Blur(sigma=(1.5, 2.0)),
    MotionBlur(count=8),
    Cutout(count=(5, 8)),
    CutNoise(),
    CutBlur(),
    MissingSection(),
    MissingSection(mode="blank", count=4),
    MissingParts(width=12),
    Misalignment(rotate=0.0, slip=0.0),
    Misalignment(rotate=1.0, slip=0.0),
)


def colours(labels: np.ndarray) -> np.ndarray:
    """A colour per id, uint8 (..., 3); black for 0."""
    hashed = (labels.astype(np.uint32) * np.uint32(2654435761)) & np.uint32(0xFFFFFFFF)
    rgb = np.stack([hashed >> 24, hashed >> 16, hashed >> 8], -1).astype(np.uint8) // 2 + 100
    return np.where((labels > 0)[..., None], rgb, 0).astype(np.uint8)


def row(sample: Sample, section: int) -> np.ndarray:
    """The panels of one sample next to each other, uint8 (y, x, 3)."""
    grey = np.repeat(as_uint8(sample["image"])[..., None], 3, -1)
    mixed = (0.6 * grey + 0.4 * colours(sample["labels"])).astype(np.uint8)
    height, middle = grey.shape[1], grey.shape[1] // 2
    side = np.repeat(mixed[:, middle], max(1, height // grey.shape[0]), 0)
    side = np.pad(side, ((0, max(0, height - len(side))), (0, 0), (0, 0)))[:height]
    return np.concatenate([grey[section], grey[section + 1], mixed[section], mixed[section + 1], side], 1)


def samples(crop: Shape, sampler_of, seed: int, as_chain: bool):
    """Title and sample of every row."""
    chains = [()] + [(dataclasses.replace(a, p=1.0),) for a in ROWS]  # type: ignore[type-var]
    if as_chain:
        chains = [standard_chain(crop, True)] * 10
    for number, chain in enumerate(chains):
        title = f"standard chain {number}" if as_chain else type(chain[0]).__name__ if chain else "as it is"
        sample = sampler_of(needed_shape(chain, crop))
        yield title, augment(chain, crop, sample, np.random.default_rng(seed + number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", help="image volume; a phantom if not given")
    parser.add_argument("--labels", help="labels of the same shape")
    parser.add_argument("--crop", type=int, nargs=3, default=(12, 128, 128), metavar=("Z", "Y", "X"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", action="store_true", help="samples of the standard chain")
    parser.add_argument("--out", default="augmentations.png")
    arguments = parser.parse_args()
    crop = tuple(arguments.crop)
    if bool(arguments.raw) != bool(arguments.labels):
        raise UserError("--raw and --labels: give both, or none for a phantom")

    if arguments.raw:
        source = Source(raw=arguments.raw, labels=arguments.labels)

        def sampler_of(shape: Shape) -> Sample:
            sampler = Sampler([source], shape)
            return sampler.read(sampler.draw_crop(np.random.default_rng(arguments.seed)))
    else:
        z, y, x = crop
        volume = make_phantom(sectioned((z + 6, 2 * y, 2 * x), seed=arguments.seed))

        def sampler_of(shape: Shape) -> Sample:
            window = tuple(slice(0, n) for n in shape)
            return {"image": volume.raw[window], "labels": volume.labels[window].astype(np.int32)}

    rows = []
    for title, sample in samples(crop, sampler_of, arguments.seed, arguments.chain):
        picture = Image.fromarray(row(sample, crop[0] // 2))
        ImageDraw.Draw(picture).text((4, 2), title, fill=(255, 255, 0), stroke_width=1, stroke_fill=(0, 0, 0))
        rows.append(np.asarray(picture))
    Image.fromarray(np.concatenate(rows)).save(arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

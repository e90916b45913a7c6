"""Speed of the training loader: augmented crops per second and core, and what each augmentation costs.

    python eval/bench/loader.py                          # crops of 32 x 160 x 160 from a volume held in memory
    python eval/bench/loader.py --crop 18 256 256 --crops 100

A made-up volume (uint8 image, uint32 labels, sharded Zarr) is written to a temporary folder. Rates are crops per second
of processor time of the whole process, so they are per core, and hold on a machine that is busy with other work; the
wall-clock rate of the threaded iterator is printed beside. Costs of an augmentation are for one crop on which it acts
(p = 1), its random draws included.
"""

import argparse
import dataclasses
import os
import platform
import tempfile
import time

import numpy as np

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
)
from emjax.data.crops import as_float
from emjax.data.pipeline import Loader, Source
from emjax.data.volume import save_volume

CHAIN: tuple[Augmentation, ...] = (
    FlipTranspose(),
    Rotate90(),
    MissingSection(p=0.25, count=1),
    Misalignment(p=0.25, displacement=8),
    Elastic(p=0.25),
    Grayscale(p=0.75, sections=0.5),
    GaussianNoise(p=0.25),
    Blur(p=0.25),
    Cutout(p=0.25),
)
OTHERS: tuple[Augmentation, ...] = (
    Rotate(),
    Rescale(),
    ElasticGrid(),
    MotionBlur(),
    CutNoise(),
    CutBlur(),
    MissingParts(),
)


def made_up_volume(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A noisy uint8 image and block-shaped uint32 labels."""
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(1, 500, [n // 16 + 1 for n in shape]), np.ones((16, 16, 16), np.uint32))
    return rng.integers(0, 256, shape, dtype=np.uint8), ids[tuple(slice(n) for n in shape)].astype(np.uint32)


def cpu_ms(work, least: int = 6) -> float:
    """Processor time of one call in milliseconds: the median, after a warm-up."""
    work()
    times = []
    for _ in range(least):
        start = time.process_time()
        work()
        times.append(1e3 * (time.process_time() - start))
    return float(np.median(times))


def cost(augmentation: Augmentation, crop: tuple[int, int, int], as_floats: bool) -> float:
    """Milliseconds for one crop: draw, apply, contiguous result."""
    always = dataclasses.replace(augmentation, p=1.0)  # type: ignore[type-var]
    image, labels = made_up_volume(needed_shape((always,), crop))
    sample = {"image": as_float(image) if as_floats else image, "labels": labels.astype(np.int32)}
    rng = np.random.default_rng(0)

    def work():
        for array in augment((always,), crop, sample, rng).values():
            np.ascontiguousarray(array)

    return cpu_ms(work, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, nargs=3, default=(32, 160, 160), metavar=("Z", "Y", "X"))
    parser.add_argument("--crops", type=int, default=200, help="crops to time")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    crop = tuple(arguments.crop)
    steps = -(-arguments.crops // arguments.batch)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, crop {' x '.join(map(str, crop))}")
    print("chain: " + ", ".join(f"{type(a).__name__} p {a.p:g}" for a in CHAIN))  # type: ignore[attr-defined]

    shape = tuple(max(n + 32, m) for n, m in zip(needed_shape(CHAIN, crop), (96, 384, 384)))
    image, labels = made_up_volume(shape)
    with tempfile.TemporaryDirectory() as folder:
        for name, array in (("raw", image), ("labels", labels)):
            save_volume(f"{folder}/v.zarr:{name}", array, voxel_size=(40, 4, 4))
        source = Source(raw=f"{folder}/v.zarr:raw", labels=f"{folder}/v.zarr:labels")
        rates = {}
        for title, chain, cache_bytes in (
            ("no augmentation, in memory", (), 8 << 30),
            ("chain, in memory", CHAIN, 8 << 30),
            ("chain, float32 image in memory", CHAIN, 8 << 30),
            ("chain, cache of a quarter of the volume", CHAIN, 5 * image.size // 4),
        ):
            transport = "float32" if "float32" in title else "uint8"
            loader = Loader([source], crop, arguments.batch, chain, cache_bytes=cache_bytes, transport=transport)
            for step in range(8):
                loader.batch(1000 + step)
            start = time.process_time()
            for step in range(steps):
                loader.batch(step)
            rates[title] = steps * arguments.batch / (time.process_time() - start)
            print(f"{title:44s} {rates[title]:7.0f} crops per second and core")
        loader = Loader([source], crop, arguments.batch, CHAIN, threads=arguments.threads)
        iterator = loader.iterate()
        for _ in range(8):
            next(iterator)
        start = time.perf_counter()
        for _ in range(steps):
            next(iterator)
        rate = steps * arguments.batch / (time.perf_counter() - start)
        print(f"{f'chain, iterator of {arguments.threads} threads':44s} {rate:7.0f} crops per second of wall clock")

    print(f"\n{'augmentation (acting on every crop)':36s} {'uint8 ms':>9s} {'float32 ms':>11s} {'share of chain':>15s}")
    whole = 1e3 / rates["chain, in memory"]
    for augmentation in CHAIN + OTHERS:
        name = type(augmentation).__name__
        on_bytes, on_floats = (cost(augmentation, crop, as_floats) for as_floats in (False, True))
        share = f"{augmentation.p * on_bytes / whole:14.0%}" if augmentation in CHAIN else f"{'-':>14s}"
        print(f"{name:36s} {on_bytes:9.2f} {on_floats:11.2f} {share}")


if __name__ == "__main__":
    main()

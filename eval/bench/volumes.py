"""Reading random crops of 32 x 160 x 160 voxels from every format, against copies of the same crops from memory.

python eval/bench/volumes.py [--size 128,512,512] [--crops 30]

Prints CPU time (all threads of this process) and wall time per crop, and their ratios to a NumPy copy, from one run.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable

import imagecodecs
import numpy as np
from scipy import ndimage

from emjax.data.volume import open_volume, read_cached, save_volume

CROP = (32, 160, 160)
CHUNKS = (32, 64, 64)


def grey_volume(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 texture of a few voxels' grain with fine noise, which compresses about as EM does."""
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), (1, 3, 3))
    noisy = 128 + 30 * smooth / smooth.std() + rng.normal(0, 6, shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def measure(read: Callable[[tuple[slice, ...]], np.ndarray], boxes: list[tuple[slice, ...]]) -> tuple[float, float]:
    """CPU and wall milliseconds per crop."""
    cpu, wall = time.process_time(), time.perf_counter()
    for box in boxes:
        read(box)
    return 1e3 * (time.process_time() - cpu) / len(boxes), 1e3 * (time.perf_counter() - wall) / len(boxes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="128,512,512", help="z,y,x of the volume")
    parser.add_argument("--crops", type=int, default=30)
    options = parser.parse_args()
    shape = tuple(int(n) for n in options.size.split(","))
    array, rng = grey_volume(shape), np.random.default_rng(1)
    corners = [tuple(int(rng.integers(0, n - c + 1)) for n, c in zip(shape, CROP)) for _ in range(options.crops)]
    boxes = [tuple(slice(a, a + c) for a, c in zip(corner, CROP)) for corner in corners]
    with tempfile.TemporaryDirectory() as folder:
        sharded = {"chunks": CHUNKS, "shards": tuple(2 * c for c in CHUNKS)}
        save_volume(f"{folder}/a.zarr", array, voxel_size=(8, 8, 8), **sharded)
        for name, more in (("b.zarr", {"format": "zarr2"}), ("c.n5:raw", {}), ("d.h5", {}), ("e.tif", {})):
            chunks = {} if name == "e.tif" else {"chunks": CHUNKS}
            save_volume(f"{folder}/{name}", array, voxel_size=(8, 8, 8), **chunks, **more)
        save_volume(f"precomputed://{folder}/p", array, voxel_size=(8, 8, 8), chunks=CHUNKS)
        os.mkdir(f"{folder}/png")
        for z, section in enumerate(array):
            with open(f"{folder}/png/{z:04d}.png", "wb") as file:
                file.write(imagecodecs.png_encode(section))
        names = {
            "zarr 3, sharded": f"{folder}/a.zarr",
            "zarr 2": f"{folder}/b.zarr",
            "n5": f"{folder}/c.n5:raw",
            "precomputed raw": f"precomputed://{folder}/p",
            "hdf5 gzip": f"{folder}/d.h5",
            "tiff": f"{folder}/e.tif",
            "png sections": f"{folder}/png",
        }
        base_cpu, base_wall = measure(lambda box: array[box].copy(), boxes * 5)
        print(f"{'source':28} {'CPU ms':>9} {'wall ms':>9} {'CPU ratio':>10} {'wall ratio':>10}")
        rows = {"NumPy copy": (base_cpu, base_wall)}
        for name, spec in names.items():
            rows[name] = measure(open_volume(spec).__getitem__, boxes)
        held = read_cached(open_volume(names["zarr 3, sharded"]), 2 * array.nbytes)
        held[:1]
        rows["zarr 3, whole in RAM"] = measure(held.__getitem__, boxes * 5)
        partly = read_cached(open_volume(names["zarr 3, sharded"]), array.nbytes * 3 // 4)
        measure(partly.__getitem__, boxes)
        rows["zarr 3, cache of 3/4"] = measure(partly.__getitem__, boxes)
        for name, (cpu, wall) in rows.items():
            print(f"{name:28} {cpu:9.2f} {wall:9.2f} {cpu / base_cpu:10.1f} {wall / base_wall:10.1f}")


if __name__ == "__main__":
    main()

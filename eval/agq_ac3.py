"""The published score of AGQ on AC3, with one command: block inference, stitching, scores.

    python eval/agq_ac3.py --checkpoint checkpoint_200000.pth.tar --raw AC3_inputs.h5:main --labels AC3_labels.h5:main

``--checkpoint`` is the official file (257 names) or a work directory of ``emjax.train``. Protocol: blocks of 17 x 257 x
257 at stride 16 x 256 x 256, the last ones moved back to the border (112 for 100 x 1024 x 1024), no test-time flips;
later blocks overwrite, affinities are averaged; 26-connected parts are joined where the mean affinity on block faces
exceeds 0.7. VOI and adapted Rand error over the whole volume, ground truth 0 left out, segment 0 an ordinary segment
(as scikit-image has it). Published: split 0.681, merge 0.267, sum 0.947, adapted Rand error 0.089 (README of the
released checkpoint; the poster, of another checkpoint, says 0.967 and 0.095). Prints the table and the time of every
stage, and with ``--output`` writes the labels too.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import time

import jax
import numpy as np

from emjax.cli import run as run_command
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.metrics import score
from emjax.models.functional import define
from emjax.postprocess.block_merge import merge_blocks
from emjax.systems import agq
from emjax.systems.agq_blocks import block_positions, concatenate
from emjax.training.loading import load_system
from emjax.weights.agq import FAMILY, config_from
from emjax.weights.family import read_checkpoint

PUBLISHED = {"voi_split": 0.681, "voi_merge": 0.267, "voi_sum": 0.947, "arand_skimage": 0.089}


def load(path: str, which: str, dtype: str | None) -> tuple[agq.Config, dict]:
    """Configuration and variables of an official checkpoint or of a work directory."""
    place = pathlib.Path(path)
    if place.is_dir() and not (place / "params").is_dir():
        config, collections = load_system(path, which)
        if not isinstance(config, agq.Config):
            raise UserError(f"--checkpoint {path} is a run of {type(config).__module__}; expected one of AGQ")
    else:
        checkpoint = read_checkpoint(place, [FAMILY])
        config, collections = agq.Config(model=config_from(checkpoint.settings)), checkpoint.collections
    if dtype:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    agq.validate(config)
    return config, jax.tree.map(jax.numpy.asarray, collections)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--which", default="best", help="step of a work directory: best, latest or a number")
    parser.add_argument("--raw", required=True, help="image, uint8, such as AC3_inputs.h5:main")
    parser.add_argument("--labels", required=True, help="ground truth, such as AC3_labels.h5:main")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="precision of the convolutions")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the merge on the host")
    parser.add_argument("--output", help="also write the labels here")
    options = parser.parse_args(arguments)
    config, collections = load(options.checkpoint, options.which, options.dtype)
    voxel_size = config.voxel_size or (29.0, 6.0, 6.0)
    image = open_volume(options.raw, voxel_size=voxel_size).require_axes("zyx")[...]
    truth = open_volume(options.labels, voxel_size=voxel_size).require_axes("zyx")[...]
    if image.dtype != np.uint8:
        raise UserError(f"--raw {options.raw} is {image.dtype}; expected uint8 grey values")
    if image.shape != truth.shape:
        raise UserError(f"--raw has shape {image.shape}, --labels {truth.shape}; expected the same")
    size, stride = config.plan.size, config.plan.stride
    if any(length < block for length, block in zip(image.shape, size)):
        raise UserError(f"--raw has shape {image.shape}; expected at least one block of {size}")
    definition = define(lambda rngs: agq.build(config, rngs))
    predict = jax.jit(lambda variables, block: agq.predict(config, definition.bind(variables), block))
    positions = block_positions(image.shape, size, stride)

    def crop(position: np.ndarray) -> np.ndarray:
        return image[tuple(slice(start, start + length) for start, length in zip(position, size))][None]

    began = time.perf_counter()
    jax.block_until_ready(predict(collections, crop(positions[0])))
    compiled = time.perf_counter()

    def blocks():
        # One block is in flight while the last one is fetched.
        waiting = None
        for position in [*positions, None]:
            found = None if position is None else (position, predict(collections, crop(position)))
            if waiting is not None:
                where, outputs = waiting
                affinities = np.moveaxis(np.asarray(outputs["affinities"][0], np.float32), -1, 0)
                yield where, np.asarray(outputs["instances"][0, ..., 0]), affinities
            waiting = found

    whole = concatenate(blocks(), image.shape)
    predicted = time.perf_counter()
    labels = merge_blocks(
        whole.affinities,
        whole.labels,
        whole.border,
        on_border=config.merge.on_border,
        threshold=config.merge.threshold,
        threads=options.threads,
    )
    merged = time.perf_counter()
    found = score(labels, truth).as_dict()
    device = jax.devices()[0].device_kind
    print(f"{len(positions)} blocks of {size} on {device} ({platform.processor() or platform.machine()}), ", end="")
    print(f"{config.model.dtype}, {len(np.unique(labels)) - 1} segments")
    print(f"compilation and first block {compiled - began:.1f} s, ", end="")
    print(f"blocks {predicted - compiled:.1f} s, merge {merged - predicted:.1f} s")
    print(f"{'':<16}{'found':>10}{'published':>12}")
    for name, published in PUBLISHED.items():
        print(f"{name:<16}{found[name]:>10.3f}{published:>12.3f}")
    if options.output:
        save_volume(options.output, labels, voxel_size=voxel_size, attributes={"source": options.raw, "method": "agq"})
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])

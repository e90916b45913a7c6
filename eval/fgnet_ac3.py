"""FGNet on AC3 by the literature's protocol, with one command: block inference, both recipes, scores.

    python eval/fgnet_ac3.py --checkpoint runs/fgnet_ac3 --raw AC3_inputs.h5:main --labels AC3_labels.h5:main

The first 100 sections; windows as trained at half a window's stride, blended by a Gaussian of 0.2, reflected at the border;
test-time flips with ``--flips``. Then, each in a table of its own and with nothing tuned on the test volume:

* watershed and agglomeration: fragments of every section (SuperHuman's), mean affinity, threshold 0.5;
* multicut: distance-transform fragments of every section, beta 0.5, Kernighan-Lin.

VOI in bits and adapted Rand error as scikit-image has them, ground truth 0 left out, labels as they are. The published
numbers that are printed beside are quoted from the sources named in docs/fgnet.md; those of FGNet are not known.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
import tempfile
import time
from collections.abc import Mapping

import jax
import numpy as np

from emjax import predict
from emjax.cli import run as run_command
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.metrics import Scores, score
from emjax.postprocess import agglomerate, apply, region_graph, superhuman_fragments
from emjax.postprocess.foreground_multicut import foreground_multicut
from emjax.systems import fgnet
from emjax.training.loading import load_system

THRESHOLD = 0.5
SECTIONS = 100
PUBLISHED = {
    "watershed and agglomeration": {"ResUNet": (1.037, 0.258, 1.295, 0.154), "AGQ": (0.681, 0.267, 0.947, 0.089)},
    "multicut": {"SuperHuman": (1.145, 0.263, 1.408, 0.122), "PEA": (0.852, 0.232, 1.084, 0.094)},
}
"""VOI split, merge and sum in bits, and adapted Rand error. AGQ has neither recipe, it is put where its blocks are merged."""


def recipes(affinities: np.ndarray, threads: int) -> dict[str, np.ndarray]:
    """Labels of both recipes from affinities (3, z, y, x), uint8 or float32."""
    fragments, _ = superhuman_fragments(affinities, threads=threads)
    graph = region_graph(affinities, fragments, threads=threads)
    agglomerated = apply(agglomerate(graph, THRESHOLD, score="mean").cut(THRESHOLD), fragments)
    multicut = foreground_multicut(affinities, None, dataclasses.replace(fgnet.LMC, threads=threads))
    return {"watershed and agglomeration": agglomerated, "multicut": multicut}


def table(recipe: str, found: Scores, published: Mapping[str, tuple[float, ...]]) -> str:
    """The scores of one recipe, with those of others by the same recipe."""
    rows = {"this checkpoint": (found.voi_split, found.voi_merge, found.voi_sum, found.arand_skimage), **published}
    lines = [recipe, f"{'':<18}{'split':>8}{'merge':>8}{'VOI':>8}{'ARAND':>8}"]
    return "\n".join(lines + [f"{name:<18}" + "".join(f"{value:8.3f}" for value in row) for name, row in rows.items()])


def affinities_of(checkpoint: str, which: str, raw: str, sections: slice, flips: str, output: str) -> np.ndarray:
    """Predicted affinities (3, z, y, x) uint8 of some sections; goes on with an unfinished prediction in ``output``."""
    config, _ = load_system(checkpoint, which)
    if not isinstance(config, fgnet.Config):
        raise UserError(f"--checkpoint {checkpoint} is a run of {type(config).__module__}; expected one of FGNet")
    volume = open_volume(raw, voxel_size=config.voxel_size).require_axes("zyx")
    for axis, length, least in zip("zyx", (sections.stop - sections.start, *volume.shape[1:]), config.plan.size):
        if length < least:
            raise UserError(f"--raw {raw}: {length} voxels along {axis}, thinner than the block of {least}")
    arguments = ["--checkpoint", checkpoint, "--which", which, "--input", raw, "--output", output]
    arguments += ["--bbox", f"{sections.start}:{sections.stop},:,:"]
    if config.voxel_size is not None:
        arguments += ["--voxel-size", ",".join(f"{size:g}" for size in config.voxel_size)]
    if predict.main(arguments + (["--flips", flips] if flips else [])):
        raise UserError(f"{output}: the prediction is not finished; the same command goes on with it")
    spec = f"{output}:affinities" if len(fgnet.outputs(config)) > 1 else output
    return np.asarray(open_volume(spec)[...])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="work directory of emjax.train")
    parser.add_argument("--which", default="best", help="best, latest or a step")
    parser.add_argument("--raw", required=True, help="image, uint8, such as AC3_inputs.h5:main")
    parser.add_argument("--labels", required=True, help="ground truth, such as AC3_labels.h5:main")
    parser.add_argument("--flips", default="", help="axes of test-time flips, such as zyx (default: none)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the post-processing")
    parser.add_argument("--prediction", help="keep (or go on with) the prediction here, a .zarr")
    parser.add_argument("--output", help="also write the labels to OUTPUT_agglomerated.zarr and OUTPUT_multicut.zarr")
    options = parser.parse_args(arguments)
    config, _ = load_system(options.checkpoint, options.which)
    size = getattr(config, "voxel_size", None) or (30.0, 6.0, 6.0)
    image, truth = (open_volume(spec, voxel_size=size).require_axes("zyx") for spec in (options.raw, options.labels))
    count = min(SECTIONS, image.shape[0])
    if image.shape[1:] != truth.shape[1:] or truth.shape[0] < count:
        raise UserError(f"--raw has shape {image.shape}, --labels {truth.shape}; expected the same sections")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = options.prediction or str(pathlib.Path(folder) / "prediction.zarr")
        affinities = affinities_of(
            options.checkpoint, options.which, options.raw, slice(0, count), options.flips, output
        )
    predicted = time.monotonic()
    labels = np.asarray(truth[:count])
    device = jax.devices()[0].device_kind
    print(f"{count} sections, flips {options.flips or 'none'}, {device} ({platform.processor() or platform.machine()})")
    for name, segmentation in recipes(affinities, options.threads).items():
        print()
        print(table(name, score(segmentation, labels), PUBLISHED[name]))
        if options.output:
            place = f"{options.output}_{'multicut' if name == 'multicut' else 'agglomerated'}.zarr"
            save_volume(place, segmentation, voxel_size=size, attributes={"source": options.raw, "method": name})
    print(f"\nprediction {predicted - start:.0f} s, post-processing and scores {time.monotonic() - predicted:.0f} s")
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])

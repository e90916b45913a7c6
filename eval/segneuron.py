"""Scores runs of SegNeuron on the validation parts at hand, and writes the table of results.

    python eval/segneuron.py --workdir runs/segneuron_cpu --workdir runs/segneuron_cpu_scratch
    python eval/segneuron.py --workdir runs/segneuron_cpu --beta 0.25 --beta 0.5

For every run (with and without pretraining, say) and every set: 2D and 3D, with and without foreground restriction.
``--beta`` is the multicut's bias: 0.25 as published joins fragments whose common boundary has a mean probability below
0.75, which suits a network that is sure of its boundaries; 0.5 those below 0.5.
VI in bits (log2) and adapted Rand error, ground truth 0 ignored, as the published tables have them. 2D segments every
section by itself and averages the sections' scores; the published protocol of the 2D tables is not stated.
Data: ``EMJAX_DATA`` (default ``../shared/data``).
"""

import argparse
import dataclasses
import math
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from trainings import machine, write_results

from emjax.data.rescale import rescale_image, rescale_labels, rescaled_shape
from emjax.data.volume import open_volume
from emjax.errors import UserError
from emjax.inference.predictor import Network
from emjax.inference.tilings import Variant, blend, tiling
from emjax.metrics.contingency import contingency
from emjax.metrics.information import variation_of_information
from emjax.metrics.rand import adapted_rand_skimage
from emjax.models.functional import Collections
from emjax.postprocess.foreground_multicut import foreground_multicut
from emjax.systems import segneuron
from emjax.training.checkpoints import restore_for_inference

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
SETS = {"fib25": ("fib25_medulla", (10.0, 10.0, 10.0)), "isbi2012": ("isbi2012_vnc", (50.0, 4.0, 4.0))}


@dataclasses.dataclass(frozen=True)
class Scores:
    """VI and adapted Rand error; ``split`` and ``merge`` add up to VI."""

    split: float
    merge: float
    arand: float

    @property
    def vi(self) -> float:
        return self.split + self.merge


def score_3d(labels: np.ndarray, segmentation: np.ndarray, mask: np.ndarray | None = None) -> Scores:
    """Scores of a whole volume."""
    table = contingency(segmentation, labels, mask)
    voi = variation_of_information(table)
    return Scores(voi.split, voi.merge, adapted_rand_skimage(table).error)


def score_2d(labels: np.ndarray, segmentation: np.ndarray, mask: np.ndarray | None = None) -> Scores:
    """Mean of the scores of the sections that have ground truth."""
    found = []
    for z in range(len(labels)):
        scores = score_3d(labels[z], segmentation[z], None if mask is None else mask[z])
        if not math.isnan(scores.vi):
            found.append(scores)
    return Scores(*(float(np.mean([getattr(one, name) for one in found])) for name in ("split", "merge", "arand")))


def network(config: segneuron.Config, collections: Collections, batch: int = 1) -> Network:
    """The compiled network for blocks of the plan's size."""
    return Network(config, collections, config.plan.size, batch)


def predict(image: np.ndarray, net: Network, variant: Variant, stride: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Affinities (3, z, y, x) and foreground (1, z, y, x) float32 of a uint8 image, by a published tiling."""

    def run(patches: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(values)[: len(patches)] for name, values in net(patches).items()}

    return blend(image, tiling(image.shape, variant, net.size, stride), run, net.batch)


def segmentations(
    outputs: Mapping[str, np.ndarray], settings: Any, shape: tuple[int, int, int], restricted: tuple[bool, ...]
) -> dict[tuple[str, bool], np.ndarray]:
    """Labels at ``shape`` by (mode, restricted)."""
    found = {}
    for restrict in restricted:
        for mode in ("2d", "3d"):
            chosen = dataclasses.replace(settings, mode=mode, restrict=restrict)
            labels = foreground_multicut(outputs["affinities"], outputs["foreground"][0], chosen)
            found[mode, restrict] = rescale_labels(labels, shape)
    return found


def fit_domain(image: np.ndarray, voxel_size: tuple[float, float, float]) -> tuple[np.ndarray, str]:
    """The image at a voxel size within SegNeuron's domain, and what was done."""
    wanted, line = segneuron.rescaling(voxel_size)
    return rescale_image(image, rescaled_shape(image.shape, voxel_size, wanted)), line


def row(cells: list[str], scores: Scores) -> str:
    return (
        f"| {' | '.join(cells)} | {scores.split:.4f} | {scores.merge:.4f} | **{scores.vi:.4f}** | {scores.arand:.4f} |"
    )


HEADER = "VI split | VI merge | VI | adapted Rand error |"


TABLE = [f"| run | set | beta | mode | restricted | {HEADER}", "|---" * 9 + "|"]


def score_run(
    name: str, workdir: pathlib.Path, which: str, sets: Sequence[str], betas: Sequence[float], rescale: bool = False
) -> list[str]:
    """Rows of one fine-tuned run: every set and ``betas``, 2D and 3D, with and without restriction."""
    experiment, collections = restore_for_inference(workdir, which)
    config = experiment.system
    if not isinstance(config, segneuron.Config):
        raise UserError(f"--workdir {workdir}: a run of {type(config).__module__}, expected fine-tuned SegNeuron")
    net, lines = network(config, collections), []
    for which_set in sets:
        folder, voxel_size = SETS[which_set]
        spec = f"{os.environ.get('EMJAX_DATA', '../shared/data')}/{folder}/val.h5"
        image, labels = (np.asarray(open_volume(f"{spec}:{part}")[:, :, :]) for part in ("raw", "labels"))
        mask = None
        if which_set == "fib25":
            mask = np.asarray(open_volume(f"{spec}:ignore_mask")[:, :, :]) == 0
        seen = image
        if rescale:
            seen, line = fit_domain(image, voxel_size)
            print(f"{which_set}: {line}")
        outputs = predict(seen, net, "centred", config.plan.stride)
        for beta in betas or (config.segmentation.beta,):
            settings = dataclasses.replace(config.segmentation, beta=beta)
            for (mode, restrict), found in segmentations(outputs, settings, labels.shape, (True, False)).items():
                measure = score_2d if mode == "2d" else score_3d
                cells = [name, which_set, f"{beta:g}", mode, "yes" if restrict else "no"]
                lines.append(row(cells, measure(labels, found, mask)))
                print(lines[-1], flush=True)
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", action="append", required=True, help="of a fine-tuning run; may be repeated")
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="default: all")
    parser.add_argument("--which", default="latest", choices=("latest", "best"))
    parser.add_argument("--beta", action="append", type=float, default=[], help="default: as the run is configured")
    parser.add_argument("--rescale", action="store_true", help="bring volumes to 5 to 10 nm first, labels back after")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "segneuron_local.md")
    options = parser.parse_args(arguments)
    lines = list(TABLE)
    start = time.monotonic()
    for workdir in options.workdir:
        place = pathlib.Path(workdir)
        lines += score_run(place.name, place, options.which, options.set or sorted(SETS), options.beta, options.rescale)
    command = shlex.join(["python", "eval/segneuron.py", *(sys.argv[1:] if arguments is None else arguments)])
    write_results(
        options.output,
        f"# SegNeuron on the validation parts\n\n`{command}`\n\n{machine()}, {time.monotonic() - start:.0f} s. VI in "
        "bits, ground truth 0 (and the residual body of fib25) ignored. 2D: mean over sections, each segmented by "
        "itself.\n\n" + "\n".join(lines) + "\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Scores runs of SAM4EM, and of its baselines, on the validation volumes that they were trained beside.

    python eval/sam4em.py --run runs/vnc_cpu --run runs/vnc_cpu_nomemory --run runs/vnc_unet_cpu --blank

Every run is scored on the validation volumes of its own configuration, whole, memory carried along z, with Dice, IoU, HD95,
ASSD and AP of each class; the table goes to ``eval/results/sam4em.md``. ``--first-mask gt`` gives the first slice's truth
to the network as the published evaluation does (a leak: its rows are marked). ``--blank`` blanks one slice after the other
and scores the network on it: with memory and prompt, with one of them, and with neither.
"""

import argparse
import dataclasses
import pathlib
import shlex
import sys
import time
from typing import Any

import numpy as np
from trainings import machine, write_results

from emjax.config import Experiment
from emjax.data.pipeline import Source
from emjax.data.semantic import open_classes
from emjax.data.volume import open_volume
from emjax.errors import UserError
from emjax.inference.predictor import Network
from emjax.inference.tilings import blend, tiling
from emjax.metrics import ClassScores, overlap, score_class
from emjax.models.functional import Collections
from emjax.systems import sam4em, semantic_unet
from emjax.systems.protocol import system_of
from emjax.systems.sam4em_stack import Stack
from emjax.training.checkpoints import restore_for_inference

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "sam4em.md"
CASES = ("memory and prompt", "memory alone", "prompt alone", "neither")


@dataclasses.dataclass(frozen=True)
class Part:
    """One validation volume: grey values, and masks bool (classes, z, y, x)."""

    name: str
    image: np.ndarray
    masks: np.ndarray
    voxel_size: tuple[float, float, float]


def part_of(config: Any, source: Source) -> Part:
    """The volume of a source, without its reflected margins."""
    volume = open_volume(source.raw, voxel_size=source.voxel_size).require_axes("zyx")
    if isinstance(source.labels, tuple):
        labels = open_classes(source.labels, source.voxel_size)
    elif source.labels is not None:
        labels = open_volume(source.labels, voxel_size=source.voxel_size)
    else:
        raise UserError(f"{source.title}: no labels to score against")
    found = labels[...].astype(np.int32)
    masks = np.asarray(system_of(config).targets(config, {"labels": found[None]})["masks"])[0] > 0
    return Part(source.title, volume[...], np.moveaxis(masks, -1, 0), volume.require_voxel_size())


def stack_of(config: sam4em.Config, collections: Collections, image: np.ndarray, truth: np.ndarray | None) -> Stack:
    """The stack of an image in memory; ``truth`` are masks (classes, y, x) for the first slice."""
    first = None if truth is None else np.moveaxis(truth, 0, -1)
    net = sam4em.stack_network(config, collections)
    z, y, x = image.shape
    return Stack(sam4em.stack_plan(config), net, lambda z0, z1: image[z0:z1], (z, y, x), first)


def probabilities(config: Any, collections: Collections, part: Part, truth: bool) -> np.ndarray:
    """(classes, z, y, x) of a volume, as ``emjax.segment`` computes them."""
    if isinstance(config, sam4em.Config):
        return stack_of(config, collections, part.image, part.masks[:, 0] if truth else None).probabilities()
    plan = config.plan
    net = Network(config, collections, plan.size, 1)

    def run(blocks: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.asarray(values) for name, values in net(blocks).items()}

    windows = tiling(part.image.shape, "notebook", plan.size, plan.stride)
    return blend(part.image, windows, run)["probabilities"]


def scores_of(config: Any, part: Part, found: np.ndarray) -> dict[str, ClassScores]:
    """Scores by class of decoded probabilities."""
    labels = system_of(config).decode(config, {"probabilities": found})
    return {
        one.name: score_class(labels == number, part.masks[number - 1], voxel_size=part.voxel_size)
        for number, one in enumerate(config.classes, 1)
    }


def blanked(config: sam4em.Config, collections: Collections, part: Part) -> list[list[float]]:
    """IoU on blanked slices, all together, by case of :data:`CASES` and class; last, the mask of the slice before."""
    one_slice = dataclasses.replace(config, plan=dataclasses.replace(config.plan, size=(1, *config.plan.size[1:])))
    image = part.image.copy()
    stack = stack_of(one_slice, collections, image, None)
    fresh = stack.start()
    states = fresh
    classes = range(1, len(config.classes) + 1)
    counts: list[list[Any]] = [[None] * len(config.classes) for _ in (*CASES, "before")]
    before = None
    for z in range(len(image)):
        if z:
            kept = image[z].copy()
            image[z] = np.rint(kept.mean()).astype(image.dtype) if image.dtype.kind == "u" else kept.mean()
            cases = [
                states,
                [state._replace(prompt=0 * state.prompt) for state in states],
                [new._replace(prompt=state.prompt) for new, state in zip(fresh, states)],
                fresh,
            ]
            answers = [sam4em.decode(config, {"probabilities": stack.advance(case, z)[1]})[0] for case in cases]
            for row, labels in enumerate([*answers, before]):
                for number in classes:
                    found = overlap(labels == number, part.masks[number - 1, z])
                    old = counts[row][number - 1]
                    counts[row][number - 1] = found if old is None else old + found
            image[z] = kept
        states, found = stack.advance(states, z)
        before = sam4em.decode(config, {"probabilities": found})[0]
    return [[found.iou for found in row] for row in counts]


def describe(config: Any) -> str:
    """What a run is, in a few words."""
    if isinstance(config, semantic_unet.Config):
        flat = all(kernel[0] == 1 for kernel in config.model.kernels)
        return f"U-Net, {'2-D' if flat else '3-D'}"
    model = config.model
    encoder = {"stage1": "LoRA", "stage2": "LoRA, second stage", "frozen": "frozen", "full": "full"}[config.finetune]
    return (
        f"SAM4EM, encoder {encoder}, memory {model.memory.update}, {model.decoders} "
        f"decoder{'s' if model.decoders > 1 else ''} ({model.output}, {model.second_prompt})"
    )


def start_of(experiment: Experiment) -> str:
    """Where the weights of a run come from, in words."""
    official = getattr(experiment.system, "sam2_checkpoint", "")
    return f"SAM 2 ({official})" if official else pathlib.Path(experiment.train.init_from).name or "random"


def row(cells: list[str], found: ClassScores) -> str:
    """A line of the table."""
    numbers = [
        f"**{found.iou:.3f}**",
        f"{found.dice:.3f}",
        f"{found.slice_dice:.3f}",
        f"{found.reference_slice_dice:.3f}",
        f"{found.hd95:.0f}",
        f"{found.assd:.1f}",
        f"{found.ap50:.3f}",
        f"{found.ap:.3f}",
        f"{found.predicted_objects} / {found.true_objects}",
    ]
    return f"| {' | '.join([*cells, *numbers])} |"


HEADER = (
    "run",
    "network",
    "started from",
    "steps",
    "first mask",
    "volume",
    "class",
    "IoU",
    "Dice",
    "Dice by slice",
    "the same, reference",
    "HD95, nm",
    "ASSD, nm",
    "AP-50",
    "AP",
    "objects found / true",
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="append", required=True, metavar="DIR", help="work directory; may be repeated")
    parser.add_argument("--which", default="best", help="best, latest or a step (default: %(default)s)")
    parser.add_argument(
        "--first-mask",
        action="append",
        choices=("empty", "predicted", "gt"),
        help="prompt of the first slice; may be repeated (default: as the run's configuration says, but never gt)",
    )
    parser.add_argument("--blank", action="store_true", help="also blank one slice after the other")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    options = parser.parse_args(arguments)
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    blanks: dict[tuple[str, ...], list[str]] = {}
    begun = time.monotonic()
    for workdir in options.run:
        experiment, collections = restore_for_inference(pathlib.Path(workdir), options.which)
        config = experiment.system
        if not isinstance(config, sam4em.Config | semantic_unet.Config):
            raise UserError(f"--run {workdir}: a run of {type(config).__module__}, expected SAM4EM or the U-Net")
        parts = [part_of(config, source) for source in experiment.data.validation]
        recurrent = isinstance(config, sam4em.Config)
        chosen = (options.first_mask or [""]) if recurrent else ["-"]
        for first in chosen:
            used = config
            if recurrent:
                if not first:
                    first = "predicted" if config.first_mask == "predicted" else "empty"
                used = dataclasses.replace(config, first_mask="truth" if first == "gt" else first)
            for part in parts:
                found = probabilities(used, collections, part, truth=first == "gt")
                shown = "gt (leaks)" if first == "gt" else first
                about = [
                    pathlib.Path(workdir).name,
                    describe(config),
                    start_of(experiment),
                    str(experiment.train.steps),
                ]
                for name, scores in scores_of(used, part, found).items():
                    lines.append(row([*about, shown, part.name, name], scores))
                    print(lines[-1], flush=True)
        if options.blank and recurrent:
            empty = dataclasses.replace(config, first_mask="empty")
            for part in parts:
                names = tuple(one.name for one in config.classes)
                for case, values in zip((*CASES, "mask of the slice before"), blanked(empty, collections, part)):
                    cells = [pathlib.Path(workdir).name, part.name, case, *(f"{value:.3f}" for value in values)]
                    blanks.setdefault(names, []).append(f"| {' | '.join(cells)} |")
                    print(blanks[names][-1], flush=True)
    command = shlex.join(["python", "eval/sam4em.py", *(sys.argv[1:] if arguments is None else arguments)])
    text = [
        "# SAM4EM on the validation parts",
        "",
        f"`{command}`",
        "",
        f"{machine()}, {time.monotonic() - begun:.0f} s. Scores of whole volumes, as `emjax.segment` labels them; "
        "definitions in docs/metrics.md (AP of connected components, ranked by size).",
        "",
        *lines,
    ]
    if blanks:
        text += [
            "",
            "## A slice without content",
            "",
            "Every slice but the first in turn is replaced by its mean grey value; the IoU is that of all blanked slices "
            "together. The network has read the slices before as they are. Memory: the slots; prompt: the mask of the "
            "slice before. The last row of a run is that mask itself as the answer.",
        ]
    for names, rows in blanks.items():
        head = ("run", "volume", "the network has", *(f"IoU {name}" for name in names))
        text += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows]
    write_results(options.output, "\n".join(text) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The published checkpoint on the three sets that SegNeuron never saw, beside the published table.

    python -m emjax.prepare emneuron --source DIR
    python eval/segneuron_zero_shot.py --source DIR --checkpoint SegNeuronModel.ckpt

``DIR`` holds the unpacked validation archive of EMNeuron (gated: log in and accept on the hub), the checkpoint comes
from ``huggingface.co/yanchaoz/SegNeuron``. Also takes a converted checkpoint (``emjax.convert``) or ``--workdir``.
Metrics as published: VI in bits and adapted Rand error, ground truth 0 ignored, 3D on the whole volume. What the
published "2D" is, is not stated; here every section is segmented by itself and the scores are averaged.
"""

import argparse
import pathlib
import shlex
import sys
import time

import numpy as np
import tifffile
from segneuron import (
    HEADER,
    RESULTS,
    Scores,
    fit_domain,
    network,
    predict,
    row,
    score_2d,
    score_3d,
    segmentations,
)
from trainings import machine, write_results

from emjax.data.emneuron import OUT_OF_DISTRIBUTION, read_manifest
from emjax.errors import UserError
from emjax.models.functional import Collections
from emjax.models.mnet import Config as MNetConfig
from emjax.systems import segneuron
from emjax.weights.family import read_checkpoint
from emjax.weights.segneuron import FAMILY

PUBLISHED = {
    ("vEM4", "2d"): (0.4028, 0.0839),
    ("Basil", "2d"): (0.6749, 0.0922),
    ("Harris", "2d"): (0.5229, 0.1063),
    ("vEM4", "3d"): (0.8655, 0.1022),
    ("Basil", "3d"): (0.7719, 0.1531),
    ("Harris", "3d"): (1.0221, 0.1170),
}
"""(VI, adapted Rand error) of SegNeuron in the paper's table of generalists."""


def load(options: argparse.Namespace) -> tuple[segneuron.Config, Collections]:
    """Configuration and variables of the checkpoint."""
    if options.workdir:
        from emjax.training.checkpoints import restore_for_inference

        experiment, collections = restore_for_inference(options.workdir, "latest")
        if not isinstance(experiment.system, segneuron.Config):
            raise UserError(f"--workdir {options.workdir}: not a run of fine-tuned SegNeuron")
        return experiment.system, collections
    checkpoint = read_checkpoint(options.checkpoint, [FAMILY])
    if not checkpoint.settings["skips"]:
        raise UserError(
            f"{options.checkpoint}: holds SegNeuron's pretraining network (no skip connections), which segments "
            "nothing; expected the segmentation network"
        )
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in checkpoint.settings.items()}
    config = segneuron.Config(model=MNetConfig(**settings))
    segneuron.validate(config)
    return config, checkpoint.collections


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=pathlib.Path, required=True, help="folder with validation.json")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--checkpoint", type=pathlib.Path, help="SegNeuronModel.ckpt, or what emjax.convert made of it")
    given.add_argument("--workdir", type=pathlib.Path, help="a run of emjax.train instead")
    parser.add_argument(
        "--set", action="append", choices=[one.name for one in OUT_OF_DISTRIBUTION], help="default: all"
    )
    parser.add_argument("--tiling", default="centred", choices=("centred", "clamped", "notebook"))
    parser.add_argument("--batch", type=int, default=1, help="tiles per call")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "segneuron_zero_shot.md")
    options = parser.parse_args(arguments)
    entries = {entry.set.rpartition("/")[2]: entry for entry in read_manifest(options.source / "validation.json")}
    wanted = [one for one in OUT_OF_DISTRIBUTION if not options.set or one.name in options.set]
    missing = [one.folder for one in wanted if one.folder not in entries]
    if missing:
        raise UserError(
            f"{options.source}/validation.json: no {', '.join(missing)}; it has {', '.join(sorted(entries))}"
        )
    config, collections = load(options)
    net = network(config, collections, options.batch)
    lines = [f"| set | mode | restricted | {HEADER} published VI | published ARE |", "|---" * 9 + "|"]
    start = time.monotonic()
    for one in wanted:
        entry = entries[one.folder]
        image, labels = (tifffile.imread(options.source / path) for path in (entry.raw, entry.labels))
        if image.dtype != np.uint8:
            raise UserError(f"{options.source / entry.raw}: {image.dtype}, expected uint8 grey values")
        seen, line = fit_domain(image, one.voxel_size)
        print(f"{one.name}: {line}")
        outputs = predict(seen, net, options.tiling, config.plan.stride)
        found = segmentations(outputs, config.segmentation, labels.shape, (True, False))
        for (mode, restrict), segmentation in found.items():
            scores: Scores = (score_2d if mode == "2d" else score_3d)(labels, segmentation)
            target = PUBLISHED[one.name, mode] if restrict else None
            ending = f" {target[0]:.4f} | {target[1]:.4f} |" if target else " | |"
            lines.append(row([one.name, mode, "yes" if restrict else "no"], scores) + ending)
            print(lines[-1], flush=True)
    command = shlex.join(["python", "eval/segneuron_zero_shot.py", *(sys.argv[1:] if arguments is None else arguments)])
    write_results(
        options.output,
        f"# SegNeuron, zero-shot\n\n`{command}`\n\n{machine()}, {time.monotonic() - start:.0f} s.\n\n"
        + "\n".join(lines)
        + "\n",
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

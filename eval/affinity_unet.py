"""Scores an affinity network on a validation volume, and writes the table of results.

    python eval/affinity_unet.py fib25 --workdir runs/fib25_cpu
    python eval/affinity_unet.py isbi2012 --workdir runs/isbi2012_cpu

Predicts all offsets of ``val.h5`` with test-time flips, makes fragments in several ways, and sweeps the agglomeration
threshold by cutting the merge history. Scores are given for all ground truth and without the doubtful residual body
(``ignore_mask``, where the set has one), predicted zeros filled with the nearest segment. The recipe and its threshold are
chosen on this very volume: it is the validation part, and the test part is kept back. Data: ``EMJAX_DATA`` (default
``../shared/data``).
"""

import argparse
import json
import os
import pathlib
import shlex
import sys
import time

import numpy as np
from trainings import machine, write_results

from emjax import predict, segment
from emjax.config import Experiment, from_json
from emjax.data.volume import open_volume
from emjax.inference.segmentation import Places, load_merges, lookup_at
from emjax.metrics import Scores, fill_unlabelled, score
from emjax.postprocess import apply

SETS = {"fib25": "fib25_medulla", "isbi2012": "isbi2012_vnc"}
SCORES = ("mean", "hist_quant_90", "max")
FRAGMENTS = {
    "watershed": ["--fragments", "watershed", "--regrow", "0"],
    "watershed above 0.7, regrown from 30 voxels": ["--fragments", "watershed", "--low", "0.7", "--regrow", "30"],
    "watershed above 0.8, regrown from 20 voxels": ["--fragments", "watershed", "--low", "0.8", "--regrow", "20"],
    "mutex, regrown from 600 voxels": ["--fragments", "mutex", "--regrow", "600"],
}
THRESHOLDS = tuple(round(0.02 * step, 2) for step in range(10, 48))
BARS = {"fib25": "| boosted-tree pixel classifier, same watershed (quoted, not run here) | | | **1.212** | 0.132 | |"}
RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def read(spec: str) -> np.ndarray:
    return np.asarray(open_volume(spec)[:, :, :])


def filled_scores(segmentation, labels, mask, voxel_size) -> Scores:
    return score(fill_unlabelled(segmentation, voxel_size), labels, mask)


def row(name: str, scores: Scores) -> str:
    return (
        f"| {name} | {scores.voi_split:.3f} | {scores.voi_merge:.3f} | **{scores.voi_sum:.3f}** | "
        f"{scores.arand_skimage:.3f} | {scores.segments} |"
    )


def training_summary(workdir: pathlib.Path, config: Experiment) -> str:
    """Steps, voxels seen, and the last validation loss of a run."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    last = max(record["step"] for record in records)
    seen = last * config.data.batch_size * np.prod(config.data.crop) / 1e9
    losses = [record["loss"] for record in records if record["kind"] == "validation"]
    return (
        f"{last} steps of {config.data.batch_size} crops {config.data.crop} ({seen:.2f} GVox), "
        f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--name", default="affinity_unet", help="of the results file: eval/results/NAME_SET.md")
    parser.add_argument("--which", default="best", help="best, latest or a step (default: %(default)s)")
    parser.add_argument("--flips", default="zyx", help="axes of the test-time flips; none for no flips")
    parser.add_argument("--keep_prediction", action="store_true", help="segment the affinities of an earlier call")
    parser.add_argument("--training", default="", help="a sentence on how the run was made, for the results file")
    options = parser.parse_args()
    file = f"{os.environ.get('EMJAX_DATA', '../shared/data')}/{SETS[options.set]}/val.h5"
    config = from_json((options.workdir / "config.json").read_text())
    voxel_size = config.system.voxel_size
    labels = read(f"{file}:labels")
    masked = options.set == "fib25"
    kept = read(f"{file}:ignore_mask") == 0 if masked else None
    folder = options.workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    affinities = str(folder / "affinities.zarr")
    start = time.monotonic()
    arguments = ["--checkpoint", str(options.workdir), "--which", options.which, "--input", f"{file}:raw"]
    arguments += [] if options.flips == "none" else ["--flips", options.flips]
    kept_prediction = options.keep_prediction and pathlib.Path(affinities).is_dir()
    if not kept_prediction:
        predict.main([*arguments, "--output", affinities, "--config.system.predicted=all", "--overwrite"])
    predicted = time.monotonic() - start
    best: dict[str, tuple[float, Scores, Places]] = {}
    curves = []
    for number, (name, fragments_arguments) in enumerate(FRAGMENTS.items()):
        for kind in SCORES:
            recipe = f"{name}; {kind}"
            output = str(folder / f"labels_{number}_{kind}.zarr")
            arguments = ["--input", affinities, "--output", output, "--score", kind, "--history", "0.95"]
            segment.main([*arguments, *fragments_arguments, "--threshold", "0.5", "--overwrite"])
            places = Places(output)
            fragments, merges = read(places.fragments), load_merges(places.merges)
            for threshold in THRESHOLDS:
                scores = filled_scores(apply(lookup_at(merges, threshold), fragments), labels, None, voxel_size)
                curves.append((recipe, threshold, scores))
                if recipe not in best or scores.cremi_score < best[recipe][1].cremi_score:
                    best[recipe] = threshold, scores, places
    seconds = time.monotonic() - start
    chosen = min(best, key=lambda recipe: best[recipe][1].cremi_score)
    threshold, _, places = best[chosen]
    segmentation = apply(lookup_at(load_merges(places.merges), threshold), read(places.fragments))
    head = "| | VOI split | VOI merge | VOI (bits) | ARAND | segments |\n|---|---|---|---|---|---|"
    lines = [
        f"# {options.name} on {SETS[options.set]}/val.h5",
        "",
        f"Command: `python {shlex.join(['eval/affinity_unet.py', *sys.argv[1:]])}`",
        "",
        f"Machine: {machine()}. Training: {training_summary(options.workdir, config)}. {options.training}",
        f"Checkpoint: {options.which}. Prediction (flips: {options.flips}): "
        f"{'kept from an earlier call' if kept_prediction else f'{predicted:.0f} s'}; fragments, agglomeration and scores "
        f"of {len(best)} recipes: {seconds - predicted:.0f} s.",
        "",
        "VOI in bits, ARAND as scikit-image defines it, ground truth 0 not scored, predicted zeros filled with the "
        "nearest segment. Recipe and threshold are chosen on this volume, by the least CREMI score (geometric mean of VOI and "
        "adapted Rand error) on all ground truth.",
        "",
        "## All ground truth",
        "",
        head,
    ]
    for recipe, (value, scores, _) in best.items():
        lines.append(row(f"{recipe} {value:g}" + (" (chosen)" if recipe == chosen else ""), scores))
    lines.append(row("fragments of the chosen recipe", filled_scores(read(places.fragments), labels, None, voxel_size)))
    shipped = read(f"{file}:overseg") if masked else None
    if shipped is not None:
        lines.append(row("shipped over-segmentation", filled_scores(shipped, labels, None, voxel_size)))
    lines += [BARS[options.set]] if options.set in BARS else []
    if kept is not None:
        lines += ["", "## Without the doubtful residual body (`ignore_mask`)", "", head]
        lines.append(row(f"{chosen} {threshold:g}", filled_scores(segmentation, labels, kept, voxel_size)))
        lines.append(row("shipped over-segmentation", filled_scores(shipped, labels, kept, voxel_size)))
    lines += ["", f"## Threshold curve: {chosen}", "", "| threshold | VOI split | VOI merge | VOI (bits) | ARAND |"]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {value:g} | {scores.voi_split:.3f} | {scores.voi_merge:.3f} | {scores.voi_sum:.3f} | "
        f"{scores.arand_skimage:.3f} |"
        for recipe, value, scores in curves
        if recipe == chosen
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_results(RESULTS / f"{options.name}_{options.set}.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

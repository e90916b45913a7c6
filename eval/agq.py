"""AGQ on the FIB-SEM medulla beside an affinity U-Net of the same budget: trains, scores, writes the table.

    python eval/agq.py                                     # all of it on 2 CPU cores, about half an hour
    python eval/agq.py --variants ,learned,guided --unet "" --unet_steps 0 --runs runs/agq_gpu    # the large ones, a GPU
    python eval/agq.py --steps 6 --unet_steps 3 --runs /tmp/dry --output /tmp/dry/agq.md           # a dry run

The same command goes on where it was stopped; what is done is not done again. With ``--only_score``, only runs that
are there are scored, whatever they have reached. Every system is trained by emjax alone, on ``train.h5``, and scored on
``val.h5``: AGQ with learned and guided queries, learned only, guided only; the U-Net with watershed and agglomeration.
The budget is the time of AGQ with both kinds of queries: the U-Net's steps are chosen so that training takes as long
(``--unet_steps``).

VOI in bits and adapted Rand error, ground truth 0 not scored, predicted zeros filled with the nearest segment; all
ground truth, and without the doubtful residual body (``ignore_mask``). The thresholds (of AGQ's joining, of the
agglomeration) are chosen on this very volume. Data: ``EMJAX_DATA`` (default ``../shared/data``).
"""

import argparse
import dataclasses
import functools
import os
import pathlib
import shlex
import sys
import time

import jax
import numpy as np
from trainings import cost, last_losses, machine, steps_done, train, write_results

from emjax import segment
from emjax.data.volume import open_volume
from emjax.inference.predictor import output_spec
from emjax.inference.segmentation import Places, load_merges, lookup_at
from emjax.metrics import Scores, fill_unlabelled, score
from emjax.postprocess import agglomerate, apply, region_graph, watershed
from emjax.systems import agq
from emjax.training.loading import load_system

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
JOINING = tuple(round(0.1 * step, 1) for step in range(1, 10))
"""Mean affinities on faces between blocks above which instances are joined; published: 0.7."""
AGGLOMERATION = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    setting: str
    everything: Scores
    certain: Scores


@functools.cache
def _truth() -> tuple[str, np.ndarray, np.ndarray]:
    file = f"{os.environ.get('EMJAX_DATA', '../shared/data')}/fib25_medulla/val.h5"
    return file, open_volume(f"{file}:labels")[...], open_volume(f"{file}:ignore_mask")[...] == 0


def _scored(name: str, setting: str, segmentation: np.ndarray) -> Row:
    _, labels, kept = _truth()
    filled = fill_unlabelled(segmentation, (10.0, 10.0, 10.0)) if segmentation.any() else segmentation
    return Row(name, setting, score(filled, labels), score(filled, labels, kept))


def _segment(workdir: pathlib.Path, *more: str) -> Places:
    output = workdir / "evaluation" / "labels.zarr"
    output.parent.mkdir(exist_ok=True)
    arguments = ["--checkpoint", str(workdir), "--which", "latest", "--input", f"{_truth()[0]}:raw"]
    segment.main([*arguments, "--output", str(output), "--overwrite", *more])
    return Places(str(output))


def score_agq(name: str, workdir: pathlib.Path) -> list[Row]:
    """The published threshold, the one that is best here, and watershed and agglomeration of the affinity branch."""
    places = _segment(workdir)
    config, _ = load_system(str(workdir), "latest")
    outputs = agq.outputs(config)
    arrays = {part: open_volume(output_spec(places.prediction, outputs, part))[...] for part in outputs}
    published = _scored(name, "0.7 (published)", open_volume(places.labels)[...])
    rows = []
    for value in JOINING:
        # (a + on_border) / 2 exceeds 1/2 where a exceeds 1 - on_border.
        merge = dataclasses.replace(config.merge, on_border=round(1 - value, 1))
        labels = agq.decode(dataclasses.replace(config, merge=merge), arrays)
        rows.append(_scored(name, f"{value:g} (best here)", labels))
    affinities = arrays["affinities"]
    fragments = watershed(affinities)
    merges = agglomerate(region_graph(affinities, fragments), AGGLOMERATION[-1])
    without = [
        _scored(f"{name}: its affinities", f"{threshold:g} (best here)", apply(merges.cut(threshold), fragments))
        for threshold in AGGLOMERATION
    ]
    return [published, _best(rows), _best(without)]


def _best(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row.everything.voi_sum)


def score_unet(name: str, workdir: pathlib.Path) -> list[Row]:
    """The best threshold of the mean affinity."""
    places = _segment(workdir, "--history", "0.95", "--threshold", "0.5")
    fragments, merges = open_volume(places.fragments)[...], load_merges(places.merges)
    rows = [
        _scored(name, f"{threshold:g} (best here)", apply(lookup_at(merges, threshold), fragments))
        for threshold in AGGLOMERATION
    ]
    return [_best(rows)]


def _table(rows: list[Row], which: str) -> list[str]:
    lines = ["| | threshold | VOI split | VOI merge | VOI (bits) | ARAND | segments |", "|---" * 7 + "|"]
    for row in rows:
        found: Scores = getattr(row, which)
        lines.append(
            f"| {row.name} | {row.setting} | {found.voi_split:.3f} | {found.voi_merge:.3f} | **{found.voi_sum:.3f}** | "
            f"{found.arand_skimage:.3f} | {found.segments} |"
        )
    return lines


NAMES = {"": "learned + guided queries", "learned": "learned queries only", "guided": "guided queries only"}


def _name(variant: str) -> str:
    return f"AGQ, {NAMES[variant.removeprefix('cpu').removeprefix('_')]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", default="cpu,cpu_learned,cpu_guided", help="of configs/agq/fib25.py")
    parser.add_argument(
        "--unet", default="cpu", help="variant of configs/affinity_unet/fib25.py (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=0, help="of AGQ (default: as configured)")
    parser.add_argument(
        "--unet_steps", type=int, default=75, help="of the U-Net; 0: as configured (default: %(default)s)"
    )
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/agq"), help="default: %(default)s")
    parser.add_argument("--only_score", action="store_true", help="train nothing, score the runs that are there")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "agq.md")
    options = parser.parse_args()
    start = time.monotonic()
    jobs = [(_name(v), f"configs/agq/fib25.py:{v}", options.steps, score_agq) for v in options.variants.split(",")]
    unet = f"configs/affinity_unet/fib25.py:{options.unet}"
    jobs.append(("affinity U-Net", unet, options.unet_steps, score_unet))
    rows, costs, missing = [], [], []
    for name, spec, steps, scorer in jobs:
        workdir = options.runs / (("agq_" if "agq" in spec else "unet_") + (spec.partition(":")[2] or "full"))
        if not options.only_score:
            # Several checkpoints on the way, so that little is lost when the run is stopped.
            often = max(1, steps // 4)
            shorter = [f"train.steps={steps}", f"train.validate_every={often}", f"train.save_every={often}"]
            train(spec, workdir, shorter if steps else [])
        if not steps_done(workdir):
            missing.append(f"{name}: no checkpoint in {workdir}")
            continue
        rows += scorer(name, workdir)
        done, operations, seconds = cost(workdir)
        costs.append(f"| {name} | {done} | {operations:.2f} | {seconds:.0f} | {last_losses(workdir)} |")
        print("\n".join(_table(rows, "everything")), flush=True)
    file, _, _ = _truth()
    shipped = _scored("shipped over-segmentation", "-", open_volume(f"{file}:overseg")[...])
    lines = [
        "# AGQ on fib25_medulla/val.h5",
        "",
        f"Command: `python {shlex.join(['eval/agq.py', *sys.argv[1:]])}`",
        "",
        f"Machine: {machine()}, {jax.devices()[0].device_kind}. This evaluation, with what of the training was left to "
        f"do: {time.monotonic() - start:.0f} s.",
        "",
        "VOI in bits, ARAND as scikit-image defines it, ground truth 0 not scored, predicted zeros filled with the "
        "nearest segment. The threshold is the mean affinity above which AGQ joins instances over block faces, or 1 - "
        'mean affinity below which the U-Net\'s fragments merge; "best here" is chosen on this very volume. "Its affinities": '
        "AGQ's affinity branch by watershed and agglomeration, as the U-Net's, without queries.",
        "",
        "## Training",
        "",
        "Seconds include compilation, and whatever else the machine did.",
        "",
        "| | steps | TFLOP | seconds | validation loss |",
        "|---" * 5 + "|",
        *costs,
        *(["", "Not trained yet: " + "; ".join(missing) + "."] if missing else []),
        "",
        "## All ground truth",
        "",
        *_table([*rows, shipped], "everything"),
        "",
        "## Without the doubtful residual body (`ignore_mask`)",
        "",
        *_table([*rows, shipped], "certain"),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_results(options.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

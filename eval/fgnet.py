"""The ablation of FGNet with one command: train, predict, segment, score, write the table. Resumable.

    python eval/fgnet.py fib25 --rows A0,A0w,A1,A2,A3,A4,A5,A5l,C1,C1t,C2 --seeds 0,1,2      # one GPU
    python eval/fgnet.py fib25 --cpu --rows A0,A4,A1,A2,C1                                   # 2 CPU cores
    python eval/fgnet.py fib25 --report                                                      # the table alone

A row is a variant of ``configs/fgnet/SET.py`` (``cpu_ROW`` with ``--cpu``); each row and seed trains in
``RUNS/SET[_cpu]_ROW_sSEED`` and goes on where it was stopped. ``val.h5`` is predicted with test-time flips and segmented
twice, never mixed in one table: by watershed and agglomeration (threshold chosen on this validation part, and fixed at one
half), and by the multicut recipe, which has nothing to choose. Predicted zeros are filled with the nearest segment. All that
is found under RUNS goes into ``eval/results/fgnet.md``, with the diagnostics of the claim and the verdict of the success rule.
Data: ``EMJAX_DATA`` (default ``../shared/data``).
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import ndimage, stats
from trainings import machine, write_results

from emjax import predict
from emjax.config import Experiment, from_json, load
from emjax.data.volume import open_volume
from emjax.errors import UserError
from emjax.metrics import Scores, contingency, fill_unlabelled, score, score_table
from emjax.models.functional import define
from emjax.postprocess import agglomerate, parse_score, region_graph, watershed
from emjax.postprocess.foreground_multicut import foreground_multicut
from emjax.systems import fgnet
from emjax.training.state import split_trainable
from emjax.view import overlay

SETS = {"fib25": "fib25_medulla", "isbi2012": "isbi2012_vnc"}
SCORE = "mean"
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
FIXED = 0.5
REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "eval" / "results" / "fgnet.md"
CALIBRES = {"thin": (0.0, 6.0), "middle": (6.0, 15.0), "thick": (15.0, float("inf"))}
"""Largest inscribed radius of an object, in pixels of the section."""
NEAR = 2
"""Voxels within which a predicted and a true boundary count as the same."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """The validation part: labels, what is scored, the calibre class of each voxel's object, the affinities."""

    raw: np.ndarray
    labels: np.ndarray
    kept: np.ndarray
    radius: np.ndarray
    affinities: np.ndarray
    counted: np.ndarray
    voxel_size: tuple[float, float, float]

    @property
    def flat(self) -> bool:
        """Whether sections are much thicker than pixels."""
        return self.voxel_size[0] >= 2 * self.voxel_size[2]


def _read(spec: str) -> np.ndarray:
    return np.asarray(open_volume(spec)[...])


def inscribed_radius(labels: np.ndarray, flat: bool) -> np.ndarray:
    """(z, y, x) float32: the largest inscribed radius of the voxel's object in its section (its volume unless ``flat``)."""
    border = np.zeros(labels.shape, bool)
    for axis in (1, 2) if flat else (0, 1, 2):
        differ = np.diff(labels.astype(np.int64), axis=axis) != 0
        border[tuple(slice(1, None) if a == axis else slice(None) for a in range(3))] |= differ
        border[tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))] |= differ
    inside = ~border & (labels > 0)
    if flat:
        distance = np.stack([ndimage.distance_transform_edt(section) for section in inside])
    else:
        distance = ndimage.distance_transform_edt(inside)
    names, dense = np.unique(labels, return_inverse=True)
    largest = np.zeros(len(names))
    np.maximum.at(largest, dense.ravel(), distance.ravel())
    largest[names == 0] = np.inf
    return (largest[dense].reshape(labels.shape) + 0.5).astype(np.float32)


def read_truth(name: str) -> Truth:
    """``val.h5`` of a set."""
    file = f"{os.environ.get('EMJAX_DATA', '../shared/data')}/{SETS[name]}/val.h5"
    labels = _read(f"{file}:labels").astype(np.int32)
    kept = _read(f"{file}:ignore_mask") == 0 if name == "fib25" else np.ones(labels.shape, bool)
    voxel_size = open_volume(f"{file}:raw").require_voxel_size()
    config = fgnet.Config(class_balance=False, widen_borders=None)
    wanted = jax.device_get(fgnet.targets(config, {"labels": labels[None], "mask": kept[None].astype(np.uint8)}))
    affinities, counted = (np.moveaxis(wanted[part][0], -1, 0) > 0 for part in ("affinities", "weights"))
    flat = voxel_size[0] >= 2 * voxel_size[2]
    raw = _read(f"{file}:raw")
    return Truth(raw, labels, kept, inscribed_radius(labels, flat), affinities, counted, voxel_size)


def workdir_of(options: argparse.Namespace, row: str, seed: int) -> pathlib.Path:
    return options.runs / f"{options.set}{'_cpu' if options.cpu else ''}_{row}_s{seed}"


def train(options: argparse.Namespace, row: str, seed: int) -> None:
    """Runs ``emjax.train`` until the row is done; raises ``UserError`` if it fails."""
    variant = f"cpu_{row}" if options.cpu else row
    command = [sys.executable, "-m", "emjax.train", "--config", f"configs/fgnet/{options.set}.py:{variant}"]
    command += ["--workdir", str(workdir_of(options, row, seed)), f"--config.seed={seed}", *options.config]
    print("$", shlex.join(command), flush=True)
    if subprocess.run(command, cwd=REPOSITORY, check=False).returncode:
        raise UserError(f"row {row}, seed {seed}: training ended early; the same command goes on with it")


def records_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    file = workdir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def trained(workdir: pathlib.Path) -> bool:
    """Whether the run in a work directory reached its last step (and its last validation)."""
    file = workdir / "config.json"
    done = max((record["step"] for record in records_of(workdir) if record["kind"] == "validation"), default=0)
    return file.is_file() and done == from_json(file.read_text()).train.steps


def predicted(options: argparse.Namespace, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Stored outputs (channel, z, y, x), uint8, of the validation part; predicted where they are not there yet."""
    output = workdir / "evaluation" / "prediction.zarr"
    output.parent.mkdir(exist_ok=True)
    file = f"{os.environ.get('EMJAX_DATA', '../shared/data')}/{SETS[options.set]}/val.h5"
    arguments = ["--checkpoint", str(workdir), "--which", "latest", "--input", f"{file}:raw", "--output", str(output)]
    if predict.main(arguments + (["--flips", options.flips] if options.flips else [])):
        raise UserError(f"{output}: the prediction is not finished; the same command goes on with it")
    config = from_json((workdir / "config.json").read_text())
    kinds = fgnet.outputs(config.system)
    many = len(kinds) > 1
    found = {name: _read(f"{output}:{name}" if many else str(output)) for name in kinds}
    return {name: values.reshape(-1, *values.shape[-3:]) for name, values in found.items()}


def _plain(scores: Scores) -> dict[str, float]:
    return {name: getattr(scores, name) for name in ("voi_split", "voi_merge", "voi_sum", "arand_skimage", "segments")}


def segmented(affinities: np.ndarray, truth: Truth) -> dict[str, Any]:
    """Scores of both recipes: the agglomeration's curve, its best and its fixed threshold, and the multicut."""
    fragments = watershed(affinities)
    graph = region_graph(affinities, fragments, parse_score(SCORE).statistics())
    tree = agglomerate(graph, max(THRESHOLDS), score=SCORE)
    whole = fill_unlabelled(fragments, truth.voxel_size)
    tables = {"all": contingency(whole, truth.labels), "kept": contingency(whole, truth.labels, truth.kept)}
    thin = (truth.radius < CALIBRES["thin"][1]) & truth.kept
    tables["thin"] = contingency(whole, truth.labels, thin)

    def at(threshold: float, part: str) -> dict[str, float]:
        lut = tree.cut(threshold)
        return _plain(score_table(tables[part].relabelled(np.arange(len(lut), dtype=np.uint64), lut.astype(np.uint64))))

    curve = {threshold: at(threshold, "all") for threshold in THRESHOLDS}
    best = min(curve, key=lambda threshold: curve[threshold]["voi_sum"])
    multicut = foreground_multicut(affinities, None, fgnet.LMC)
    return {
        "curve": {f"{threshold:g}": scores for threshold, scores in curve.items()},
        "threshold": best,
        "agglomerated": curve[best],
        "agglomerated_fixed": curve[FIXED],
        "agglomerated_kept": at(best, "kept"),
        "agglomerated_thin": at(best, "thin"),
        "multicut": _plain(score(multicut, truth.labels)),
        "multicut_kept": _plain(score(multicut, truth.labels, truth.kept)),
    }


def boundaries_by_calibre(affinities: np.ndarray, truth: Truth) -> dict[str, dict[str, float]]:
    """Precision and recall of predicted boundary voxels, by the calibre of the (thinner) object that they bound.

    A voxel is a boundary where one of its three affinities cuts; a predicted one is right within ``NEAR`` voxels (in the
    section where sections are thick) of a true one, and a true one is found likewise.
    """
    true = (~truth.affinities & truth.counted).any(0)
    found = (affinities < 128).any(0) & truth.counted.all(0)
    reach = np.ones((1 if truth.flat else 2 * NEAR + 1, 2 * NEAR + 1, 2 * NEAR + 1), bool)
    right = found & ndimage.binary_dilation(true, reach)
    recovered = true & ndimage.binary_dilation(found, reach)
    thinner = ndimage.minimum_filter(truth.radius, (1 if truth.flat else 3, 3, 3))
    rows = {}
    for name, (low, high) in CALIBRES.items():
        inside = (thinner >= low) & (thinner < high)
        hits, all_found = int((right & inside).sum()), int((found & inside).sum())
        seen, all_true = int((recovered & inside).sum()), int((true & inside).sum())
        precision, recall = hits / max(all_found, 1), seen / max(all_true, 1)
        f1 = 2 * precision * recall / max(precision + recall, 1e-9)
        rows[name] = {"precision": precision, "recall": recall, "f1": f1, "boundary_voxels": all_true}
    return rows


def auroc(values: np.ndarray, positive: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in which the positive has the larger value."""
    ranks = stats.rankdata(values)
    count = int(positive.sum())
    if not 0 < count < positive.size:
        return float("nan")
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (positive.size - count)))


def guidance_against_errors(outputs: Mapping[str, np.ndarray], truth: Truth, seed: int = 0) -> dict[str, float]:
    """AUROC of the focus map for voxels where the coarse map is wrong; of the same map shuffled, and of the coarse map's own
    doubt, which is what the focus map would have to beat to say anything new."""
    coarse, focus = outputs["coarse"], outputs["guidance"][0]
    wrong = (((coarse >= 128) != truth.affinities) & truth.counted).any(0)
    where = truth.counted.all(0)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.flatnonzero(where))[:300_000]
    errors = wrong.ravel()[chosen]
    values = focus.ravel()[chosen].astype(float)
    doubt = (127.5 - np.abs(coarse.astype(float) - 127.5)).max(0).ravel()[chosen]
    return {
        "guidance": auroc(values, errors),
        "shuffled": auroc(rng.permutation(values), errors),
        "doubt_of_coarse": auroc(doubt, errors),
        "wrong_share": float(errors.mean()),
    }


def picture(outputs: Mapping[str, np.ndarray], truth: Truth, path: pathlib.Path) -> None:
    """One section: image, truth, coarse and refined affinities, focus map, errors of the coarse map."""
    z = truth.labels.shape[0] // 2
    wrong = (((outputs["coarse"] >= 128) != truth.affinities) & truth.counted).any(0)[z]
    raw = truth.raw[z]
    focus = outputs["guidance"][0, z].astype(np.float32)
    span = max(float(focus.max() - focus.min()), 1.0)
    pictures = {
        "image": overlay.grey(raw),
        "ground truth": overlay.labels_over(raw, truth.labels[z]),
        "coarse affinities": overlay.affinities_as_rgb(outputs["coarse"][:, z]),
        "refined affinities": overlay.affinities_as_rgb(outputs["affinities"][:, z]),
        f"focus map, {focus.min() / 255:.2f} to {focus.max() / 255:.2f}": overlay.grey((focus - focus.min()) / span),
        "coarse map is wrong": overlay.grey(wrong),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(overlay.png(overlay.tiles(pictures, 3), small=True))


def trainable_parameters(config: Experiment) -> int:
    shapes = define(lambda rngs: fgnet.build(config.system, rngs)).shapes["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(split_trainable(config, shapes)[0]))


def evaluated(options: argparse.Namespace, row: str, seed: int, truth: Truth) -> None:
    """Predicts and scores a finished run; writes ``evaluation/scores.json`` and the picture."""
    workdir = workdir_of(options, row, seed)
    file = workdir / "evaluation" / "scores.json"
    if file.is_file():
        return
    start = time.monotonic()
    outputs = predicted(options, workdir)
    seconds = time.monotonic() - start
    config = from_json((workdir / "config.json").read_text())
    validated = [record for record in records_of(workdir) if record["kind"] == "validation"][-1]
    found: dict[str, Any] = {
        "set": options.set,
        "cpu": options.cpu,
        "row": row,
        "seed": seed,
        "machine": machine() if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "command": shlex.join(["python", "eval/fgnet.py", *sys.argv[1:]]),
        "flips": options.flips,
        "steps": config.train.steps,
        "voxels": config.train.steps * config.data.batch_size * int(np.prod(config.data.crop)),
        "parameters": trainable_parameters(config),
        "start": config.train.init_from or config.system.encoder_checkpoint,
        "validation": {key: validated.get(key) for key in ("loss", "refined_loss", "coarse_loss")},
        "refined": segmented(outputs["affinities"], truth),
        "boundaries": boundaries_by_calibre(outputs["affinities"], truth),
    }
    if "coarse" in outputs:
        found["coarse"] = segmented(outputs["coarse"], truth)
        found["boundaries_coarse"] = boundaries_by_calibre(outputs["coarse"], truth)
    if "coarse" in outputs and "guidance" in outputs:
        found["auroc"] = guidance_against_errors(outputs, truth)
        picture(outputs, truth, workdir / "evaluation" / "guidance.png")
    found["seconds"] = {"prediction": seconds, "all": time.monotonic() - start}
    file.write_text(json.dumps(found, indent=1))


def _mean(values: Sequence[float], digits: int = 3) -> str:
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


Group = dict[str, list[dict[str, Any]]]


def _table(group: Group, key: str, more: str = "") -> list[str]:
    lines = [f"| row | seeds | VOI split | VOI merge | VOI (bits) | ARAND | segments |{more}"]
    lines.append("|---" * (7 + bool(more)) + "|")
    for row, entries in group.items():
        threshold = "threshold" if more else None
        lines.append(_line(row, [entry["refined"] for entry in entries], key, threshold))
        if "coarse" in entries[0]:
            lines.append(_line(f"{row}, coarse map", [entry["coarse"] for entry in entries], key, threshold))
    return lines


def _line(name: str, entries: Sequence[Mapping[str, Any]], key: str, threshold: str | None) -> str:
    chosen = [entry[key] for entry in entries]
    cells = [
        _mean([scores[part] for scores in chosen]) for part in ("voi_split", "voi_merge", "voi_sum", "arand_skimage")
    ]
    cells[2] = f"**{cells[2]}**"
    made = (
        f"| {name} | {len(entries)} | {' | '.join(cells)} | {np.mean([scores['segments'] for scores in chosen]):.0f} |"
    )
    return made + (f" {', '.join(format(entry[threshold], 'g') for entry in entries)} |" if threshold else "")


def verdict(group: Group) -> list[str]:
    """The success rule of the ablation, condition by condition, on VOI of watershed and agglomeration (chosen threshold)."""

    def voi(row: str, part: str = "refined") -> list[float] | None:
        return [entry[part]["agglomerated"]["voi_sum"] for entry in group[row]] if row in group else None

    conditions: list[tuple[str, list[float] | None, list[float] | None]] = [
        ("A4 below A2", voi("A4"), voi("A2")),
        ("A2 below A0", voi("A2"), voi("A0")),
        ("A4 below A0", voi("A4"), voi("A0")),
        (
            "refined below coarse map inside A4",
            voi("A4"),
            voi("A4", "coarse") if "coarse" in group.get("A4", [{}])[0] else None,
        ),
        ("A5 below A4", voi("A5"), voi("A4")),
        ("A4 below C1", voi("A4"), voi("C1")),
        ("A4 below A0w", voi("A4"), voi("A0w")),
        ("A0 not above C2", voi("A0"), voi("C2")),
    ]
    lines = ["| condition (VOI sum) | difference | holds |", "|---|---|---|"]
    for text, better, worse in conditions:
        if better is None or worse is None:
            lines.append(f"| {text} | not run | |")
            continue
        gap = float(np.mean(worse) - np.mean(better))
        spread = [float(np.std(values, ddof=1)) for values in (better, worse) if len(values) > 1]
        enough = len(spread) == 2 and gap > float(np.sqrt(np.mean(np.square(spread))))
        word = (
            "yes"
            if gap > 0 and enough
            else ("no" if gap <= 0 else "right sign, not shown (one seed, or within the spread)")
        )
        lines.append(f"| {text} | {gap:+.3f} | {word} |")
    return lines


def section(name: str, cpu: bool, group: Group) -> list[str]:
    """The report of one set and size."""
    first = next(iter(group.values()))[0]
    lines = [f"## {SETS[name]}/val.h5, {'small networks for CPUs' if cpu else 'full size'}", ""]
    commands = sorted({entry["command"] for entries in group.values() for entry in entries})
    lines += [f"`{command}`" + "  " for command in commands]
    lines += [
        "",
        f"{first['machine']}. Each row: {first['steps']} steps, {first['voxels'] / 1e9:.2f} GVox of crops, the last "
        f"checkpoint; flips {first['flips'] or 'none'}. VOI in bits, ARAND as scikit-image defines it, ground truth 0 not scored, "
        "predicted zeros filled. Mean ± standard deviation over seeds.",
        "",
        "| row | what | trainable parameters | starts from | validation loss |",
        "|---|---|---|---|---|",
    ]
    for row, entries in group.items():
        one = entries[0]
        losses = _mean([entry["validation"]["loss"] for entry in entries])
        start = one["start"] if row not in ("A0", "A0w") else "nothing"
        lines.append(f"| {row} | {fgnet.ABLATIONS[row]} | {one['parameters']:,} | {start} | {losses} |")
    lines += ["", "### Watershed and agglomeration (mean affinity), threshold chosen on this volume", ""]
    lines += _table(group, "agglomerated", " threshold |")
    lines += [
        "",
        f"### Watershed and agglomeration, threshold fixed at {FIXED:g}",
        "",
        *_table(group, "agglomerated_fixed"),
    ]
    lines += ["", "### Multicut recipe (nothing chosen)", "", *_table(group, "multicut")]
    if name == "fib25":
        lines += [
            "",
            "### Without the doubtful residual body (`ignore_mask`)",
            "",
            "Agglomeration, chosen threshold:",
            "",
        ]
        lines += [*_table(group, "agglomerated_kept"), "", "Multicut:", "", *_table(group, "multicut_kept")]
    lines += ["", f"### Thin objects alone (inscribed radius below {CALIBRES['thin'][1]:g} pixels), agglomeration", ""]
    lines += _table(group, "agglomerated_thin")
    lines += ["", "### Boundaries by calibre of the thinner object", ""]
    lines += [
        f"Precision / recall of boundary voxels, within {NEAR} voxels; affinity below one half is a boundary.",
        "",
    ]
    lines += [f"| row | {' | '.join(CALIBRES)} |", "|---" * (1 + len(CALIBRES)) + "|"]
    for row, entries in group.items():
        for label, key in ((row, "boundaries"), (f"{row}, coarse map", "boundaries_coarse")):
            if key in entries[0]:
                cells = [
                    " / ".join(
                        f"{np.mean([entry[key][size][what] for entry in entries]):.3f}"
                        for what in ("precision", "recall")
                    )
                    for size in CALIBRES
                ]
                lines.append(f"| {label} | {' | '.join(cells)} |")
    focused = {row: entries for row, entries in group.items() if "auroc" in entries[0]}
    if focused:
        lines += ["", "### Does the focus map find where the coarse map is wrong?", ""]
        lines += ["AUROC; 0.5 is chance. The claim would be above 0.65.", ""]
        lines += [
            "| row | focus map | shuffled | doubt of the coarse map itself | share of wrong voxels |",
            "|---|---|---|---|---|",
        ]
        for row, entries in focused.items():
            keys = ("guidance", "shuffled", "doubt_of_coarse", "wrong_share")
            lines.append(f"| {row} | {' | '.join(_mean([e['auroc'][key] for e in entries]) for key in keys)} |")
    return [*lines, "", "### Success rule", "", *verdict(group), ""]


def report(runs: pathlib.Path) -> str:
    """The results file from all scores under ``runs``."""
    groups: dict[tuple[str, bool], Group] = {}
    for file in sorted(runs.glob("*/evaluation/scores.json")):
        entry = json.loads(file.read_text())
        groups.setdefault((entry["set"], entry["cpu"]), {}).setdefault(entry["row"], []).append(entry)
    lines = [
        "# FGNet: ablation",
        "",
        "FGA is emjax's formulation (docs/fgnet.md): the original's is not public. Rows that start from an EM-prior run use an "
        "encoder pretrained by emjax on unlabelled EM; **that is not SAM 2**, and says nothing of SAM 2's weights.",
        "",
    ]
    for (name, cpu), group in sorted(groups.items()):
        ordered = {row: group[row] for row in fgnet.ABLATIONS if row in group}
        lines += section(name, cpu, ordered)
    if not groups:
        lines += ["No row has been run."]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(SETS))
    parser.add_argument("--rows", default="A0,A1,A2,A4,C1", help=f"of {', '.join(fgnet.ABLATIONS)}")
    parser.add_argument("--seeds", default="0", help="such as 0,1,2")
    parser.add_argument("--cpu", action="store_true", help="the small variants, cpu_ROW")
    parser.add_argument("--runs", type=pathlib.Path, default=REPOSITORY / "runs" / "fgnet")
    parser.add_argument(
        "--flips", default="zyx", help="axes of the test-time flips; '' for none (default: %(default)s)"
    )
    parser.add_argument("--report", action="store_true", help="train and predict nothing, write the table")
    parser.add_argument("--evaluate", action="store_true", help="train nothing, predict and score what is trained")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS)
    known = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args([text for text in known if not text.startswith("--config.")])
    options.config = [text for text in known if text.startswith("--config.")]
    options.runs = options.runs.resolve()
    rows = options.rows.split(",")
    if wrong := [row for row in rows if row not in fgnet.ABLATIONS]:
        raise UserError(f"--rows {wrong[0]}: expected some of {', '.join(fgnet.ABLATIONS)}")
    todo = [] if options.report else [(row, int(seed)) for seed in options.seeds.split(",") for row in rows]
    for row, _ in todo:
        load(f"{REPOSITORY}/configs/fgnet/{options.set}.py:{'cpu_' if options.cpu else ''}{row}", [])
    truth = None
    for row, seed in todo:
        workdir = workdir_of(options, row, seed)
        if not trained(workdir):
            if options.evaluate:
                print(f"{workdir}: not trained to its end, left out")
                continue
            train(options, row, seed)
        truth = truth or read_truth(options.set)
        evaluated(options, row, seed, truth)
        write_results(options.output, report(options.runs))
    write_results(options.output, report(options.runs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")

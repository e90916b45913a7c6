"""SegNeuron on the volumes at hand, with and without pretraining: trains, scores, writes the table.

    python eval/segneuron_runs.py                                     # all of it on 2 CPU cores, about half an hour
    python eval/segneuron_runs.py --variant local --runs runs/segneuron_gpu                       # the large one, a GPU
    python eval/segneuron_runs.py --steps 4 --runs /tmp/dry --output /tmp/dry/segneuron.md        # a dry run

Pretraining on every raw volume at hand, fine-tuning on ``fib25_medulla`` and ``isbi2012_vnc`` with domain mixing
between them, once from the pretrained encoder and once from scratch, with as many steps. Both are scored on both
validation parts, 2D and 3D, with and without foreground restriction (``eval/segneuron.py``). The same command goes on
where it was stopped; with ``--only_score``, only runs that are there are scored, whatever they have reached. Further
ablations: ``--finetune "system.mixing.frequency_p=0 system.mixing.spatial_p=0"``, ``--pretrain "system.fill=zero"``
(then give another ``--runs``). Data: ``EMJAX_DATA`` (default ``../shared/data``).
"""

import argparse
import pathlib
import shlex
import sys
import time

import jax
from segneuron import SETS, TABLE, score_run
from trainings import cost, last_losses, machine, steps_done, train, write_results

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="cpu", help="of configs/segneuron/*.py (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="of every stage (default: as configured)")
    parser.add_argument(
        "--runs", type=pathlib.Path, default=pathlib.Path("runs/segneuron"), help="default: %(default)s"
    )
    parser.add_argument("--pretrain", default="", metavar="FIELD=VALUE ...", help="overrides of pretraining")
    parser.add_argument("--finetune", default="", metavar="FIELD=VALUE ...", help="overrides of fine-tuning")
    parser.add_argument("--set", action="append", choices=sorted(SETS), help="to score (default: all)")
    parser.add_argument("--beta", action="append", type=float, default=[], help="of the multicut; may be repeated")
    parser.add_argument("--only_score", action="store_true", help="train nothing, score the runs that are there")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / "segneuron.md")
    options = parser.parse_args()
    start = time.monotonic()
    often = max(1, options.steps // 4)
    steps = [f"train.steps={options.steps}", f"train.validate_every={often}", f"train.save_every={often}"]
    shorter = steps if options.steps else []
    pretrained = options.runs / "pretrain"
    jobs = {
        "pretraining": ("pretrain", pretrained, options.pretrain.split()),
        "fine-tuned after pretraining": (
            "finetune",
            options.runs / "finetune",
            [f"train.init_from={pretrained}", *options.finetune.split()],
        ),
        "from scratch": ("finetune", options.runs / "scratch", options.finetune.split()),
    }
    rows, costs, missing = list(TABLE), [], []
    for name, (file, workdir, overrides) in jobs.items():
        if not options.only_score:
            train(f"configs/segneuron/{file}.py:{options.variant}", workdir, [*shorter, *overrides])
        if not steps_done(workdir):
            missing.append(f"{name}: no checkpoint in {workdir}")
            continue
        done, operations, seconds = cost(workdir)
        costs.append(f"| {name} | {done} | {operations:.2f} | {seconds:.0f} | {last_losses(workdir)} |")
        if file == "finetune":
            rows += score_run(name, workdir, "latest", options.set or sorted(SETS), options.beta)
    lines = [
        "# SegNeuron on the validation parts of fib25_medulla and isbi2012_vnc",
        "",
        f"Command: `python {shlex.join(['eval/segneuron_runs.py', *sys.argv[1:]])}`",
        "",
        f"Machine: {machine()}, {jax.devices()[0].device_kind}. This evaluation, with what of the training was left to "
        f"do: {time.monotonic() - start:.0f} s.",
        "",
        "VI in bits, adapted Rand error as scikit-image defines it; ground truth 0 (and the residual body of fib25) is "
        "not scored. 2D: mean over sections, each segmented by itself.",
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
        "## Scores",
        "",
        *rows,
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    write_results(options.output, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

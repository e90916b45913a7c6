"""Trainings of an evaluation: started, gone on with, or left alone when they are whole; what they cost; its results file."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence

from emjax.config import Experiment, load
from emjax.training.checkpoints import FOLDER


def machine() -> str:
    """The processor and the number of cores, in words."""
    name = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {name}"


def steps_done(workdir: pathlib.Path) -> int:
    """The latest step that a run has stored; 0 without any."""
    return max((int(path.name) for path in (workdir / FOLDER).glob("[0-9]*") if path.name.isdigit()), default=0)


def train(spec: str, workdir: pathlib.Path, overrides: Sequence[str] = ()) -> Experiment:
    """Trains ``spec`` with ``--config.`` overrides to its last step, from where an earlier run stopped.

    Keeps ``seconds.json`` beside the run: seconds of all attempts, compilation included, and GFLOP of a step.

    Raises:
        SystemExit: the training failed.
    """
    experiment = load(spec, overrides)
    record = workdir / "seconds.json"
    if steps_done(workdir) >= experiment.train.steps:
        print(f"{workdir}: {experiment.train.steps} steps are done", flush=True)
        return experiment
    arguments = ["--config", spec, "--workdir", str(workdir), *(f"--config.{text}" for text in overrides)]
    print("python -m emjax.train " + " ".join(arguments), flush=True)
    known = json.loads(record.read_text()) if record.is_file() else {"seconds": 0.0, "gflop": None}
    before, start = known["seconds"], time.monotonic()

    def keep() -> None:
        known["seconds"] = before + time.monotonic() - start
        if workdir.is_dir():
            record.write_text(json.dumps(known))

    with subprocess.Popen(
        [sys.executable, "-m", "emjax.train", *arguments], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if (found := re.search(r"one step: ([\d,.]+) GFLOP", line)) is not None:
                known["gflop"] = float(found[1].replace(",", ""))
            # Often, so that an evaluation that is killed knows what its training has taken.
            keep()
    keep()
    if process.returncode:
        sys.exit(f"training of {workdir} ended with code {process.returncode}; the same command goes on")
    return experiment


def cost(workdir: pathlib.Path) -> tuple[int, float, float]:
    """Steps, TFLOP and seconds of a run."""
    steps = steps_done(workdir)
    record = workdir / "seconds.json"
    known = json.loads(record.read_text()) if record.is_file() else {"seconds": float("nan"), "gflop": None}
    return steps, steps * (known["gflop"] or float("nan")) / 1e3, known["seconds"]


def last_losses(workdir: pathlib.Path) -> str:
    """First and last validation loss of a run, in words."""
    records = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()] if records.is_file() else []
    losses = [line["loss"] for line in lines if line["kind"] == "validation"]
    return f"{losses[0]:.3f} -> {losses[-1]:.3f}" if losses else "-"


def write_results(path: pathlib.Path, text: str) -> None:
    """Writes a results file; what stands in it below "Remarks", by hand, is kept."""
    before = path.read_text() if path.is_file() else ""
    marker = "\n## Remarks\n"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + (before[before.index(marker) :] if marker in before else ""))
    print(f"wrote {path}")

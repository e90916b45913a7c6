"""Whole runs: killed and resumed, stopped and resumed, one process and two, and refused input."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import h5py
import jax
import numpy as np
import pytest
from small_run import experiment, write_volume

from emjax import train
from emjax.config import Optimizer
from emjax.errors import UserError
from emjax.training import loop
from emjax.training.checkpoints import find, initial_variables, restore_for_inference
from emjax.training.loading import load_system
from emjax.training.state import definition

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def volume(tmp_path_factory):
    return write_volume(tmp_path_factory.mktemp("data") / "volume.h5")


@pytest.fixture(scope="module")
def config_file(volume, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "small.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom small_run import experiment\n"
        f"def get_config(variant=''):\n    return experiment({volume!r}, train__overlays=0)\n"
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(volume, tmp_path_factory):
    """A run from start to end in this process: its work directory and the losses of its steps."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    outcome = loop.run(experiment(volume, train__overlays=1), workdir)
    assert outcome.finished
    assert outcome.step == 12
    return workdir, losses(workdir)


def losses(workdir, kind="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == kind}


def start(config_file, workdir, devices=8, processes=0):
    """Starts the command as a process of its own (or several, by the launcher)."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "train/launch.py"), "--processes", str(processes), "--"]
    command = command if processes else [sys.executable, "-m", "emjax.train"]
    command += ["--config", str(config_file), "--workdir", str(workdir)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def wait_for_step(process, workdir, step, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file = workdir / "metrics.jsonl"
        if file.exists() and file.read_text().count('"kind": "train"') >= step:
            return
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.stderr.read()[-2000:]}")
        time.sleep(0.01)
    process.kill()
    raise AssertionError("no progress")


def test_a_run_learns_and_records(uninterrupted):
    workdir, steps = uninterrupted
    assert sorted(steps) == list(range(1, 13))
    assert steps[12] < steps[1]
    assert sorted(losses(workdir, "validation")) == [6, 12]
    assert any((workdir / "tensorboard").iterdir())


def test_a_killed_run_resumes_with_the_same_losses(uninterrupted, config_file, volume, tmp_path):
    process = start(config_file, tmp_path)
    wait_for_step(process, tmp_path, random.SystemRandom().randint(2, 9))
    process.kill()
    process.communicate()
    assert loop.run(experiment(volume, train__overlays=0), tmp_path).finished
    assert losses(tmp_path) == uninterrupted[1]
    assert losses(tmp_path, "validation") == losses(uninterrupted[0], "validation")


def test_sigterm_leaves_a_valid_checkpoint(config_file, uninterrupted, tmp_path):
    process = start(config_file, tmp_path)
    wait_for_step(process, tmp_path, 3)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=240)
    steps = losses(tmp_path)
    if process.returncode == 0:
        # The last steps may be done before the signal is seen.
        assert max(steps) == 12
        return
    assert process.returncode == 1, text[-2000:]
    assert "the same command goes on" in text
    checkpoint = find(tmp_path, "latest")
    assert int(checkpoint.name) == max(steps)
    config, variables = restore_for_inference(tmp_path, "latest")
    assert definition(config).bind(variables) is not None
    assert steps == {step: uninterrupted[1][step] for step in steps}


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_as_one(config_file, uninterrupted, volume, tmp_path):
    process = start(config_file, tmp_path, devices=2, processes=2)
    wait_for_step(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=240)
    steps = losses(tmp_path)
    assert len(steps) >= 5, text[-2000:]
    assert loop.run(experiment(volume, train__overlays=0), tmp_path).finished
    steps = losses(tmp_path)
    assert sorted(steps) == list(range(1, 13))
    np.testing.assert_allclose([steps[n] for n in sorted(steps)], list(uninterrupted[1].values()), rtol=1e-4)


def test_two_processes_without_a_stop(config_file, uninterrupted, tmp_path):
    process = start(config_file, tmp_path, devices=4, processes=2)
    _, text = process.communicate(timeout=400)
    assert process.returncode == 0, text[-3000:]
    steps = losses(tmp_path)
    np.testing.assert_allclose([steps[n] for n in sorted(steps)], list(uninterrupted[1].values()), rtol=1e-5)


def test_checkpoints_keep_the_latest_and_the_best(uninterrupted):
    workdir, _ = uninterrupted
    kept = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    assert kept[-1] == 12
    assert find(workdir, "latest").name == "12"
    validation = losses(workdir, "validation")
    assert int(find(workdir, "best").name) == min(validation, key=validation.get)


def test_a_run_can_start_from_another(uninterrupted, volume):
    config = experiment(volume, train__init_from=str(uninterrupted[0]))
    variables = initial_variables(config.train.init_from, config)
    _, best = restore_for_inference(uninterrupted[0])
    for ours, theirs in zip(jax.tree.leaves(variables), jax.tree.leaves(best)):
        np.testing.assert_array_equal(ours, theirs)


def test_the_configuration_of_a_run_can_be_changed_but_not_its_network(uninterrupted):
    workdir = str(uninterrupted[0])
    changed, collections = load_system(workdir, "best", ("system.plan.blending=linear", "system.predicted=all"))
    trained, same = load_system(workdir, "best")
    plan = dataclasses.replace(trained.plan, blending="linear")
    assert changed == dataclasses.replace(trained, plan=plan, predicted="all")
    assert collections is same
    for text, complaint in (
        ("system.model.widths=(12,)", "cannot be changed"),
        ("system.predictd=all", "predicted"),
        ("train.steps=3", "trained system"),
        ("system.plan.halo=(9,9,9)", "leave gaps"),
    ):
        with pytest.raises(UserError, match=complaint):
            load_system(workdir, "best", (text,))


def test_checkpoint_of_another_model_is_refused(uninterrupted, volume, tmp_path):
    wider = experiment(volume, train__init_from=str(uninterrupted[0]))

    model = dataclasses.replace(wider.system.model, widths=(12,))
    wider = dataclasses.replace(wider, system=dataclasses.replace(wider.system, model=model))
    with pytest.raises(UserError, match="not of this model"):
        loop.run(wider, tmp_path / "new")
    with pytest.raises(UserError, match="holds a run of another model"):
        loop.run(dataclasses.replace(wider, train=dataclasses.replace(wider.train, init_from="")), uninterrupted[0])


def test_a_broken_checkpoint_is_named(uninterrupted, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(uninterrupted[0], copy)
    (find(copy, "latest") / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        restore_for_inference(copy, "latest")
    with pytest.raises(UserError, match="holds steps"):
        find(copy, "7")
    with pytest.raises(UserError, match="no finished checkpoint"):
        find(tmp_path)


def _config(tmp_path, volume, **changes):
    text = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    path = tmp_path / "config.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom small_run import experiment\n"
        f"def get_config(variant=''):\n    return experiment({str(volume)!r}{', ' + text if text else ''})\n"
    )
    return str(path)


def _broken(kind, tmp_path):
    path = tmp_path / f"{kind}.h5"
    if kind == "absent":
        return path
    write_volume(path)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
        return path
    with h5py.File(path, "r+") as file:
        if kind == "no labels":
            del file["labels"]
        elif kind == "other shape":
            del file["labels"]
            file["labels"] = np.ones((12, 40, 41), np.uint32)
        elif kind == "nan":
            del file["raw"]
            file["raw"] = np.full((12, 40, 40), np.nan, np.float32)
        elif kind == "two axes":
            del file["raw"]
            file["raw"] = np.zeros((40, 40), np.uint8)
        elif kind == "small":
            for name in ("raw", "labels"):
                data = file[name][:4]
                del file[name]
                file[name] = data
    return path


@pytest.mark.parametrize("kind", ["absent", "truncated", "no labels", "other shape", "nan", "two axes", "small"])
def test_bad_volumes_are_refused_before_anything_is_written(kind, tmp_path):
    config = _config(tmp_path, _broken(kind, tmp_path))
    workdir = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train.main(["--config", config, "--workdir", str(workdir)])
    assert f"{kind}.h5" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not workdir.exists()


def test_unwritable_work_directory(volume, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        train.main(["--config", _config(tmp_path, volume), "--workdir", str(tmp_path / "file" / "run")])


def test_command_line_errors_have_one_line_and_exit_code_2(volume, tmp_path):
    command = [sys.executable, "-m", "emjax.train", "--config", _config(tmp_path, volume), "--config.train.step=3"]
    ended = subprocess.run(
        [*command, "--workdir", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert ended.returncode == 2
    assert ended.stderr.strip() == "error: --config.train.step: Train has no field 'step'; did you mean 'steps'?"


def test_dry_run_reads_no_data(tmp_path, capsys):
    config = _config(tmp_path, tmp_path / "absent.h5")
    assert train.main(["--config", config, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "GFLOP" in text
    assert "parameters" in text


def test_a_run_that_diverges_ends(volume, tmp_path):

    config = experiment(
        volume, optimizer=Optimizer(lr=1e38, warmup_steps=0, clip_norm=0.0), train__most_skipped=3, train__overlays=0
    )
    with pytest.raises(FloatingPointError, match="not finite"):
        loop.run(config, tmp_path)

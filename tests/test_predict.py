import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from inference import tiny_systems

from emjax import cli, predict, status
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.prediction import add_prediction_options, choose_window, predict_volume, voxel_size_warning

TESTS = pathlib.Path(__file__).parent


def image_of(shape=(20, 44, 40), seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "image.zarr"
    save_volume(path, image_of(), voxel_size=(40, 4, 4), offset=(400, 0, 40))
    return str(path)


def options_of(*arguments):
    parser = cli.parser("tiny", "")
    add_prediction_options(parser)
    return parser.parse_args(list(arguments))


def predicted(source, output, *arguments, load=tiny_systems.load, say=lambda line: None):
    return predict_volume(load, source, str(output), options=options_of(*arguments), say=say)


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def start(source, output, slow, *arguments):
    command = [sys.executable, str(TESTS / "inference" / "tiny_run.py"), str(slow)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS)}
    return subprocess.Popen(
        [*command, "--input", source, "--output", str(output), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
    )


def wait_for_blocks(output, count, process, seconds=120):
    end = time.monotonic() + seconds
    while len(list(output.glob(".ledger/predict/*/done/*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


BLOCK = ("--block", "6,10,10")


def test_output_says_what_it_is(source, tmp_path):
    lines = []
    places, _ = predicted(source, tmp_path / "out.zarr", *BLOCK, say=lines.append)
    out = open_volume(places["affinities"])
    assert out.complete
    assert out.shape == (3, 20, 44, 40)
    assert out.dtype == np.uint8
    assert out.voxel_size == (40, 4, 4)
    assert out.offset == (400, 0, 40)
    assert out.attributes["offsets"] == [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
    assert out.attributes["scale"] == pytest.approx(1 / 255)
    assert "axes zyx" in lines[0]
    assert "voxel size 40 x 4 x 4 nm" in lines[0]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_prediction_resumes_to_the_identical_array(source, tmp_path, number):
    whole = tmp_path / "whole.zarr"
    predicted(source, whole, *BLOCK)
    output = tmp_path / "killed.zarr"
    process = start(source, output, 0.05, *BLOCK, "--threads", "2")
    wait_for_blocks(output, 3, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (1 if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert "the same command goes on" in errors
    done = {path.name: path.stat().st_mtime_ns for path in output.glob(".ledger/predict/*/done/*.json")}
    assert 3 <= len(done) < 100
    with pytest.raises(UserError, match="not finished"):
        open_volume(str(output))
    process = start(source, output, 0.05, *BLOCK)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for path in output.glob(".ledger/predict/*/done/*.json"):
        assert done.get(path.name, path.stat().st_mtime_ns) == path.stat().st_mtime_ns
    np.testing.assert_array_equal(open_volume(str(output))[...], open_volume(str(whole))[...])


def test_stripes_of_two_processes_equal_one(source, tmp_path):
    whole, output = tmp_path / "whole.zarr", tmp_path / "striped.zarr"
    predicted(source, whole, *BLOCK)
    common = (*BLOCK, "--executor", "stripes", "--stripe")
    workers = [start(source, output, 0.0, *common, f"{index}/2") for index in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    np.testing.assert_array_equal(open_volume(str(output))[...], open_volume(str(whole))[...])


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["processes", "dask"])
def test_executors_give_the_same_array(source, tmp_path, executor):
    predicted(source, tmp_path / "one.zarr", *BLOCK)
    # Workers import the tests' systems by name.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS))
        predicted(source, tmp_path / "many.zarr", *BLOCK, "--executor", executor, "--workers", "2")
    np.testing.assert_array_equal(
        open_volume(str(tmp_path / "many.zarr"))[...], open_volume(str(tmp_path / "one.zarr"))[...]
    )


def test_another_plan_is_refused_and_overwrite_begins_anew(source, tmp_path):
    output = tmp_path / "out.zarr"
    predicted(source, output)
    first = open_volume(str(output))[...]
    lines = []
    predicted(source, output, say=lines.append)
    assert any("already finished" in line for line in lines)
    with pytest.raises(UserError, match="flips"):
        predicted(source, output, "--flips", "yx")
    other = functools.partial(tiny_systems.load, 1)
    with pytest.raises(UserError, match="model"):
        predicted(source, output, load=other)
    predicted(source, output, "--overwrite", load=other)
    assert (open_volume(str(output))[...] != first).any()


def test_a_box_is_a_part_of_the_whole(source, tmp_path):
    predicted(source, tmp_path / "whole.zarr")
    predicted(source, tmp_path / "part.zarr", "--bbox", "3:15,10:40,:")
    part, whole = open_volume(str(tmp_path / "part.zarr")), open_volume(str(tmp_path / "whole.zarr"))
    assert part.offset == (400 + 3 * 40, 40, 40)
    np.testing.assert_array_equal(part[...], whole[:, 3:15, 10:40])


def test_grey_windows(tmp_path):
    wide = (image_of().astype(np.uint16) * 257).astype(np.uint16)
    volumes = {
        "uint8": image_of(),
        "uint16": wide,
        "float": image_of().astype(np.float32) / 255,
        "large": image_of().astype(np.float32),
    }
    opened = {}
    for name, array in volumes.items():
        save_volume(tmp_path / f"{name}.zarr", array, voxel_size=(1, 1, 1))
        opened[name] = open_volume(tmp_path / f"{name}.zarr")
    assert choose_window(opened["uint8"], None) is None
    assert choose_window(opened["uint16"], None).high == 65535
    assert choose_window(opened["uint16"], None, (10.0, 20.0)).low == 10
    assert choose_window(opened["float"], None).high == 1
    assert 240 < choose_window(opened["large"], "auto").high <= 255
    with pytest.raises(UserError, match="--window"):
        choose_window(opened["large"], None)
    for name in ("uint16", "float"):
        predicted(str(tmp_path / f"{name}.zarr"), tmp_path / f"{name}.out.zarr")
    predicted(str(tmp_path / "uint8.zarr"), tmp_path / "uint8.out.zarr")
    found = {name: open_volume(tmp_path / f"{name}.out.zarr")[...].astype(int) for name in ("uint8", "uint16", "float")}
    assert np.abs(found["uint8"] - found["uint16"]).max() <= 1
    assert np.abs(found["uint8"] - found["float"]).max() <= 1


def test_voxel_size_mismatch_is_a_warning(source):
    volume = open_volume(source)
    assert voxel_size_warning(volume, tiny_systems.Config()) is None
    assert voxel_size_warning(volume, tiny_systems.Config(voxel_size=(40.0, 4.0, 4.0))) is None
    assert "8 x 8 x 8 nm" in voxel_size_warning(volume, tiny_systems.Config(voxel_size=(8.0, 8.0, 8.0)))


def test_status_prints_the_ledger(source, tmp_path, capsys):
    predicted(source, tmp_path / "out.zarr", *BLOCK)
    assert status.main([str(tmp_path / "out.zarr")]) == 0
    printed = capsys.readouterr().out
    assert "100 of 100 blocks done, 0 failed" in printed or "blocks done, 0 failed" in printed
    with pytest.raises(UserError, match="no ledger"):
        status.main([str(tmp_path)])


# --- bad input: one line, nothing left behind ------------------------------------------------------------------------


def bad_inputs(folder):
    good = image_of((8, 12, 12))
    with h5py.File(folder / "good.h5", "w") as file:
        file["raw"] = good
    save_volume(folder / "four.zarr", np.stack([good, good]), voxel_size=(1, 1, 1))
    save_volume(folder / "nan.zarr", np.where(good > 250, np.nan, good / 255).astype(np.float32), voxel_size=(1, 1, 1))
    save_volume(folder / "flat.zarr", image_of((8, 12, 1)), voxel_size=(1, 1, 1))
    with h5py.File(folder / "truncated.h5", "w") as file:
        file["raw"] = image_of((64, 64, 64))
    data = (folder / "truncated.h5").read_bytes()
    (folder / "truncated.h5").write_bytes(data[: len(data) // 2])
    save_volume(folder / "cut.zarr", good, voxel_size=(1, 1, 1))
    for path in (folder / "cut.zarr").rglob("c/*"):
        for chunk in [path] if path.is_file() else path.rglob("*"):
            if chunk.is_file():
                chunk.write_bytes(chunk.read_bytes()[:10])
    return {
        "missing.zarr": "does not exist",
        "good.h5:rwa": "raw",
        "good.h5:raw": "--voxel-size",
        "four.zarr": "czyx",
        "nan.zarr": "NaN",
        "flat.zarr": "too few",
        "truncated.h5:raw": "truncated",
        "cut.zarr": "cut.zarr",
    }


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path):
    for name, expected in bad_inputs(tmp_path).items():
        before = tree(tmp_path)
        with pytest.raises(UserError) as caught:
            predicted(str(tmp_path / name), tmp_path / "out.zarr")
        assert expected in str(caught.value), (name, str(caught.value))
        assert "\n" not in str(caught.value)
        assert tree(tmp_path) == before, name


def test_bad_options(source, tmp_path):
    wrong = {
        ("--bbox", "0:99,:,:"): "not inside",
        ("--bbox", "1,2"): "z0:z1",
        ("--flips", "abc"): "zyx",
        ("--block", "1,2"): "three positive",
        ("--memory", "lots"): "500MB",
        ("--window", "9,3"): "LOW < HIGH",
        ("--threads", "0"): "at least 1",
    }
    for arguments, expected in wrong.items():
        with pytest.raises(UserError, match=expected):
            predicted(source, tmp_path / "out.zarr", *arguments)
    with pytest.raises(UserError, match=r"something\.zarr"):
        predicted(source, tmp_path / "out.h5")
    assert not (tmp_path / "out.zarr").exists()


def test_output_that_cannot_be_written(source, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError) as caught:
        predicted(source, tmp_path / "file" / "out.zarr")
    assert "out.zarr" in str(caught.value)
    (tmp_path / "mine.zarr").mkdir()
    (tmp_path / "mine.zarr" / "notes.txt").write_text("mine")
    for arguments in ((), ("--overwrite",)):
        with pytest.raises(UserError):
            predicted(source, tmp_path / "mine.zarr", *arguments)
    assert tree(tmp_path / "mine.zarr") == ["notes.txt"]


def test_full_output(source, tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(UserError) as caught:
            predicted(source, place / "out.zarr")
        assert "\n" not in str(caught.value)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_the_command_wants_a_checkpoint(source, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(
            predict.main,
            ["--checkpoint", str(tmp_path / "no"), "--input", source, "--output", str(tmp_path / "o.zarr")],
        )
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: --checkpoint")
    assert errors.count("\n") == 1


def test_facts_of_a_block_are_kept(source, tmp_path):
    predicted(source, tmp_path / "out.zarr", *BLOCK)
    markers = sorted((tmp_path / "out.zarr").glob(".ledger/predict/*/done/*.json"))
    facts = [json.loads(path.read_text()) for path in markers]
    assert sum(fact["voxels"] for fact in facts) == 20 * 44 * 40
    assert all(fact["seconds"] >= 0 and fact["host"] for fact in facts)

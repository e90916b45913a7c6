import functools
import json
import signal
import threading

import pytest

from emjax.errors import UserError
from emjax.inference import ledger as ledgers
from emjax.inference.executor import Dask, Processes, Stripes, Threads, run_stage, stopping, stripe_of_environment
from emjax.inference.ledger import Ledger


def note(folder, item):
    (folder / f"{item}.txt").write_text(str(item * item))
    return {"voxels": item}


def fail_on_three(item):
    if item == 3:
        raise ValueError("three is too many")
    return {"voxels": 1}


@pytest.mark.parametrize("kind", ["threads", "processes", "dask"])
def test_executors_do_all_items_once(tmp_path, kind):
    make = {
        "threads": lambda: Threads(3),
        "processes": lambda: Processes(2),
        "dask": lambda: Dask(workers=2, processes=False),
    }
    executor = make[kind]()
    book = Ledger(str(tmp_path / "out.zarr"), "stage", "abc")
    assert executor.workers() >= 1
    assert executor.describe()
    try:
        result = run_stage(executor, functools.partial(note, tmp_path), range(20), str, book)
        assert (result.done, result.skipped, result.failed) == (20, 0, {})
        again = run_stage(executor, functools.partial(note, tmp_path), range(21), str, book)
        assert (again.done, again.skipped) == (1, 20)
    finally:
        executor.close()
    assert book.done() == {str(item) for item in range(21)}
    assert (tmp_path / "19.txt").read_text() == "361"
    assert book.progress(21).voxels == sum(range(21))


@pytest.mark.parametrize("kind", ["threads", "dask"])
def test_failures_are_tried_three_times_and_listed(tmp_path, kind):
    executor = Threads(2) if kind == "threads" else Dask(workers=1, processes=False)
    book = Ledger(str(tmp_path), "stage", "abc")
    try:
        result = run_stage(executor, fail_on_three, range(6), str, book)
    finally:
        executor.close()
    assert result.done == 5
    assert list(result.failed) == ["3"]
    assert "three is too many" in result.failed["3"]
    assert book.failed() == {"3"}
    assert book.failure("3")["attempts"] == 3
    assert run_stage(Threads(), lambda item: {}, range(6), str, book).done == 1
    assert book.failed() == set()


def test_user_errors_stop_at_once(tmp_path):
    calls = []

    def refuse(item):
        calls.append(item)
        raise UserError("no such thing")

    with pytest.raises(UserError, match="no such thing"):
        run_stage(Threads(1), refuse, range(50), str, Ledger(str(tmp_path), "stage", "abc"))
    assert len(calls) <= 2


def test_stripes_share_the_items(tmp_path):
    book = Ledger(str(tmp_path), "stage", "abc")
    for index in range(3):
        run_stage(Stripes(index, 3), functools.partial(note, tmp_path), range(11), str, book)
        assert len(book.done()) == len([item for item in range(11) if item % 3 <= index])
    assert len(book.done()) == 11


def test_stripe_of_environment(monkeypatch):
    for name in ("SLURM_ARRAY_TASK_COUNT", "SLURM_NTASKS", "SLURM_PROCID", "JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"):
        monkeypatch.delenv(name, raising=False)
    assert stripe_of_environment("2/5") == (2, 5)
    for wrong in ("5/5", "a/2", "3", "-1/2"):
        with pytest.raises(UserError, match="INDEX/COUNT"):
            stripe_of_environment(wrong)
    with pytest.raises(UserError, match="stripe"):
        stripe_of_environment(None)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setenv("JOB_COMPLETIONS", "4")
    assert stripe_of_environment(None) == (1, 4)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "10")
    assert stripe_of_environment(None) == (2, 8)


def test_another_plan_is_refused_and_named(tmp_path):
    location = str(tmp_path / "out.zarr")
    assert ledgers.read_plan(location) is None
    ledgers.write_plan(location, {"content": {"flips": "", "block": [1, 2, 3]}, "stages": {}, "begun": 0})
    stored = ledgers.read_plan(location)
    ledgers.check_same_plan(location, stored, {"block": [1, 2, 3], "flips": ""})
    with pytest.raises(UserError, match=r"flips \(was , now yx\).*--overwrite"):
        ledgers.check_same_plan(location, stored, {"block": [1, 2, 3], "flips": "yx"})


def test_markers_of_another_plan_count_for_nothing(tmp_path):
    Ledger(str(tmp_path), "predict", "old").mark_done("0-0-0", voxels=1)
    assert Ledger(str(tmp_path), "predict", "new").done() == set()
    marker = json.loads((tmp_path / ".ledger/predict/old/done/0-0-0.json").read_text())
    assert marker["voxels"] == 1
    assert marker["host"]


def test_content_hash_ignores_order():
    assert ledgers.content_hash({"a": 1, "b": [2]}) == ledgers.content_hash({"b": [2], "a": 1})
    assert ledgers.content_hash({"a": 1}) != ledgers.content_hash({"a": 2})


def test_signals_set_the_event_first():
    stop = threading.Event()
    with pytest.raises(KeyboardInterrupt), stopping(stop):
        signal.raise_signal(signal.SIGTERM)
    assert stop.is_set()

"""Every SAM 2 oracle through the parity harness."""

import pathlib

import pytest
from shared_folder import SHARED

from parity import case_for, run_file

FOLDER = SHARED / "oracles" / "sam2"
FILES = sorted([*FOLDER.glob("*.npz"), *FOLDER.glob("manifest_*.json")])


def marked(path: pathlib.Path):
    case = case_for(path)
    return pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if case is not None and case.slow else [])


@pytest.mark.parametrize("path", [marked(path) for path in FILES])
def test_file(path, oracles):
    rows = list(run_file(path))
    assert rows
    wrong = [f"{row.array}: {row.max_abs:.2e} ({row.tolerance})" for row in rows if not row.ok]
    assert not wrong, "\n".join(wrong)

"""Every oracle file, through the same code as ``python eval/parity.py``; the slow files are marked."""

import pathlib

import pytest
from shared_folder import SHARED

import parity


def _parameters() -> list:
    root = SHARED / "oracles"
    if not root.is_dir():
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"{root} is not there; set EMJAX_SHARED"))]
    parameters = []
    for folder in parity.folders(root):
        if not parity.cases_of(folder):
            continue
        for path in parity.files_of(folder):
            case = parity.case_for(path)
            # Networks compile for minutes; `.ci/run` checks every file through the command.
            quick = folder.name == "postprocess" and case is not None and not case.slow
            marks = [] if quick else [pytest.mark.slow]
            parameters.append(pytest.param(path, id=f"{folder.name}/{path.name}", marks=marks))
    return parameters


@pytest.mark.parametrize("path", _parameters())
def test_oracle_file(path: pathlib.Path):
    wrong = [row for row in parity.run_file(path) if not row.ok]
    assert not wrong, "\n".join(
        f"{row.array}: {row.max_abs:g} abs, {row.max_rel:g} rel, {row.tolerance}" for row in wrong
    )

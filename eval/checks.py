"""What a parity case yields: one row per compared array."""

import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: largest absolute and relative error, the tolerance in words, and the verdict."""

    array: str
    max_abs: float
    max_rel: float
    tolerance: str
    ok: bool


@dataclasses.dataclass(frozen=True)
class Case:
    """How the files that match a pattern are checked.

    ``run(path)`` yields the rows of one file; ``slow`` cases are left out by ``--fast``.
    """

    run: Callable[[pathlib.Path], Iterator[Row]]
    slow: bool = False


def _errors(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    if got.size == 0:
        return 0.0, 0.0
    difference = np.abs(got.astype(np.float64) - want.astype(np.float64))
    both_nan = np.isnan(got) & np.isnan(want) if got.dtype.kind == "f" and want.dtype.kind == "f" else None
    if both_nan is not None:
        difference = np.where(both_nan, 0.0, difference)
    relative = difference / np.maximum(np.abs(want.astype(np.float64)), np.finfo(np.float64).tiny)
    return float(difference.max()), float(np.where(difference == 0, 0.0, relative).max())


def exact(array: str, got, want) -> Row:
    """Equal shape and equal values."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
        return Row(f"{array} shape {got.shape} for {want.shape}", math.inf, math.inf, "exact", False)
    return Row(array, *_errors(got, want), "exact", bool(np.array_equal(got, want)))


def close(array: str, got, want, *, atol: float = 0.0, rtol: float = 0.0) -> Row:
    """``|got - want| <= atol + rtol * |want|`` everywhere; NaN only where the oracle has NaN."""
    got, want = np.asarray(got), np.asarray(want)
    tolerance = " + ".join(([f"{atol:.1e}"] if atol else []) + ([f"{rtol:.1e} rel"] if rtol else [])) or "exact"
    if got.shape != want.shape:
        return Row(f"{array} shape {got.shape} for {want.shape}", math.inf, math.inf, tolerance, False)
    got64, want64 = got.astype(np.float64), want.astype(np.float64)
    ok = bool(np.allclose(got64, want64, rtol=rtol, atol=atol, equal_nan=True))
    return Row(array, *_errors(got, want), tolerance, ok)


def bound(array: str, value: float, most: float, meaning: str) -> Row:
    """A single figure (an energy excess, a variation of information) that may not exceed ``most``."""
    return Row(array, float(value), math.nan, f"{meaning} <= {most:g}", bool(value <= most))


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file."""
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def seeded_state(folder: pathlib.Path, shapes: Mapping[str, list[int]], seed: int) -> dict[str, np.ndarray]:
    """Stand-in weights by the oracle folder's own ``seeded_state.py`` (``folder`` holds that file)."""
    module: dict = {"__name__": "seeded_state"}
    source = folder / "seeded_state.py"
    exec(compile(source.read_text(), str(source), "exec"), module)
    return module["seeded_state"](shapes, seed)


def load_json(path: pathlib.Path):
    return json.loads(path.read_text())


def table(rows: list[tuple[str, Row]], stream=None) -> None:
    """Prints one line per row, failures marked."""
    stream = stream or sys.stdout
    for file, row in rows:
        verdict = "ok" if row.ok else "FAIL"
        print(
            f"{verdict:4} {file:44} {row.array:44} {row.max_abs:10.3e} {row.max_rel:10.3e}  {row.tolerance}",
            file=stream,
        )

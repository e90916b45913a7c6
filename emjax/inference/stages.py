"""Stages of a long computation on blocks: each block is done once, by anyone, and a killed run goes on where it was.

What passes between stages lies in a work folder, beside the ledger that says which blocks of which plan are done.
"""

import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from emjax.errors import UserError
from emjax.inference import ledger
from emjax.inference.executor import Executor, Stopped, Stripes, run_stage
from emjax.inference.progress import ProgressLine
from emjax.postprocess.blockwise import Block

Place = tuple[int, int, int]


def name_of(place: Place) -> str:
    """Name of a block in the ledger."""
    return "-".join(map(str, place))


def save_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """An ``.npz`` that appears under its name only when it is whole."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), suffix=".tmp", delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.close()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def load_arrays(path: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


class Stop:
    """An event that stays behind when its holder is sent to another process."""

    def __init__(self, event: threading.Event | None = None):
        self.event = event or threading.Event()

    def is_set(self) -> bool:
        return self.event.is_set()

    def check(self) -> None:
        """Raises ``Stopped`` once the event is set."""
        if self.is_set():
            raise Stopped

    def __reduce__(self) -> tuple:
        return Stop, ()


def wait_until(ready: Callable[[], bool]) -> None:
    """Returns once ``ready()``; other stripes make it so."""
    while not ready():
        time.sleep(0.5)


class Stages:
    """Runs stages in a work folder, for one plan and the blocks of one grid.

    Args:
        folder: of the work, with the ledger.
        plan: hash of the plan.
        blocks: by their place in the grid.
        executor: who runs the blocks.
    """

    def __init__(self, folder: str, plan: str, blocks: Mapping[Place, Block], executor: Executor):
        self.folder, self.plan, self.blocks, self.executor = folder, plan, blocks, executor

    def each(self, stage: str, function: Callable[[Place], dict[str, Any] | None]) -> None:
        """Runs ``function`` on every block that the ledger does not hold; it must be safe to run twice.

        Raises:
            RuntimeError: blocks that failed three times.
        """
        book = ledger.Ledger(self.folder, stage, self.plan)
        if len(book.done()) < len(self.blocks):
            line = ProgressLine(stage, float(sum(math.prod(block.shape) for block in self.blocks.values())))

            def report(place: Place, done: int, total: int) -> None:
                line.add(math.prod(self.blocks[place].shape))

            result = run_stage(self.executor, function, list(self.blocks), name_of, book, report)
            line.finish()
            if result.failed:
                name, error = next(iter(result.failed.items()))
                raise RuntimeError(
                    f"{stage}: {len(result.failed)} of {len(self.blocks)} blocks failed {ledger.MOST_ATTEMPTS} times, "
                    f"first {name}: {error}; see python -m emjax.status {self.folder}; the same command tries them "
                    "again"
                )
        if isinstance(self.executor, Stripes):
            wait_until(lambda: len(book.done()) == len(self.blocks))

    def once(self, stage: str, function: Callable[[], None]) -> None:
        """Runs what only one process may do; the other stripes wait for its marker."""
        book = ledger.Ledger(self.folder, stage, self.plan)
        if book.done():
            return
        if isinstance(self.executor, Stripes) and self.executor.index > 0:
            wait_until(lambda: bool(book.done()))
            return
        begun = time.time()
        function()
        book.mark_done("all", seconds=round(time.time() - begun, 3))

    def side(self, stage: str, place: Place | None = None) -> str:
        """Path of the arrays that a stage keeps for a block, or once."""
        return side_path(self.folder, self.plan, stage, place)


def side_path(folder: str, plan: str, stage: str, place: Place | None = None) -> str:
    """Path of the arrays that a stage keeps for a block, or once."""
    name = stage if place is None else f"{stage}/{name_of(place)}"
    return os.path.join(folder, plan, f"{name}.npz")


def begin(
    folder: str,
    content: Mapping[str, Any],
    blocks: Mapping[Place, Block],
    stages: Mapping[str, bool],
    executor: Executor,
    create: Callable[[], None],
) -> None:
    """Creates the work folder of a plan, or keeps the one that is there; an abandoned plan's is removed.

    Args:
        content: the plan, JSON-able.
        stages: by name, whether a stage runs on every block (or once).
        create: makes the volumes that the stages write.
    """
    hashed = ledger.content_hash(content)
    stored = ledger.read_plan(folder)
    if isinstance(executor, Stripes) and executor.index > 0:
        wait_until(lambda: (ledger.read_plan(folder) or {}).get("hash") == hashed)
        return
    if stored is not None and stored.get("hash") == hashed:
        return
    if stored is not None:
        # An abandoned plan's intermediate results are of no use to anyone.
        shutil.rmtree(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror or error}") from None
    create()
    voxels = sum(math.prod(block.shape) for block in blocks.values())
    described = {
        name: {"hash": hashed, "blocks": len(blocks) if each else 1, "voxels": voxels if each else 0}
        for name, each in stages.items()
    }
    ledger.write_plan(folder, {"content": dict(content), "stages": described, "begun": time.time()})

"""What a run leaves to read: metrics as JSON lines (the primary record), TensorBoard, and one line of progress."""

import json
import logging
import pathlib
import time
from collections.abc import Mapping

import numpy as np

from emjax.inference.progress import duration

logger = logging.getLogger(__name__)


class Records:
    """Writes ``metrics.jsonl`` and TensorBoard files into a work directory; does nothing where ``active`` is False.

    Opening for a run that resumes at ``step`` drops lines of later steps, which a killed run may have left: they will
    be written again.
    """

    def __init__(self, workdir: pathlib.Path, step: int, active: bool = True):
        self.active = active
        if not active:
            return
        from tensorboardX import SummaryWriter

        self.path = workdir / "metrics.jsonl"
        if self.path.exists():
            kept = []
            for line in self.path.read_text().splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError):
                    # A line cut short by a kill is written again too.
                    continue
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Appends one line; ``kind`` is ``"train"`` or ``"validation"``."""
        if not self.active:
            return
        values = {name: float(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def image(self, step: int, name: str, picture: np.ndarray) -> None:
        """An RGB picture uint8 (rows, columns, 3) for TensorBoard."""
        if self.active:
            self.board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


class Progress:
    """One line of progress with speed and time left, and the share of time spent waiting for data."""

    def __init__(self, first_step: int, steps: int, voxels_per_step: int):
        self.first, self.steps, self.voxels = first_step, steps, voxels_per_step
        self.start = time.monotonic()
        self.waited = 0.0

    def line(self, step: int, scalars: Mapping[str, float]) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        done = step - self.first
        rate = done / elapsed
        left = (self.steps - step) / rate if rate else 0.0
        shown = "  ".join(f"{name} {scalars[name]:.4g}" for name in scalars if not name.endswith("_norm"))
        return (
            f"step {step}/{self.steps}  {shown}  {rate:.2f} steps/s  {rate * self.voxels / 1e6:.2f} MVox/s  "
            f"data {self.waited / elapsed:.0%}  left {duration(left)}"
        )

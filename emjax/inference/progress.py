"""One line that says how far a run is: on a terminal it is rewritten in place, in a log file it comes now and then."""

import sys
import threading
import time
from typing import TextIO


def duration(seconds: float) -> str:
    """``"42 s"``, ``"3 min 20 s"``, ``"5 h 12 min"``, ``"3 d 4 h"``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


class ProgressLine:
    """Counts voxels from any thread and prints speed and time left.

    Args:
        title: what is being done.
        total: voxels of this run.
        done: voxels that were done before.
    """

    def __init__(self, title: str, total: float, done: float = 0.0, stream: TextIO | None = None):
        self.title, self.total, self.before = title, total, done
        self.stream = sys.stderr if stream is None else stream
        self.in_place = self.stream.isatty()
        self.seconds_between = 0.3 if self.in_place else 10.0
        self._count, self._lock = 0.0, threading.Lock()
        self._start = self._shown = time.monotonic()

    def add(self, voxels: float) -> None:
        """Counts voxels, and prints if it is time to."""
        with self._lock:
            self._count += voxels
            now = time.monotonic()
            if now - self._shown < self.seconds_between:
                return
            self._shown = now
            self._print(self._line(now))

    def _line(self, now: float) -> str:
        elapsed = max(now - self._start, 1e-6)
        rate = self._count / elapsed
        left = (self.total - self._count) / rate if rate else 0.0
        share = (self.before + self._count) / max(self.before + self.total, 1)
        return f"{self.title}: {share:4.0%}  {rate / 1e6:.3g} MVox/s  {duration(max(left, 0))} left"

    def _print(self, line: str) -> None:
        print(
            f"\r{line:<70}" if self.in_place else line, end="" if self.in_place else "\n", file=self.stream, flush=True
        )

    def finish(self, note: str = "") -> None:
        """The last line: how much, in what time."""
        elapsed = max(time.monotonic() - self._start, 1e-6)
        done, rate = self._count / 1e6, self._count / elapsed / 1e6
        text = f"{self.title}: {done:.2f} MVox in {duration(elapsed)}, {rate:.3g} MVox/s"
        self._print(text + note)
        if self.in_place:
            print(file=self.stream, flush=True)

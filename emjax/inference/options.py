"""Command-line options that the commands for whole volumes share, and what they are parsed to."""

import argparse
import os
import re
from collections.abc import Sequence

from emjax.errors import UserError
from emjax.inference.executor import Dask, Executor, Processes, Stripes, Threads, stripe_of_environment

Box = tuple[slice, slice, slice]


def whole_triple(text: str | None, option: str) -> tuple[int, int, int] | None:
    """Three positive whole numbers z,y,x; None stays None."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"{option} {text}: expected three positive whole numbers z,y,x, such as 64,256,256")
    return int(parts[0]), int(parts[1]), int(parts[2])


def bounding_box(text: str | None, shape: Sequence[int], where: str) -> Box:
    """``z0:z1,y0:y1,x0:x1`` in voxels, ends open where left out; the whole of ``shape`` if None.

    Raises:
        UserError: malformed, empty, or not inside ``shape``.
    """
    if text is None:
        z, y, x = (slice(0, length) for length in shape)
        return z, y, x
    parts = []
    for part, length in zip(text.split(","), shape):
        match = re.fullmatch(r"\s*(\d*)\s*:\s*(\d*)\s*", part)
        if match is None or text.count(",") != 2:
            raise UserError(f"--bbox {text}: expected z0:z1,y0:y1,x0:x1 in voxels, such as 0:64,100:356,:")
        low, high = int(match[1] or 0), int(match[2] or length)
        if not low < high <= length:
            raise UserError(f"--bbox {text}: {part.strip()} is not inside {where} of shape {tuple(shape)} (z, y, x)")
        parts.append(slice(low, high))
    return parts[0], parts[1], parts[2]


def byte_size(text: str, option: str = "--memory") -> int:
    """``"4GB"``, ``"500MB"``, ``"2GiB"`` or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise UserError(f"{option} {text}: expected a size such as 500MB or 4GB")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " kmgt".index(match[2].lower() or " "))


def memory_of_machine() -> int:
    """Bytes of memory that are free for use, within the limit of the control group."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    try:
        with open("/proc/meminfo") as file:
            found = re.search(r"MemAvailable:\s+(\d+) kB", file.read())
        free = int(found[1]) * 1024 if found else free
        with open("/sys/fs/cgroup/memory.max") as limit, open("/sys/fs/cgroup/memory.current") as used:
            text = limit.read().strip()
            if text.isdigit():
                free = min(free, int(text) - int(used.read()))
    except OSError:
        pass
    return max(free, 1 << 28)


def numbers(text: str, option: str) -> list[float]:
    """Numbers between 0 and 1 separated by commas, in rising order without repetition."""
    try:
        values = sorted({float(part) for part in text.split(",")})
    except ValueError:
        values = []
    if not values or not 0 <= values[0] <= values[-1] <= 1:
        raise UserError(f"{option} {text}: expected numbers between 0 and 1, such as 0.1,0.2,0.5")
    return values


def add_executor_options(parser: argparse.ArgumentParser) -> None:
    """``--executor`` and what belongs to it."""
    group = parser.add_argument_group("where blocks are computed")
    group.add_argument(
        "--executor",
        choices=("local", "processes", "dask", "stripes"),
        default="local",
        help="local: threads of this process; processes: a pool; dask: a cluster (extra dask); stripes: this process "
        "is one of many that run the same command and takes every n-th block (default: %(default)s)",
    )
    group.add_argument("--threads", type=int, default=3, help="blocks in flight of a local run (default: %(default)s)")
    group.add_argument("--workers", type=int, help="processes, or local Dask workers (default: one per core / 1)")
    group.add_argument("--scheduler", metavar="ADDRESS", help="Dask scheduler: tcp://host:port or a scheduler file")
    group.add_argument(
        "--stripe", metavar="P/N", help="this process is number P of N (default: from SLURM, Kubernetes or JAX)"
    )


def executor_of(options: argparse.Namespace) -> Executor:
    """The executor that the options ask for."""
    if options.threads < 1 or (options.workers is not None and options.workers < 1):
        raise UserError("--threads and --workers must be at least 1")
    if options.executor == "processes":
        return Processes(options.workers)
    if options.executor == "dask":
        return Dask(options.scheduler, options.workers)
    if options.executor == "stripes":
        return Stripes(*stripe_of_environment(options.stripe), threads=options.threads)
    return Threads(options.threads)

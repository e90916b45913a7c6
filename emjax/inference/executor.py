"""Who runs the blocks: threads of this process, a pool of processes, a Dask cluster, or one stripe of many hosts.

An executor maps a function over items and yields ``(item, None)`` or ``(item, error)`` as they finish, in any order.
Retries, the ledger and progress live in :func:`run_stage`, the same for all.
"""

import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

from emjax.errors import UserError
from emjax.inference.ledger import MOST_ATTEMPTS, Ledger

Outcome = tuple[Any, BaseException | None]


class Stopped(Exception):
    """The run was asked to stop; the block at hand is abandoned."""


class Executor(Protocol):
    """The small interface behind which an engine works."""

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        """Runs ``function`` on all items (of this executor's share); yields each with its error or None."""

    def workers(self) -> int:
        """How many items are worked on at a time."""

    def describe(self) -> str:
        """One line for the log."""

    def close(self) -> None:
        """Stops what was started."""


def _drain(pending: Iterator[tuple[Any, Any]], running: dict[Any, Any], most: int) -> None:
    for item, future in pending:
        running[future] = item
        if len(running) >= most:
            return


def _as_completed(submit: Callable[[Any], Any], items: Sequence[Any], most: int) -> Iterator[Outcome]:
    """Keeps ``most`` items submitted (millions are never queued at once) and yields them as they finish."""
    pending = ((item, submit(item)) for item in items)
    running: dict[Any, Any] = {}
    try:
        while True:
            _drain(pending, running, most)
            if not running:
                return
            # A timeout keeps the main thread open for signals.
            finished, _ = concurrent.futures.wait(running, timeout=0.2, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.exception()
    finally:
        for future in running:
            future.cancel()


class Threads:
    """Threads of this process. One computes while others read and write (the function sees to that with its locks)."""

    def __init__(self, threads: int = 1):
        self.threads = max(1, threads)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        with concurrent.futures.ThreadPoolExecutor(self.threads, thread_name_prefix="block") as pool:
            yield from _as_completed(lambda item: pool.submit(function, item), items, self.threads)

    def workers(self) -> int:
        return self.threads

    def describe(self) -> str:
        return f"this process, {self.threads} thread{'s' if self.threads > 1 else ''}"

    def close(self) -> None:
        pass


class Processes:
    """A pool of processes of this machine. Functions and items travel by pickle."""

    def __init__(self, processes: int | None = None):
        self.processes = processes or os.cpu_count() or 1
        # "spawn": JAX and Numba do not survive a fork of a process with threads.
        context = multiprocessing.get_context("spawn")
        self._pool = concurrent.futures.ProcessPoolExecutor(self.processes, mp_context=context)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        yield from _as_completed(lambda item: self._pool.submit(function, item), items, 2 * self.processes)

    def workers(self) -> int:
        return self.processes

    def describe(self) -> str:
        return f"{self.processes} processes of this machine"

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class Dask:
    """A Dask cluster (extra ``dask``): a running scheduler by its address, or local workers.

    ``--scheduler`` takes ``tcp://host:8786`` or a scheduler file, as SLURM (dask-jobqueue), Kubernetes and clouds give.
    """

    def __init__(self, scheduler: str | None = None, workers: int | None = None, processes: bool = True):
        try:
            import distributed
        except ImportError:
            raise UserError("--executor dask needs the extra: pip install 'emjax[dask]'") from None
        self._cluster = None
        if scheduler and os.path.isfile(scheduler):
            self._client = distributed.Client(scheduler_file=scheduler)
        elif scheduler:
            try:
                self._client = distributed.Client(scheduler, timeout=20)
            except OSError as error:
                raise UserError(f"--scheduler {scheduler}: no Dask scheduler answers there ({error})") from None
        else:
            self._cluster = distributed.LocalCluster(
                n_workers=workers or 1, threads_per_worker=1, processes=processes, dashboard_address=None
            )
            self._client = distributed.Client(self._cluster)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        import distributed

        # A window of tasks: a scheduler with millions of them hangs.
        window = max(4, 4 * self.workers())
        remaining = iter(items)
        running: dict[Any, Any] = {}
        finished = distributed.as_completed()

        def submit() -> None:
            for item in remaining:
                future = self._client.submit(function, item, pure=False, retries=0)
                running[future.key] = item
                finished.add(future)
                return

        for _ in range(window):
            submit()
        while running:
            future = next(finished)
            item = running.pop(future.key)
            error = future.exception() if future.status != "cancelled" else RuntimeError("the task was cancelled")
            future.release()
            submit()
            yield item, error

    def workers(self) -> int:
        return max(1, len(self._client.scheduler_info(n_workers=-1)["workers"]))

    def describe(self) -> str:
        return f"Dask, {self.workers()} workers, dashboard {self._client.dashboard_link or 'off'}"

    def close(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


@dataclasses.dataclass(frozen=True)
class Stripes:
    """One of ``count`` independent processes that run the same command; this one takes every ``count``-th block.

    No process waits for another: TPU hosts, SLURM array jobs and Kubernetes indexed jobs need nothing else. Stripes are
    of the whole list of blocks, so that they stay disjoint whoever starts first, and finished ones are skipped.
    """

    index: int
    count: int
    threads: int = 1

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Outcome]:
        yield from Threads(self.threads).map(function, items)

    def workers(self) -> int:
        return self.threads

    def describe(self) -> str:
        return f"stripe {self.index} of {self.count}"

    def close(self) -> None:
        pass


@contextlib.contextmanager
def stopping(stop: threading.Event) -> Iterator[None]:
    """While inside, SIGINT and SIGTERM set ``stop`` and raise ``KeyboardInterrupt`` in the main thread.

    The event comes first: threads that hold a block look at it and give up, so that the process ends soon.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        stop.set()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stripe_of_environment(text: str | None = None) -> tuple[int, int]:
    """(index, count) from ``"p/P"``, a SLURM array, a Kubernetes indexed job, or JAX's processes.

    Raises:
        UserError: the text is malformed, or nothing in the environment says which stripe this is.
    """
    if text:
        first, _, second = text.partition("/")
        if not (first.isdigit() and second.isdigit() and int(first) < int(second)):
            raise UserError(f"--stripe {text}: expected INDEX/COUNT with 0 <= INDEX < COUNT, such as 0/4")
        return int(first), int(second)
    environment = os.environ
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        first_task = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        return int(environment["SLURM_ARRAY_TASK_ID"]) - first_task, int(environment["SLURM_ARRAY_TASK_COUNT"])
    if "SLURM_NTASKS" in environment and "SLURM_PROCID" in environment:
        return int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
    if "JOB_COMPLETION_INDEX" in environment and "JOB_COMPLETIONS" in environment:
        return int(environment["JOB_COMPLETION_INDEX"]), int(environment["JOB_COMPLETIONS"])
    import jax

    if jax.process_count() > 1:
        return jax.process_index(), jax.process_count()
    raise UserError(
        "--executor stripes: neither --stripe INDEX/COUNT nor a SLURM array, a Kubernetes indexed job (with "
        "JOB_COMPLETIONS) or several JAX processes say which stripe this is"
    )


@dataclasses.dataclass(frozen=True)
class StageResult:
    """Blocks done in this run, skipped because they were done, and given up (name -> error in one line)."""

    done: int
    skipped: int
    failed: dict[str, str]


@dataclasses.dataclass(frozen=True)
class _Marked:
    """The function of a block with its marker: the marker is written where the block was computed, after it."""

    function: Callable[[Any], dict[str, Any] | None]
    ledger: Ledger
    name: Callable[[Any], str]

    def __call__(self, item: Any) -> None:
        start = time.time()
        facts = self.function(item) or {}
        self.ledger.mark_done(self.name(item), seconds=round(time.time() - start, 3), **facts)


def run_stage(
    executor: Executor,
    function: Callable[[Any], dict[str, Any] | None],
    items: Iterable[Any],
    name: Callable[[Any], str],
    ledger: Ledger,
    progress: Callable[[Any, int, int], None] = lambda item, done, total: None,
    stop: threading.Event | None = None,
) -> StageResult:
    """Runs ``function`` on all items that the ledger does not hold, retries failures, and lists what was given up.

    ``UserError`` is not retried: it is raised at once, because another attempt would find the same input.

    Args:
        executor: who runs the blocks.
        function: of one item; returns facts for its marker. Must be safe to run twice.
        items: all items of the stage, done or not.
        name: of an item, unique.
        ledger: of the stage.
        progress: called with (item, blocks done, blocks of this run) after each block.
        stop: set when the run ends for any reason, so that blocks in flight can give up early.
    """
    items = list(items)
    if isinstance(executor, Stripes):
        items = items[executor.index :: executor.count]
    finished = ledger.done()
    todo = [item for item in items if name(item) not in finished]
    skipped, total, done = len(items) - len(todo), len(todo), 0
    ledger.forgive()
    given_up: dict[str, str] = {}
    work = _Marked(function, ledger, name)
    outcomes: Iterator[Outcome] = iter(())
    try:
        while todo:
            again = []
            outcomes = executor.map(work, todo)
            for item, error in outcomes:
                if error is None:
                    done += 1
                    progress(item, done, total)
                elif isinstance(error, UserError | KeyboardInterrupt | Stopped):
                    raise error
                else:
                    text = "".join(traceback.format_exception(error))
                    if ledger.mark_failed(name(item), text) < MOST_ATTEMPTS:
                        again.append(item)
                    else:
                        given_up[name(item)] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            todo = again
    finally:
        if stop is not None:
            stop.set()
        # Waits for blocks in flight: nobody may write once the caller cleans up.
        if isinstance(outcomes, Generator):
            outcomes.close()
    return StageResult(done, skipped, given_up)

"""Work cut into contiguous ranges, done by Python threads: the Numba kernels release the GIL."""

import concurrent.futures
import itertools
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def ranges(length: int, parts: int) -> list[tuple[int, int]]:
    """``[start, stop)`` of at most ``parts`` contiguous, non-empty, nearly equal ranges that cover ``length``."""
    parts = max(1, min(parts, length))
    bounds = [length * part // parts for part in range(parts + 1)]
    return list(itertools.pairwise(bounds))


def check_threads(threads: int) -> int:
    """``threads`` if it is a positive whole number.

    Raises:
      ValueError: anything else.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads is {threads!r}; expected a whole number of at least 1")
    return threads


def each(work: Callable[..., Result], items: list[tuple], threads: int) -> list[Result]:
    """``[work(*item) for item in items]``, in order, on ``threads`` threads (in this one if that is enough)."""
    if threads == 1 or len(items) == 1:
        return [work(*item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda item: work(*item), items))

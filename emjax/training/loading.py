"""A trained system for inference: the configuration and variables of a checkpoint, read once per process."""

import functools
import pathlib
from typing import Any

from emjax.config import Experiment
from emjax.models.functional import Collections
from emjax.training.checkpoints import restore_for_inference


@functools.lru_cache(maxsize=1)
def _restored(directory: str, which: str) -> tuple[Experiment, Collections]:
    return restore_for_inference(pathlib.Path(directory), which)


def load_system(directory: str, which: str) -> tuple[Any, Collections]:
    """The system's configuration and variables of a checkpoint."""
    experiment, collections = _restored(directory, which)
    return experiment.system, collections


def trained_window(directory: str, which: str) -> tuple[float, float] | None:
    """The grey values that became 0 and 1 in training, if all sources of the run agree on them."""
    ranges = {source.intensity_range for source in _restored(directory, which)[0].data.train}
    return ranges.pop() if len(ranges) == 1 else None

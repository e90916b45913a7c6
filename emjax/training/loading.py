"""A trained system for inference: the configuration and variables of a checkpoint, read once per process."""

import functools
import pathlib
from typing import Any

from emjax.config import Experiment, override
from emjax.errors import UserError
from emjax.models.functional import Collections, define
from emjax.systems.protocol import system_of
from emjax.training.checkpoints import restore_for_inference


@functools.lru_cache(maxsize=1)
def _restored(directory: str, which: str) -> tuple[Experiment, Collections]:
    return restore_for_inference(pathlib.Path(directory), which)


def load_system(directory: str, which: str, overrides: tuple[str, ...] = ()) -> tuple[Any, Collections]:
    """The system's configuration and variables of a checkpoint.

    ``overrides`` (``system.field=value``) change the configuration that was trained with, such as the plan of blocks.
    ``UserError`` for those that cannot work, or that change the network.
    """
    experiment, collections = _restored(directory, which)
    if not overrides:
        return experiment.system, collections
    changed = experiment
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.startswith("system."):
            raise UserError(
                f"--config.{text}: expected --config.system.FIELD=VALUE, as {directory} is a trained system"
            )
        changed = override(changed, key, value)
    system_of(changed.system).validate(changed.system)
    if _shapes(changed.system) != _shapes(experiment.system):
        raise UserError(f"--config.{' --config.'.join(overrides)}: the network of {directory} cannot be changed")
    return changed.system, collections


def _shapes(config: Any) -> Any:
    return define(lambda rngs: system_of(config).build(config, rngs)).shapes


def trained_window(directory: str, which: str) -> tuple[float, float] | None:
    """The grey values that became 0 and 1 in training, if all sources of the run agree on them."""
    ranges = {source.intensity_range for source in _restored(directory, which)[0].data.train}
    return ranges.pop() if len(ranges) == 1 else None

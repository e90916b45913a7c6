"""A SAM 2 of few channels, whole in all its parts, that compiles in seconds."""

import functools

import jax

from emjax.models.functional import initialise
from emjax.models.sam2.config import HieraConfig, SAM2Config
from emjax.models.sam2.model import SAM2
from emjax.models.sam2.stack import TrackOptions
from emjax.systems.sam2_session import Network

HIERA = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2))


def config(**changes) -> SAM2Config:
    return SAM2Config(HIERA, **{"features": 64, "memory_features": 16, "memory_layers": 1} | changes)


@functools.cache
def variables(image_only: bool = False):
    made = config(image_only=image_only)
    return initialise(lambda rngs: SAM2(made, rngs), jax.random.key(0))


def network(options: TrackOptions | None = None, **changes) -> Network:
    return Network(config(**changes), variables(), options or TrackOptions(memory_dtype="float32"))

"""A SAM4EM of few channels, whole in all its parts."""

import functools

import jax

from emjax.models.functional import define, initialise
from emjax.models.layers.lora import LoRA
from emjax.models.sam2.config import HieraConfig
from emjax.models.sam4em import SAM4EM, Config, MemoryConfig

HIERA = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2))


def small(**changes) -> Config:
    base = {"hiera": HIERA, "lora": LoRA(rank=2), "features": 16, "heads": 2, "inner": 16}
    return Config(**base | {"memory": MemoryConfig(slots=3, window=0, dropout=0.0)} | changes)


@functools.cache
def definition(config: Config):
    return define(lambda rngs: SAM4EM(config, rngs))


@functools.cache
def variables(config: Config):
    return jax.jit(lambda key: initialise(lambda rngs: SAM4EM(config, rngs), key))(jax.random.key(0))

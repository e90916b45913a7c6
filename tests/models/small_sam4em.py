"""A SAM4EM of few channels, whole in all its parts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from emjax.models.functional import define
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


def drawn(shapes, seed=0):
    """Variables of the given shapes by NumPy: compiling hundreds of random draws would take longer than the tests."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.ones(leaf.shape, jnp.float32)
        if name in ("bias", "mean"):
            return jnp.zeros(leaf.shape, jnp.float32)
        return jnp.asarray(rng.normal(0, math.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def variables(config: Config):
    return drawn(definition(config).shapes)

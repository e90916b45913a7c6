"""Systems small enough to compile in no time, loadable by other processes through a picklable function."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.models.functional import initialise
from emjax.systems.protocol import Block, Output, flip_back_affinities

OFFSETS = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One 3x3x3 convolution to three affinities; its field of view is one voxel, so a halo of one is exact."""

    plan: Block = Block(size=(8, 12, 12), stride=(6, 10, 10), halo=(1, 1, 1))
    voxel_size: tuple[float, float, float] | None = None
    kind: str = "affinities"
    slow: float = 0.0


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, 3, 3, 1, 3)))

    def __call__(self, image: jax.Array) -> jax.Array:
        scaled = image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image
        dimensions = ("NDHWC", "DHWIO", "NDHWC")
        return jax.nn.sigmoid(
            jax.lax.conv_general_dilated(
                scaled[..., None] - 0.5, self.kernel[...], (1, 1, 1), "SAME", dimension_numbers=dimensions
            )
        )


def build(config: Config, rngs: nnx.Rngs) -> Net:
    return Net(rngs)


def predict(config: Config, model: Net, image: jax.Array) -> dict[str, jax.Array]:
    if config.slow:
        jax.debug.callback(lambda _: time.sleep(config.slow), image[0, 0, 0, 0], ordered=False)
    if config.kind == "instances":
        return {"instances": (image[..., None] > 127).astype(jnp.int32)}
    found = model(image)
    return {"affinities": found, "foreground": found[..., :1]} if config.kind == "two" else {"affinities": found}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    return {"affinities": flip_back_affinities(outputs["affinities"], OFFSETS, axes)}


def outputs(config: Config) -> dict[str, Output]:
    if config.kind == "instances":
        return {"instances": Output(kind="instances", channels=1)}
    affinities = Output(kind="affinities", channels=3, attributes={"offsets": [list(o) for o in OFFSETS]})
    if config.kind == "two":
        return {"affinities": affinities, "foreground": Output(kind="probability", channels=1)}
    return {"affinities": affinities}


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    return (np.asarray(outputs["affinities"])[0] > 127).astype(np.uint32)


def block(config: Config) -> Block:
    return config.plan


def validate(config: Config) -> None:
    config.plan.validate()


def load(seed: int = 0, **changes: Any) -> tuple[Config, Any]:
    """Configuration and random variables, a pure function of its arguments."""
    config = Config(**changes)
    return config, initialise(lambda rngs: build(config, rngs), jax.random.key(seed))

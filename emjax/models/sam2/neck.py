"""Feature pyramid neck and the image encoder of SAM 2."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.resize import upsample_nearest
from emjax.models.sam2.blocks import convolution, counted
from emjax.models.sam2.config import SAM2Config
from emjax.models.sam2.hiera import Hiera

TOP_DOWN = (2, 3)
"""Levels (0 = finest) that take part in the top-down sum."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, per channel, which SAM 2 was trained with."""


def grey_input(grey: jax.Array) -> jax.Array:
    """Grey slices (batch, H, W) in 0..1 as the encoder's input (batch, H, W, 3), normalised, float32."""
    three = jnp.repeat(grey[..., None].astype(jnp.float32), 3, axis=-1)
    return (three - jnp.asarray(MEAN, jnp.float32)) / jnp.asarray(STD, jnp.float32)


class FpnNeck(nnx.Module):
    """Stages to levels of equal width by 1 x 1 convolutions; ``convs`` runs from coarse to fine, as published."""

    def __init__(self, widths: Sequence[int], features: int, dtype: str, rngs: nnx.Rngs):
        self.convs = nnx.List([convolution(width, features, 1, 1, 0, dtype, rngs) for width in reversed(widths)])

    def __call__(self, stages: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        """Stage maps, fine to coarse, to as many maps of ``features`` channels, fine to coarse."""
        last = len(stages) - 1
        levels: list[jax.Array] = []
        above = None
        for level in range(last, -1, -1):
            lateral = self.convs[last - level](stages[level])
            if level in TOP_DOWN and above is not None:
                summed = lateral.astype(jnp.float32) + upsample_nearest(above.astype(jnp.float32), 2)
                lateral = summed.astype(lateral.dtype)
            above = lateral
            levels.append(lateral)
        return tuple(reversed(levels))


class EncodedImage(NamedTuple):
    """``stages``: trunk maps at strides 4 to 32; ``levels``: neck maps at strides 4 to 32, 256 channels each."""

    stages: tuple[jax.Array, ...]
    levels: tuple[jax.Array, ...]

    @property
    def embedding(self) -> jax.Array:
        """The stride-16 level, SAM 2's image embedding (the coarsest level reaches the output only through it)."""
        return self.levels[2]


class ImageEncoder(nnx.Module):
    """Trunk and neck: images (batch, H, W, 3), normalised, to :class:`EncodedImage`."""

    def __init__(self, config: SAM2Config, rngs: nnx.Rngs):
        rngs = counted(rngs)
        self.trunk = Hiera(config.hiera, rngs, config.dtype, config.attention)
        self.neck = FpnNeck(config.hiera.widths, config.features, config.dtype, rngs)

    def __call__(self, images: jax.Array) -> EncodedImage:
        stages = self.trunk(images)
        return EncodedImage(stages, self.neck(stages))

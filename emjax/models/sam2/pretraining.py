"""SAM 2's image encoder with a light head that restores what is hidden from it (masked pretraining)."""

from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.resize import upsample_nearest
from emjax.models.sam2.blocks import Keys, gelu, layer_norm, linear
from emjax.models.sam2.config import SAM2Config
from emjax.models.sam2.neck import ImageEncoder, grey_input

CELL = 4
"""Side in pixels of what one token of the finest level stands for."""


class MaskedEncoder(nnx.Module):
    """Grey slices (n, H, W), 0..1, to numbers per cell of 4 x 4 pixels: (n, H / 4, W / 4, outputs), float32.

    Every level of the neck is projected, brought to stride 4 and added, so that trunk and neck are trained as a whole.
    The head (``project``, ``norm``, ``out``) is thrown away afterwards.
    """

    def __init__(self, config: SAM2Config, width: int, outputs: int, rngs: nnx.Rngs):
        rngs = cast(nnx.Rngs, Keys(rngs))
        self.image_encoder = ImageEncoder(config, rngs)
        levels = len(config.hiera.stages)
        self.project = nnx.List([linear(config.features, width, "float32", rngs) for _ in range(levels)])
        self.norm = layer_norm(width, 1e-6, "float32", rngs)
        self.out = linear(width, outputs, "float32", rngs)

    def __call__(self, grey: jax.Array) -> jax.Array:
        levels = self.image_encoder(grey_input(grey)).levels
        summed = sum(
            upsample_nearest(project(level.astype(jnp.float32)), 1 << depth)
            for depth, (project, level) in enumerate(zip(self.project, levels))
        )
        return self.out(gelu(self.norm(summed)))

"""Anisotropic residual 3-D U-Net: the plain baseline of affinity prediction (Lee et al. 2017, arXiv 1706.00120)."""

import dataclasses
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.errors import UserError
from emjax.models.layers.conv import Conv3d, Padding, Triple
from emjax.models.layers.interpolate import max_pool, upsample_linear

ACTIVATIONS = {"elu": jax.nn.elu, "silu": jax.nn.silu, "relu": jax.nn.relu, "leaky_relu": jax.nn.leaky_relu}
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the network.

    Attributes:
        widths: features per level, finest first.
        pools: down-sampling (z, y, x) from each level to the next; one fewer than ``widths``.
        kernels: kernel (z, y, x) of the residual blocks per level; ``(1, 3, 3)`` where sections are thick.
        patch: voxels (z, y, x) folded into channels before the first level and unfolded after the last
            (space to depth): the whole network then works on a grid coarser by this factor, with an output still
            at every voxel. ``(1, 1, 1)`` is the usual U-Net.
        blocks: residual blocks per level on the way down and up.
        norm: ``"group"`` (8 channels a group at most) or ``"instance"``.
        padding: what surrounds the block, ``"zero"`` or ``"replicate"``.
        deep_supervision: also returns logits of the coarser levels of the decoder (coarsest last).
        dtype: precision of the convolutions; norms, head and losses are float32.
        remat: recompute the blocks in the backward pass instead of storing their activations.
    """

    widths: tuple[int, ...] = (32, 48, 64, 80)
    pools: tuple[Triple, ...] = ((1, 2, 2), (1, 2, 2), (2, 2, 2))
    kernels: tuple[Triple, ...] = ((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    patch: Triple = (1, 1, 1)
    blocks: int = 1
    norm: Literal["group", "instance"] = "group"
    activation: Literal["elu", "silu", "relu", "leaky_relu"] = "elu"
    padding: Padding = "zero"
    deep_supervision: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    def validate(self) -> None:
        """Raises ``UserError`` for lists of different lengths or sizes below one."""
        levels = len(self.widths)
        if len(self.kernels) != levels or len(self.pools) != levels - 1:
            raise UserError(
                f"U-Net: {levels} widths need {levels} kernels and {levels - 1} pools, "
                f"found {len(self.kernels)} and {len(self.pools)}"
            )
        if any(size < 1 for size in (*self.widths, *self.patch, *sum(self.pools, ()), *sum(self.kernels, ()))):
            raise UserError("U-Net: widths, pools, kernels and patch must be positive")
        if any(size % 2 == 0 for kernel in self.kernels for size in kernel):
            raise UserError(f"U-Net: kernel sizes must be odd, found {self.kernels}")

    def multiple(self) -> Triple:
        """The block size must be a multiple of this (z, y, x)."""
        sizes = list(self.patch)
        for pool in self.pools:
            sizes = [size * step for size, step in zip(sizes, pool)]
        return tuple(sizes)  # type: ignore[return-value]


def _norm(config: UNetConfig, features: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    groups = features if config.norm == "instance" else max(d for d in range(1, features // 4 + 1) if features % d == 0)
    return nnx.GroupNorm(features, num_groups=groups, epsilon=1e-5, dtype=PRECISIONS[config.dtype], rngs=rngs)


class ConvNorm(nnx.Module):
    """Convolution without bias, then the norm; (b, z, y, x, in) to (b, z, y, x, features)."""

    def __init__(self, config: UNetConfig, in_features: int, features: int, kernel: Triple, rngs: nnx.Rngs):
        self.conv = Conv3d(
            in_features,
            features,
            kernel,
            padding=config.padding,
            use_bias=False,
            dtype=PRECISIONS[config.dtype],
            rngs=rngs,
        )
        self.norm = _norm(config, features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


class ResidualBlock(nnx.Module):
    """An in-plane convolution to the new width, then two of the level's kernel added to it."""

    def __init__(self, config: UNetConfig, in_features: int, features: int, kernel: Triple, rngs: nnx.Rngs):
        self.enter = ConvNorm(config, in_features, features, (1, *kernel[1:]), rngs)
        self.first = ConvNorm(config, features, features, kernel, rngs)
        self.second = ConvNorm(config, features, features, kernel, rngs)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(self.enter(x))
        return self.activation(x + self.second(self.activation(self.first(x))))


def space_to_depth(x: jax.Array, patch: Triple) -> jax.Array:
    """(b, z, y, x, c) -> (b, z/pz, y/py, x/px, pz*py*px*c)."""
    batch, depth, height, width, channels = x.shape
    a, b, c = patch
    x = x.reshape(batch, depth // a, a, height // b, b, width // c, c, channels)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, depth // a, height // b, width // c, -1)


def depth_to_space(x: jax.Array, patch: Triple) -> jax.Array:
    """The inverse of :func:`space_to_depth`."""
    batch, depth, height, width, channels = x.shape
    a, b, c = patch
    x = x.reshape(batch, depth, height, width, a, b, c, channels // (a * b * c))
    return x.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, depth * a, height * b, width * c, -1)


class UNet(nnx.Module):
    """(b, z, y, x, in) -> logits (b, z, y, x, out), float32; a tuple, finest first, with deep supervision."""

    def __init__(self, config: UNetConfig, in_features: int, out_features: int, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        volume = config.patch[0] * config.patch[1] * config.patch[2]
        widths, kernels = config.widths, config.kernels
        self.stem = ConvNorm(config, in_features * volume, widths[0], (1, 5, 5) if volume == 1 else kernels[0], rngs)
        self.down: nnx.List = nnx.List()
        for level, width in enumerate(widths):
            before = widths[max(level - 1, 0)]
            sizes = [before, *[width] * config.blocks]
            self.down.append(
                nnx.List(ResidualBlock(config, a, b, kernels[level], rngs) for a, b in itertools.pairwise(sizes))
            )
        self.merge: nnx.List = nnx.List()
        self.up: nnx.List = nnx.List()
        for level in reversed(range(len(widths) - 1)):
            self.merge.append(ConvNorm(config, widths[level + 1], widths[level], (1, 1, 1), rngs))
            self.up.append(
                nnx.List(
                    ResidualBlock(config, widths[level], widths[level], kernels[level], rngs)
                    for _ in range(config.blocks)
                )
            )
        self.head = Conv3d(widths[0], out_features * volume, (1, 1, 1), rngs=rngs)
        self.side_heads = nnx.List(
            Conv3d(width, out_features, (1, 1, 1), rngs=rngs)
            for width in (widths[1:-1] if config.deep_supervision else ())
        )

    def _run(self, blocks: nnx.List, x: jax.Array) -> jax.Array:
        for block in blocks:
            x = jax.checkpoint(lambda x, block=block: block(x))(x) if self.config.remat else block(x)
        return x

    def __call__(self, x: jax.Array) -> jax.Array | tuple[jax.Array, ...]:
        config = self.config
        multiple = config.multiple()
        if any(size % step for size, step in zip(x.shape[1:4], multiple)):
            raise UserError(f"U-Net: block {x.shape[1:4]} (z, y, x) is not a multiple of {multiple}")
        activation = ACTIVATIONS[config.activation]
        x = activation(self.stem(space_to_depth(x, config.patch)))
        skips = []
        for level, blocks in enumerate(self.down):
            if level:
                skips.append(x)
                x = max_pool(x, config.pools[level - 1])
            x = self._run(blocks, x)
        sides: list[jax.Array] = []
        for step, (merge, blocks) in enumerate(zip(self.merge, self.up)):
            level = len(config.widths) - 2 - step
            # The 1x1x1 convolution commutes with the interpolation and is cheaper before it.
            x = activation(upsample_linear(merge(x), config.pools[level]) + skips.pop())
            x = self._run(blocks, x)
            if config.deep_supervision and level > 0:
                sides.insert(0, self.side_heads[level - 1](x.astype(jnp.float32)))
        logits = depth_to_space(self.head(x.astype(jnp.float32)), config.patch)
        return (logits, *sides) if config.deep_supervision else logits

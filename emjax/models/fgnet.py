"""FGNet: SAM 2 features guide a fine-grained encoder, for a coarse and a refined affinity map (Li et al., AAAI 2026).

Of the original only the outline is public: SAM 2 features, feature-guided attention (FGA), a light fine-grained encoder, two
affinity decoders. All inside is emjax's own formulation; ``docs/fgnet.md`` has the equations and lists what is not known.

The fine-grained encoder with its decoder is the residual U-Net of the PNI and SuperHuman line (Lee et al. 2017), so that with
``mode="none"`` and without the coarse decoder the network *is* that baseline.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.errors import UserError
from emjax.models.layers.attention import attend, merge_heads, split_heads
from emjax.models.layers.conv import Conv3d, Triple, UpConv3d, depthwise_conv3d
from emjax.models.layers.interpolate import max_pool, upsample_linear
from emjax.models.layers.lora import is_adapter
from emjax.models.layers.position import sine_position
from emjax.models.layers.resize import resize
from emjax.models.sam2.blocks import Keys
from emjax.models.sam2.config import STRIDE, SAM2Config
from emjax.models.sam2.neck import ImageEncoder, grey_input
from emjax.models.unet import (
    ACTIVATIONS,
    PRECISIONS,
    ConvNorm,
    ResidualBlock,
    UNetConfig,
    depth_to_space,
    space_to_depth,
)

Mode = Literal["none", "add", "concat", "gate", "xattn"]
MODES = ("none", "add", "concat", "gate", "xattn")
HEADS = 4
WINDOW = 8
"""Rows and columns of an attention window of mode ``xattn``."""
GATE_RATIO = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class FGNetConfig:
    """Shape of the network beside SAM 2.

    Attributes:
        fine: the fine-grained encoder and its decoder; the first numbers of ``pools`` are the strides along z, 1 for
            sections of 30 nm and more. ``patch`` folds voxels into channels, for runs on small machines.
        mode: how SAM 2 features enter the fine-grained encoder: ``"gate"`` (feature-guided attention), ``"add"``,
            ``"concat"``, ``"xattn"`` (windowed cross-attention), or ``"none"``.
        guided: in-plane strides (pixels) of the encoder's levels that are guided.
        gamma: initial weight of the guidance, per channel; 0 is mode ``"none"``.
        coarse: whether there is a coarse decoder, which sees SAM 2 features alone.
        refined: whether there are the fine-grained encoder and its decoder.
        share_coarse: the refined decoder also gets the coarse decoder's finest feature map.
        refine_residual: refined logits are a correction that is added to the coarse ones.
        context: features of the level below the encoder's last, where SAM 2 has a coarser map.
        features: SAM 2 maps that are used: ``"fpn"``, the neck's four levels, or ``"trunk"``, the stages themselves.
        sam_scale: slices are enlarged by this before SAM 2 (1, 2 or 4), against its loss of resolution.
        thickness: sections averaged into one slice for SAM 2: 1, or more in isotropic volumes, whose neighbouring
            sections differ little; SAM 2's cost falls by this factor.
        image_mean, image_std: normalisation of grey values 0..1 for the fine-grained encoder.
    """

    fine: UNetConfig = UNetConfig(widths=(28, 36, 48, 64, 80), pools=((1, 2, 2),) * 4, kernels=((3, 3, 3),) * 5)
    mode: Mode = "gate"
    guided: tuple[int, ...] = (2, 4, 8, 16)
    gamma: float = 0.1
    coarse: bool = True
    refined: bool = True
    share_coarse: bool = True
    refine_residual: bool = False
    context: int = 96
    features: Literal["fpn", "trunk"] = "fpn"
    sam_scale: Literal[1, 2, 4] = 1
    thickness: int = 1
    image_mean: float = 0.5
    image_std: float = 0.13

    @property
    def uses_sam2(self) -> bool:
        """Whether any part of the network sees SAM 2 features."""
        return self.coarse or (self.refined and self.mode != "none")

    @property
    def levels(self) -> int:
        """Levels of the fine-grained encoder."""
        return len(self.fine.widths)

    @property
    def native(self) -> tuple[int, ...]:
        """In-plane strides of SAM 2's maps, in pixels of the block, finest first."""
        return tuple(stride // self.sam_scale for stride in (4, 8, 16, 32))

    def stride(self, level: int) -> int:
        """In-plane stride of a level; the level after the last one is that of the context."""
        return self.fine.patch[1] << level

    def level(self, stride: int) -> int:
        """The level of an in-plane stride."""
        return (stride // self.fine.patch[1]).bit_length() - 1

    def pool(self, level: int) -> Triple:
        """From a level to the next coarser one."""
        return self.fine.pools[level] if level < self.levels - 1 else (1, 2, 2)

    def z_stride(self, level: int) -> int:
        """Stride along z of a level."""
        return math.prod((self.fine.patch[0], *(pool[0] for pool in self.fine.pools[:level])))

    def width(self, level: int) -> int:
        """Features of a level."""
        return self.fine.widths[level] if level < self.levels else self.context

    @property
    def coarse_levels(self) -> tuple[int, ...]:
        """Levels with a SAM 2 map of their own that the coarse decoder starts from, finest first."""
        found = [self.level(stride) for stride in self.native if stride >= self.fine.patch[1]]
        return tuple(level for level in found if level <= self.levels)

    @property
    def guided_levels(self) -> tuple[int, ...]:
        """Levels of the encoder at which SAM 2 features enter."""
        return tuple(self.level(stride) for stride in self.guided) if self.refined and self.mode != "none" else ()

    def multiple(self) -> Triple:
        """Blocks are padded inside the network to multiples of this (z, y, x)."""
        z, y, x = self.fine.multiple() if self.refined else self.fine.patch
        if not self.uses_sam2:
            return z, y, x
        z = math.lcm(z, self.z_stride(max(self.coarse_levels)) if self.coarse else 1, self.thickness)
        return z, math.lcm(y, STRIDE), math.lcm(x, STRIDE)

    def validate(self) -> None:
        """Raises ``UserError`` for a shape that cannot work."""
        self.fine.validate()
        if not (self.coarse or self.refined):
            raise UserError("fgnet: neither coarse nor refined; expected at least one decoder")
        if self.fine.deep_supervision:
            raise UserError("fgnet: fine.deep_supervision is not used here; the coarse decoder has a loss of its own")
        if self.refine_residual and not (self.coarse and self.refined):
            raise UserError("fgnet: refine_residual needs the coarse and the refined decoder")
        if self.mode not in MODES:
            raise UserError(f"fgnet: mode {self.mode!r}, expected one of {', '.join(MODES)}")
        if not self.uses_sam2:
            return
        patch = self.fine.patch
        if patch[1] != patch[2] or patch[1] & (patch[1] - 1) or any(pool[1:] != (2, 2) for pool in self.fine.pools):
            raise UserError(
                f"fgnet: patch {patch} and pools {self.fine.pools}: in plane, expected a patch of 1, 2 or 4 and pools of "
                "2, so that the levels meet SAM 2's strides"
            )
        if self.sam_scale not in (1, 2, 4) or self.thickness < 1:
            raise UserError(
                f"fgnet: sam_scale {self.sam_scale} and thickness {self.thickness}, expected 1, 2 or 4; 1 up"
            )
        if not self.coarse_levels or min(self.coarse_levels) >= self.levels:
            raise UserError(f"fgnet: none of SAM 2's strides {self.native} is one of the encoder's levels")
        strides = [self.stride(level) for level in range(self.levels)]
        least = max(8, self.native[0]) if self.mode == "xattn" else self.native[0] // 2
        if wrong := [stride for stride in self.guided if stride not in strides or stride < least]:
            raise UserError(
                f"fgnet: guided {self.guided}: stride {wrong[0]} has no guidance of mode {self.mode!r}; expected some of "
                f"{tuple(stride for stride in strides if stride >= least)}"
            )
        if self.mode == "xattn" and any(self.width(level) % HEADS for level in self.guided_levels):
            raise UserError(
                f"fgnet: xattn has {HEADS} heads; expected widths that they divide, found {self.fine.widths}"
            )
        for level in {*self.guided_levels, *(self.coarse_levels if self.coarse else ())}:
            z = self.z_stride(min(level, self.levels - 1))
            if z % self.thickness and self.thickness % z:
                raise UserError(
                    f"fgnet: thickness {self.thickness} and the stride {z} along z: one must divide the other at each level"
                )


class FGNetOutput(NamedTuple):
    """Logits (b, z, y, x, offset) float32 of the two decoders, None where there is none, and the focus maps of the
    guidance (b, z', y', x') in 0..1 by their in-plane stride (mode ``gate`` only)."""

    refined: jax.Array | None
    coarse: jax.Array | None
    guidance: dict[int, jax.Array]


def pad_block(image: jax.Array, multiple: Triple) -> jax.Array:
    """Blocks (b, z, y, x) continued at their far ends by their own mirror image to multiples of ``multiple``.

    So statistics and attention see nothing but the block's own content.
    """
    margins = [(0, -size % step) for size, step in zip(image.shape[1:], multiple)]
    return jnp.pad(image, [(0, 0), *margins], mode="symmetric") if any(after for _, after in margins) else image


def mean_pool(x: jax.Array, window: Triple) -> jax.Array:
    """Means over cells of ``window`` that divide the grid, (b, z, y, x, c)."""
    batch, depth, height, width, channels = x.shape
    a, b, c = window
    return x.reshape(batch, depth // a, a, height // b, b, width // c, c, channels).mean((2, 4, 6))


class Projection(nnx.Module):
    """A SAM 2 map to a level's width, then evidence from the slices before and behind.

    The depth-wise convolution along z is zero at first: SAM 2's meaning of a slice is where training starts.
    """

    def __init__(self, config: UNetConfig, inputs: int, features: int, rngs: nnx.Rngs):
        self.enter = ConvNorm(config, inputs, features, (1, 1, 1), rngs)
        self.along_z = nnx.Param(jnp.zeros((3, 1, 1, features), jnp.float32))
        self.padding = config.padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """(b, slices, h, w, inputs) to (b, slices, h, w, features)."""
        x = jax.nn.silu(self.enter(x))
        return x + depthwise_conv3d(x, self.along_z[...].astype(x.dtype), self.padding)


class Adding(nnx.Module):
    """Mode ``add``: X + S."""

    def __call__(self, x: jax.Array, s: jax.Array) -> tuple[jax.Array, None]:
        return x + s, None


class Joining(nnx.Module):
    """Mode ``concat``: a 1 x 1 x 1 convolution of X and S side by side."""

    def __init__(self, config: UNetConfig, features: int, rngs: nnx.Rngs):
        self.conv = Conv3d(2 * features, features, (1, 1, 1), dtype=PRECISIONS[config.dtype], rngs=rngs)

    def __call__(self, x: jax.Array, s: jax.Array) -> tuple[jax.Array, None]:
        return self.conv(jnp.concatenate([x, s], -1)), None


class Gate(nnx.Module):
    """Mode ``gate``, feature-guided attention: a spatial focus map M and a channel gate G per slice weigh what X and S
    add to X::

        U = silu(norm(W [X; S]))    M = sigmoid(w U + b)    G = sigmoid(W2 silu(W1 mean_yx(U)))
        X' = X + gamma * M * G * (V [X; S])
    """

    def __init__(self, config: UNetConfig, features: int, gamma: float, rngs: nnx.Rngs):
        dtype = PRECISIONS[config.dtype]
        narrow = max(1, features // GATE_RATIO)
        self.evidence = ConvNorm(config, 2 * features, features, (3, 3, 3), rngs)
        self.focus = Conv3d(features, 1, (1, 1, 1), rngs=rngs)
        self.squeeze = nnx.Linear(features, narrow, rngs=rngs)
        self.excite = nnx.Linear(narrow, features, rngs=rngs)
        self.value = Conv3d(2 * features, features, (1, 1, 1), use_bias=False, dtype=dtype, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((features,), gamma, jnp.float32))

    def __call__(self, x: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = jnp.concatenate([x, s], -1)
        evidence = jax.nn.silu(self.evidence(both))
        focus = jax.nn.sigmoid(self.focus(evidence.astype(jnp.float32)))
        pooled = evidence.astype(jnp.float32).mean((2, 3), keepdims=True)
        channels = jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(pooled))))
        weight = (self.gamma[...] * focus * channels).astype(x.dtype)
        return x + weight * self.value(both), focus[..., 0]


class CrossAttention(nnx.Module):
    """Mode ``xattn``: each window of X attends to the same window of S in its own and the two neighbouring slices."""

    def __init__(self, config: UNetConfig, features: int, gamma: float, rngs: nnx.Rngs):
        dtype = PRECISIONS[config.dtype]
        self.norm_x = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.norm_s = nnx.LayerNorm(features, dtype=dtype, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(features, features, dtype=dtype, rngs=rngs) for _ in range(4)
        )
        self.slice = nnx.Param(0.02 * jax.random.normal(rngs.params(), (3, 1, features), jnp.float32))
        self.gamma = nnx.Param(jnp.full((features,), gamma, jnp.float32))

    def __call__(self, x: jax.Array, s: jax.Array) -> tuple[jax.Array, None]:
        batch, depth, height, width, features = x.shape
        position = sine_position(WINDOW, WINDOW, features).reshape(-1, features)
        down, right = -height % WINDOW, -width % WINDOW
        rows, columns = (height + down) // WINDOW, (width + right) // WINDOW

        def windows(volume: jax.Array) -> jax.Array:
            """(b, z, h, w, c) to (b, z, windows, tokens, c), zeros beyond the map."""
            volume = jnp.pad(volume, ((0, 0), (0, 0), (0, down), (0, right), (0, 0)))
            volume = volume.reshape(batch, -1, rows, WINDOW, columns, WINDOW, volume.shape[-1])
            return volume.transpose(0, 1, 2, 4, 3, 5, 6).reshape(batch, -1, rows * columns, WINDOW**2, volume.shape[-1])

        def around(tokens: jax.Array) -> jax.Array:
            """(b, z + 2, windows, tokens, c) to (b, z, windows, 3 tokens, c)."""
            return jnp.concatenate([tokens[:, step : step + depth] for step in range(3)], 3)

        queries = windows(self.norm_x(x)) + position.astype(x.dtype)
        # One slice more at each end, whose tokens are masked.
        slices = windows(jnp.pad(self.norm_s(s), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0))))
        inside = jnp.pad(jnp.ones((batch, depth, height, width, 1), bool), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        mask = around(windows(inside))[..., 0][..., None, None, :]
        places = (position + self.slice[...]).reshape(-1, features).astype(x.dtype)
        keys, values = around(slices) + places, around(slices)
        heads = [
            split_heads(layer(tokens), HEADS)
            for layer, tokens in zip((self.query, self.key, self.value), (queries, keys, values))
        ]
        found = self.out(merge_heads(attend(*heads, mask=mask)))
        found = found.reshape(batch, depth, rows, columns, WINDOW, WINDOW, features).transpose(0, 1, 2, 4, 3, 5, 6)
        found = found.reshape(batch, depth, rows * WINDOW, columns * WINDOW, features)[:, :, :height, :width]
        return x + self.gamma[...].astype(x.dtype) * found, None


Guidance = Adding | Joining | Gate | CrossAttention


def _guidance(config: FGNetConfig, features: int, rngs: nnx.Rngs) -> Guidance:
    if config.mode == "add":
        return Adding()
    if config.mode == "concat":
        return Joining(config.fine, features, rngs)
    if config.mode == "gate":
        return Gate(config.fine, features, config.gamma, rngs)
    return CrossAttention(config.fine, features, config.gamma, rngs)


class _Run:
    """Calls modules, recomputing them in the backward pass where the configuration says so."""

    def __init__(self, config: UNetConfig):
        self.remat = config.remat

    def __call__(self, module: nnx.Module, *inputs: jax.Array):
        return jax.checkpoint(lambda *inputs: module(*inputs))(*inputs) if self.remat else module(*inputs)


class CoarseDecoder(nnx.Module):
    """From projected SAM 2 maps alone to logits: top-down with a residual block a level, then transposed convolutions."""

    def __init__(self, config: FGNetConfig, outputs: int, rngs: nnx.Rngs):
        fine = config.fine
        self.config = config
        levels = config.coarse_levels
        self.merge: nnx.List = nnx.List()
        self.blocks: nnx.List = nnx.List()
        for level in reversed(levels[:-1]):
            width = config.width(level)
            self.merge.append(ConvNorm(fine, config.width(level + 1), width, (1, 1, 1), rngs))
            self.blocks.append(ResidualBlock(fine, width, width, fine.kernels[level], rngs))
        self.up: nnx.List = nnx.List()
        self.norms: nnx.List = nnx.List()
        for level in reversed(range(levels[0])):
            width = config.width(level)
            dtype = PRECISIONS[fine.dtype]
            self.up.append(UpConv3d(config.width(level + 1), width, config.pool(level), dtype=dtype, rngs=rngs))
            self.norms.append(ConvNorm(fine, width, width, (1, 1, 1), rngs))
        self.head = Conv3d(config.width(0), outputs * math.prod(fine.patch), (1, 1, 1), rngs=rngs)

    def __call__(self, maps: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Projected maps, finest first, to logits (b, z, y, x, outputs) and the finest feature map."""
        config, run = self.config, _Run(self.config.fine)
        activation = ACTIVATIONS[config.fine.activation]
        x = maps[-1]
        levels = config.coarse_levels
        for level, merge, block in zip(reversed(levels[:-1]), self.merge, self.blocks):
            x = activation(upsample_linear(merge(x), config.pool(level)) + maps[levels.index(level)])
            x = run(block, x)
        finest = x
        for up, norm in zip(self.up, self.norms):
            x = activation(norm(up(x)))
        return depth_to_space(self.head(x.astype(jnp.float32)), config.fine.patch), finest


class FineNet(nnx.Module):
    """The fine-grained encoder, guided at some levels, and the refined decoder: a residual U-Net."""

    def __init__(self, config: FGNetConfig, outputs: int, rngs: nnx.Rngs):
        fine = config.fine
        self.config = config
        volume = math.prod(fine.patch)
        edge = (1, 5, 5) if volume == 1 else fine.kernels[0]
        self.stem = ConvNorm(fine, volume, fine.widths[0], edge, rngs)
        self.down: nnx.List = nnx.List(
            ResidualBlock(fine, fine.widths[max(level - 1, 0)], width, fine.kernels[level], rngs)
            for level, width in enumerate(fine.widths)
        )
        self.guides: nnx.List = nnx.List(_guidance(config, config.width(level), rngs) for level in config.guided_levels)
        self.merge: nnx.List = nnx.List()
        self.up: nnx.List = nnx.List()
        for level in reversed(range(config.levels - 1)):
            self.merge.append(ConvNorm(fine, fine.widths[level + 1], fine.widths[level], (1, 1, 1), rngs))
            self.up.append(ResidualBlock(fine, fine.widths[level], fine.widths[level], fine.kernels[level], rngs))
        if config.coarse and config.share_coarse:
            width = config.width(config.coarse_levels[0])
            self.share = Conv3d(width, width, (1, 1, 1), use_bias=False, dtype=PRECISIONS[fine.dtype], rngs=rngs)
        self.out = ConvNorm(fine, fine.widths[0], fine.widths[0], edge, rngs)
        self.head = Conv3d(fine.widths[0], outputs * volume, (1, 1, 1), rngs=rngs)

    def __call__(
        self, image: jax.Array, maps: dict[int, jax.Array], shared: jax.Array | None
    ) -> tuple[jax.Array, dict[int, jax.Array]]:
        """Normalised blocks (b, z, y, x, 1), projected maps by level, and the coarse decoder's finest map, to logits
        and focus maps by in-plane stride."""
        config, run = self.config, _Run(self.config.fine)
        fine = config.fine
        activation = ACTIVATIONS[fine.activation]
        x = activation(self.stem(space_to_depth(image, fine.patch)))
        skips, focus = [], {}
        for level, block in enumerate(self.down):
            if level:
                skips.append(x)
                x = max_pool(x, fine.pools[level - 1])
            x = run(block, x)
            if level in config.guided_levels:
                x, seen = run(self.guides[config.guided_levels.index(level)], x, maps[level])
                if seen is not None:
                    focus[config.stride(level)] = seen
        meeting = config.coarse_levels[0] if config.coarse else -1
        if shared is not None and meeting == config.levels - 1:
            x = x + self.share(shared)
        for level, merge, block in zip(reversed(range(config.levels - 1)), self.merge, self.up):
            x = activation(upsample_linear(merge(x), fine.pools[level]) + skips[level])
            if shared is not None and level == meeting:
                x = x + self.share(shared)
            x = run(block, x)
        x = activation(self.out(x))
        return depth_to_space(self.head(x.astype(jnp.float32)), fine.patch), focus


class FGNet(nnx.Module):
    """Blocks (b, z, y, x) of grey values 0..1, of any size, to :class:`FGNetOutput`.

    Args:
        config: all but SAM 2.
        sam2: the image encoder; None where the configuration does not use it.
        outputs: affinities per voxel.
        frozen: no gradient flows into SAM 2, nor into its adapters.
        weights: precision in which SAM 2's own weights are kept, those of adapters are float32.
    """

    def __init__(
        self,
        config: FGNetConfig,
        sam2: SAM2Config | None,
        outputs: int,
        *,
        frozen: bool = True,
        weights: str = "float32",
        rngs: nnx.Rngs,
    ):
        config.validate()
        self.config, self.frozen = config, frozen
        keys: Any = Keys(rngs)
        if config.uses_sam2:
            if sam2 is None:
                raise ValueError("sam2 is None; expected the encoder's configuration")
            self.sam2 = ImageEncoder(sam2, keys)
            _store_as(self.sam2, weights)
            widths = sam2.hiera.widths if config.features == "trunk" else (sam2.features,) * 4
            self.project: nnx.List = nnx.List(
                Projection(config.fine, widths[self._source(level)], config.width(level), keys)
                for level in self._projected
            )
        if config.coarse:
            self.coarse = CoarseDecoder(config, outputs, keys)
        if config.refined:
            self.fine = FineNet(config, outputs, keys)

    @property
    def _projected(self) -> list[int]:
        config = self.config
        return sorted({*config.guided_levels, *(config.coarse_levels if config.coarse else ())})

    def _source(self, level: int) -> int:
        """Which of SAM 2's maps serves a level: its own, else the nearest."""
        native, stride = self.config.native, self.config.stride(level)
        return min(range(4), key=lambda index: abs(math.log2(native[index] / stride)))

    def slice_maps(self, grey: jax.Array, order: jax.Array | None = None) -> tuple[jax.Array, ...]:
        """SAM 2's maps (b, slices, h, w, channels), finest first, of padded blocks (b, z, y, x).

        ``order`` (b * slices,) gives each slice the features of another one (a control).
        """
        config = self.config
        batch, depth, height, width = grey.shape
        slices = grey.reshape(batch * depth // config.thickness, config.thickness, height, width).mean(1)
        if config.sam_scale > 1:
            size = (config.sam_scale * height, config.sam_scale * width)
            slices = resize(slices, size, axes=(1, 2))
        encoded = self.sam2(grey_input(slices))
        maps = encoded.stages if config.features == "trunk" else encoded.levels
        if self.frozen:
            maps = jax.lax.stop_gradient(maps)
        if order is not None:
            maps = tuple(level[order] for level in maps)
        return tuple(level.reshape(batch, -1, *level.shape[1:]) for level in maps)

    def _meet(self, x: jax.Array, level: int) -> jax.Array:
        """A projected map on a level's grid."""
        config = self.config
        have, wanted = config.native[self._source(level)], config.stride(level)
        depth = config.z_stride(min(level, config.levels - 1))
        if depth > config.thickness:
            x = mean_pool(x, (depth // config.thickness, 1, 1))
        x = jnp.repeat(x, max(config.thickness // depth, 1), 1)
        if wanted < have:
            return upsample_linear(x, (1, have // wanted, have // wanted))
        return mean_pool(x, (1, wanted // have, wanted // have)) if wanted > have else x

    def __call__(self, image: jax.Array, order: jax.Array | None = None) -> FGNetOutput:
        config = self.config
        size = image.shape[1:]
        image = pad_block(image.astype(jnp.float32), config.multiple())
        maps: dict[int, jax.Array] = {}
        if config.uses_sam2:
            native = self.slice_maps(image, order)
            for level, projection in zip(self._projected, self.project):
                maps[level] = self._meet(projection(native[self._source(level)]), level)
        cut = tuple(slice(length) for length in size)
        coarse = shared = refined = None
        guidance: dict[int, jax.Array] = {}
        if config.coarse:
            coarse, shared = self.coarse([maps[level] for level in config.coarse_levels])
        if config.refined:
            normal = ((image - config.image_mean) / config.image_std)[..., None]
            refined, guidance = self.fine(normal, maps, shared if config.share_coarse else None)
            if config.refine_residual and coarse is not None:
                refined = refined + coarse
        return FGNetOutput(
            None if refined is None else refined[(slice(None), *cut)],
            None if coarse is None else coarse[(slice(None), *cut)],
            {
                stride: seen[
                    :,
                    : -(-size[0] // config.z_stride(config.level(stride))),
                    : -(-size[1] // stride),
                    : -(-size[2] // stride),
                ]
                for stride, seen in guidance.items()
            },
        )


def _store_as(encoder: ImageEncoder, dtype: str) -> None:
    """Keeps the encoder's own weights in ``dtype``; adapters, which train, stay in float32."""
    if dtype == "float32":
        return
    for path, variable in nnx.to_flat_state(nnx.state(encoder, nnx.Param)):
        if not is_adapter(".".join(map(str, path))):
            owner: Any = encoder
            for key in path[:-1]:
                owner = owner[int(str(key))] if isinstance(owner, nnx.List) else getattr(owner, str(key))
            getattr(owner, str(path[-1])).set_value(variable.get_value().astype(dtype))

"""MNet, the network of SegNeuron: planar and volumetric convolutions on a triangular mesh.

Row r of the mesh has seen r - 1 volumetric pooling steps, column c has seen c - 1 planar ones; the node (r, c) is fed
by its planar neighbour (r, c - 1) and its volumetric neighbour (r - 1, c), so that the network chooses by itself how
to treat anisotropic voxels. Two decoders with separate weights share the encoder. The variant for pretraining has the
same nodes without skip connections. Architecture: Dong et al., MNet (IJCAI 2022), as SegNeuron (Zhang et al., MICCAI
2024) uses it.

Arrays are ``(batch, z, y, x, channel)``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.errors import UserError
from emjax.models.layers.conv import Conv3d, Triple
from emjax.models.layers.interpolate import max_pool, resize_linear

Merge = Literal["sub", "sum", "cat"]
Features = dict[str, jax.Array]
"""``"down11.2d"`` -> output of that node's planar stream, ``".3d"`` of its volumetric one; ``"input"`` is the image."""

ROWS = 5
SMALLEST = 16
"""Least size in y and x: four planar pooling steps must leave one voxel."""
_DECODERS = {"affinity": "", "foreground": "_"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of the network.

    ``widths``: channels after 0..4 pooling steps; ``merge``: how two streams become one (``sub`` is |a - b|);
    ``skips``: false for the pretraining variant; ``outputs``: channels of the first head (affinities or image) and of
    the second (foreground or HOG image); ``remat``: recompute node by node in the backward pass; ``dtype``: of the
    convolutions, everything else is at least float32.
    """

    widths: tuple[int, int, int, int, int] = (32, 64, 96, 128, 256)
    merge: Merge = "sub"
    in_features: int = 1
    outputs: tuple[int, int] = (3, 1)
    skips: bool = True
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if len(self.widths) != ROWS or any(width < 1 for width in self.widths):
            raise UserError(f"mnet: widths {tuple(self.widths)}, expected {ROWS} positive numbers of channels")
        if self.merge not in ("sub", "sum", "cat"):
            raise UserError(f"mnet: merge {self.merge!r}, expected 'sub', 'sum' or 'cat'")


def pretraining(config: Config) -> Config:
    """The variant that reconstructs an image and its HOG image, with the same encoder."""
    return dataclasses.replace(config, skips=False, outputs=(1, 1))


class Wiring(NamedTuple):
    """Where a node's inputs come from (names of features, None where it has none) and which streams it computes."""

    planar: str | None
    volumetric: str | None
    skip: str | None
    width: int
    planar_out: bool
    volumetric_out: bool


def _encoder_name(row: int, column: int) -> str:
    return f"bottleneck{row}" if row + column == ROWS + 1 else f"down{row}{column}"


def encoder_wiring() -> dict[str, Wiring]:
    """Node -> wiring, in an order of computation. ``width`` counts pooling steps (an index into ``Config.widths``)."""
    nodes = {}
    for row in range(1, ROWS + 1):
        for column in range(1, ROWS + 2 - row):
            bottom = row + column == ROWS + 1
            nodes[_encoder_name(row, column)] = Wiring(
                planar=f"{_encoder_name(row, column - 1)}.2d" if column > 1 else None,
                volumetric=f"{_encoder_name(row - 1, column)}.3d" if row > 1 else None,
                skip=None,
                width=row + column - 2,
                planar_out=not (bottom and row == ROWS),
                volumetric_out=not (bottom and row == 1),
            )
    return nodes


def decoder_wiring(mark: str = "") -> dict[str, Wiring]:
    """The same for a decoder; ``mark`` is appended to its nodes' names (``"_"`` for the second decoder)."""
    nodes = {}
    for row in range(ROWS - 1, 0, -1):
        for step in range(1, ROWS + 1 - row):
            column = ROWS + 1 - row - step
            last = column == 1
            nodes[f"up{row}{step}{mark}"] = Wiring(
                planar=f"bottleneck{row}.2d" if step == 1 else f"up{row}{step - 1}{mark}.2d",
                volumetric=f"bottleneck{row + 1}.3d" if step == 1 else f"up{row + 1}{step - 1}{mark}.3d",
                skip=_encoder_name(row, column),
                width=row + column - 2,
                planar_out=not last or row == 1,
                volumetric_out=row > 1 or last,
            )
    return nodes


def is_encoder(path: str) -> bool:
    """Whether a parameter path belongs to the encoder, the part that pretraining hands on to fine-tuning."""
    return path.startswith("encoder.")


def merge(kind: Merge, a: jax.Array, b: jax.Array) -> jax.Array:
    """Two streams of one shape as one: |a - b|, a + b, or both side by side."""
    if kind == "cat":
        return jnp.concatenate([a, b], axis=-1)
    return jnp.abs(a - b) if kind == "sub" else a + b


def pool_planar(x: jax.Array) -> jax.Array:
    return max_pool(x, (1, 2, 2))


def pool_volumetric(x: jax.Array) -> jax.Array:
    """Halves y and x, and z only from 8 planes on."""
    return max_pool(x, (2, 2, 2) if x.shape[1] >= 8 else (1, 2, 2))


class ConvNormAct(nnx.Module):
    """Convolution, instance norm, leaky ReLU."""

    def __init__(self, in_features: int, features: int, kernel: Triple, dtype: str, rngs: nnx.Rngs):
        # PyTorch's default, U(+-1/sqrt(fan in)). The bias starts at 0: the norm cancels it.
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.conv = Conv3d(in_features, features, kernel, kernel_init=init, dtype=jnp.dtype(dtype), rngs=rngs)
        self.norm = nnx.InstanceNorm(features, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        x = self.norm(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
        return jax.nn.leaky_relu(x, 0.01)


class Stream(nnx.Module):
    """Two convolutions of one kernel size."""

    def __init__(self, in_features: int, features: int, kernel: Triple, dtype: str, rngs: nnx.Rngs):
        self.conv1 = ConvNormAct(in_features, features, kernel, dtype, rngs)
        self.conv2 = ConvNormAct(features, features, kernel, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.conv1(x))


class Node(nnx.Module):
    """A planar (1, 3, 3) and a volumetric (3, 3, 3) stream on the same input; either may be absent."""

    def __init__(self, in_features: int, features: int, wiring: Wiring, dtype: str, rngs: nnx.Rngs):
        self.planar = Stream(in_features, features, (1, 3, 3), dtype, rngs) if wiring.planar_out else None
        self.volumetric = Stream(in_features, features, (3, 3, 3), dtype, rngs) if wiring.volumetric_out else None

    def __call__(self, x: jax.Array) -> tuple[jax.Array | None, jax.Array | None]:
        planar = None if self.planar is None else self.planar(x)
        return planar, None if self.volumetric is None else self.volumetric(x)


class Mesh(nnx.Module):
    """The nodes of the encoder or of one decoder, as attributes of their names."""

    def __init__(self, wiring: Mapping[str, Wiring], in_features: Mapping[str, int], config: Config, rngs: nnx.Rngs):
        for name, node in wiring.items():
            made = Node(in_features[name], config.widths[node.width], node, config.dtype, rngs)
            setattr(self, name, made)


def _encoder_inputs(config: Config) -> dict[str, int]:
    doubled = 2 if config.merge == "cat" else 1
    inputs = {}
    for name, node in encoder_wiring().items():
        if node.width == 0:
            inputs[name] = config.in_features
        else:
            both = node.planar is not None and node.volumetric is not None
            inputs[name] = config.widths[node.width - 1] * (doubled if both else 1)
    return inputs


def _decoder_inputs(config: Config, mark: str) -> dict[str, int]:
    doubled = 2 if config.merge == "cat" else 1
    return {
        name: doubled * (config.widths[node.width + 1] + (config.widths[node.width] if config.skips else 0))
        for name, node in decoder_wiring(mark).items()
    }


class MNet(nnx.Module):
    """The network. Any size from 16 in y and x and any number of planes; multiples of 16 waste nothing."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Mesh(encoder_wiring(), _encoder_inputs(config), config, rngs)
        self.affinity = Mesh(decoder_wiring(), _decoder_inputs(config, ""), config, rngs)
        self.foreground = Mesh(decoder_wiring("_"), _decoder_inputs(config, "_"), config, rngs)
        first, second = config.outputs
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def head(features: int) -> Conv3d:
            dtype = jnp.dtype(config.dtype)
            return Conv3d(
                config.widths[0], features, (1, 1, 1), use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs
            )

        self.affinity_head = head(first)
        self.foreground_head = head(second)

    def _input_of(self, node: Wiring, features: Features) -> jax.Array:
        if node.planar is None:
            return features["input"] if node.volumetric is None else pool_volumetric(features[node.volumetric])
        if node.volumetric is None:
            return pool_planar(features[node.planar])
        planar, volumetric = features[node.planar], features[node.volumetric]
        if node.skip is None:
            return merge(self.config.merge, pool_planar(planar), pool_volumetric(volumetric))
        skip_planar, skip_volumetric = features[f"{node.skip}.2d"], features[f"{node.skip}.3d"]
        size = skip_planar.shape[1], skip_planar.shape[2], skip_planar.shape[3]
        upsampled = merge(self.config.merge, resize_linear(planar, size), resize_linear(volumetric, size))
        if not self.config.skips:
            return upsampled
        return jnp.concatenate([merge(self.config.merge, skip_planar, skip_volumetric), upsampled], axis=-1)

    def node(self, name: str, features: Features) -> Features:
        """Outputs of one node from the features that feed it."""
        part, wiring = self._parts()[name]
        layer = getattr(part, name)

        def compute(inputs: Features):
            return layer(self._input_of(wiring, inputs))

        used = [wiring.planar, wiring.volumetric, f"{wiring.skip}.2d", f"{wiring.skip}.3d"]
        inputs = {key: features[key] for key in [*used, "input"] if key in features}
        planar, volumetric = (jax.checkpoint(compute) if self.config.remat else compute)(inputs)
        streams = {f"{name}.2d": planar, f"{name}.3d": volumetric}
        return {key: value for key, value in streams.items() if value is not None}

    def _parts(self) -> dict[str, tuple[Mesh, Wiring]]:
        parts = {name: (self.encoder, node) for name, node in encoder_wiring().items()}
        for decoder, mark in _DECODERS.items():
            parts |= {name: (getattr(self, decoder), node) for name, node in decoder_wiring(mark).items()}
        return parts

    def features(self, x: jax.Array, given: Mapping[str, jax.Array] | None = None) -> Features:
        """Every node's outputs for an image (b, z, y, x, in) in [0, 1].

        ``given`` features replace those of the same name as soon as they are computed, so that a part of the network
        can be run on recorded inputs.

        Raises:
            UserError: fewer than 16 voxels in y or x, or another number of axes or channels than expected.
        """
        if x.ndim != 5 or x.shape[-1] != self.config.in_features:
            raise UserError(f"mnet: input of shape {x.shape}, expected (batch, z, y, x, {self.config.in_features})")
        if min(x.shape[2:4]) < SMALLEST:
            raise UserError(
                f"mnet: patch of {x.shape[1:4]} voxels (z, y, x), expected at least {SMALLEST} in y and in x"
            )
        given = given or {}
        found: Features = {"input": x}
        for name in self._parts():
            found |= self.node(name, found)
            found |= {key: given[key] for key in (f"{name}.2d", f"{name}.3d") if key in given}
        return found

    def heads(self, features: Features) -> tuple[jax.Array, jax.Array]:
        """Logits of the two heads from the last nodes of the decoders; at least float32."""
        first = self.affinity_head(features["up14.2d"] + features["up14.3d"])
        second = self.foreground_head(features["up14_.2d"] + features["up14_.3d"])
        wide = jnp.promote_types(first.dtype, jnp.float32)
        return first.astype(wide), second.astype(wide)

    def logits(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(first, second) head before the sigmoid."""
        return self.heads(self.features(x))

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Probabilities (affinities (b, z, y, x, 3), foreground (b, z, y, x, 1)) of an image (b, z, y, x, 1) in [0, 1].

        Of the pretraining variant: the image and its HOG image, one channel each.
        """
        first, second = self.logits(x)
        return jax.nn.sigmoid(first), jax.nn.sigmoid(second)

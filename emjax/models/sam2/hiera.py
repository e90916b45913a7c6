"""Hiera, the hierarchical transformer trunk of SAM 2 (Ryali et al. 2023; Ravi et al. 2024, section 4)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.attention import attend
from emjax.models.layers.lora import Adapters
from emjax.models.layers.resize import resize
from emjax.models.sam2.blocks import MLP, convolution, counted, gelu, layer_norm, linear
from emjax.models.sam2.config import HieraConfig, check_size

EPSILON = 1e-6


def _pool(x: jax.Array) -> jax.Array:
    """Maximum over 2 x 2 cells of (batch, h, w, channels)."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))


def _padded(x: jax.Array, window: int) -> jax.Array:
    """Zeros at the bottom and right up to multiples of ``window``; they take part in the softmax, as published."""
    down, right = -x.shape[1] % window, -x.shape[2] % window
    return jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0))) if down or right else x


def _windows(x: jax.Array, window: tuple[int, int], heads: int) -> jax.Array:
    """(batch, H, W, features) to (batch * windows, heads, tokens, features / heads)."""
    batch, height, width, features = x.shape
    rows, columns = height // window[0], width // window[1]
    x = x.reshape(batch, rows, window[0], columns, window[1], heads, features // heads)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6)
    return x.reshape(batch * rows * columns, heads, window[0] * window[1], features // heads)


def _unwindow(x: jax.Array, window: tuple[int, int], height: int, width: int) -> jax.Array:
    """The inverse of :func:`_windows` for a padded map of ``height`` x ``width``."""
    rows, columns = height // window[0], width // window[1]
    heads, features = x.shape[1], x.shape[3]
    x = x.reshape(-1, rows, columns, heads, window[0], window[1], features)
    return x.transpose(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, heads * features)


class WindowAttention(nnx.Module):
    """Attention within windows (or over the whole map), queries pooled 2 x 2 where a stage begins."""

    def __init__(self, inputs: int, outputs: int, heads: int, window: int, pool: bool, options: dict, rngs: nnx.Rngs):
        self.qkv = linear(inputs, 3 * outputs, options["dtype"], rngs)
        self.proj = linear(outputs, outputs, options["dtype"], rngs)
        self.adapted = options["lora"] is not None
        if self.adapted:
            self.lora = Adapters(options["lora"], inputs, outputs, options["dtype"], rngs)
        self.heads, self.window, self.pool = heads, window, pool
        self.attention = options["attention"]

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, h, w, inputs) to (batch, h', w', outputs), halved where queries are pooled."""
        height, width = x.shape[1:3]
        if self.window:
            x = _padded(x, self.window)
        window = (self.window, self.window) if self.window else (height, width)
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        if self.adapted:
            q, k, v = (self.lora.adapt(target, projected, x) for target, projected in (("q", q), ("k", k), ("v", v)))
        cell = window
        if self.pool:
            q, cell = _pool(q), (window[0] // 2, window[1] // 2)
            height, width = height // 2, width // 2
        out = attend(
            _windows(q, cell, self.heads),
            _windows(k, window, self.heads),
            _windows(v, window, self.heads),
            implementation=self.attention,
        )
        return self.proj(_unwindow(out, cell, *q.shape[1:3])[:, :height, :width])


class Block(nnx.Module):
    """Pre-norm transformer block; where the width changes, the shortcut is the normed input, projected and pooled."""

    def __init__(self, inputs: int, outputs: int, heads: int, window: int, pool: bool, options: dict, rngs: nnx.Rngs):
        dtype = options["dtype"]
        self.norm1 = layer_norm(inputs, EPSILON, dtype, rngs)
        self.attn = WindowAttention(inputs, outputs, heads, window, pool, options, rngs)
        self.norm2 = layer_norm(outputs, EPSILON, dtype, rngs)
        self.mlp = MLP((outputs, options["mlp_ratio"] * outputs, outputs), dtype, rngs, activation=gelu)
        if inputs != outputs:
            self.proj = linear(inputs, outputs, dtype, rngs)
        self.changes_width, self.pool = inputs != outputs, pool

    def __call__(self, x: jax.Array) -> jax.Array:
        normed = self.norm1(x)
        if self.changes_width:
            x = self.proj(normed)
            x = _pool(x) if self.pool else x
        x = x + self.attn(normed)
        return x + self.mlp(self.norm2(x))


class PatchEmbedding(nnx.Module):
    def __init__(self, width: int, dtype: str, rngs: nnx.Rngs):
        self.proj = convolution(3, width, 7, 4, 3, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.proj(x)


class Hiera(nnx.Module):
    """Images (batch, H, W, 3), normalised, to the maps of all four stages at strides 4, 8, 16, 32.

    Raises ``ValueError`` unless H and W are multiples of 32.
    """

    def __init__(self, config: HieraConfig, rngs: nnx.Rngs, dtype: str = "float32", attention: str = "auto"):
        self.config = config
        rngs = counted(rngs)
        options = {"dtype": dtype, "attention": attention, "mlp_ratio": config.mlp_ratio, "lora": config.lora}
        self.patch_embed = PatchEmbedding(config.width, dtype, rngs)
        init = nnx.initializers.truncated_normal(0.02)
        self.pos_embed = nnx.Param(init(rngs.params(), (1, *config.background, config.width), jnp.float32))
        self.pos_embed_window = nnx.Param(init(rngs.params(), (1, *config.window_embedding, config.width), jnp.float32))
        blocks = []
        width, heads, stage = config.width, config.heads, 0
        firsts = [end + 1 for end in config.stage_ends[:-1]]
        for index in range(config.depth):
            # The window lags: the first block of a stage still has that of the stage before.
            window = 0 if index in config.global_blocks else config.windows[stage]
            outputs = width
            if index in firsts:
                outputs, heads, stage = 2 * width, 2 * heads, stage + 1
            blocks.append(Block(width, outputs, heads, window, index in firsts, options, rngs))
            width = outputs
        self.blocks = nnx.List(blocks)

    def position(self, height: int, width: int) -> jax.Array:
        """(1, height, width, channels): the resized background plus the tiled window embedding (Bolya et al. 2023)."""
        background = resize(self.pos_embed[...], (height, width), "bicubic")
        window = self.pos_embed_window[...]
        return background + jnp.tile(window, (1, height // window.shape[1], width // window.shape[2], 1))

    def steps(self, images: jax.Array) -> Iterator[tuple[str, jax.Array]]:
        """Every intermediate map by name: ``patch_embed``, ``pos_embed``, ``block00``, ``block01``, ..."""
        check_size(*images.shape[1:])
        x = self.patch_embed(images)
        yield "patch_embed", x
        position = self.position(*x.shape[1:3])
        yield "pos_embed", position
        x = x + position.astype(x.dtype)
        for index, block in enumerate(self.blocks):
            x = jax.checkpoint(lambda x, block=block: block(x))(x) if self.config.remat else block(x)
            yield f"block{index:02d}", x

    def __call__(self, images: jax.Array) -> tuple[jax.Array, ...]:
        ends = {f"block{end:02d}" for end in self.config.stage_ends}
        return tuple(x for name, x in self.steps(images) if name in ends)

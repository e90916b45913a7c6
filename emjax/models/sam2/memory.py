"""Memory encoder and memory attention of SAM 2."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.attention import attend
from emjax.models.layers.position import rotary_table, rotate, sine_position
from emjax.models.sam2.blocks import convolution, gelu, layer_norm, linear


class DepthwiseConvolution(nnx.Module):
    """Depthwise convolution, channels last; on CPU a sum of shifted products, which is many times faster there."""

    def __init__(self, features: int, size: int, dtype: str, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), (size, size, 1, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...].astype(jnp.dtype(self.dtype))
        size, features = kernel.shape[0], kernel.shape[-1]
        pad = size // 2

        def shifted(x, kernel):
            height, width = x.shape[1:3]
            around = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            return sum(
                around[:, i : i + height, j : j + width] * kernel[i, j, 0] for i in range(size) for j in range(size)
            )

        def native(x, kernel):
            return jax.lax.conv_general_dilated(
                x,
                kernel,
                (1, 1),
                ((pad, pad), (pad, pad)),
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=features,
            )

        x = x.astype(kernel.dtype)
        out = jax.lax.platform_dependent(x, kernel, cpu=shifted, default=native)
        return out + self.bias[...].astype(kernel.dtype)


class ConvNextBlock(nnx.Module):
    """Depthwise 7 x 7, norm, two pointwise layers, layer scale, residual (Liu et al. 2022)."""

    def __init__(self, features: int, dtype: str, rngs: nnx.Rngs, initial_scale: float = 1e-6):
        self.dwconv = DepthwiseConvolution(features, 7, dtype, rngs)
        self.norm = layer_norm(features, 1e-6, dtype, rngs)
        self.pwconv1 = linear(features, 4 * features, dtype, rngs)
        self.pwconv2 = linear(4 * features, features, dtype, rngs)
        self.gamma = nnx.Param(jnp.full((features,), initial_scale, jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        inner = self.pwconv2(gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        return x + self.gamma[...].astype(x.dtype) * inner


class MaskDownsampler(nnx.Module):
    """Mask at input size to ``features`` channels at stride 16, by four strided convolutions."""

    def __init__(self, features: int, dtype: str, rngs: nnx.Rngs):
        widths = [1, 4, 16, 64, 256]
        self.convs = nnx.List([convolution(a, b, 3, 2, 1, dtype, rngs) for a, b in itertools.pairwise(widths)])
        self.norms = nnx.List([layer_norm(b, 1e-6, dtype, rngs) for b in widths[1:]])
        self.final = convolution(widths[-1], features, 1, 1, 0, dtype, rngs)

    def __call__(self, mask: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms):
            mask = gelu(norm(conv(mask)))
        return self.final(mask)


class MemoryEncoder(nnx.Module):
    """Image features and a mask to a memory of ``outputs`` channels at stride 16."""

    def __init__(self, features: int, outputs: int, dtype: str, rngs: nnx.Rngs, layers: int = 2):
        self.mask_downsampler = MaskDownsampler(features, dtype, rngs)
        self.pix_feat_proj = convolution(features, features, 1, 1, 0, dtype, rngs)
        self.fuser = nnx.List([ConvNextBlock(features, dtype, rngs) for _ in range(layers)])
        self.out_proj = convolution(features, outputs, 1, 1, 0, dtype, rngs)
        self.outputs = outputs

    def steps(self, image: jax.Array, mask: jax.Array) -> list[jax.Array]:
        """The down-sampled mask, the map after each fusing block, the memory."""
        small = self.mask_downsampler(mask.astype(image.dtype))
        x = self.pix_feat_proj(image) + small
        results = [small]
        for block in self.fuser:
            x = block(x)
            results.append(x)
        return [*results, self.out_proj(x)]

    def __call__(self, image: jax.Array, mask: jax.Array) -> jax.Array:
        """``image`` (batch, h, w, features) of stride 16 (without memory), ``mask`` (batch, 16 h, 16 w, 1), scaled."""
        return self.steps(image, mask)[-1]

    def position(self, height: int, width: int) -> jax.Array:
        """(height, width, outputs) sine encoding of memories."""
        return sine_position(height, width, self.outputs)


class RotaryAttention(nnx.Module):
    """Single-head attention with axial rotary position on a raster grid."""

    def __init__(self, features: int, keys: int, dtype: str, attention: str, rngs: nnx.Rngs):
        self.q_proj = linear(features, features, dtype, rngs)
        self.k_proj = linear(keys, features, dtype, rngs)
        self.v_proj = linear(keys, features, dtype, rngs)
        self.out_proj = linear(features, features, dtype, rngs)
        self.attention = attention

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        grid: tuple[int, int],
        unplaced: int = 0,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """``query`` (batch, h w, features); ``key``, ``value`` (batch, r h w + unplaced, keys).

        Every one of the r memories has the same phases; the last ``unplaced`` keys are not turned. ``mask``
        (batch, keys) is True where a key counts.
        """
        cosine, sine = rotary_table(*grid, query.shape[-1])
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        batch, total, features = k.shape
        placed = total - unplaced
        turned = rotate(k[:, :placed].reshape(batch, -1, grid[0] * grid[1], features), cosine, sine)
        k = jnp.concatenate([turned.reshape(batch, placed, features), k[:, placed:]], axis=1)
        out = attend(
            rotate(q, cosine, sine)[:, None],
            k[:, None],
            v[:, None],
            mask=None if mask is None else mask[:, None, None, :],
            implementation=self.attention,
        )
        return self.out_proj(out[:, 0])


class MemoryAttentionLayer(nnx.Module):
    def __init__(self, features: int, memory: int, inner: int, dtype: str, attention: str, rngs: nnx.Rngs):
        self.self_attn = RotaryAttention(features, features, dtype, attention, rngs)
        self.cross_attn_image = RotaryAttention(features, memory, dtype, attention, rngs)
        self.linear1 = linear(features, inner, dtype, rngs)
        self.linear2 = linear(inner, features, dtype, rngs)
        self.norm1 = layer_norm(features, 1e-5, dtype, rngs)
        self.norm2 = layer_norm(features, 1e-5, dtype, rngs)
        self.norm3 = layer_norm(features, 1e-5, dtype, rngs)

    def __call__(self, x, memory, memory_position, grid, pointers, mask):
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, grid)
        x = x + self.cross_attn_image(self.norm2(x), memory + memory_position, memory, grid, pointers, mask)
        return x + self.linear2(jax.nn.relu(self.linear1(self.norm3(x))))


class MemoryAttention(nnx.Module):
    """Image tokens attend to themselves and to a bank of memories and object pointers."""

    def __init__(self, features: int, memory: int, layers: int, dtype: str, rngs: nnx.Rngs, attention: str = "auto"):
        self.layers = nnx.List(
            [MemoryAttentionLayer(features, memory, 2048, dtype, attention, rngs) for _ in range(layers)]
        )
        self.norm = layer_norm(features, 1e-5, dtype, rngs)

    def steps(
        self,
        image: jax.Array,
        image_position: jax.Array,
        memory: jax.Array,
        memory_position: jax.Array,
        grid: tuple[int, int],
        pointers: int = 0,
        mask: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Image tokens after each layer and after the final norm; see :meth:`__call__`."""
        x = image + (0.1 * image_position).astype(image.dtype)
        memory, memory_position = memory.astype(x.dtype), memory_position.astype(x.dtype)
        results = []
        for layer in self.layers:
            x = layer(x, memory, memory_position, grid, pointers, mask)
            results.append(x)
        return [*results, self.norm(x)]

    def __call__(self, *arguments, **options) -> jax.Array:
        """``image``, ``image_position`` (batch, h w, features), ``memory``, ``memory_position`` (batch, keys, memory).

        ``grid`` is (h, w). Keys are whole memories of h w tokens each, then ``pointers`` pointer tokens. ``mask``
        (batch, keys), True where a key counts, makes a bank of fixed size equal to one of varying size.
        """
        return self.steps(*arguments, **options)[-1]

"""Convolution of volumes, the one place that decides how it is computed.

On accelerators a convolution is one native ``lax.conv_general_dilated``. On CPU XLA's 3-D convolution runs at a tenth
of the machine's speed, and its 2-D convolution too once a whole batch of planes no longer fits the cache; so there the
volume is walked plane by plane, each output plane a sum of 2-D convolutions (``docs/performance.md`` has the figures).
Values and gradients agree with the native form to rounding.

Arrays are ``(batch, z, y, x, channel)``, kernels ``(kz, ky, kx, in, out)``.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

Triple = tuple[int, int, int]
Pads = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Padding = Literal["replicate", "zero", "valid"]

# Below this many operations per sample the native form on CPU takes milliseconds, and compiles ten times faster.
SMALL = 1e8

_VOLUME = ("NDHWC", "DHWIO", "NDHWC")
_PLANE = ("NHWC", "HWIO", "NHWC")


def _native(x: jax.Array, kernel: jax.Array, strides: Triple, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_VOLUME)


def _output_size(size: int, kernel: int, stride: int, pad: tuple[int, int]) -> int:
    return (size + pad[0] + pad[1] - kernel) // stride + 1


def _plane_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_PLANE)


def _pad_z(x: jax.Array, pad: tuple[int, int]) -> jax.Array:
    return x if pad == (0, 0) else jnp.pad(x, ((0, 0), pad, (0, 0), (0, 0), (0, 0)))


def _planewise(x: jax.Array, kernel: jax.Array, strides: Triple, pads: Pads) -> jax.Array:
    """The native form's result by 2-D convolutions."""
    batch, depth, height, width, channels = x.shape
    kz, ky, kx, _, features = kernel.shape
    if (ky, kx) == (1, 1) and strides[1:] == (1, 1) and pads[1:] == ((0, 0), (0, 0)):
        if kz == 1 and strides[0] == 1 and pads[0] == (0, 0):
            return jnp.einsum("bzyxi,io->bzyxo", x, kernel[0, 0, 0])
        folded = x.reshape(batch, depth, height * width, channels)
        out = _plane_conv(folded, kernel[:, 0], (strides[0], 1), (pads[0], (0, 0)))
        return out.reshape(batch, -1, height, width, features)
    planes = _output_size(depth, kz, strides[0], pads[0])
    x = _pad_z(x, pads[0])

    def plane(z: jax.Array) -> jax.Array:
        slab = lax.dynamic_slice_in_dim(x, z * strides[0], kz, axis=1)
        taps = (_plane_conv(slab[:, tap], kernel[tap], strides[1:], pads[1:]) for tap in range(kz))
        return functools.reduce(operator.add, taps)

    # The batch stays a batch dimension of every plane, so that a sharded batch is never gathered.
    return jnp.moveaxis(lax.map(plane, jnp.arange(planes)), 0, 1)


def _planewise_kernel_gradient(x: jax.Array, gradient: jax.Array, shape, strides: Triple, pads: Pads) -> jax.Array:
    kz, ky, kx, channels, features = shape
    _, planes, rows, columns, _ = gradient.shape
    sz, sy, sx = strides
    if (ky, kx) == (1, 1) and strides[1:] == (1, 1) and pads[1:] == ((0, 0), (0, 0)):
        x = _pad_z(x, pads[0])
        taps = [x[:, z : z + (planes - 1) * sz + 1 : sz] for z in range(kz)]
        return jnp.stack([jnp.einsum("bzyxi,bzyxo->io", tap, gradient) for tap in taps]).reshape(shape)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))

    def add_plane(total: jax.Array, z: jax.Array) -> tuple[jax.Array, None]:
        slab = lax.dynamic_slice_in_dim(x, z * sz, kz, axis=1)
        outer = lax.dynamic_slice_in_dim(gradient, z, 1, axis=1)[:, 0].reshape(-1, features)
        taps = [
            slab[:, a, b : b + (rows - 1) * sy + 1 : sy, c : c + (columns - 1) * sx + 1 : sx].reshape(-1, channels)
            for a in range(kz)
            for b in range(ky)
            for c in range(kx)
        ]
        return total + jnp.stack([tap.T @ outer for tap in taps]), None

    start = jnp.zeros((kz * ky * kx, channels, features), x.dtype)
    return lax.scan(add_plane, start, jnp.arange(planes))[0].reshape(shape)


def _planewise_input_gradient(x, kernel, gradient, strides: Triple, pads: Pads) -> jax.Array:
    if strides == (1, 1, 1):
        flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
        z, y, x_ = ((size - 1 - low, size - 1 - high) for size, (low, high) in zip(kernel.shape[:3], pads))
        if min(*z, *y, *x_) >= 0:
            return _planewise(gradient, flipped, strides, (z, y, x_))
    return jax.vjp(lambda volume: _planewise(volume, kernel, strides, pads), x)[1](gradient)[0]


def _is_small(x: jax.Array, kernel: jax.Array, strides: Triple) -> bool:
    return 2 * math.prod(x.shape[1:4]) / math.prod(strides) * math.prod(kernel.shape) < SMALL


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: jax.Array, kernel: jax.Array, strides: Triple, pads: Pads) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=functools.partial(_planewise, strides=strides, pads=pads),
        default=functools.partial(_native, strides=strides, pads=pads),
    )


def _forward(x, kernel, strides, pads):
    return _convolve(x, kernel, strides, pads), (x, kernel)


def _backward(strides, pads, saved, gradient):
    x, kernel = saved

    def planewise(x, kernel, gradient):
        return (
            _planewise_input_gradient(x, kernel, gradient, strides, pads),
            _planewise_kernel_gradient(x, gradient, kernel.shape, strides, pads),
        )

    def native(x, kernel, gradient):
        return jax.vjp(lambda volume, weights: _native(volume, weights, strides, pads), x, kernel)[1](gradient)

    return lax.platform_dependent(x, kernel, gradient, cpu=planewise, default=native)


_convolve.defvjp(_forward, _backward)


def same_pads(kernel: Triple) -> Pads:
    """Symmetric padding that keeps the size at stride 1 (PyTorch's ``kernel // 2``)."""
    z, y, x = ((size // 2, size // 2) for size in kernel)
    return z, y, x


def conv3d(x: jax.Array, kernel: jax.Array, strides: Triple = (1, 1, 1), padding: Padding = "zero") -> jax.Array:
    """Convolves ``x`` (b, z, y, x, in) with ``kernel`` (kz, ky, kx, in, out).

    ``padding`` is ``"zero"`` or ``"replicate"`` by half the kernel on each side, or ``"valid"``. Cross-correlation, as
    in every deep-learning library. Reverse-mode differentiable.
    """
    kz, ky, kx = kernel.shape[:3]
    pads = same_pads((kz, ky, kx))
    if padding == "replicate":
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="edge")
    if padding != "zero":
        pads = ((0, 0), (0, 0), (0, 0))
    sz, sy, sx = strides
    if _is_small(x, kernel, strides):
        return _native(x, kernel, (sz, sy, sx), pads)
    return _convolve(x, kernel, (sz, sy, sx), pads)


def depthwise_conv3d(x: jax.Array, kernel: jax.Array, padding: Padding = "zero") -> jax.Array:
    """One filter per channel: ``x`` (b, z, y, x, c), ``kernel`` (kz, ky, kx, c), stride 1.

    A sum of shifted products on every platform: grouped convolutions are 14 to 230 times slower on CPU and poor on GPU.
    """
    kz, ky, kx, _ = kernel.shape
    if padding != "valid":
        pads = ((0, 0), *same_pads((kz, ky, kx)), (0, 0))
        x = jnp.pad(x, pads, mode="edge" if padding == "replicate" else "constant")
    depth, height, width = x.shape[1] - kz + 1, x.shape[2] - ky + 1, x.shape[3] - kx + 1
    products = (
        x[:, a : a + depth, b : b + height, c : c + width] * kernel[a, b, c]
        for a in range(kz)
        for b in range(ky)
        for c in range(kx)
    )
    return functools.reduce(operator.add, products)


def upconv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Transposed convolution whose stride equals its kernel (kz, ky, kx, in, out): no overlap, hence one product.

    Kernel taps are in output order (PyTorch's ``ConvTranspose3d`` weight transposed to (kz, ky, kx, in, out), unflipped).
    """
    batch, depth, height, width, _ = x.shape
    kz, ky, kx, _, features = kernel.shape
    out = jnp.einsum("bzyxi,dhwio->bzdyhxwo", x, kernel)
    return out.reshape(batch, depth * kz, height * ky, width * kx, features)


class Conv3d(nnx.Module):
    """Convolution layer; ``kernel`` (kz, ky, kx, in, out), optional ``bias`` (out,).

    Parameters are float32; ``dtype`` is the precision of the computation and of the result.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        kernel_size: Triple = (3, 3, 3),
        *,
        strides: Triple = (1, 1, 1),
        padding: Padding = "zero",
        use_bias: bool = True,
        kernel_init: Callable = nnx.initializers.he_normal(),
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (*kernel_size, in_features, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32)) if use_bias else None
        self.strides = strides
        self.padding: Padding = padding
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        out = conv3d(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.strides, self.padding)
        return out if self.bias is None else out + self.bias[...].astype(self.dtype)


class UpConv3d(nnx.Module):
    """Transposed convolution with stride = kernel: multiplies each axis by ``factors``."""

    def __init__(
        self,
        in_features: int,
        features: int,
        factors: Triple,
        *,
        use_bias: bool = True,
        dtype: jnp.dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.he_normal(in_axis=-2, out_axis=-1, batch_axis=(0, 1, 2))
        self.kernel = nnx.Param(init(rngs.params(), (*factors, in_features, features), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        out = upconv3d(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return out if self.bias is None else out + self.bias[...].astype(self.dtype)

"""Prompt encoder of SAM 2: points, boxes, masks."""

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.position import fourier_features
from emjax.models.sam2.blocks import convolution, gelu, layer_norm

NOT_A_POINT, NEGATIVE, POSITIVE, BOX_START, BOX_END = -1, 0, 1, 2, 3
"""Labels of points; a box is the two points ``BOX_START`` (top left) and ``BOX_END`` (bottom right)."""


class Constant(nnx.Variable):
    """A value that belongs to the network and is never trained."""


class PositionEmbedding(nnx.Module):
    """Random Fourier features of places in the unit square."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        draw = jax.random.normal(rngs.params(), (2, features // 2), jnp.float32)
        self.positional_encoding_gaussian_matrix = Constant(draw)

    def __call__(self, unit: jax.Array) -> jax.Array:
        """(..., 2) x, y in [0, 1] to (..., features)."""
        return fourier_features(unit, self.positional_encoding_gaussian_matrix[...])

    def grid(self, height: int, width: int) -> jax.Array:
        """(height, width, features) of pixel centres."""
        x, y = (jnp.arange(width) + 0.5) / width, (jnp.arange(height) + 0.5) / height
        return self(jnp.stack(jnp.meshgrid(x, y), axis=-1))


class MaskEmbedding(nnx.Module):
    """Mask logits at a quarter of the input size to a dense prompt at stride 16."""

    def __init__(self, features: int, inner: int, dtype: str, rngs: nnx.Rngs, masks: int = 1):
        self.conv1 = convolution(masks, inner // 4, 2, 2, 0, dtype, rngs)
        self.norm1 = layer_norm(inner // 4, 1e-6, dtype, rngs)
        self.conv2 = convolution(inner // 4, inner, 2, 2, 0, dtype, rngs)
        self.norm2 = layer_norm(inner, 1e-6, dtype, rngs)
        self.conv3 = convolution(inner, features, 1, 1, 0, dtype, rngs)

    def __call__(self, mask: jax.Array) -> jax.Array:
        return self.conv3(gelu(self.norm2(self.conv2(gelu(self.norm1(self.conv1(mask)))))))


class PromptEncoder(nnx.Module):
    """Sparse (points, boxes) and dense (mask) prompt embeddings; one dense prompt may be made of several ``masks``."""

    def __init__(self, features: int, dtype: str, rngs: nnx.Rngs, mask_features: int = 16, masks: int = 1):
        self.pe_layer = PositionEmbedding(features, rngs)
        self.point_embeddings = nnx.List([nnx.Embed(1, features, rngs=rngs) for _ in range(4)])
        self.not_a_point_embed = nnx.Embed(1, features, rngs=rngs)
        self.mask_downscaling = MaskEmbedding(features, mask_features, dtype, rngs, masks)
        self.no_mask_embed = nnx.Embed(1, features, rngs=rngs)
        self.dtype = dtype

    def dense_position(self, height: int, width: int) -> jax.Array:
        """(1, height, width, features) position encoding of the stride-16 grid."""
        return self.pe_layer.grid(height, width)[None]

    def points(self, coordinates: jax.Array, labels: jax.Array, size: tuple[int, int], pad: bool) -> jax.Array:
        """(batch, n, 2) x, y in pixels with labels (batch, n) to (batch, n (+ 1 padding point), features)."""
        coordinates = coordinates.astype(jnp.float32) + 0.5
        if pad:
            coordinates = jnp.pad(coordinates, ((0, 0), (0, 1), (0, 0)))
            labels = jnp.pad(labels, ((0, 0), (0, 1)), constant_values=NOT_A_POINT)
        place = self.pe_layer(coordinates / jnp.asarray([size[1], size[0]], jnp.float32))
        kinds = jnp.concatenate([e.embedding[...] for e in self.point_embeddings])
        is_point = (labels >= 0)[..., None]
        return jnp.where(is_point, place + kinds[jnp.maximum(labels, 0)], self.not_a_point_embed.embedding[...])

    def boxes(self, corners: jax.Array, size: tuple[int, int]) -> jax.Array:
        """(batch, 4) x0, y0, x1, y1 in pixels to (batch, 2, features)."""
        labels = jnp.broadcast_to(jnp.asarray([BOX_START, BOX_END]), (len(corners), 2))
        return self.points(corners.reshape(-1, 2, 2), labels, size, pad=False)

    def __call__(
        self,
        size: tuple[int, int],
        points: tuple[jax.Array, jax.Array] | None = None,
        boxes: jax.Array | None = None,
        masks: jax.Array | None = None,
        batch: int = 1,
    ) -> tuple[jax.Array, jax.Array]:
        """Sparse (batch, n, features) and dense (batch, h / 16, w / 16, features) embeddings.

        ``size``: height and width of the network's input; ``points``: coordinates (batch, n, 2) and labels (batch, n);
        ``masks``: logits (batch, h / 4, w / 4, masks). Without boxes one padding point is appended to points. ``batch`` is
        used where there is no prompt that tells it.
        """
        sparse = []
        if points is not None:
            batch = len(points[0])
            sparse.append(self.points(*points, size, pad=boxes is None))
        if boxes is not None:
            batch = len(boxes)
            sparse.append(self.boxes(boxes, size))
        features = self.no_mask_embed.embedding.shape[-1]
        if masks is not None:
            batch = len(masks)
            dense = self.mask_downscaling(masks.astype(jnp.dtype(self.dtype)))
        else:
            shape = (batch, size[0] // 16, size[1] // 16, features)
            dense = jnp.broadcast_to(self.no_mask_embed.embedding[...].astype(jnp.dtype(self.dtype)), shape)
        tokens = jnp.concatenate(sparse, axis=1) if sparse else jnp.zeros((batch, 0, features))
        return tokens.astype(jnp.dtype(self.dtype)), dense

"""Two-way transformer and mask decoder of SAM 2."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.sam2.blocks import MLP, Attention, Upsampling, convolution, gelu, layer_norm

EPSILON = 1e-5


class TwoWayBlock(nnx.Module):
    """Self-attention of tokens, tokens to image, MLP, image to tokens."""

    def __init__(self, features: int, heads: int, inner: int, first: bool, options: dict, rngs: nnx.Rngs):
        dtype = options["dtype"]
        narrow = features // 2
        self.self_attn = Attention(features, features, heads, rngs=rngs, **options)
        self.norm1 = layer_norm(features, EPSILON, dtype, rngs)
        self.cross_attn_token_to_image = Attention(features, narrow, heads, rngs=rngs, **options)
        self.norm2 = layer_norm(features, EPSILON, dtype, rngs)
        self.mlp = MLP((features, inner, features), dtype, rngs)
        self.norm3 = layer_norm(features, EPSILON, dtype, rngs)
        self.norm4 = layer_norm(features, EPSILON, dtype, rngs)
        self.cross_attn_image_to_token = Attention(features, narrow, heads, rngs=rngs, **options)
        self.first = first

    def __call__(
        self, tokens: jax.Array, image: jax.Array, token_position: jax.Array, image_position: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        if self.first:
            # The first layer replaces the tokens: no position, no residual.
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_position
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        placed_image = image + image_position
        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_position, placed_image, image))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.norm4(image + self.cross_attn_image_to_token(placed_image, tokens + token_position, tokens))
        return tokens, image


class TwoWayTransformer(nnx.Module):
    def __init__(self, depth: int, features: int, heads: int, inner: int, options: dict, rngs: nnx.Rngs):
        self.layers = nnx.List(
            [TwoWayBlock(features, heads, inner, index == 0, options, rngs) for index in range(depth)]
        )
        self.final_attn_token_to_image = Attention(features, features // 2, heads, rngs=rngs, **options)
        self.norm_final_attn = layer_norm(features, EPSILON, options["dtype"], rngs)

    def steps(
        self, image: jax.Array, image_position: jax.Array, tokens: jax.Array
    ) -> list[tuple[jax.Array, jax.Array]]:
        """Tokens and image tokens after each layer, and after the final attention.

        ``image`` (batch, pixels, features), ``tokens`` (batch, n, features), which are their own position encoding.
        """
        queries, keys = tokens, image
        results = []
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, image_position)
            results.append((queries, keys))
        out = self.final_attn_token_to_image(queries + tokens, keys + image_position, keys)
        results.append((self.norm_final_attn(queries + out), keys))
        return results

    def __call__(self, image: jax.Array, image_position: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.steps(image, image_position, tokens)[-1]


class DecodedMasks(NamedTuple):
    """``masks`` (batch, 4, h / 4, w / 4) logits, mask 0 for unambiguous prompts; ``ious`` (batch, 4);
    ``tokens`` (batch, 4, features); ``score`` (batch, 1), the logit that the object is in the slice."""

    masks: jax.Array
    ious: jax.Array
    tokens: jax.Array
    score: jax.Array


class MaskDecoder(nnx.Module):
    """Image embedding and prompt embeddings to masks, their IoU, and the object score."""

    def __init__(
        self,
        features: int,
        dtype: str,
        rngs: nnx.Rngs,
        attention: str = "auto",
        masks: int = 4,
        depth: int = 2,
        heads: int = 8,
        inner: int = 2048,
    ):
        options = {"dtype": dtype, "attention": attention}
        self.transformer = TwoWayTransformer(depth, features, heads, inner, options, rngs)
        self.iou_token = nnx.Embed(1, features, rngs=rngs)
        self.mask_tokens = nnx.Embed(masks, features, rngs=rngs)
        self.obj_score_token = nnx.Embed(1, features, rngs=rngs)
        self.upscale1 = Upsampling(features, features // 4, dtype, rngs)
        self.upscale_norm = layer_norm(features // 4, 1e-6, dtype, rngs)
        self.upscale2 = Upsampling(features // 4, features // 8, dtype, rngs)
        self.conv_s0 = convolution(features, features // 8, 1, 1, 0, dtype, rngs)
        self.conv_s1 = convolution(features, features // 4, 1, 1, 0, dtype, rngs)
        self.output_hypernetworks_mlps = nnx.List(
            [MLP((features, features, features, features // 8), dtype, rngs) for _ in range(masks)]
        )
        self.iou_prediction_head = MLP((features, features, features, masks), dtype, rngs, sigmoid=True)
        self.pred_obj_score_head = MLP((features, features, features, 1), dtype, rngs)
        self.masks, self.dtype = masks, dtype

    def high_resolution(self, level0: jax.Array, level1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Neck levels of strides 4 and 8 to the decoder's high-resolution features (32 and 64 channels)."""
        return self.conv_s0(level0), self.conv_s1(level1)

    def tokens(self, sparse: jax.Array) -> jax.Array:
        """(batch, 6 + n, features): object score, IoU, masks, prompts."""
        embeds = (self.obj_score_token, self.iou_token, self.mask_tokens)
        own = jnp.concatenate([embed.embedding[...] for embed in embeds]).astype(sparse.dtype)
        return jnp.concatenate([jnp.broadcast_to(own, (len(sparse), *own.shape)), sparse], axis=1)

    def flatten(
        self, embedding: jax.Array, position: jax.Array, sparse: jax.Array, dense: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The transformer's inputs: image tokens, their position encoding, prompt tokens; one image serves all."""
        source = embedding.astype(dense.dtype) + dense
        batch, features = len(sparse), source.shape[-1]
        image = jnp.broadcast_to(source, (batch, *source.shape[1:])).reshape(batch, -1, features)
        place = jnp.broadcast_to(position.reshape(1, -1, features), image.shape).astype(image.dtype)
        return image, place, self.tokens(sparse)

    def __call__(
        self,
        embedding: jax.Array,
        position: jax.Array,
        sparse: jax.Array,
        dense: jax.Array,
        high_resolution: tuple[jax.Array, jax.Array],
    ) -> DecodedMasks:
        """``embedding`` (1 or batch, h, w, features), ``position`` (1, h, w, features), ``sparse`` (batch, n,
        features), ``dense`` (batch, h, w, features), ``high_resolution`` the maps of :meth:`high_resolution`."""
        height, width = embedding.shape[1:3]
        hidden, image = self.transformer(*self.flatten(embedding, position, sparse, dense))
        score = self.pred_obj_score_head(hidden[:, 0])
        ious = self.iou_prediction_head(hidden[:, 1])
        mask_tokens = hidden[:, 2 : 2 + self.masks]
        fine, middle = high_resolution
        x = self.upscale1(image.reshape(len(image), height, width, -1)) + middle
        x = gelu(self.upscale2(gelu(self.upscale_norm(x))) + fine)
        weights = jnp.stack([mlp(mask_tokens[:, i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], axis=1)
        masks = jnp.einsum("bkc,bhwc->bkhw", weights, x, preferred_element_type=jnp.float32)
        return DecodedMasks(masks, ious.astype(jnp.float32), mask_tokens, score.astype(jnp.float32))


def stability(masks: jax.Array, delta: float = 0.05) -> jax.Array:
    """Area above +delta over area above -delta, per mask (..., h, w); 1 where the latter is empty."""
    inner = (masks > delta).sum(axis=(-2, -1)).astype(jnp.float32)
    outer = (masks > -delta).sum(axis=(-2, -1)).astype(jnp.float32)
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)


def single_mask(
    decoded: DecodedMasks, threshold: float | None = None, delta: float = 0.05
) -> tuple[jax.Array, jax.Array]:
    """Mask 0 (batch, 1, h, w) and its IoU (batch, 1).

    With a ``threshold``, where mask 0 is less stable than it, the multi-mask output of the best predicted IoU instead.
    """
    mask, iou = decoded.masks[:, :1], decoded.ious[:, :1]
    if threshold is None:
        return mask, iou
    best = jnp.argmax(decoded.ious[:, 1:], axis=-1) + 1
    other = jnp.take_along_axis(decoded.masks, best[:, None, None, None], axis=1)
    other_iou = jnp.take_along_axis(decoded.ious, best[:, None], axis=1)
    stable = stability(mask, delta) >= threshold
    return jnp.where(stable[..., None, None], mask, other), jnp.where(stable, iou, other_iou)

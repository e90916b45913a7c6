"""SAM 2 as one module: image features, prompts to masks, masks to memories, memories to features (Ravi et al. 2024)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.models.layers.position import sine_of_scalar, sine_position
from emjax.models.layers.resize import resize
from emjax.models.sam2.blocks import MLP, convolution, counted, linear
from emjax.models.sam2.config import SAM2Config
from emjax.models.sam2.mask_decoder import MaskDecoder, single_mask
from emjax.models.sam2.memory import MemoryAttention, MemoryEncoder
from emjax.models.sam2.neck import EncodedImage, ImageEncoder
from emjax.models.sam2.prompt_encoder import NOT_A_POINT, PromptEncoder

NO_OBJECT = -1024.0
"""Mask logit everywhere where the object is predicted to be absent."""


class Features(NamedTuple):
    """What the decoder and the memory need of a slice: ``embedding`` (batch, h, w, 256) at stride 16, ``fine``
    (batch, 4 h, 4 w, 32), ``middle`` (batch, 2 h, 2 w, 64)."""

    embedding: jax.Array
    fine: jax.Array
    middle: jax.Array

    @property
    def grid(self) -> tuple[int, int]:
        return self.embedding.shape[-3], self.embedding.shape[-2]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the network's input."""
        return 16 * self.grid[0], 16 * self.grid[1]


class Heads(NamedTuple):
    """Masks of one slice for a batch of objects. h and w are those of the input.

    ``candidates`` (batch, 1 or 3, h / 4, w / 4) logits, ``ious`` (batch, 1 or 3), ``low`` (batch, h / 4, w / 4) the
    best candidate, ``pointer`` (batch, 256), ``score`` (batch,) object score logit.
    """

    candidates: jax.Array
    ious: jax.Array
    low: jax.Array
    pointer: jax.Array
    score: jax.Array

    def high(self, size: tuple[int, int]) -> jax.Array:
        """The best mask's logits at input size."""
        return resize(self.low, size, axes=(-2, -1))


class Bank(NamedTuple):
    """The memories that a slice attends to, of fixed size, with what is valid among them.

    ``spatial`` (batch, m, h, w, 64) and ``age`` (batch, m), the index into the temporal encoding; ``spatial_valid``
    (batch, m). ``pointers`` (batch, p, 256) with ``distance`` (batch, p), slices to the pointer's own, signed, divided
    by the largest; ``pointer_valid`` (batch, p).
    """

    spatial: jax.Array
    age: jax.Array
    spatial_valid: jax.Array
    pointers: jax.Array
    distance: jax.Array
    pointer_valid: jax.Array


def disjoint(logits: jax.Array) -> jax.Array:
    """Objects (batch, ...) made disjoint: at each pixel all but the largest logit are limited to -10."""
    if len(logits) == 1:
        return logits
    best = jnp.argmax(logits, axis=0)
    own = jnp.arange(len(logits)).reshape(-1, *[1] * (logits.ndim - 1))
    return jnp.where(best[None] == own, logits, jnp.minimum(logits, -10.0))


class SAM2(nnx.Module):
    """The whole network. All methods are pure; images and maps are channels last, masks (batch, h, w)."""

    def __init__(self, config: SAM2Config, rngs: nnx.Rngs):
        dtype, features, memory = config.dtype, config.features, config.memory_features
        self.config = config
        rngs = counted(rngs)
        normal = nnx.initializers.truncated_normal(0.02)

        def parameter(*shape: int) -> nnx.Param:
            return nnx.Param(normal(rngs.params(), shape, jnp.float32))

        self.image_encoder = ImageEncoder(config, rngs)
        self.sam_prompt_encoder = PromptEncoder(features, dtype, rngs)
        self.sam_mask_decoder = MaskDecoder(features, dtype, rngs, config.attention)
        self.no_mem_embed = parameter(1, 1, features)
        if config.image_only:
            return
        self.memory_encoder = MemoryEncoder(features, memory, dtype, rngs)
        self.memory_attention = MemoryAttention(features, memory, config.memory_layers, dtype, rngs, config.attention)
        self.mask_downsample = convolution(1, 1, 4, 4, 0, dtype, rngs)
        self.obj_ptr_proj = MLP((features,) * 4, dtype, rngs)
        self.maskmem_tpos_enc = parameter(config.memories, 1, 1, memory)
        self.no_mem_pos_enc = parameter(1, 1, features)
        self.no_obj_ptr = parameter(1, features)
        if config.occlusion_embedding:
            self.no_obj_embed_spatial = parameter(1, memory)
        if config.pointer_time_encoding:
            self.obj_ptr_tpos_proj = linear(features, memory, dtype, rngs)

    def features(self, encoded: EncodedImage) -> Features:
        """The neck's levels as the decoder takes them."""
        return Features(encoded.embedding, *self.sam_mask_decoder.high_resolution(*encoded.levels[:2]))

    def encode(self, images: jax.Array) -> Features:
        """Normalised images (batch, H, W, 3) to features. Raises ``ValueError`` unless H, W are multiples of 32."""
        return self.features(self.image_encoder(images))

    def without_memory(self, features: Features) -> jax.Array:
        """The embedding of a slice that is prompted before anything is remembered."""
        return features.embedding + self.no_mem_embed[...].astype(features.embedding.dtype)

    def predict_masks(
        self,
        embedding: jax.Array,
        features: Features,
        points: tuple[jax.Array, jax.Array] | None = None,
        mask: jax.Array | None = None,
        *,
        several: bool = True,
        stability_threshold: float | None = None,
        stability_delta: float = 0.05,
        hide_absent: bool = True,
    ) -> Heads:
        """Prompts on one slice to masks of each object of the batch.

        ``embedding`` (1 or batch, h, w, 256); ``points``: x, y in input pixels (batch, n, 2) and labels (batch, n), a
        box being the first two points with labels 2 and 3; ``mask``: logits (batch, 4 h, 4 w). ``several`` asks for
        three candidates, of which the best predicted IoU is taken. With ``hide_absent`` the masks of an object that is
        predicted to be absent are -1024 everywhere.
        """
        batch = len(points[0]) if points is not None else len(mask) if mask is not None else len(embedding)
        if points is None:
            points = jnp.zeros((batch, 1, 2)), jnp.full((batch, 1), NOT_A_POINT)
        if mask is not None:
            mask = resize(
                mask[..., None].astype(jnp.float32), (4 * features.grid[0], 4 * features.grid[1]), antialias=True
            )
        sparse, dense = self.sam_prompt_encoder(features.size, points, masks=mask)
        position = self.sam_prompt_encoder.dense_position(*features.grid)
        decoded = self.sam_mask_decoder(embedding, position, sparse, dense, (features.fine, features.middle))
        score = decoded.score[:, 0]
        present = score > 0
        if several:
            candidates, ious = decoded.masks[:, 1:], decoded.ious[:, 1:]
            best = jnp.argmax(ious, axis=-1)
        else:
            candidates, ious = single_mask(decoded, stability_threshold, stability_delta)
            best = jnp.zeros(batch, jnp.int32)
        if hide_absent:
            candidates = jnp.where(present[:, None, None, None], candidates, NO_OBJECT)
        low = jnp.take_along_axis(candidates, best[:, None, None, None], axis=1)[:, 0]
        token = jnp.take_along_axis(decoded.tokens, (best + int(several))[:, None, None], axis=1)[:, 0]
        return Heads(candidates, ious, low, self.pointer(token, present), score)

    def pointer(self, token: jax.Array, present: jax.Array) -> jax.Array:
        """Output tokens (batch, 256) to object pointers, float32; absent objects have the no-object pointer.

        A network for single images has no pointers and gives zeros.
        """
        if self.config.image_only:
            return jnp.zeros(token.shape, jnp.float32)
        projected = self.obj_ptr_proj(token).astype(jnp.float32)
        return jnp.where(present[:, None], projected, self.no_obj_ptr[...])

    def take_mask(self, features: Features, mask: jax.Array) -> tuple[Heads, jax.Array]:
        """A given binary mask (batch, H, W) as if the network had predicted it, and its logits at input size.

        The decoder runs on the raw embedding only for the object pointer. An empty mask means an absent object.
        """
        mask = mask.astype(jnp.float32)
        high = mask * 20 - 10
        size = features.size
        low = resize(high, (size[0] // 4, size[1] // 4), axes=(-2, -1), antialias=True)
        prompt = self.mask_downsample(mask[..., None])[..., 0]
        pointer = self.predict_masks(features.embedding, features, mask=prompt, several=False).pointer
        present = (mask > 0).any(axis=(-2, -1))
        pointer = jnp.where(present[:, None], pointer, self.no_obj_ptr[...])
        score = jnp.where(present, 10.0, -10.0)
        return Heads(low[:, None], jnp.ones((len(mask), 1)), low, pointer, score), high

    def remember(
        self, features: Features, logits: jax.Array, score: jax.Array, *, binary: bool = False, exclusive: bool = False
    ) -> jax.Array:
        """Memories (batch, h, w, 64) of a slice from mask logits at input size (batch, H, W) and scores (batch,).

        ``binary`` takes the mask's sign instead of its sigmoid (prompted slices of the video predictor);
        ``exclusive`` makes the batch's objects disjoint first.
        """
        if exclusive:
            logits = disjoint(logits)
        mask = (logits > 0).astype(jnp.float32) if binary else jax.nn.sigmoid(logits)
        mask = (mask * 20 - 10)[..., None]
        memory = self.memory_encoder(features.embedding, mask)
        if self.config.occlusion_embedding:
            absent = (score <= 0)[:, None, None, None]
            memory = memory + jnp.where(absent, self.no_obj_embed_spatial[...][:, None, None], 0).astype(memory.dtype)
        return memory

    def recall(self, features: Features, bank: Bank) -> jax.Array:
        """The slice's embedding conditioned on the bank, (batch, h, w, 256)."""
        height, width = features.grid
        batch, slots = bank.spatial_valid.shape
        tokens = height * width
        dtype = features.embedding.dtype
        spatial = bank.spatial.astype(dtype).reshape(batch, slots * tokens, -1)
        times = self.maskmem_tpos_enc[...][:, 0, 0][jnp.broadcast_to(bank.age, (batch, slots))]
        places = self.memory_encoder.position(height, width).reshape(1, 1, tokens, -1) + times[:, :, None]
        pieces = self.config.features // self.config.memory_features
        pointers = bank.pointers.astype(dtype).reshape(batch, -1, self.config.memory_features)
        if self.config.pointer_time_encoding:
            encoded = self.obj_ptr_tpos_proj(sine_of_scalar(bank.distance, self.config.features))
            pointer_places = jnp.repeat(encoded.astype(jnp.float32), pieces, axis=1)
        else:
            pointer_places = jnp.zeros(pointers.shape, jnp.float32)
        valid = jnp.concatenate(
            [jnp.repeat(bank.spatial_valid, tokens, axis=1), jnp.repeat(bank.pointer_valid, pieces, axis=1)], axis=1
        )
        image = jnp.broadcast_to(features.embedding, (batch, *features.embedding.shape[1:]))
        position = sine_position(height, width, self.config.features).reshape(1, tokens, -1)
        out = self.memory_attention(
            image.reshape(batch, tokens, -1),
            position,
            jnp.concatenate([spatial, pointers], axis=1),
            jnp.concatenate([places.reshape(batch, slots * tokens, -1), pointer_places], axis=1),
            grid=(height, width),
            pointers=pointers.shape[1],
            mask=valid,
        )
        return out.reshape(batch, height, width, -1)

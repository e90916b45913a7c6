"""SAM4EM: semantic segmentation of EM stacks with an adapted SAM 2 that prompts itself (Shah et al., CVPRW 2025).

Every slice is encoded by SAM 2's trunk with low-rank adapters (:class:`Encoder`), the three finest neck levels are fused
at stride 4 (:class:`Enhancer`), and then slices go one after the other: a memory of the slices before is added
(:class:`Memory`), the mask of the slice before is the prompt, a first decoder gives masks, and a second decoder refines
them, prompted by the first ones.

What inference needs, all pure, channels last::

    features = model.encode(images)                    # (n, H, W, 3) normalised -> (n, H / 4, W / 4, features), batched
    state = model.initial_state(batch, (H, W))         # empty memory, empty prompt; a pytree of fixed shapes
    state, masks = model.step(state, features_of_one)  # (batch, H / 4, W / 4, features) -> Masks of logits
    state, masks = model.scan(state, features)         # the same for (slices, batch, ...), under lax.scan

H and W are any multiples of 32. Encoding does not depend on the state, so it may run ahead, slices as a batch; only
:meth:`SAM4EM.step` is sequential. A state is carried from one piece of a stack to the next, and made anew for each volume.

Several classes are segmented in one pass: every class has a mask token, a hyper-network, and a channel of the mask prompt
(of prompt encoders and of the memory's mask branch). Masks of classes are independent of each other; for one class the
network is exactly the published one. The published code does otherwise in places; every switch is described at
:class:`Config` and :class:`MemoryConfig`, and ``published()`` sets all of them.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.errors import UserError
from emjax.models.layers.lora import LoRA
from emjax.models.layers.norm import MaskedBatchNorm
from emjax.models.layers.position import pixel_position, sine_position
from emjax.models.layers.resize import resize
from emjax.models.sam2.blocks import MLP, Upsampling, convolution, counted, gelu, layer_norm
from emjax.models.sam2.config import HIERA, HieraConfig, SAM2Config
from emjax.models.sam2.mask_decoder import TwoWayTransformer
from emjax.models.sam2.neck import EncodedImage, ImageEncoder
from emjax.models.sam2.prompt_encoder import PromptEncoder

_he = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryConfig:
    """The memory of the slices before.

    Attributes:
        update: ``"ring"`` writes slice i to slot i mod ``slots``, and slots that were never written are left out of the
            softmax. ``"broadcast"`` is what the published code does: one running average in all slots, which are
            therefore equal for ever, so that the softmax says nothing and four of six branches get no gradient.
            ``"none"`` leaves the memory out.
        slots: slices that are remembered.
        window: of ``"ring"``: memories pass gradients back, but not over every ``window``-th slice (counted from the
            start of the stack); 0 lets them pass to the beginning.
        average: of ``"broadcast"``: weight of the new slice.
        dropout: in training, share of channels of features, masks, queries and keys, and of attention weights, that are
            set to zero.
    """

    update: Literal["ring", "broadcast", "none"] = "ring"
    slots: int = 8
    window: int = 4
    average: float = 0.3
    dropout: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The network.

    Attributes:
        hiera: SAM 2's trunk; the published network has ``HIERA["base_plus"]``. Its own ``lora`` is not used.
        lora: adapters of every block of the trunk; ``None`` for none. Published: rank 100, not scaled, halves only
            (``LoRA(rank=100, faithful_halves=True)``).
        decoder_lora: adapters of the attention layers of both decoders, for the second stage of fine-tuning.
        features: channels of the neck's levels and of all that follows (256 in SAM 2).
        heads: attention heads of the decoders.
        inner: width of the decoders' MLP.
        classes: masks per slice.
        memory: what is remembered.
        position_temperature: of the sine encoding that is added to the neck's levels. 1000 as published; SAM 2 itself
            was trained with 10000 (and does not add it here).
        decoders: 2, or 1 for an ablation: the first decoder's masks are the result.
        second_prompt: prompt of the second decoder: ``"first_mask"``, the first decoder's mask, which is the paper's
            idea, or ``"reuse_first"``, the prompt of the first, as in the published code.
        output: whose masks are the result: ``"stage2"``, ``"stage1"`` (as the published evaluation) or ``"mean"`` (of
            the logits).
        dtype: of activations; parameters, norms, attention weights and logits are float32.
        attention: see :func:`emjax.models.layers.attention.attend`.
        remat: compute the slices' activations again in the backward pass.
    """

    hiera: HieraConfig = HIERA["base_plus"]
    lora: LoRA | None = LoRA(rank=16, alpha=16.0)
    decoder_lora: LoRA | None = None
    features: int = 256
    heads: int = 8
    inner: int = 2048
    classes: int = 1
    memory: MemoryConfig = MemoryConfig()
    position_temperature: float = 1000.0
    decoders: int = 2
    second_prompt: Literal["first_mask", "reuse_first"] = "first_mask"
    output: Literal["stage2", "stage1", "mean"] = "stage2"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["auto", "xla", "cudnn"] = "auto"
    remat: bool = False

    @property
    def encoder(self) -> SAM2Config:
        """The image encoder as SAM 2 knows it."""
        hiera = dataclasses.replace(self.hiera, lora=self.lora, remat=self.remat or self.hiera.remat)
        return SAM2Config(hiera, features=self.features, image_only=True, dtype=self.dtype, attention=self.attention)

    def validate(self) -> None:
        """Raises ``UserError`` for values that cannot work."""
        for name, lora in (("lora", self.lora), ("decoder_lora", self.decoder_lora)):
            if lora is not None:
                try:
                    lora.validate()
                except UserError as error:
                    raise UserError(f"model.{name}: {error}") from None
        if self.classes < 1:
            raise UserError(f"model.classes {self.classes}: expected at least 1")
        if self.features % (4 * self.heads) or self.features % 8:
            raise UserError(
                f"model.features {self.features} and model.heads {self.heads}: features must be a multiple of 8 and of "
                "4 heads"
            )
        if self.decoders not in (1, 2):
            raise UserError(f"model.decoders {self.decoders}: expected 1 or 2")
        if self.decoders == 1 and self.output != "stage1":
            raise UserError(f"model.output {self.output!r}: with one decoder there is only 'stage1'")
        memory = self.memory
        if memory.slots < 1 or memory.window < 0:
            raise UserError(
                f"model.memory: slots {memory.slots} and window {memory.window}, expected from 1 and from 0 up"
            )
        if not 0 <= memory.dropout < 1 or not 0 < memory.average <= 1:
            raise UserError(
                f"model.memory: dropout {memory.dropout} and average {memory.average}, expected 0 <= dropout < 1 and "
                "0 < average <= 1"
            )


def published(config: Config = Config()) -> Config:
    """``config`` with every switch as in the published code."""
    return dataclasses.replace(
        config,
        lora=LoRA(rank=100, faithful_halves=True),
        decoder_lora=None,
        memory=dataclasses.replace(config.memory, update="broadcast", slots=8, average=0.3, dropout=0.1),
        position_temperature=1000.0,
        decoders=2,
        second_prompt="reuse_first",
        output="stage1",
    )


class Masks(NamedTuple):
    """Logits of one or more slices, (..., H, W, classes) float32; ``second`` equals ``first`` with one decoder."""

    first: jax.Array
    second: jax.Array

    def result(self, config: Config) -> jax.Array:
        """The logits that count."""
        if config.output == "mean":
            return (self.first + self.second) / 2
        return self.first if config.output == "stage1" else self.second


class State(NamedTuple):
    """What is known when a slice begins.

    ``slots`` (batch, slots, H / 4, W / 4, features / 2); ``seen`` int32 (), slices since the start of the stack;
    ``prompt`` (batch, H, W, classes), the mask of the slice before, 0 or 1.
    """

    slots: jax.Array
    seen: jax.Array
    prompt: jax.Array


class Decoded(NamedTuple):
    """``masks`` (batch, H, W, classes) float32 logits, ``ious`` (batch, classes), ``upscaled`` (batch, H, W,
    features / 8), ``tokens`` (batch, 2 + classes, features) and ``image`` (batch, pixels, features) after attention."""

    masks: jax.Array
    ious: jax.Array
    upscaled: jax.Array
    tokens: jax.Array
    image: jax.Array


class Slice(NamedTuple):
    """Everything that :meth:`SAM4EM.segment` computes of a slice."""

    remembered: jax.Array
    first_prompt: jax.Array
    second_prompt: jax.Array
    first: Decoded
    second: Decoded

    @property
    def masks(self) -> Masks:
        return Masks(self.first.masks, self.second.masks)


class Enhancer(nnx.Module):
    """Fuses the neck's levels of strides 4, 8 and 16 at stride 4."""

    def __init__(self, features: int, dtype: str, rngs: nnx.Rngs):
        def conv(inputs: int, kernel: int) -> nnx.Conv:
            return convolution(inputs, features, kernel, 1, kernel // 2, dtype, rngs, _he)

        def norm() -> MaskedBatchNorm:
            return MaskedBatchNorm(features, 1e-5, 0.1, False, rngs)

        self.middle_conv, self.middle_norm = conv(features, 3), norm()
        self.coarse_conv, self.coarse_norm = conv(features, 3), norm()
        self.fusion_conv1, self.fusion_norm1 = conv(3 * features, 1), norm()
        self.fusion_conv2, self.fusion_norm2 = conv(features, 3), norm()
        self.fusion_conv3, self.fusion_norm3 = conv(features, 3), norm()
        self.projection = conv(features, 1)
        self.dtype = dtype

    def __call__(self, fine: jax.Array, middle: jax.Array, coarse: jax.Array, train: bool = False) -> jax.Array:
        """Maps (n, h, w, features), (n, h / 2, ...) and (n, h / 4, ...) to (n, h, w, features)."""
        dtype = jnp.dtype(self.dtype)

        def normed(conv: nnx.Conv, norm: MaskedBatchNorm, x: jax.Array) -> jax.Array:
            return norm(conv(x), train).astype(dtype)

        def smoothed(conv: nnx.Conv, norm: MaskedBatchNorm, x: jax.Array) -> jax.Array:
            x = resize(x, fine.shape[1:3])
            return jax.nn.relu(x + jax.nn.relu(normed(conv, norm, x)))

        middle = smoothed(self.middle_conv, self.middle_norm, middle)
        coarse = smoothed(self.coarse_conv, self.coarse_norm, coarse)
        x = jnp.concatenate([fine, middle, coarse], axis=-1)
        x = jax.nn.relu(normed(self.fusion_conv1, self.fusion_norm1, x))
        x = jax.nn.relu(normed(self.fusion_conv2, self.fusion_norm2, x))
        return self.projection(jax.nn.relu(normed(self.fusion_conv3, self.fusion_norm3, x) + fine))


def _dropped(x: jax.Array, rate: float, key: jax.Array | None, spatial: bool) -> jax.Array:
    """Dropout of single values, or of whole channels of (batch, h, w, channels); nothing without a key."""
    if key is None or not rate:
        return x
    shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1]) if spatial else x.shape
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Memory(nnx.Module):
    """Per-pixel attention over remembered slices, each a mix of its features, its prompt mask, and its place."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        features, dtype = config.features, config.dtype
        inner = features // 2

        def pointwise(inputs: int, outputs: int) -> nnx.Conv:
            return convolution(inputs, outputs, 1, 1, 0, dtype, rngs)

        self.mask_conv1 = convolution(config.classes, features // 8, 3, 2, 1, dtype, rngs)
        self.mask_conv2 = convolution(features // 8, inner, 3, 2, 1, dtype, rngs)
        self.feature_proj = pointwise(features, inner)
        self.query_proj, self.key_proj, self.value_proj = (pointwise(inner, inner) for _ in range(3))
        self.output_proj = pointwise(inner, features)
        self.config, self.dtype = config.memory, dtype

    def content(self, embedding: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is remembered of a slice, (batch, h, w, features / 2)."""
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        rate, dtype = self.config.dropout, jnp.dtype(self.dtype)
        seen = _dropped(jax.nn.relu(self.feature_proj(embedding)), rate, keys[0], True)
        drawn = _dropped(jax.nn.relu(self.mask_conv1(mask.astype(dtype))), rate, keys[1], True)
        drawn = _dropped(jax.nn.relu(self.mask_conv2(drawn)), rate, keys[2], True)
        return seen + drawn + pixel_position(*seen.shape[1:]).astype(dtype)

    def recall(self, slots: jax.Array, valid: jax.Array, content: jax.Array, key: jax.Array | None) -> jax.Array:
        """Mean of the slots' values (batch, h, w, features / 2), weighted at each pixel by how well they fit.

        ``valid`` (slots,) says which count; without any the result is zero.
        """
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        rate, dtype = self.config.dropout, jnp.dtype(self.dtype)
        place = pixel_position(*content.shape[1:]).astype(dtype)
        flat = slots.astype(dtype).reshape(-1, *slots.shape[2:])
        query = _dropped(self.query_proj(content) + place, rate, keys[0], True)
        stored = _dropped(self.key_proj(flat) + place, rate, keys[1], True).reshape(slots.shape)
        scores = jnp.einsum("bhwc,bshwc->bshw", query, stored, preferred_element_type=jnp.float32)
        scores = jnp.where(valid[None, :, None, None], scores / content.shape[-1] ** 0.5, -jnp.inf)
        peak = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=1, keepdims=True), jnp.finfo(jnp.float32).min))
        weights = jnp.exp(scores - peak)
        weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        weights = _dropped(weights, rate, keys[2], False).astype(dtype)
        return jnp.einsum("bshw,bshwc->bhwc", weights, self.value_proj(flat).reshape(slots.shape))

    def write(self, slots: jax.Array, count: jax.Array, content: jax.Array) -> jax.Array:
        """The slots after slice ``count``."""
        content = content.astype(slots.dtype)
        if self.config.update == "ring":
            return slots.at[:, count % self.config.slots].set(content)
        share = self.config.average
        return (1 - share) * slots + share * jax.lax.stop_gradient(content)[:, None]

    def __call__(
        self, slots: jax.Array, count: jax.Array, embedding: jax.Array, mask: jax.Array, key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The embedding (batch, h, w, features) with what is remembered, and the slots for the next slice."""
        if self.config.update == "none":
            return embedding, slots
        keys = (None, None) if key is None else jax.random.split(key)
        number = jnp.arange(self.config.slots)
        valid = number < count if self.config.update == "ring" else number >= 0
        if self.config.update == "ring" and self.config.window:
            # Gradients end here, not in every slice: a slot that is never trained through teaches nothing to what is
            # remembered.
            slots = jnp.where(count % self.config.window == 0, jax.lax.stop_gradient(slots), slots)
        content = self.content(embedding, mask, keys[0])
        recalled = self.recall(slots, valid, content, keys[1])
        return embedding + jax.nn.relu(self.output_proj(recalled)), self.write(slots, count, content)


class Decoder(nnx.Module):
    """SAM's mask decoder at stride 4, with a mask token for each class and one to spare, and no object score.

    A ``joined`` decoder mixes the other decoder's upscaled features with its own before the masks are made.
    """

    def __init__(self, config: Config, joined: bool, rngs: nnx.Rngs):
        features, dtype, masks = config.features, config.dtype, config.classes + 1
        options = {"dtype": dtype, "attention": config.attention, "lora": config.decoder_lora}
        self.transformer = TwoWayTransformer(2, features, config.heads, config.inner, options, rngs)
        self.iou_token = nnx.Embed(1, features, rngs=rngs)
        self.mask_tokens = nnx.Embed(masks, features, rngs=rngs)
        self.upscale1 = Upsampling(features, features // 4, dtype, rngs)
        self.upscale_norm = layer_norm(features // 4, 1e-6, dtype, rngs)
        self.upscale2 = Upsampling(features // 4, features // 8, dtype, rngs)
        if joined:
            fine = features // 8
            self.join_conv1, self.join_norm1 = (
                convolution(2 * fine, fine, 1, 1, 0, dtype, rngs),
                layer_norm(fine, 1e-6, dtype, rngs),
            )
            self.join_conv2, self.join_norm2 = (
                convolution(fine, fine, 3, 1, 1, dtype, rngs),
                layer_norm(fine, 1e-6, dtype, rngs),
            )
        self.output_hypernetworks_mlps = nnx.List(
            [MLP((features, features, features, features // 8), dtype, rngs) for _ in range(masks)]
        )
        self.iou_prediction_head = MLP((features, features, features, masks), dtype, rngs)
        self.classes, self.dtype = config.classes, dtype

    def __call__(
        self, embedding: jax.Array, position: jax.Array, dense: jax.Array, other: jax.Array | None = None
    ) -> Decoded:
        """``embedding`` and ``dense`` (batch, h, w, features), ``position`` (1, h, w, features); ``other``: the other
        decoder's upscaled features (batch, 4 h, 4 w, features / 8)."""
        batch, features = embedding.shape[0], embedding.shape[-1]
        dtype = jnp.dtype(self.dtype)
        own = jnp.concatenate([self.iou_token.embedding[...], self.mask_tokens.embedding[...]]).astype(dtype)
        tokens = jnp.broadcast_to(own, (batch, *own.shape))
        source = (embedding + dense).reshape(batch, -1, features)
        place = jnp.broadcast_to(position.reshape(1, -1, features).astype(dtype), source.shape)
        hidden, image = self.transformer(source, place, tokens)
        x = gelu(self.upscale_norm(self.upscale1(image.reshape(embedding.shape))))
        x = gelu(self.upscale2(x))
        if other is not None:
            x = gelu(self.join_norm1(self.join_conv1(jnp.concatenate([x, other], axis=-1))))
            x = gelu(self.join_norm2(self.join_conv2(x)))
        chosen = range(self.classes)
        weights = jnp.stack([self.output_hypernetworks_mlps[i](hidden[:, 1 + i]) for i in chosen], axis=1)
        masks = jnp.einsum("bhwc,bkc->bhwk", x, weights, preferred_element_type=jnp.float32)
        ious = self.iou_prediction_head(hidden[:, 0])[:, : self.classes].astype(jnp.float32)
        return Decoded(masks, ious, x, hidden, image)


class SAM4EM(nnx.Module):
    """The whole network; see the module's description for how it is used."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        rngs = counted(rngs)
        self.image_encoder = ImageEncoder(config.encoder, rngs)
        self.fpn = Enhancer(config.features, config.dtype, rngs)
        if config.memory.update != "none":
            self.mem = Memory(config, rngs)
        self.prompt_encoder = PromptEncoder(config.features, config.dtype, rngs, masks=config.classes)
        self.mask_decoder = Decoder(config, False, rngs)
        if config.decoders == 2:
            self.prompt_encoder2 = PromptEncoder(config.features, config.dtype, rngs, masks=config.classes)
            self.mask_decoder2 = Decoder(config, True, rngs)

    def positions(self, encoded: EncodedImage) -> list[jax.Array]:
        """The sine encodings (h, w, features) of the three levels that are fused."""
        return [
            sine_position(level.shape[1], level.shape[2], level.shape[3], self.config.position_temperature)
            for level in encoded.levels[:3]
        ]

    def fuse(self, encoded: EncodedImage, train: bool = False) -> jax.Array:
        """The features of encoded images; batch statistics and their update in training."""
        fine, middle, coarse = (
            level + place.astype(level.dtype) for level, place in zip(encoded.levels[:3], self.positions(encoded))
        )
        return self.fpn(fine, middle, coarse, train)

    def encode(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Normalised images (n, H, W, 3) to features (n, H / 4, W / 4, features).

        Raises ``ValueError`` unless H and W are multiples of 32.
        """
        return self.fuse(self.image_encoder(images), train)

    def initial_state(self, batch: int, size: tuple[int, int], prompt: jax.Array | None = None) -> State:
        """The state before the first slice of a stack of ``size`` (H, W); ``prompt`` (batch, H, W, classes) is the mask
        that it starts with, by default empty."""
        height, width = size
        slots = (batch, self.config.memory.slots, height // 4, width // 4, self.config.features // 2)
        if prompt is None:
            prompt = jnp.zeros((batch, height, width, self.config.classes), jnp.float32)
        return State(
            jnp.zeros(slots, jnp.dtype(self.config.dtype)), jnp.zeros((), jnp.int32), prompt.astype(jnp.float32)
        )

    def segment(self, state: State, features: jax.Array, key: jax.Array | None = None) -> tuple[State, Slice]:
        """One slice, with everything on the way. ``key``: dropout, in training."""
        if self.config.memory.update == "none":
            remembered, slots = features, state.slots
        else:
            remembered, slots = self.mem(state.slots, state.seen, features, state.prompt, key)
        size = (features.shape[1] * 16, features.shape[2] * 16)
        dense = self.prompt_encoder(size, masks=state.prompt)[1]
        position = self.prompt_encoder.dense_position(*features.shape[1:3])
        first = self.mask_decoder(remembered, position, dense)
        second, second_dense = first, dense
        if self.config.decoders == 2:
            drawn = (jax.lax.stop_gradient(first.masks) > 0).astype(jnp.float32)
            second_dense = self.prompt_encoder2(size, masks=drawn)[1]
            if self.config.second_prompt == "first_mask":
                place = self.prompt_encoder2.dense_position(*features.shape[1:3])
                second = self.mask_decoder2(remembered, place, second_dense, first.upscaled)
            else:
                second = self.mask_decoder2(remembered, position, dense, first.upscaled)
        prompt = (jax.lax.stop_gradient(second.masks) > 0).astype(jnp.float32)
        return State(slots, state.seen + 1, prompt), Slice(remembered, dense, second_dense, first, second)

    def step(self, state: State, features: jax.Array, key: jax.Array | None = None) -> tuple[State, Masks]:
        """One slice: features (batch, H / 4, W / 4, features) to the next state and the slice's masks."""
        state, found = self.segment(state, features, key)
        return state, found.masks

    def scan(self, state: State, features: jax.Array, key: jax.Array | None = None) -> tuple[State, Masks]:
        """Slices in order, features (slices, batch, H / 4, W / 4, features), masks (slices, batch, H, W, classes)."""

        def one(state: State, now: tuple[jax.Array, jax.Array]) -> tuple[State, Masks]:
            number, features = now
            return self.step(state, features, None if key is None else jax.random.fold_in(key, number))

        body = jax.checkpoint(one) if self.config.remat else one
        return jax.lax.scan(body, state, (jnp.arange(len(features)), features))

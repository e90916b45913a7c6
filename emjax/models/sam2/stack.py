"""Tracking objects through a stack of slices with SAM 2: pure functions on a memory of fixed size.

The reference keeps every slice's output for ever in dictionaries and builds a memory of varying length per slice. Here
a :class:`Memory` holds the conditioning (prompted) slices and two rings of the most recent ones; what is absent is
masked out of the attention, so one compiled step serves every slice of a stack of any length, forward and backward, for
a batch of objects. Up to rounding the result is the same (Ravi et al. 2024, section 4 and appendix C).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from emjax.models.sam2.model import NO_OBJECT, SAM2, Bank, Features, Heads

EMPTY = -(1 << 30)
"""Slice number of an empty place in the memory, and of a padding step of :func:`propagate`."""
FORWARD, BACKWARD = 1, -1


@dataclasses.dataclass(frozen=True)
class TrackOptions:
    """How memories are chosen and made. The defaults are those of the reference's video predictor.

    ``most_conditioning``: at most this many conditioning slices are attended to, the nearest ones (-1: all);
    ``stride``: recent memories are the neighbour and every ``stride``-th slice; ``pointers_from_past``: pointers of
    conditioning slices ahead of the current one are left out; ``pointer_span_of_stack``: pointer distances are divided
    by the stack's length where it is below 16, which makes results depend on the length (False: always by 15);
    ``stability_threshold`` (None: off) and ``stability_delta``: fall back to another mask where a single one is
    unstable; ``binary_prompts``: the memory of a prompted slice is made from its binary mask; ``exclusive``: objects
    are made disjoint before they are remembered; ``memory_dtype``: how memories are kept.
    """

    most_conditioning: int = -1
    stride: int = 1
    pointers_from_past: bool = True
    pointer_span_of_stack: bool = True
    stability_threshold: float | None = 0.98
    stability_delta: float = 0.05
    binary_prompts: bool = True
    exclusive: bool = False
    memory_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.most_conditioning != -1 and self.most_conditioning < 2:
            raise ValueError(f"most_conditioning is {self.most_conditioning}; expected -1 (all) or at least 2")
        if self.stride < 1:
            raise ValueError(f"stride is {self.stride}; expected at least 1")


class Memory(NamedTuple):
    """What is remembered, for a batch of n objects with k conditioning slices.

    ``prompted`` (n, k) slice numbers (``EMPTY`` where free), ``prompted_features`` (n, k, h, w, 64),
    ``prompted_pointers`` (n, k, 256), ``prompted_low`` (n, k, 4 h, 4 w) mask logits, ``prompted_scores`` (n, k);
    ``recent`` (n, r) slice numbers and ``recent_features`` (n, r, h, w, 64) of the ring of memories;
    ``pointed`` (n, p) slice numbers and ``pointers`` (n, p, 256) of the ring of object pointers.
    """

    prompted: jax.Array
    prompted_features: jax.Array
    prompted_pointers: jax.Array
    prompted_low: jax.Array
    prompted_scores: jax.Array
    recent: jax.Array
    recent_features: jax.Array
    pointed: jax.Array
    pointers: jax.Array


class Tracked(NamedTuple):
    """One slice's result for n objects: ``low`` (n, 4 h, 4 w) mask logits, ``score`` (n,) object score logits,
    ``iou`` (n,) predicted IoU of the mask, ``pointer`` (n, 256), ``features`` (n, h, w, 64) the slice's memory."""

    low: jax.Array
    score: jax.Array
    iou: jax.Array
    pointer: jax.Array
    features: jax.Array


def empty_memory(model: SAM2, options: TrackOptions, objects: int, conditioning: int, grid: tuple[int, int]) -> Memory:
    """A memory without anything in it, for ``objects`` with up to ``conditioning`` prompted slices each.

    ``grid``: rows and columns at stride 16. Its size is independent of the length of the stack.
    """
    config = model.config
    recents = (config.memories - 2) * options.stride + 1
    pointers = config.pointers - 1
    shape = (*grid, config.memory_features)
    dtype = jnp.dtype(options.memory_dtype)
    return Memory(
        prompted=jnp.full((objects, conditioning), EMPTY, jnp.int32),
        prompted_features=jnp.zeros((objects, conditioning, *shape), dtype),
        prompted_pointers=jnp.zeros((objects, conditioning, config.features), jnp.float32),
        prompted_low=jnp.full((objects, conditioning, 4 * grid[0], 4 * grid[1]), NO_OBJECT, jnp.float32),
        prompted_scores=jnp.zeros((objects, conditioning), jnp.float32),
        recent=jnp.full((objects, recents), EMPTY, jnp.int32),
        recent_features=jnp.zeros((objects, recents, *shape), dtype),
        pointed=jnp.full((objects, pointers), EMPTY, jnp.int32),
        pointers=jnp.zeros((objects, pointers, config.features), jnp.float32),
    )


def forget_recent(memory: Memory) -> Memory:
    """The memory with its conditioning slices only, as a new run in another direction starts."""
    return memory._replace(recent=jnp.full_like(memory.recent, EMPTY), pointed=jnp.full_like(memory.pointed, EMPTY))


def condition(memory: Memory, place: int | jax.Array, z: int | jax.Array, tracked: Tracked) -> Memory:
    """Puts a prompted slice ``z`` at ``place`` of every object's conditioning memory (replacing what was there)."""
    return memory._replace(
        prompted=memory.prompted.at[:, place].set(z),
        prompted_features=memory.prompted_features.at[:, place].set(
            tracked.features.astype(memory.prompted_features.dtype)
        ),
        prompted_pointers=memory.prompted_pointers.at[:, place].set(tracked.pointer),
        prompted_low=memory.prompted_low.at[:, place].set(tracked.low),
        prompted_scores=memory.prompted_scores.at[:, place].set(tracked.score),
    )


def push(memory: Memory, z: int | jax.Array, tracked: Tracked, accepted: jax.Array) -> Memory:
    """Puts slice ``z`` into the rings of the objects that are ``accepted`` (n,)."""
    place, pointer_place = z % memory.recent.shape[1], z % memory.pointed.shape[1]

    def put(ring: jax.Array, at: int | jax.Array, value: Any) -> jax.Array:
        chosen = accepted.reshape(-1, *[1] * (ring.ndim - 2))
        return ring.at[:, at].set(jnp.where(chosen, value, ring[:, at]).astype(ring.dtype))

    return memory._replace(
        recent=put(memory.recent, place, z),
        recent_features=put(memory.recent_features, place, tracked.features),
        pointed=put(memory.pointed, pointer_place, z),
        pointers=put(memory.pointers, pointer_place, tracked.pointer),
    )


def _nearest(prompted: jax.Array, z: jax.Array, most: int) -> jax.Array:
    """Which of the conditioning slices (k,) are attended to: the one before, the one after, then the nearest."""
    filled = prompted != EMPTY
    if most == -1 or most >= len(prompted):
        return filled
    big = 1 << 30
    distance = jnp.where(filled, jnp.abs(prompted - z), big)
    before = jnp.argmin(jnp.where(filled & (prompted < z), distance, big))
    after = jnp.argmin(jnp.where(filled & (prompted >= z), distance, big))
    distance = distance.at[before].set(jnp.where(prompted[before] < z, -1, distance[before]))
    distance = distance.at[after].set(jnp.where(prompted[after] >= z, -1, distance[after]))
    distance = jnp.where(filled, distance, big)
    order = jnp.argsort(distance, stable=True)
    return jnp.zeros(len(prompted), bool).at[order[:most]].set(True) & filled


def _bank_of_object(
    memory: Memory, z: jax.Array, direction: jax.Array, slices: jax.Array, options: TrackOptions, memories: int
) -> Bank:
    """The bank of one object (no batch axis) for slice ``z`` of a stack of ``slices``."""
    chosen = _nearest(memory.prompted, z, options.most_conditioning)
    steps = jnp.arange(1, memories)
    stride = options.stride
    behind = (z - 2) // stride * stride - (steps - 2) * stride
    ahead = -((-(z + 2)) // stride) * stride + (steps - 2) * stride
    wanted = jnp.where(steps == 1, z - direction, jnp.where(direction > 0, behind, ahead))

    def look_up(slices_wanted: jax.Array, ring_slices: jax.Array, ring: jax.Array, prompted: jax.Array):
        """Values of the wanted slices from a ring, or from a conditioning slice that was not chosen."""
        place = slices_wanted % len(ring_slices)
        found = ring_slices[place] == slices_wanted
        values = ring[place]
        if options.most_conditioning == -1:
            return values, found
        spare = (memory.prompted[None] == slices_wanted[:, None]) & ~chosen[None]
        from_spare = spare.any(axis=1) & ~found
        instead = prompted[jnp.argmax(spare, axis=1)]
        shape = (-1, *[1] * (values.ndim - 1))
        return jnp.where(from_spare.reshape(shape), instead, values), found | from_spare

    recent, recent_valid = look_up(wanted, memory.recent, memory.recent_features, memory.prompted_features)
    limit = memory.pointed.shape[0] + 1
    span = jnp.minimum(slices, limit) if options.pointer_span_of_stack else jnp.asarray(limit)
    distances = jnp.arange(1, limit)
    seen = z - direction * distances
    pointers, pointer_valid = look_up(seen, memory.pointed, memory.pointers, memory.prompted_pointers)
    pointer_valid &= (distances < span) & (seen >= 0) & (seen < slices)
    signed = (z - memory.prompted) * direction
    prompted_valid = chosen & ((signed >= 0) if options.pointers_from_past else True)
    return Bank(
        spatial=jnp.concatenate([memory.prompted_features, recent]),
        age=jnp.concatenate([jnp.full(len(memory.prompted), memories - 1), steps - 1]),
        spatial_valid=jnp.concatenate([chosen, recent_valid]),
        pointers=jnp.concatenate([memory.prompted_pointers, pointers]),
        distance=jnp.concatenate([jnp.where(chosen, signed, 0), distances]) / jnp.maximum(span - 1, 1),
        pointer_valid=jnp.concatenate([prompted_valid, pointer_valid]),
    )


def bank(
    model: SAM2,
    options: TrackOptions,
    memory: Memory,
    z: int | jax.Array,
    direction: int | jax.Array,
    slices: int | jax.Array,
) -> Bank:
    """What slice ``z`` attends to, for every object: chosen conditioning slices, recent slices, pointers.

    ``direction`` is ``FORWARD`` or ``BACKWARD``; ``slices`` the length of the stack.
    """
    z, direction, slices = (jnp.asarray(value, jnp.int32) for value in (z, direction, slices))
    return jax.vmap(lambda own: _bank_of_object(own, z, direction, slices, options, model.config.memories))(memory)


def prompt_points(
    model: SAM2,
    options: TrackOptions,
    features: Features,
    points: jax.Array,
    labels: jax.Array,
    *,
    recalled: jax.Array | None = None,
    previous: jax.Array | None = None,
) -> Heads:
    """Masks from points (n, m, 2), x and y in input pixels, with labels (n, m), for n objects on one slice.

    A box is two points with labels 2 and 3 ahead of the clicks. ``recalled`` is the embedding with memory of a slice
    that has been tracked before (a correction); without it the slice is prompted as a single image. ``previous``
    (n, 4 h, 4 w) mask logits of that slice refine the answer. One click gives the best of three masks, more points one.
    """
    embedding = model.without_memory(features) if recalled is None else recalled
    return model.predict_masks(
        embedding,
        features,
        (points, labels),
        None if previous is None else jnp.clip(previous, -32, 32),
        several=points.shape[1] <= 1,
        stability_threshold=options.stability_threshold,
        stability_delta=options.stability_delta,
    )


def remembered(
    model: SAM2,
    options: TrackOptions,
    features: Features,
    heads: Heads,
    high: jax.Array | None = None,
    prompted: bool = False,
) -> Tracked:
    """The heads' result with the memory that is made of it. ``high`` (n, H, W): logits at input size, if known."""
    high = heads.high(features.size) if high is None else high
    memory = model.remember(
        features, high, heads.score, binary=prompted and options.binary_prompts, exclusive=options.exclusive
    )
    iou = heads.ious.max(axis=-1)
    return Tracked(heads.low, heads.score, iou, heads.pointer, memory)


def track(
    model: SAM2,
    options: TrackOptions,
    features: Features,
    memory: Memory,
    z: int | jax.Array,
    direction: int | jax.Array,
    slices: int | jax.Array,
) -> tuple[Heads, jax.Array, Tracked]:
    """One slice without prompts: its heads, the embedding with memory, and the result with its own memory."""
    recalled = model.recall(features, bank(model, options, memory, z, direction, slices))
    heads = model.predict_masks(recalled, features)
    return heads, recalled, remembered(model, options, features, heads)


def propagate(
    model: SAM2,
    options: TrackOptions,
    memory: Memory,
    features: Features,
    order: jax.Array,
    start: jax.Array,
    direction: int | jax.Array,
    slices: int | jax.Array,
    keep: bool = False,
) -> tuple[Memory, Tracked]:
    """Tracks through ``order`` (t,) slice numbers with their features (t, h, w, ...), by ``lax.scan``.

    An object is tracked from slice ``start`` (n,) on, in ``direction``; before, it is absent and remembers nothing. A
    slice that is prompted for an object is not tracked for it: its own result is given. Entries of ``order`` that are
    ``EMPTY`` are padding. Results have a leading axis t; their ``features`` and ``pointer`` are empty unless ``keep``.
    The memory goes in and comes out, so a stack may be tracked in pieces of any length with the same result.
    """

    def step(memory: Memory, now: tuple[Features, jax.Array]) -> tuple[Memory, Tracked]:
        slice_features, z = now
        slice_features = Features(*(x[None] for x in slice_features))
        _, _, tracked = track(model, options, slice_features, memory, z, direction, slices)
        own = memory.prompted == z
        prompted, place = own.any(axis=1), jnp.argmax(own, axis=1)
        active = (direction * (z - start) >= 0) & (z != EMPTY)
        pick = jnp.arange(len(place)), place

        def given(theirs: jax.Array, tracked: jax.Array) -> jax.Array:
            return jnp.where(
                prompted.reshape(-1, *[1] * (tracked.ndim - 1)), theirs[pick].astype(tracked.dtype), tracked
            )

        memory_after = push(memory, z, tracked, active & ~prompted)
        low = given(memory.prompted_low, tracked.low)
        result = Tracked(
            low=jnp.where(active[:, None, None], low, NO_OBJECT),
            score=jnp.where(active, given(memory.prompted_scores, tracked.score), NO_OBJECT),
            iou=jnp.where(active, jnp.where(prompted, 1.0, tracked.iou), 0.0),
            pointer=given(memory.prompted_pointers, tracked.pointer) if keep else jnp.zeros((0,)),
            features=given(memory.prompted_features, tracked.features) if keep else jnp.zeros((0,)),
        )
        return memory_after, result

    return jax.lax.scan(step, memory, (features, jnp.asarray(order, jnp.int32)))

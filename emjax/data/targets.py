"""Training targets from label ids, made where the labels are: jit-able, static shapes, any leading batch dimensions.

Labels are int32 ids ``(..., z, y, x)``, 0 = background. Affinities come out channel-last, ``(..., z, y, x, offset)``,
which is how networks here speak. Connected-part splitting needs a variable number of steps and stays on the host
(:func:`emjax.data.crops.split_components`).
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from emjax.errors import UserError

Offset = tuple[int, int, int]
Border = Literal["replicate", "masked"]

NEAREST_OFFSETS: tuple[Offset, ...] = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))


def check_offsets(offsets: Sequence[Sequence[int]]) -> tuple[Offset, ...]:
    """``offsets`` as a tuple of three-tuples.

    Raises:
        UserError: no offset, an offset that is not three integers, or the zero offset.
    """
    if len(offsets) == 0:
        raise UserError("offsets: none given, expected at least one (z, y, x) offset such as (-1, 0, 0)")
    checked = []
    for offset in offsets:
        if len(offset) != 3 or any(int(step) != step for step in offset):
            raise UserError(f"offsets: found {tuple(offset)}, expected three integers (z, y, x)")
        z, y, x = (int(step) for step in offset)
        if (z, y, x) == (0, 0, 0):
            raise UserError("offsets: found (0, 0, 0), a voxel is always connected to itself; leave it out")
        checked.append((z, y, x))
    return tuple(checked)


def _partner(volume: Num[Array, "*batch z y x"], offset: Offset, outside: int) -> Num[Array, "*batch z y x"]:
    """``volume[v + offset]`` at every voxel ``v``, ``outside`` where that is beyond the border."""
    batch_axes = volume.ndim - 3
    shape = volume.shape[batch_axes:]
    if any(abs(step) >= size for step, size in zip(offset, shape)):
        return jnp.full_like(volume, outside)
    pads = [(0, 0)] * batch_axes + [(max(-step, 0), max(step, 0)) for step in offset]
    padded = jnp.pad(volume, pads, constant_values=outside)
    starts = [0] * batch_axes + [max(step, 0) for step in offset]
    return jax.lax.slice(padded, starts, [start + size for start, size in zip(starts, volume.shape)])


def inside(shape: Sequence[int], offset: Offset) -> Bool[Array, "z y x"]:
    """Where ``v + offset`` lies inside a volume of ``shape`` (z, y, x)."""
    return _partner(jnp.ones(tuple(shape), bool), offset, False)


def affinities(
    labels: Int[Array, "*batch z y x"],
    offsets: Sequence[Offset] = NEAREST_OFFSETS,
    border: Border = "replicate",
) -> Float[Array, "*batch z y x offset"]:
    """1 where the voxel and its partner at ``v + offset`` carry the same positive id, else 0; float32.

    ``border`` says what holds where the partner is outside the block: ``"replicate"`` puts 1 where the voxel itself is
    labelled (the SegNeuron and AGQ rule), ``"masked"`` puts 0, to be left out of the loss by :func:`affinity_mask`.
    """
    if border not in ("replicate", "masked"):
        raise UserError(f"border: found {border!r}, expected 'replicate' or 'masked'")
    positive = labels > 0
    channels = []
    for offset in check_offsets(offsets):
        same = (labels == _partner(labels, offset, -1)) & positive
        if border == "replicate":
            same = same | (positive & ~inside(labels.shape[-3:], offset))
        channels.append(same)
    return jnp.stack(channels, axis=-1).astype(jnp.float32)


def affinity_mask(
    mask: Num[Array, "*batch z y x"],
    offsets: Sequence[Offset] = NEAREST_OFFSETS,
    border: Border = "replicate",
    both: bool = True,
) -> Float[Array, "*batch z y x offset"]:
    """1 for the affinities that count in the loss; float32.

    An affinity speaks of two voxels, so with ``both`` it counts only where ``mask`` is non-zero at the voxel and at its
    partner; without, the mask of the voxel alone decides (as SegNeuron does). With ``border="masked"`` affinities whose
    partner is outside do not count; with ``"replicate"`` the voxel's own mask decides there.
    """
    valid = mask > 0
    channels = []
    for offset in check_offsets(offsets):
        keep = valid
        if both:
            keep = keep & _partner(valid, offset, True)
        if border == "masked":
            keep = keep & inside(mask.shape[-3:], offset)
        channels.append(keep)
    return jnp.stack(channels, axis=-1).astype(jnp.float32)


def widen_borders(
    labels: Int[Array, "*batch z y x"], window: tuple[int, int, int] = (1, 3, 3)
) -> Int[Array, "*batch z y x"]:
    """``labels`` with 0 wherever the ``window`` around a voxel holds more than one positive id.

    Zeros in the window do not count. The window is cut at the border of the block, which for odd windows is the same as
    reflect padding. The default is the in-plane 3 x 3 window of AGQ and of the affinity literature: without
    it one-voxel borders are lost and watershed merges everything.
    """
    if len(window) != 3 or any(size < 1 or size % 2 == 0 for size in window):
        raise UserError(f"window: found {tuple(window)}, expected three odd sizes (z, y, x) such as (1, 3, 3)")
    biggest = jnp.iinfo(labels.dtype).max
    high = jnp.where(labels > 0, labels, 0)
    low = jnp.where(labels > 0, labels, biggest)
    for axis, size in zip((-3, -2, -1), window):
        high = _window_extreme(high, axis, size // 2, 0, jnp.maximum)
        low = _window_extreme(low, axis, size // 2, biggest, jnp.minimum)
    several = (high > 0) & (low < high)
    return jnp.where(several, 0, labels)


def _window_extreme(volume, axis: int, radius: int, neutral: int, extreme):
    # Shifted slices instead of reduce_window: XLA fuses them, and integer reduce_window is slow on CPU.
    size = volume.shape[axis]
    pads = [(0, 0)] * volume.ndim
    pads[axis] = (radius, radius)
    padded = jnp.pad(volume, pads, constant_values=neutral)
    result = volume
    for start in range(2 * radius + 1):
        if start != radius:
            result = extreme(result, jax.lax.slice_in_dim(padded, start, start + size, axis=padded.ndim + axis))
    return result


def foreground(labels: Int[Array, "*batch z y x"]) -> Float[Array, "*batch z y x"]:
    """1 inside labelled objects, 0 in the background; float32."""
    return (labels > 0).astype(jnp.float32)


def loss_mask(
    labels: Int[Array, "*batch z y x"],
    mask: Num[Array, "*batch z y x"] | None = None,
    ignore_labels: Sequence[int] = (),
) -> Float[Array, "*batch z y x"]:
    """1 for the voxels that count, 0 where ``mask`` is 0 or the label is one of ``ignore_labels``; float32."""
    keep = jnp.ones(labels.shape, bool) if mask is None else mask > 0
    for ignored in ignore_labels:
        keep = keep & (labels != ignored)
    return keep.astype(jnp.float32)


def one_hot(labels: Int[Array, "*batch z y x"], classes: Sequence[int] | int) -> Float[Array, "*batch z y x c"]:
    """Semantic targets, one channel per class; float32. ``classes`` is a count (0, 1, ...) or the list of label values.

    A voxel of none of the classes is zero in every channel.
    """
    values = range(classes) if isinstance(classes, int) else classes
    return (labels[..., None] == jnp.asarray(tuple(values), labels.dtype)).astype(jnp.float32)


def balancing_weights(
    targets: Float[Array, "*batch z y x c"],
    mask: Float[Array, "*batch z y x c"] | None = None,
    per: Literal["sample", "channel", "batch"] = "sample",
    fraction_limits: tuple[float, float] = (0.05, 0.99),
) -> Float[Array, "*batch z y x c"]:
    """Voxel weights that give positives and negatives of 0/1 ``targets`` equal say; float32, 0 where ``mask`` is 0.

    With f the fraction of positives among counted voxels, clipped to ``fraction_limits``, the rarer class weighs
    max(f, 1 - f) / min(f, 1 - f) and the commoner 1. f is taken over each sample (all channels together, the rule of
    the SuperHuman line of affinity networks), over each channel of each sample, or over the whole batch.
    """
    counted = jnp.ones_like(targets) if mask is None else jnp.broadcast_to(mask, targets.shape).astype(targets.dtype)
    axes = {"sample": (-4, -3, -2, -1), "channel": (-4, -3, -2), "batch": tuple(range(targets.ndim))}
    if per not in axes:
        raise UserError(f"per: found {per!r}, expected one of {sorted(axes)}")
    total = jnp.sum(counted, axes[per], keepdims=True)
    positives = jnp.sum(counted * targets, axes[per], keepdims=True)
    f = jnp.clip(positives / jnp.maximum(total, 1), *fraction_limits)
    positive_weight = jnp.maximum((1 - f) / f, 1)
    negative_weight = jnp.maximum(f / (1 - f), 1)
    return jnp.where(targets > 0.5, positive_weight, negative_weight) * counted

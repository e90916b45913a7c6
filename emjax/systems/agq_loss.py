"""AGQ's targets and losses (Chen et al., ICLR 2025, as published in code), on the accelerator, with empty query slots.

One Hungarian matching per volume, on the masks of the first stage, serves all stages. Rows of empty slots and crops
without an instance drop out of every term instead of failing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.optimize import linear_sum_assignment

from emjax.data.targets import affinities, affinity_mask, widen_borders
from emjax.errors import UserError
from emjax.losses import binary_cross_entropy
from emjax.models.layers.components import connected_components
from emjax.models.layers.interpolate import resize_linear

_EXACT = jax.lax.Precision.HIGHEST
# What the reference takes off the sampling score of voxels that belong to no instance.
_VOID_OFFSET = 99999.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and constants of the criterion; the defaults are the published ones.

    Attributes:
        dice, mask, pixel, affinity: weights of the terms.
        instances: most instances of one crop that become targets; of more, the largest.
        samples: voxels drawn for the pixel term, at most all.
        temperature: of the similarity between voxel features.
        rarity: exponent by which voxels of small instances are drawn more often.
    """

    dice: float = 3.0
    mask: float = 0.3
    pixel: float = 0.1
    affinity: float = 1.0
    instances: int = 192
    samples: int = 4096
    temperature: float = 0.3
    rarity: float = 0.6

    def validate(self) -> None:
        """Raises ``UserError`` for settings that cannot work."""
        if min(self.dice, self.mask, self.pixel, self.affinity) < 0:
            raise UserError("AGQ loss: weights dice, mask, pixel and affinity cannot be negative")
        if self.instances < 1 or self.samples < 1 or self.temperature <= 0:
            raise UserError("AGQ loss: instances, samples and temperature must be positive")


class Targets(NamedTuple):
    """``labels`` int32 (b, z, y, x), split into connected parts, borders widened; ``affinities`` float32 (..., 3).

    ``counted`` bool (b, z, y, x) and ``counted_affinities`` (..., 3) say which voxels and pairs enter the losses; None
    for all.
    """

    labels: jax.Array
    affinities: jax.Array
    counted: jax.Array | None = None
    counted_affinities: jax.Array | None = None


def split_and_erode(labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Connected parts of every id, in raster order, and the same with borders widened; int32 (b, z, y, x) both.

    Widening comes last, so an id may consist of several parts again.
    """
    parts = jax.vmap(connected_components)(labels.astype(jnp.int32))
    return parts, widen_borders(parts)


def make_targets(labels: jax.Array, mask: jax.Array | None = None) -> Targets:
    """Targets of labels (b, z, y, x) of any integer dtype, as they are after augmentation; 0 = background.

    Where ``mask`` (b, z, y, x) is 0, nothing is known and nothing is learned; the reference has no such voxels.
    """
    if mask is None:
        _, eroded = split_and_erode(labels)
        return Targets(eroded, affinities(eroded))
    counted = mask > 0
    _, eroded = split_and_erode(jnp.where(counted, labels, 0))
    return Targets(eroded, affinities(eroded), counted, affinity_mask(counted))


def instance_ids(labels: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The positive ids of ``labels`` (any shape, int32): ids (count,) ascending, and which entries are valid.

    Of more than ``count`` ids the largest objects stay. Invalid entries hold the largest int32.
    """
    nothing = jnp.iinfo(jnp.int32).max
    values = jnp.sort(labels.reshape(-1))
    position = jnp.arange(values.size)
    last = jnp.concatenate([values[1:] != values[:-1], jnp.ones(1, bool)])
    # Run lengths: distance from each run's last element to the one before.
    ends = jnp.where(last, position, -1)
    before = jnp.concatenate([jnp.full(1, -1), jax.lax.cummax(ends)[:-1]])
    lengths = jnp.where(last & (values > 0), position - before, 0)
    most, where = jax.lax.top_k(lengths, min(count, values.size))
    ids = jnp.sort(jnp.where(most > 0, values[where], nothing))
    ids = jnp.concatenate([ids, jnp.full(count - ids.size, nothing, ids.dtype)])
    return ids, ids < nothing


def _taps(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Left and right neighbour and the right one's weight along one axis, half-pixel centres, float32."""
    scale = np.float32(size) / np.float32(target)
    position = np.maximum((np.arange(target, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5), 0)
    low = np.minimum(position.astype(np.int32), size - 1)
    return low, np.minimum(low + 1, size - 1), (position - low).astype(np.float32)


def soft_masks(slots: jax.Array, count: int, grid: Sequence[int]) -> jax.Array:
    """0/1 masks of slots 0..count-1, resized to ``grid`` (z, y, x): float32 (z, y, x, count).

    ``slots`` int32 (z, y, x) says which mask a voxel belongs to, -1 none. Bilinear in each section, half-pixel centres,
    no antialiasing; sections stay. The masks never exist at full size.
    """
    depth, height, width = slots.shape
    if grid[0] != depth:
        raise UserError(f"AGQ: labels have {depth} sections, masks {grid[0]}; expected as many")
    rows = _taps(height, grid[1])
    columns = _taps(width, grid[2])
    channel = jnp.arange(count, dtype=slots.dtype)

    def corner(row: np.ndarray, column: np.ndarray) -> jax.Array:
        return (slots[:, row][:, :, column][..., None] == channel).astype(jnp.float32)

    across, down = columns[2][:, None], rows[2][:, None, None]

    def line(row: np.ndarray) -> jax.Array:
        return corner(row, columns[0]) * (1 - across) + corner(row, columns[1]) * across

    return line(rows[0]) * (1 - down) + line(rows[1]) * down


def match_scores(shares: jax.Array, masks: jax.Array) -> jax.Array:
    """Dice of every row with every target: 2 sum(p t) / (sum p^2 + sum t^2 + 1e-4).

    ``shares`` (v, 1 + n), the softmax with background first, ``masks`` (v, k); returns (1 + n, k), background row 0.
    """
    overlap = jnp.einsum("vn,vk->nk", shares, masks, precision=_EXACT)
    sizes = jnp.square(shares).sum(0)[:, None] + jnp.square(masks).sum(0)
    return (2 * overlap / (sizes + 1e-4)).at[0].set(0)


def _costs(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Scores to be maximised, such that background and empty rows are taken only where no query is left."""
    allowed = rows & (jnp.arange(rows.size) > 0)
    return jnp.where(columns, jnp.where(allowed[:, None], scores, -1.0), 0.0)


def match(scores: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The row of each target, or -1: the assignment with the largest sum of ``scores`` (1 + n, k).

    ``rows`` (1 + n,) and ``columns`` (k,) say which queries and targets are there. Targets beyond the number of queries
    stay unmatched. Compiled.
    """
    taken, target = optax.assignment.hungarian_algorithm(-_costs(scores, rows, columns))
    found = jnp.full(columns.size, -1, jnp.int32).at[target].set(taken.astype(jnp.int32))
    good = columns & (found > 0) & rows[jnp.maximum(found, 0)]
    return jnp.where(good, found, -1)


def match_on_host(scores: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """:func:`match` by SciPy, to check it."""
    scores, rows, columns = np.asarray(scores, np.float64), np.asarray(rows), np.asarray(columns)
    queries, targets = np.flatnonzero(rows[1:]) + 1, np.flatnonzero(columns)
    taken, target = linear_sum_assignment(scores[np.ix_(queries, targets)], maximize=True)
    found = np.full(columns.size, -1)
    found[targets[target]] = queries[taken]
    return found


class Matched(NamedTuple):
    """Targets of one volume after matching, (v, 1 + n): ``masks`` sum to 1, background first; ``void`` (v,) bool.

    Voxels that do not count are void, and their masks sum to 0.

    ``rows`` int32 (k,): mask channel of each target, -1 unmatched, in ascending id; ``targets`` bool (k,): which exist.
    """

    masks: jax.Array
    void: jax.Array
    rows: jax.Array
    targets: jax.Array


def match_volume(
    config: LossConfig, labels: jax.Array, masks: jax.Array, valid: jax.Array, counted: jax.Array | None = None
) -> Matched:
    """Matches the instances of one volume with the masks of the first stage.

    ``labels`` int32 (z, 2y, 2x), ``masks`` logits (z, y, x, 1 + n), ``valid`` bool (n,), ``counted`` bool (z, y, x).
    Carries no gradient.
    """
    grid, count = masks.shape[:3], masks.shape[-1]
    ids, targets = instance_ids(labels, config.instances)
    place = jnp.searchsorted(ids, labels.reshape(-1)).reshape(labels.shape)
    known = (ids[jnp.minimum(place, ids.size - 1)] == labels) & (labels > 0)
    slots = jnp.where(known, place, -1).astype(jnp.int32)
    wanted = soft_masks(slots, config.instances, grid).reshape(-1, config.instances)
    shares = jax.nn.softmax(jax.lax.stop_gradient(masks).reshape(-1, count), -1)
    present = jnp.concatenate([jnp.ones(1, bool), valid])
    rows = match(match_scores(shares, wanted), present, targets)
    channel = jnp.where(known, rows[jnp.minimum(place, ids.size - 1)], -1)
    chosen = soft_masks(channel, count, grid).reshape(-1, count)
    covered = chosen.sum(-1)
    # Rounding may push the sum of several partial masks just above 1.
    chosen = chosen / jnp.maximum(covered, 1)[:, None]
    background = 1 - chosen.sum(-1)
    void = covered < 1
    if counted is not None:
        inside = counted.reshape(-1)
        chosen, background, void = chosen * inside[:, None], background * inside, void | ~inside
    return Matched(chosen.at[:, 0].set(background), void, rows, targets)


def dice_loss(shares: jax.Array, matched: Matched, valid: jax.Array) -> jax.Array:
    """1 - dice of matched rows, outside of void, over the number of valid rows and background; one volume."""
    inside = jnp.where(matched.void[:, None], 0, shares)
    overlap = (inside * matched.masks).sum(0)
    sizes = jnp.square(inside).sum(0) + jnp.square(matched.masks).sum(0)
    used = jnp.zeros(shares.shape[-1], bool).at[jnp.where(matched.rows > 0, matched.rows, 0)].set(True).at[0].set(False)
    values = jnp.where(used, 1 - 2 * overlap / (sizes + 1e-4), 0)
    return values.sum() / (1 + valid.sum())


def mask_loss(logarithms: jax.Array, matched: Matched) -> jax.Array:
    """Cross-entropy of the softmax over rows, over the number of voxels where it is not 0; one volume."""
    values = -(matched.masks * logarithms).sum(-1)
    return values.sum() / jnp.maximum((values != 0).sum(), 1)


def gumbel(uniform: jax.Array) -> jax.Array:
    """Standard Gumbel noise from uniform numbers in (0, 1)."""
    return -jnp.log(-jnp.log(uniform))


def pixel_loss(config: LossConfig, features: jax.Array, matched: Matched, noise: jax.Array) -> jax.Array:
    """Contrast between features of sampled voxels of the same and of other instances; one volume.

    ``features`` (v, c) un-normalised, ``noise`` (v,) Gumbel. Voxels of small instances are drawn more often; void ones
    only where nothing else is left, as negatives.
    """
    masks = matched.masks[:, 1:]
    voxels = features.shape[0]
    area = masks @ masks.sum(0)
    score = config.rarity * jnp.log(voxels / jnp.maximum(area, 1)) - _VOID_OFFSET * matched.void.astype(jnp.float32)
    _, drawn = jax.lax.top_k(jax.lax.stop_gradient(score) + noise, min(config.samples, voxels))
    members = masks[drawn]
    same = jnp.einsum("in,jn->ij", members, members, precision=_EXACT)
    same = same / jnp.maximum(same.sum(0), 1)
    sampled = features[drawn]
    alike = jnp.einsum("ic,jc->ij", sampled, sampled, precision=_EXACT) / config.temperature
    values = -(same * jax.nn.log_softmax(alike, 0)).sum(0)
    return values.sum() / jnp.maximum((values != 0).sum(), 1)


def wholly(counted: jax.Array, grid: Sequence[int]) -> jax.Array:
    """Which voxels of the coarser ``grid`` (z, y, x) touch only voxels of ``counted`` (b, z, y, x, c) that are set."""
    return resize_linear(counted.astype(jnp.float32), (grid[0], grid[1], grid[2])) > 1 - 1e-6


def affinity_loss(logits: jax.Array, wanted: jax.Array, counted: jax.Array | None = None) -> jax.Array:
    """Mean binary cross-entropy of logits (b, z, y, x, 3) against targets at twice the grid, resized linearly."""
    grid = logits.shape[1], logits.shape[2], logits.shape[3]
    small = jnp.clip(resize_linear(wanted.astype(jnp.float32), grid), 1e-5, 1 - 1e-5)
    return binary_cross_entropy(logits, small, None if counted is None else wholly(counted, grid))


def criterion(
    config: LossConfig,
    stages: Sequence[jax.Array],
    valid: jax.Array,
    pixel_features: jax.Array,
    affinity_logits: jax.Array,
    targets: Targets,
    noise: jax.Array,
) -> tuple[dict[str, jax.Array], Matched]:
    """All terms, weighted, by the reference's names (``loss_dice_0`` ... ``loss_affinity``); the loss is their sum.

    ``stages``: mask logits (b, z, y, x, 1 + n) of each stage; ``valid`` bool (b, n); ``pixel_features``
    (b, z, y, x, c); ``affinity_logits`` (b, z, y, x, 3); ``noise`` (b, z * y * x) standard Gumbel. Means over volumes
    of the means over each volume, which is what the reference computes with one volume per device. Also returns the
    matching.
    """
    inside = None if targets.counted is None else wholly(targets.counted[..., None], stages[0].shape[1:4])[..., 0]
    matched = jax.vmap(lambda *volume: match_volume(config, *volume))(targets.labels, stages[0], valid, inside)
    matched = jax.lax.stop_gradient(matched)
    terms: dict[str, jax.Array] = {}
    for index, masks in enumerate(stages):
        suffix = "" if index == len(stages) - 1 else f"_{index}"
        logits = masks.reshape(masks.shape[0], -1, masks.shape[-1])
        shares, logarithms = jax.nn.softmax(logits, -1), jax.nn.log_softmax(logits, -1)
        terms[f"loss_dice{suffix}"] = config.dice * jax.vmap(dice_loss)(shares, matched, valid).mean()
        terms[f"loss_mask{suffix}"] = config.mask * jax.vmap(mask_loss)(logarithms, matched).mean()
    features = pixel_features.reshape(pixel_features.shape[0], -1, pixel_features.shape[-1])
    each = jax.vmap(lambda *volume: pixel_loss(config, *volume))(features, matched, noise)
    terms["loss_pixel"] = config.pixel * each.mean()
    terms["loss_affinity"] = config.affinity * affinity_loss(
        affinity_logits, targets.affinities, targets.counted_affinities
    )
    return terms, matched


def total(terms: Mapping[str, jax.Array]) -> jax.Array:
    """The loss: the plain sum."""
    return sum(terms.values(), jnp.float32(0))

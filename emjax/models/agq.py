"""AGQ: affinity-guided queries for dense instance segmentation of neurons (Chen et al., ICLR 2025).

A residual U-Net feeds three branches: affinities, an embedding of every voxel, and features from which queries are
pooled. Connected components of the thresholded affinity give one query each; together with learned queries they are
refined by two K-Net iterations (Zhang et al. 2021), and every query's kernel, multiplied with the voxel embedding, is
the mask of one instance.

The number of components differs from block to block. Here it is a fixed number of slots with a mask of valid ones:
batch statistics, softmaxes and attention leave invalid slots out, so results equal those of the network without slots.
"""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.errors import UserError
from emjax.models.layers.components import connected_components
from emjax.models.layers.conv import Conv3d, Triple
from emjax.models.layers.interpolate import resize_linear
from emjax.models.layers.norm import MaskedBatchNorm

PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
ABSENT = -1e30
"""Logit of a query slot that holds no query: exactly 0 after any softmax, and finite, so that gradients are."""

_XY: Triple = (1, 3, 3)
_ISO: Triple = (3, 3, 3)
_EXACT = jax.lax.Precision.HIGHEST

_orthogonal = nnx.initializers.orthogonal()
_kaiming_fan_out = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_torch_default = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_small_normal = nnx.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AGQConfig:
    """The network; the defaults are the published one.

    Attributes:
        filters: features per level, finest first; level 0 has the grid of the block, each next one half of it in y and
            x, and in z where ``isotropic``.
        isotropic: levels reached by a stride in z as well, with 3 x 3 x 3 kernels.
        features: width of the fused map, of all three branches and of the queries.
        groups: groups of the group norms.
        heads: heads of the self-attention among queries.
        branch_convs: convolutions of each of the three branches.
        guided: slots for affinity-guided queries; 0 leaves them out.
        learned: number of learned queries; 0 leaves them out.
        min_area: components of *more* voxels than this (of the half grid) give a query.
        iterations: refinements of queries and masks.
        selection: which components count where there are more than slots: the ``"largest"``, or the first in
            ``"raster"`` order. In training it is a random subset, as long as a key is given.
        threshold_scope: the affinity threshold is the mean over one ``"volume"``, or over the whole ``"batch"`` (as the
            reference has it on each device).
        statistics: batch norms of the convolutions take the statistics of each ``"volume"`` (which is what the
            reference does with one volume per device) or of the whole ``"batch"``. Kernels and logits always use the
            whole batch, over all devices.
        dtype: precision of the convolutions; norms, queries, masks and losses are float32.
        remat: compute the layers on the finest grid again in the backward pass instead of storing them.
    """

    filters: tuple[int, ...] = (32, 64, 96, 128, 160)
    isotropic: tuple[bool, ...] = (False, False, False, True, True)
    features: int = 64
    groups: int = 8
    heads: int = 8
    branch_convs: int = 4
    guided: int = 100
    learned: int = 100
    min_area: int = 100
    iterations: int = 2
    selection: Literal["largest", "raster"] = "largest"
    threshold_scope: Literal["volume", "batch"] = "volume"
    statistics: Literal["volume", "batch"] = "volume"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False

    @property
    def queries(self) -> int:
        """Query slots, guided ones first."""
        return self.guided + self.learned

    def validate(self) -> None:
        """Raises ``UserError`` for settings that cannot work, with what was found and expected."""
        if len(self.filters) < 2 or len(self.isotropic) != len(self.filters):
            raise UserError(
                f"AGQ: filters {self.filters} and isotropic {self.isotropic}: expected as many of both, at least 2"
            )
        if self.isotropic[0] or self.isotropic[1]:
            raise UserError("AGQ: isotropic levels start at the third; masks have the sections of the block")
        for width in (*self.filters, self.features):
            if width < 1 or width % self.groups:
                raise UserError(f"AGQ: width {width} is not a positive multiple of groups {self.groups}")
        if self.features % self.heads:
            raise UserError(f"AGQ: features {self.features} is not a multiple of heads {self.heads}")
        if min(self.guided, self.learned, self.min_area) < 0 or self.queries < 1:
            raise UserError("AGQ: guided, learned and min_area cannot be negative, nor guided and learned both 0")
        if self.iterations < 1 or self.branch_convs < 1:
            raise UserError("AGQ: iterations and branch_convs must be at least 1")
        for name, known in (
            ("selection", ("largest", "raster")),
            ("threshold_scope", ("volume", "batch")),
            ("statistics", ("volume", "batch")),
            ("dtype", tuple(PRECISIONS)),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"AGQ: {name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")

    def mask_grid(self, shape: Triple) -> Triple:
        """Size (z, y, x) of the masks and affinities of a block of ``shape``."""
        return shape[0], (shape[1] - 1) // 2 + 1, (shape[2] - 1) // 2 + 1


class Stage(NamedTuple):
    """Queries and masks after the first head, or after one iteration.

    ``queries``, ``kernels`` (b, n, c); ``masks`` (b, z, y, x, 1 + n), background first, :data:`ABSENT` in empty slots.
    ``gathered`` and ``updated`` (b, n, c) are the features gathered by the masks before and the updated kernels, both
    ``None`` in the first stage. Rows of empty slots mean nothing.
    """

    queries: jax.Array
    kernels: jax.Array
    masks: jax.Array
    gathered: jax.Array | None = None
    updated: jax.Array | None = None


class AGQOutputs(NamedTuple):
    """Everything that the network computes; what a caller does not use costs nothing under ``jit``.

    Float32 (b, z, y, x, channel), on the half grid unless said: ``stem`` (full grid), ``levels`` P_0 ... P_4 (each on
    its own grid), ``fused``, ``affinity_logits`` (channels z, y, x), ``mask_features`` (not normalised),
    ``query_features``. ``component_labels`` int32 (b, z, y, x); ``valid`` bool (b, n), guided slots first, in ascending
    component label; ``stages`` the first masks, then one per iteration.
    """

    stem: jax.Array
    levels: tuple[jax.Array, ...]
    fused: jax.Array
    affinity_logits: jax.Array
    mask_features: jax.Array
    query_features: jax.Array
    component_labels: jax.Array
    valid: jax.Array
    stages: tuple[Stage, ...]


def _group_norm(config: AGQConfig, features: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        features,
        num_groups=config.groups,
        epsilon=1e-5,
        use_fast_variance=False,
        dtype=PRECISIONS[config.dtype],
        rngs=rngs,
    )


class ConvNorm(nnx.Module):
    """Convolution with replicated border, then group norm."""

    def __init__(
        self,
        config: AGQConfig,
        in_features: int,
        features: int,
        kernel: Triple,
        rngs: nnx.Rngs,
        strides: Triple = (1, 1, 1),
    ):
        self.conv = _convolution(config, in_features, features, kernel, rngs, strides=strides, init=_orthogonal)
        self.norm = _group_norm(config, features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.conv(x))


def _convolution(
    config: AGQConfig,
    in_features: int,
    features: int,
    kernel: Triple,
    rngs: nnx.Rngs,
    *,
    init: Callable,
    strides: Triple = (1, 1, 1),
) -> Conv3d:
    return Conv3d(
        in_features,
        features,
        kernel,
        strides=strides,
        padding="replicate",
        use_bias=False,
        kernel_init=init,
        dtype=PRECISIONS[config.dtype],
        rngs=rngs,
    )


class Residual(nnx.Module):
    """Two in-plane convolutions added to the identity."""

    def __init__(self, config: AGQConfig, features: int, rngs: nnx.Rngs):
        self.first = ConvNorm(config, features, features, _XY, rngs)
        self.second = ConvNorm(config, features, features, _XY, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.elu(x + self.second(jax.nn.elu(self.first(x))))


class DownLayer(nnx.Module):
    """To the next coarser grid, then a residual block."""

    def __init__(
        self, config: AGQConfig, in_features: int, features: int, kernel: Triple, strides: Triple, rngs: nnx.Rngs
    ):
        self.reduce = ConvNorm(config, in_features, features, kernel, rngs, strides)
        self.block = Residual(config, features, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.block(jax.nn.elu(self.reduce(x)))


class UpLayer(nnx.Module):
    """Convolution on the coarse grid, resize to the skip's grid, sum, residual block."""

    def __init__(self, config: AGQConfig, in_features: int, features: int, kernel: Triple, rngs: nnx.Rngs):
        self.merge = ConvNorm(config, in_features, features, kernel, rngs)
        self.block = Residual(config, features, rngs)

    def __call__(self, x: jax.Array, skip: jax.Array) -> jax.Array:
        grid = skip.shape[1], skip.shape[2], skip.shape[3]
        x = resize_linear(jax.nn.elu(self.merge(x)), grid, align_corners=True)
        return self.block(x + skip)


class Fusion(nnx.Module):
    """The sum of all decoder levels on the half grid.

    The convolution of the finest level runs on its own grid: its group norm needs the statistics of every voxel.
    """

    def __init__(self, config: AGQConfig, rngs: nnx.Rngs):
        self.pre = nnx.List(ConvNorm(config, width, config.features, _XY, rngs) for width in config.filters)
        self.post = ConvNorm(config, config.features, config.features, _XY, rngs)
        self.remat = config.remat

    def __call__(self, levels: tuple[jax.Array, ...]) -> jax.Array:
        grid = levels[1].shape[1], levels[1].shape[2], levels[1].shape[3]
        terms = []
        for index, (conv, level) in enumerate(zip(self.pre, levels)):

            def layer(x: jax.Array, conv: ConvNorm = conv) -> jax.Array:
                return resize_linear(jax.nn.elu(conv(x)), grid, align_corners=True)

            terms.append(_run(layer, self.remat and index == 0, level))
        return jax.nn.elu(self.post(functools.reduce(operator.add, terms)))


def _run(layer: Callable, again: bool, *inputs: jax.Array) -> jax.Array:
    """``layer(*inputs)``, computed again in the backward pass if ``again``."""
    return jax.checkpoint(lambda *x: layer(*x))(*inputs) if again else layer(*inputs)


def coordinates(shape: Triple) -> np.ndarray:
    """(z, y, x, 3) float32: positions from -1 to 1 along each axis, in the order z, x, y of the reference."""
    z, y, x = (np.linspace(-1, 1, size, dtype=np.float32) for size in shape)
    grid = np.meshgrid(z, y, x, indexing="ij")
    return np.stack([grid[0], grid[2], grid[1]], -1)


class Branch(nnx.Module):
    """Convolutions without norm, then a projection of every voxel."""

    def __init__(self, config: AGQConfig, in_features: int, features: int, kernel: Triple, rngs: nnx.Rngs):
        sizes = [in_features] + [config.features] * config.branch_convs
        self.convs = nnx.List(
            _convolution(config, before, after, kernel, rngs, init=_kaiming_fan_out)
            for before, after in itertools.pairwise(sizes)
        )
        self.projection = Conv3d(
            config.features,
            features,
            (1, 1, 1),
            kernel_init=_kaiming_fan_out,
            dtype=PRECISIONS[config.dtype],
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in self.convs:
            x = jax.nn.elu(conv(x))
        return self.projection(x).astype(jnp.float32)


class ConvBatchNorm(nnx.Module):
    """In-plane convolution, batch norm, ReLU."""

    def __init__(self, config: AGQConfig, in_features: int, features: int, rngs: nnx.Rngs):
        self.conv = _convolution(config, in_features, features, _XY, rngs, init=_torch_default)
        self.norm = MaskedBatchNorm(features, 1e-5, 0.1, config.statistics == "volume", rngs)

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return jax.nn.relu(self.norm(self.conv(x), train))


def _linear(in_features: int, features: int, rngs: nnx.Rngs, init: Callable | None = None) -> nnx.Linear:
    bound = in_features**-0.5

    def uniform(key, shape, dtype=jnp.float32, **_):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return nnx.Linear(
        in_features,
        features,
        kernel_init=init or _torch_default,
        bias_init=uniform if init is None else nnx.initializers.zeros,
        rngs=rngs,
    )


def _layer_norm(features: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(features, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class MaskHead(nnx.Module):
    """Queries to kernels, kernels times voxel embedding to logits, both batch-normalised over valid queries."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.kernel = _linear(features, features, rngs, _small_normal)
        self.norm_kernel = MaskedBatchNorm(features, 1e-3, 0.01, False, rngs)
        self.norm_logits = MaskedBatchNorm(1, 1e-3, 0.01, False, rngs)

    def __call__(
        self, queries: jax.Array, embedding: jax.Array, background: jax.Array, valid: jax.Array, train: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Kernels (b, n, c) and logits (b, z, y, x, 1 + n), ``background`` (b, z, y, x, 1) in front."""
        kernels = self.norm_kernel(self.kernel(queries), train, valid[..., None])
        logits = jnp.einsum("bzyxc,bnc->bzyxn", embedding, kernels, precision=_EXACT)
        logits = self.norm_logits(logits[..., None], train, valid[:, None, None, None, :, None])[..., 0]
        logits = jnp.where(valid[:, None, None, None], logits, ABSENT)
        return kernels, jnp.concatenate([background, logits], -1)


class KernelUpdate(nnx.Module):
    """Gated mixture of gathered features and queries (K-Net's kernel update head)."""

    def __init__(self, features: int, rngs: nnx.Rngs):
        self.dynamic_layer = _linear(features, 2 * features, rngs)
        self.input_layer = _linear(features, 2 * features, rngs)
        self.input_gate = _linear(features, features, rngs)
        self.update_gate = _linear(features, features, rngs)
        self.norm_in = _layer_norm(features, rngs)
        self.norm_out = _layer_norm(features, rngs)
        self.input_norm_in = _layer_norm(features, rngs)
        self.input_norm_out = _layer_norm(features, rngs)
        self.fc_layer = _linear(features, features, rngs)
        self.fc_norm = _layer_norm(features, rngs)

    def __call__(self, gathered: jax.Array, queries: jax.Array) -> jax.Array:
        gathered_in, gathered_out = jnp.split(self.dynamic_layer(gathered), 2, -1)
        query_in, query_out = jnp.split(self.input_layer(queries), 2, -1)
        gate = gathered_in * query_in
        keep = jax.nn.sigmoid(self.input_norm_in(self.input_gate(gate)))
        update = jax.nn.sigmoid(self.norm_in(self.update_gate(gate)))
        mixed = update * self.norm_out(gathered_out) + keep * self.input_norm_out(query_out)
        return jax.nn.relu(self.fc_norm(self.fc_layer(mixed)))


class Interaction(nnx.Module):
    """Self-attention among valid queries and an MLP, norms after the sums."""

    def __init__(self, features: int, heads: int, rngs: nnx.Rngs):
        self.attention_in = _linear(features, 3 * features, rngs)
        self.attention_out = _linear(features, features, rngs)
        self.norm_attention = _layer_norm(features, rngs)
        self.mlp_in = _linear(features, 4 * features, rngs)
        self.mlp_out = _linear(4 * features, features, rngs)
        self.norm_mlp = _layer_norm(features, rngs)
        self.heads = heads

    def __call__(self, queries: jax.Array, valid: jax.Array) -> jax.Array:
        batch, count, features = queries.shape
        query, key, value = (
            part.reshape(batch, count, self.heads, features // self.heads)
            for part in jnp.split(self.attention_in(queries), 3, -1)
        )
        scores = jnp.einsum("bqhc,bkhc->bhqk", query, key, precision=_EXACT) * (features // self.heads) ** -0.5
        weights = jax.nn.softmax(jnp.where(valid[:, None, None], scores, ABSENT), -1)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", weights, value, precision=_EXACT).reshape(queries.shape)
        queries = self.norm_attention(queries + self.attention_out(mixed))
        return self.norm_mlp(queries + self.mlp_out(jax.nn.gelu(self.mlp_in(queries), approximate=False)))


def without_background(masks: jax.Array, first_only: bool = False) -> jax.Array:
    """Masks (b, z, y, x, 1 + n) whose background logit is 0: background is then where every query's logit is negative.

    ``first_only`` leaves all volumes of the batch but the first as they are, as the reference does.
    """
    changed = masks.at[:1, ..., 0] if first_only else masks.at[..., 0]
    return changed.set(0.0)


def coarse_components(affinity_logits: jax.Array, scope: str = "volume") -> jax.Array:
    """Components of voxels whose mean affinity exceeds the mean of all; int32 ids (b, z, y, x) in raster order.

    ``affinity_logits`` (b, z, y, x, 3); 26-connectivity; ``scope`` says whether the mean is that of the ``"volume"`` or
    of the ``"batch"``. Carries no gradient.
    """
    affinity = jax.nn.sigmoid(jax.lax.stop_gradient(affinity_logits)).mean(-1)
    threshold = affinity.mean() if scope == "batch" else affinity.mean((1, 2, 3), keepdims=True)
    return jax.vmap(connected_components)(affinity > threshold)


def choose_components(
    labels: jax.Array, count: int, min_area: int, selection: str, key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """At most ``count`` ids of more than ``min_area`` voxels: ids int32 (count,) ascending, and which slots are valid.

    ``labels`` int32, any shape, ids 1..``labels.size``, 0 = background. With ``key`` a random subset, otherwise the
    ``"largest"`` or the first in ``"raster"`` order. Ids of empty slots are ``labels.size + 1``.
    """
    size = labels.size
    areas = jnp.zeros(size + 1, jnp.int32).at[labels.reshape(-1)].add(1).at[0].set(0)
    if key is not None:
        score = jax.random.randint(key, areas.shape, 0, jnp.iinfo(jnp.int32).max)
    elif selection == "largest":
        score = areas
    else:
        score = size - jnp.arange(size + 1)
    found, ids = jax.lax.top_k(jnp.where(areas > min_area, score, -1), min(count, size + 1))
    ids = jnp.sort(jnp.where(found >= 0, ids, size + 1))
    ids = jnp.concatenate([ids, jnp.full((count - ids.size,), size + 1, ids.dtype)])
    return ids, ids <= size


def pool_components(features: jax.Array, labels: jax.Array, ids: jax.Array) -> jax.Array:
    """Mean of ``features`` (z, y, x, c) over each component ``ids`` (n,) of ``labels`` (z, y, x): (n, c).

    One product with the components' indicator matrix; zero for an id without a voxel.
    """
    slots = jnp.zeros(labels.size + 2, jnp.int32).at[ids].set(jnp.arange(1, ids.size + 1))
    slot = slots.at[labels.size + 1].set(0)[labels.reshape(-1)]
    members = (slot[:, None] == jnp.arange(1, ids.size + 1)).astype(jnp.float32)
    sums = jnp.einsum("vn,vc->nc", members, features.reshape(labels.size, -1), precision=_EXACT)
    return sums / jnp.maximum(members.sum(0), 1)[:, None]


class Decoder(nnx.Module):
    """Query features, initial queries, and the iterations that refine them."""

    def __init__(self, config: AGQConfig, in_features: int, rngs: nnx.Rngs):
        width = config.features
        self.config = config
        sizes = [in_features] + [width] * config.branch_convs
        self.query_convs = nnx.List(ConvBatchNorm(config, a, b, rngs) for a, b in itertools.pairwise(sizes))
        self.learned = (
            nnx.Embed(config.learned, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
            if config.learned
            else None
        )
        count = config.iterations
        self.heads = nnx.List(MaskHead(width, rngs) for _ in range(count + 1))
        self.updates = nnx.List(KernelUpdate(width, rngs) for _ in range(count))
        self.interactions = nnx.List(Interaction(width, config.heads, rngs) for _ in range(count))
        # One per stage. The reference lists the first stage's head last.
        self.backgrounds = nnx.List(ConvBatchNorm(config, width, 1, rngs) for _ in range(count + 1))

    def initial_queries(
        self, features: jax.Array, labels: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Queries (b, n, c), guided ones first, and the validity (b, n) of their slots."""
        config = self.config
        batch = features.shape[0]
        queries, valid = [], []
        if config.guided:
            keys = None if key is None else jax.random.split(key, batch)

            def guided(features, labels, key):
                ids, present = choose_components(labels, config.guided, config.min_area, config.selection, key)
                return pool_components(features, labels, ids), present

            pooled, present = jax.vmap(guided, (0, 0, None if keys is None else 0))(features, labels, keys)
            queries.append(pooled)
            valid.append(present)
        if self.learned is not None:
            table = self.learned.embedding[...]
            queries.append(jnp.broadcast_to(table, (batch, *table.shape)))
            valid.append(jnp.ones((batch, config.learned), bool))
        return jnp.concatenate(queries, 1), jnp.concatenate(valid, 1)

    def __call__(
        self, features: jax.Array, queries: jax.Array, valid: jax.Array, mask_features: jax.Array, train: bool
    ) -> tuple[Stage, ...]:
        """All stages from query features and un-normalised voxel embedding (b, z, y, x, c), queries and validity."""
        squares = jnp.square(mask_features).sum(-1, keepdims=True)
        embedding = mask_features / jnp.sqrt(jnp.maximum(squares, 1e-24))
        background = self.backgrounds[0](embedding, train)
        kernels, masks = self.heads[0](queries, embedding, background, valid, train)
        stages = [Stage(queries, kernels, masks)]
        for index, (update, interact) in enumerate(zip(self.updates, self.interactions), 1):
            shares = jax.nn.softmax(masks[..., 1:], -1) * valid[:, None, None, None]
            # Section by section: a sum over so many voxels at once is rounded differently for every number of queries.
            gathered = jnp.einsum("bzyxn,bzyxc->bznc", shares, features, precision=_EXACT).sum(1)
            updated = update(gathered, queries)
            queries = interact(updated, valid)
            background = self.backgrounds[index](embedding, train)
            kernels, masks = self.heads[index](queries, embedding, background, valid, train)
            stages.append(Stage(queries, kernels, masks, gathered, updated))
        return tuple(stages)


class AGQ(nnx.Module):
    """The whole network: :meth:`__call__`."""

    def __init__(self, config: AGQConfig, *, rngs: nnx.Rngs):
        config.validate()
        self.config = config
        filters = config.filters
        kernels = [_ISO if isotropic else _XY for isotropic in config.isotropic]
        self.stem = ConvNorm(config, 1, filters[0], (1, 5, 5), rngs)
        self.down: nnx.List = nnx.List()
        for level, width in enumerate(filters):
            strides = (2 if config.isotropic[level] else 1, 2, 2) if level else (1, 1, 1)
            self.down.append(DownLayer(config, filters[max(level - 1, 0)], width, kernels[level], strides, rngs))
        self.up = nnx.List(
            UpLayer(config, filters[level + 1], filters[level], kernels[level + 1], rngs)
            for level in range(len(filters) - 1)
        )
        self.fusion = Fusion(config, rngs)
        width = config.features + 3
        self.mask_branch = Branch(config, width, config.features, _XY, rngs)
        self.affinity_branch = Branch(config, width, 3, _ISO, rngs)
        self.decoder = Decoder(config, width, rngs)

    def _backbone(self, image: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The stem's output, and P_0 ... P_4."""
        again = self.config.remat
        stem = x = jax.nn.elu(self.stem(image))
        skips = []
        for level, layer in enumerate(self.down):
            x = _run(layer, again and level == 0, x)
            skips.append(x)
        levels = [skips.pop()]
        for level in reversed(range(len(self.up))):
            levels.insert(0, _run(self.up[level], again and level == 0, levels[0], skips.pop()))
        return stem, tuple(levels)

    def __call__(
        self,
        image: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        affinity_override: jax.Array | None = None,
        component_labels: jax.Array | None = None,
    ) -> AGQOutputs:
        """Runs the network on normalised blocks ``image`` (b, z, y, x, 1), float.

        ``train`` takes batch statistics and moves the running ones; ``key`` then draws which components become queries
        where there are more than slots. ``affinity_override`` (b, z, y, x, 3) replaces the network's affinity logits
        from there on, ``component_labels`` (b, z, y, x) int32 the components of the thresholded affinity; both on the
        grid ``config.mask_grid``.
        """
        config = self.config
        if image.ndim != 5 or image.shape[-1] != 1 or min(image.shape) < 1:
            raise UserError(f"AGQ: block of shape {image.shape}; expected (batch, z, y, x, 1) without an empty axis")
        stem, levels = self._backbone(image.astype(PRECISIONS[config.dtype]))
        fused = self.fusion(levels)
        batch, *grid = fused.shape[:4]
        for name, given, channels in (
            ("affinity_override", affinity_override, (3,)),
            ("component_labels", component_labels, ()),
        ):
            if given is not None and given.shape != (batch, *grid, *channels):
                raise UserError(f"AGQ: {name} of shape {given.shape}; expected {(batch, *grid, *channels)}")
        position = jnp.broadcast_to(
            jnp.asarray(coordinates((grid[0], grid[1], grid[2])), fused.dtype), (batch, *grid, 3)
        )
        x = jnp.concatenate([position, fused], -1)
        affinity_logits = self.affinity_branch(x) if affinity_override is None else affinity_override
        mask_features = self.mask_branch(x)
        query_features = x
        for conv in self.decoder.query_convs:
            query_features = conv(query_features, train)
        if component_labels is None:
            component_labels = coarse_components(affinity_logits, config.threshold_scope)
        queries, valid = self.decoder.initial_queries(query_features, component_labels, key if train else None)
        stages = self.decoder(query_features, queries, valid, mask_features, train)
        return AGQOutputs(
            stem,
            levels,
            fused,
            affinity_logits.astype(jnp.float32),
            mask_features,
            query_features,
            component_labels,
            valid,
            stages,
        )

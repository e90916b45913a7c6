"""AGQ (Chen et al., ICLR 2025): affinity-guided queries segment blocks, affinities on block faces join them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.targets import NEAREST_OFFSETS
from emjax.errors import UserError
from emjax.models.agq import AGQ, AGQConfig, without_background
from emjax.postprocess.agglomerate import agglomerate
from emjax.postprocess.block_merge import border_affinities, merge_blocks
from emjax.postprocess.blockwise import block_graph
from emjax.postprocess.components import label_components
from emjax.postprocess.region_graph import Graph
from emjax.systems.agq_blocks import SOFT_AREA, block_affinities, block_labels, border_between_blocks
from emjax.systems.agq_loss import LossConfig, Targets, criterion, make_targets, total
from emjax.systems.protocol import Block, Output, Triple, unit_grey


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """How instances of neighbouring blocks are joined.

    Attributes:
        on_border: what the affinities on faces between blocks are averaged with (those inside: 0). With 0.3, and
            ``threshold`` 0.5, instances join where their mean affinity exceeds 0.7, and never inside a block.
        threshold: instances are joined while 1 - mean is below it.
        ties: ``"waterz"`` reproduces the reference's bin queue merge for merge, ``"canonical"`` depends on no order.
        queue: bins of that queue.
        threads: of the joining, on the host.
    """

    on_border: float = 0.3
    threshold: float = 0.5
    ties: Literal["waterz", "canonical"] = "waterz"
    queue: int = 256
    threads: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """AGQ; the defaults are the published system.

    Attributes:
        model: the network.
        criterion: weights and constants of the losses.
        voxel_size: nm (z, y, x) that the model is meant for; prediction warns when the volume's differs.
        plan: blocks of prediction. ``"linear"`` blending averages affinities where blocks overlap; of instances the
            later block's stay.
        background: ``"learned"`` takes the background head's logit, ``"zero"`` calls background what every query's
            logit is negative for.
        soft_area: queries with a smaller sum of probabilities (in voxels) are dropped from a block.
        merge: joining of instances across blocks.
    """

    model: AGQConfig = AGQConfig()
    criterion: LossConfig = LossConfig()
    voxel_size: tuple[float, float, float] | None = None
    plan: Block = Block(size=(17, 257, 257), stride=(16, 256, 256), blending="linear")
    background: Literal["learned", "zero"] = "learned"
    soft_area: float = SOFT_AREA
    merge: Merge = Merge()


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    config.model.validate()
    config.criterion.validate()
    config.plan.validate()
    if config.plan.blending == "gaussian" or any(config.plan.halo):
        raise UserError(
            f"plan: blending {config.plan.blending!r} with halo {config.plan.halo}; instances of whole blocks are "
            "joined, expected 'linear' or 'crop' without a halo"
        )
    if config.background not in ("learned", "zero"):
        raise UserError(f"background is {config.background!r}; expected 'learned' or 'zero'")
    merge = config.merge
    if merge.ties not in ("waterz", "canonical") or not 0 <= merge.on_border <= 1 or not 0 <= merge.threshold <= 1:
        raise UserError(
            f"merge: ties {merge.ties!r}, on_border {merge.on_border:g}, threshold {merge.threshold:g}; expected "
            "'waterz' or 'canonical', and numbers from 0 to 1"
        )


def check_block(config: Config, size: Triple) -> str:
    """What a block of ``size`` (z, y, x) has that a trained one has not, in one sentence, or an empty string.

    Any size works: coarser grids are resized to finer ones. They fit voxel for voxel where a size is one more than a
    multiple of the total stride.
    """
    strides = np.ones(3, int)
    for level, isotropic in enumerate(config.model.isotropic):
        if level:
            strides *= np.array([2 if isotropic else 1, 2, 2])
    odd = [f"{length} along {axis}" for length, step, axis in zip(size, strides, "zyx") if (length - 1) % step]
    multiples = tuple(int(step) for step in strides)
    return f"block has {', '.join(odd)}; grids fit exactly for multiples of {multiples} plus 1" if odd else ""


def domain(config: Config, voxel_size: tuple[float, float, float]) -> str | None:
    """A warning if blocks of prediction do not fit the network's grids voxel for voxel; see :func:`check_block`."""
    found = check_block(config, config.plan.size)
    return f"warning: {found}; expect worse results near the far borders of blocks" if found else None


def build(config: Config, rngs: nnx.Rngs) -> AGQ:
    """The network."""
    return AGQ(config.model, rngs=rngs)


def trainable(config: Config, path: str) -> bool:
    """Every parameter trains."""
    return True


def normalise(image: jax.Array) -> jax.Array:
    """Blocks (b, z, y, x), uint8 or float32 in 0..1, as float32 in -1..1 with a channel axis."""
    return ((unit_grey(image) - 0.5) / 0.5)[..., None]


def targets(config: Config, batch: Mapping[str, jax.Array]) -> Targets:
    """Instances and affinities of ``batch["labels"]``: split into connected parts, borders widened.

    Voxels whose optional ``batch["mask"]`` is 0 do not count.
    """
    return make_targets(batch["labels"], batch.get("mask"))


def loss(
    config: Config, model: AGQ, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum of all terms, and the terms; ``key`` draws voxels of the pixel term and, of too many, components."""
    choose, sample = jax.random.split(key)
    outputs = model(normalise(batch["image"]), train=train, key=choose)
    batch_size, *grid, _ = outputs.affinity_logits.shape
    noise = jax.random.gumbel(sample, (batch_size, int(np.prod(grid))))
    terms, matched = criterion(
        config.criterion,
        [stage.masks for stage in outputs.stages],
        outputs.valid,
        outputs.mask_features,
        outputs.affinity_logits,
        targets(config, batch),
        noise,
    )
    guided = outputs.valid[:, : config.model.guided].sum(-1)
    counts = {
        "guided_queries": guided.mean(dtype=jnp.float32),
        "instances": matched.targets.sum(-1).mean(dtype=jnp.float32),
        "unmatched": (matched.targets & (matched.rows < 0)).sum(-1).mean(dtype=jnp.float32),
    }
    return total(terms), terms | counts


def predict(config: Config, model: AGQ, image: jax.Array) -> dict[str, jax.Array]:
    """``instances`` int16 (b, z, y, x, 1), local to each block, and ``affinities`` float16 (b, z, y, x, 3) in 0..1.

    Probabilities never leave the accelerator.
    """
    outputs = model(normalise(image))
    masks = outputs.stages[-1].masks
    if config.background == "zero":
        masks = without_background(masks)
    size = image.shape[1:4]
    labels = jax.vmap(lambda block: block_labels(block, size, config.soft_area)[0])(masks)
    return {
        "instances": labels[..., None],
        "affinities": block_affinities(outputs.affinity_logits, size).astype(jnp.float16),
    }


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Refused: ids of instances cannot be averaged over flips."""
    raise UserError("AGQ predicts instances, which cannot be averaged over test-time flips; leave --flips out")


def outputs(config: Config) -> dict[str, Output]:
    """Instances of each block, and affinities of the nearest neighbours."""
    offsets = [list(offset) for offset in NEAREST_OFFSETS]
    return {
        "instances": Output(kind="instances", channels=1),
        "affinities": Output(kind="affinities", channels=3, attributes={"offsets": offsets}),
    }


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Labels uint32 (z, y, x): instances of blocks joined by the affinities on the faces between them.

    ``instances`` (1, z, y, x) carry the number of their block above :data:`INSTANCE_BITS` bits; ``affinities``
    (3, z, y, x) are uint8 (value / 255) or float32.
    """
    settings = config.merge
    instances = np.asarray(outputs["instances"])[0].astype(np.uint64, copy=False)
    affinities = np.asarray(outputs["affinities"])
    if affinities.dtype.kind == "f":
        affinities = affinities.astype(np.float32, copy=False)
    return merge_blocks(
        affinities,
        instances,
        border_between_blocks(instances),
        on_border=settings.on_border,
        threshold=settings.threshold,
        ties=settings.ties,
        discretize_queue=settings.queue if settings.ties == "waterz" else 0,
        threads=settings.threads,
    )


@dataclasses.dataclass(frozen=True)
class Stitching:
    """:func:`decode` in blocks. Always ``ties="canonical"``: the order of a queue would depend on the blocks."""

    settings: Merge
    pieces: str = "instances"
    whole_sections: bool = False
    bytes_per_voxel: int = 80

    def fragments(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """26-connected parts of instances."""
        return label_components(outputs["instances"][0], 26)

    def notes(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}

    def edges(self, outputs: Mapping[str, np.ndarray], fragments: np.ndarray, lead: Triple) -> Graph:
        """Mean affinities, raised on the faces between blocks of prediction."""
        border = border_between_blocks(outputs["instances"][0])
        values = border_affinities(outputs["affinities"], border, self.settings.on_border)
        return block_graph(values, fragments, lead, ("mean",))

    def partition(self, graph: Graph, nodes: int, notes: list[dict[str, np.ndarray]]) -> np.ndarray:
        """Agglomeration."""
        tree = agglomerate(graph, self.settings.threshold)
        return dataclasses.replace(tree, nodes=nodes).cut()

    def finish(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
        """As they are."""
        return labels


def block_decoder(config: Config) -> Stitching:
    """Joins instances of volumes that do not fit into memory."""
    return Stitching(config.merge)


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan

"""SegNeuron, the generalist (Zhang et al., MICCAI 2024): affinities and foreground by MNet, trained on mixed domains.

This module is the second and third stage, fine-tuning and segmentation; ``emjax.systems.segneuron_pretraining`` is the
first. The network sees grey values 0..1 without further normalisation and is meant for 5 to 10 nm in plane.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.mixing import AFFINITY_BITS, Mixing, mixed_sample
from emjax.data.pipeline import Sampler
from emjax.data.targets import NEAREST_OFFSETS, affinities, foreground
from emjax.errors import UserError
from emjax.models import mnet
from emjax.postprocess.foreground_multicut import Settings as Segmentation
from emjax.postprocess.foreground_multicut import (
    brightest_of,
    check_foreground,
    foreground_multicut,
    fragments,
    is_background,
    partition,
    segment_sections,
    slab_affinities,
    slab_graph,
)
from emjax.postprocess.multicut import BoundaryEdges
from emjax.postprocess.region_graph import Graph
from emjax.systems import segneuron_pretraining
from emjax.systems.protocol import Block, Output, Triple, flip_back_affinities, unit_grey

PATCH = (20, 128, 128)
PLAN = Block(size=PATCH, stride=(10, 64, 64), placement="centred", blending="gaussian_plus", sigma=0.2, floor=1e-6)
NOTEBOOK_PLAN = Block(size=PATCH, stride=(10, 64, 64), blending="gaussian_least", sigma=0.5, floor=1e-3)
IN_PLANE_NM = (5.0, 10.0)
"""Pixel sizes that SegNeuron was trained on; other volumes are to be rescaled first."""
SECTION_NM = 50.0
"""Largest distance of sections in its training data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """SegNeuron's segmentation network.

    Attributes:
        model: MNet.
        loss: ``"mse"`` is what the published code runs (its configuration says BCE, but the names are swapped there),
            ``"bce"`` its alternative.
        affinity_weight, foreground_weight: of the two terms. The published squared error of the affinities is summed
            over the channels, so that it counts three times as much as a mean.
        mixing: frequency and spatial mixing of data sets.
        plan: blocks of prediction; half overlapping, Gaussian weights, as in the corrected published code. That of its
            notebook is ``NOTEBOOK_PLAN``.
        segmentation: foreground-restricted multicut.
    """

    model: mnet.Config = mnet.Config()
    loss: Literal["mse", "bce"] = "mse"
    affinity_weight: float = 1.0
    foreground_weight: float = 1.0
    mixing: Mixing = Mixing()
    plan: Block = PLAN
    segmentation: Segmentation = Segmentation()


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    if not config.model.skips or config.model.outputs != (3, 1):
        raise UserError(
            f"segneuron: model.skips {config.model.skips} and model.outputs {config.model.outputs}, expected True and "
            "(3, 1); the variant without skip connections belongs to segneuron_pretraining"
        )
    if config.loss not in ("mse", "bce"):
        raise UserError(f"segneuron: loss {config.loss!r}, expected 'mse' or 'bce'")
    config.mixing.validate()
    config.plan.validate()
    try:
        config.segmentation.validate()
    except ValueError as error:
        raise UserError(f"segneuron: segmentation: {error}") from None
    if min(config.plan.size[1:]) < mnet.SMALLEST:
        raise UserError(f"segneuron: plan.size {config.plan.size}, expected y and x of at least {mnet.SMALLEST}")


def build(config: Config, rngs: nnx.Rngs) -> mnet.MNet:
    """The network."""
    return mnet.MNet(config.model, rngs)


def trainable(config: Config, path: str) -> bool:
    """Every parameter trains."""
    return True


def inherits(config: Config, other: Any) -> Callable[[str], bool] | None:
    """Which parameters a run takes over from a run of ``other``: of pretraining, the encoder; decoders start afresh."""
    return mnet.is_encoder if isinstance(other, segneuron_pretraining.Config) else None


def compose(config: Config) -> Callable[[Sampler, np.random.Generator], dict[str, np.ndarray]]:
    """How a training sample is made: one crop, or several mixed."""
    return functools.partial(mixed_sample, config.mixing)


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``affinities`` (b, z, y, x, 3), ``foreground`` and ``mask`` (b, z, y, x, 1), float32.

    Affinities of a mixed sample come as bits, because the ids alone do not tell what each crop said at the seam.
    """
    labels = batch["labels"]
    if AFFINITY_BITS in batch:
        bits = batch[AFFINITY_BITS][..., None]
        wanted = ((bits >> jnp.arange(3, dtype=bits.dtype)) & 1).astype(jnp.float32)
    else:
        wanted = affinities(labels, NEAREST_OFFSETS, "replicate")
    mask = (batch["mask"] > 0).astype(jnp.float32) if "mask" in batch else jnp.ones(labels.shape, jnp.float32)
    return {"affinities": wanted, "foreground": foreground(labels)[..., None], "mask": mask[..., None]}


def squared_error(prediction: jax.Array, wanted: jax.Array, mask: jax.Array) -> jax.Array:
    """Masked squared errors summed over everything, divided by the number of voxels: channels add up, masked voxels
    count as voxels. Any shape (b, z, y, x, c) against a mask (b, z, y, x, 1)."""
    return (mask * (prediction - wanted) ** 2).sum() / (prediction.size // prediction.shape[-1])


def cross_entropy(prediction: jax.Array, wanted: jax.Array, mask: jax.Array) -> jax.Array:
    """Masked binary cross-entropy of probabilities, mean over everything; logarithms end at -100, as in PyTorch."""

    def log(p: jax.Array) -> jax.Array:
        # The inner guard keeps the gradient of the branch that is not taken finite.
        safe = jnp.where(p > 0, p, 1)
        return jnp.where(p > 0, jnp.maximum(jnp.log(safe), -100), -100)

    return (-mask * (wanted * log(prediction) + (1 - wanted) * log(1 - prediction))).mean()


def terms(config: Config, outputs: tuple[jax.Array, jax.Array], wanted: Mapping[str, jax.Array]) -> tuple:
    """Affinity and foreground term of the loss, unweighted, from probabilities."""
    measure = squared_error if config.loss == "mse" else cross_entropy
    return (
        measure(outputs[0], wanted["affinities"], wanted["mask"]),
        measure(outputs[1], wanted["foreground"], wanted["mask"]),
    )


def loss(
    config: Config, model: mnet.MNet, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the affinity and the foreground term; logs both and the balanced accuracy of affinities."""
    wanted = targets(config, batch)
    outputs = model(unit_grey(batch["image"])[..., None])
    first, second = terms(config, outputs, wanted)
    counted = jnp.broadcast_to(wanted["mask"], wanted["affinities"].shape) > 0
    positive = wanted["affinities"] > 0.5
    right = (outputs[0] > 0.5) == positive

    def share(where: jax.Array) -> jax.Array:
        return (right & where).sum() / jnp.maximum(where.sum(), 1)

    scalars = {
        "affinity_loss": first,
        "foreground_loss": second,
        "recall": share(counted & positive),
        "specificity": share(counted & ~positive),
    }
    return config.affinity_weight * first + config.foreground_weight * second, scalars


def predict(config: Config, model: mnet.MNet, image: jax.Array) -> dict[str, jax.Array]:
    """``affinities`` (b, z, y, x, 3) and ``foreground`` (b, z, y, x, 1) in [0, 1]."""
    first, second = model(unit_grey(image)[..., None])
    return {"affinities": first, "foreground": second}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame."""
    return {
        "affinities": flip_back_affinities(outputs["affinities"], NEAREST_OFFSETS, axes),
        "foreground": jnp.flip(outputs["foreground"], [axis + 1 for axis in axes]),
    }


def outputs(config: Config) -> dict[str, Output]:
    """Nearest affinities, and the probability of being inside a neuron."""
    offsets = [list(offset) for offset in NEAREST_OFFSETS]
    return {
        "affinities": Output(kind="affinities", channels=3, attributes={"offsets": offsets}),
        "foreground": Output(kind="probability", channels=1),
    }


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Labels uint32 (z, y, x) by the foreground-restricted multicut.

    ``outputs`` may be arrays or anything that is sliced like one: they are read a few sections at a time.
    """
    try:
        return foreground_multicut(outputs["affinities"], outputs["foreground"][0], config.segmentation)
    except ValueError as error:
        raise UserError(f"segneuron: {error}") from None


@dataclasses.dataclass(frozen=True)
class SlabDecoder:
    """:func:`decode` by slabs of whole sections. Fragments never reach over a section, so labels are the very same."""

    settings: Segmentation
    pieces: None = None
    whole_sections: bool = True
    bytes_per_voxel: int = 48

    def _affinities(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return slab_affinities(outputs["affinities"], outputs["foreground"][0], self.settings)

    def fragments(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Fragments of every section; in mode 2d its segments."""
        values = self._affinities(outputs)
        made = fragments(values, self.settings)
        if self.settings.mode == "2d":
            return segment_sections(values, made, self.settings)[0]
        occurs = np.zeros(int(made.max(initial=0)) + 1, np.uint32)
        occurs[made.ravel()] = 1
        return np.cumsum(occurs, dtype=np.uint32)[made]

    def notes(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The largest foreground probability."""
        return {"brightest": np.asarray(brightest_of(outputs["foreground"]))}

    def edges(self, outputs: Mapping[str, np.ndarray], fragments: np.ndarray, lead: Triple) -> Graph:
        """Means of the boundary probability; none in mode 2d."""
        if self.settings.mode == "2d":
            return Graph(
                nodes=0, uv=np.zeros((0, 2), np.uint32), count=np.zeros(0, np.uint32), sum=np.zeros(0, np.int64)
            )
        return slab_graph(self._affinities(outputs), fragments, lead[0], self.settings.threads)

    def partition(self, graph: Graph, nodes: int, notes: list[dict[str, np.ndarray]]) -> np.ndarray:
        """The multicut."""
        if self.settings.restrict:
            try:
                check_foreground(max(float(note["brightest"]) for note in notes))
            except ValueError as error:
                raise UserError(f"segneuron: {error}") from None
        if self.settings.mode == "2d":
            return np.arange(nodes + 1, dtype=np.uint32)
        return partition(BoundaryEdges(graph.uv, graph.mean, graph.count.astype(float)), nodes, self.settings)

    def finish(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
        """0 where ``settings.background`` says so."""
        if self.settings.background is None:
            return labels
        return np.where(is_background(outputs["foreground"][0], self.settings.background), 0, labels)


def block_decoder(config: Config) -> SlabDecoder:
    """Segments volumes that do not fit into memory."""
    return SlabDecoder(config.segmentation)


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan


def domain(config: Config, voxel_size: tuple[float, float, float]) -> str | None:
    """A warning if a volume should be rescaled before prediction; see :func:`rescaling`."""
    wanted, line = rescaling(voxel_size)
    if wanted == tuple(voxel_size):
        return None
    z, y, x = wanted
    return (
        f"warning: {line.partition(': ')[0]}; rescale first: python -m emjax.prepare rescale --to {z:g},{y:g},{x:g} "
        "--input IMAGE --output RESCALED"
    )


def rescaling(voxel_size: tuple[float, float, float]) -> tuple[tuple[float, float, float], str]:
    """Voxel size (z, y, x) in nm to which a volume has to be rescaled for SegNeuron, and a line that says so.

    In plane the nearest size within 5 to 10 nm, y and x alike; sections are left as they are, except that sections
    thinner than the pixels are wide are joined to their width (FIB volumes finer than the domain).

    Raises:
        UserError: sections further apart than 50 nm; no rescaling makes up for what lies between them.
    """
    z, y, x = voxel_size
    if z > SECTION_NM:
        raise UserError(
            f"sections are {z:g} nm apart, SegNeuron was trained up to {SECTION_NM:g} nm; volumes with thicker "
            "sections are outside of its domain"
        )
    low, high = IN_PLANE_NM
    side = min(max((y * x) ** 0.5, low), high)
    if low <= y <= high and low <= x <= high:
        return (z, y, x), f"voxels of {z:g} x {y:g} x {x:g} nm (z, y, x) are within the trained 5 to 10 nm"
    wanted = (max(z, min(side, high)) if z < low else z, side, side)
    return wanted, (
        f"voxels of {z:g} x {y:g} x {x:g} nm (z, y, x) are outside of the trained 5 to 10 nm in plane: rescaled to "
        f"{wanted[0]:g} x {wanted[1]:g} x {wanted[2]:g} nm; labels are brought back by the nearest voxel"
    )

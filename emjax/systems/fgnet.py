"""FGNet (Li et al., AAAI 2026, as far as it is public): affinities from a fine-grained encoder guided by SAM 2 features.

``docs/fgnet.md`` has the equations, and what of the original is not known. Segmentation is from the refined map alone, by
watershed and agglomeration, or by the multicut recipe.
"""

import dataclasses
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax import losses
from emjax.data.targets import NEAREST_OFFSETS, Offset, affinities, affinity_mask, balancing_weights, check_offsets
from emjax.data.targets import widen_borders as widen
from emjax.errors import UserError
from emjax.models.fgnet import FGNet, FGNetConfig, FGNetOutput, mean_pool, pad_block
from emjax.models.layers.lora import LoRA, is_adapter
from emjax.models.layers.resize import resize
from emjax.models.sam2.config import SAM2Config, sam2_config
from emjax.postprocess import agglomerate, apply, region_graph, watershed
from emjax.postprocess.foreground_multicut import Settings as Multicut
from emjax.postprocess.foreground_multicut import foreground_multicut
from emjax.systems import affinity_unet, hiera_pretraining
from emjax.systems.protocol import Block, Output, Triple, flip_back_affinities, unit_grey
from emjax.weights.family import read_checkpoint
from emjax.weights.sam2 import FAMILY

logger = logging.getLogger(__name__)

LONG_RANGE: tuple[Offset, ...] = (
    *NEAREST_OFFSETS,
    *((-2, 0, 0), (0, -3, 0), (0, 0, -3)),
    *((-3, 0, 0), (0, -9, 0), (0, 0, -9)),
    *((-4, 0, 0), (0, -27, 0), (0, 0, -27)),
)
"""Twelve offsets: the nearest neighbours, and the auxiliary targets of the PNI line for sectioned volumes."""

RANDOM = "random"
WEIGHTS_HELP = (
    "convert SAM 2 weights once (docs/sam2.md says where they are: python -m emjax.convert sam2.1_hiera_large.pt "
    "weights/sam2.1_large) and give --config.system.encoder_checkpoint=weights/sam2.1_large; or start from an EM-prior run "
    "with --config.train.init_from=runs/em_prior; or --config.system.encoder_checkpoint=random, which is a control"
)

LMC = Multicut(mode="3d", restrict=False, beta=0.5)
"""The multicut recipe of the AC3/AC4 literature: distance-transform fragments of every section, no foreground."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """SAM 2's image encoder, and how it takes part in training.

    Attributes:
        size: ``"tiny"``, ``"small"``, ``"base_plus"``, ``"large"``, or ``"nano"`` (emjax's, for CPUs).
        version: ``"2.1"`` or ``"2.0"``; image encoders are alike.
        features: channels of the neck, 256 in SAM 2.
        mode: ``"frozen"``; ``"lora"``, adapters train; ``"finetune"``, all trains (see :func:`layer_rates`).
        dtype: of activations and products.
        weights: precision in which frozen weights are kept.
        lora: adapters of mode ``"lora"``.
        remat: recompute blocks in the backward pass, for the modes that have one.
    """

    size: Literal["tiny", "small", "base_plus", "large", "nano"] = "large"
    version: Literal["2.0", "2.1"] = "2.1"
    features: int = 256
    mode: Literal["frozen", "lora", "finetune"] = "frozen"
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights: Literal["float32", "bfloat16"] = "float32"
    lora: LoRA = LoRA(rank=8)
    remat: bool = True

    def network(self) -> SAM2Config:
        """The encoder's configuration."""
        made = sam2_config(self.size, self.version, image_only=True, features=self.features, dtype=self.dtype)
        adapters = self.lora if self.mode == "lora" else None
        hiera = dataclasses.replace(made.hiera, remat=self.remat and self.mode != "frozen", lora=adapters)
        return dataclasses.replace(made, hiera=hiera)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segmentation:
    """From affinities to labels: ``recipe`` is ``"agglomerate"`` (watershed and agglomeration) or ``"multicut"``.

    ``python -m emjax.segment`` agglomerates unless told ``--method system``, which follows ``recipe``.
    """

    recipe: Literal["agglomerate", "multicut"] = "agglomerate"
    agglomeration: affinity_unet.Segmentation = affinity_unet.Segmentation()
    multicut: Multicut = LMC


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """FGNet and its ablations.

    Attributes:
        model: the network beside SAM 2.
        encoder: SAM 2.
        encoder_checkpoint: converted SAM 2 weights that training starts from, or ``"random"`` (a control). Not read when
            a run goes on, starts from another (``train.init_from``), or predicts.
        offsets: of both affinity maps; the first three are the nearest neighbours, others are auxiliary targets.
        widen_borders: window in which a voxel with two ids becomes background in targets; ``None`` leaves labels.
        loss: ``"bce"``, or ``"wmse"`` (weighted squared error of probabilities); classes are balanced per channel.
        class_balance: whether the rarer class weighs more.
        dice_weight: of the Dice term.
        coarse_weight: of the coarse map's loss against the refined one's.
        hard_weight: of an auxiliary loss that draws the stride-4 focus map to where the coarse map is wrong.
        shuffle_slices: gives each slice the SAM 2 features of another one at least a quarter of the block away, a control.
        diagnostics: also predict ``coarse`` affinities and the ``guidance`` map.
        voxel_size: nm (z, y, x) that the model is meant for.
        plan: blocks of prediction.
        segmentation: default post-processing.
    """

    model: FGNetConfig = FGNetConfig()
    encoder: Encoder = Encoder()
    encoder_checkpoint: str = ""
    offsets: tuple[Offset, ...] = NEAREST_OFFSETS
    widen_borders: Triple | None = (1, 3, 3)
    loss: Literal["bce", "wmse"] = "bce"
    class_balance: bool = True
    dice_weight: float = 0.5
    coarse_weight: float = 0.5
    hard_weight: float = 0.0
    shuffle_slices: bool = False
    diagnostics: bool = False
    voxel_size: tuple[float, float, float] | None = None
    plan: Block = Block(size=(18, 256, 256), stride=(9, 128, 128), blending="gaussian", sigma=0.2)
    segmentation: Segmentation = Segmentation()


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work; warns of strides that do not fit the voxel size."""
    config.model.validate()
    config.plan.validate()
    config.encoder.lora.validate()
    if check_offsets(config.offsets)[:3] != NEAREST_OFFSETS:
        raise UserError(f"offsets: the first three must be {NEAREST_OFFSETS}, found {config.offsets[:3]}")
    if config.loss not in ("bce", "wmse"):
        raise UserError(f"fgnet: loss {config.loss!r}, expected 'bce' or 'wmse'")
    if config.hard_weight and not (config.model.coarse and 4 in _focus_strides(config.model)):
        raise UserError("fgnet: hard_weight needs the coarse decoder and mode 'gate' at stride 4")
    if config.shuffle_slices and config.plan.size[0] // config.model.thickness < 2:
        raise UserError(f"fgnet: shuffle_slices needs two slices for SAM 2, the block {config.plan.size} has one")
    if config.voxel_size is not None and (text := _unfit(config, config.voxel_size)):
        logger.warning("%s", text)


def _focus_strides(model: FGNetConfig) -> tuple[int, ...]:
    return model.guided if model.refined and model.mode == "gate" else ()


def build(config: Config, rngs: nnx.Rngs) -> FGNet:
    """The network."""
    encoder = config.encoder
    return FGNet(
        config.model,
        encoder.network() if config.model.uses_sam2 else None,
        len(config.offsets),
        frozen=encoder.mode == "frozen",
        weights="float32" if encoder.mode == "finetune" else encoder.weights,
        rngs=rngs,
    )


def trainable(config: Config, path: str) -> bool:
    """All but SAM 2; of SAM 2 nothing, its adapters, or all that the network uses."""
    if not path.startswith("sam2."):
        return True
    if config.encoder.mode == "lora":
        return is_adapter(path)
    unused = config.model.features == "trunk" and path.startswith("sam2.neck.")
    return config.encoder.mode == "finetune" and not unused


def layer_rates(encoder: Encoder, rate: float = 0.1, decay: float = 0.85) -> tuple[tuple[str, float], ...]:
    """``optimizer.multipliers`` of fine-tuning: ``rate`` for the neck, times ``decay`` for every block from the last."""
    depth = encoder.network().hiera.depth
    blocks = [(rf"^sam2\.trunk\.blocks\.{index}\.", rate * decay ** (depth - index)) for index in range(depth)]
    return ((r"^sam2\.neck\.", rate), *blocks, (r"^sam2\.trunk\.", rate * decay ** (depth + 1)))


def inherits(config: Config, other: Any) -> Mapping[str, str] | None:
    """What a run takes over from an EM-prior run: trunk and neck."""
    return hiera_pretraining.inherited(other, config.encoder.network(), "sam2") if config.model.uses_sam2 else None


def pretrained(config: Config) -> dict[str, Any]:
    """SAM 2's image encoder from ``encoder_checkpoint``, for a fresh run; empty where there is none or it is random.

    Raises ``UserError`` for weights that are missing, of another size, or not of SAM 2.
    """
    if not config.model.uses_sam2 or config.encoder_checkpoint == RANDOM:
        return {}
    path = pathlib.Path(config.encoder_checkpoint)
    if not config.encoder_checkpoint or not path.exists():
        found = f"{path} does not exist" if config.encoder_checkpoint else "none is given"
        raise UserError(f"encoder_checkpoint: {found}; {WEIGHTS_HELP}")
    if (path / "config.json").is_file():
        raise UserError(f"encoder_checkpoint {path}: is a run of emjax.train; give --config.train.init_from={path}")
    checkpoint = read_checkpoint(path, [FAMILY])
    size = checkpoint.settings["size"]
    if (size, 256) != (config.encoder.size, config.encoder.features):
        raise UserError(
            f"encoder_checkpoint {path}: weights of SAM 2 {size} with 256 features, the configuration has "
            f"{config.encoder.size} with {config.encoder.features}; set --config.system.encoder.size={size} "
            "--config.system.encoder.features=256, or convert those of the other size"
        )
    return {"sam2": checkpoint.collections["params"]["image_encoder"]}


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``affinities`` and ``weights``, both (b, z, y, x, offset), from ``batch["labels"]`` and an optional mask."""
    labels = batch["labels"]
    wanted = affinities(labels if config.widen_borders is None else widen(labels, config.widen_borders), config.offsets)
    weights = affinity_mask(batch.get("mask", jnp.ones(labels.shape, jnp.uint8)), config.offsets, "masked")
    if config.class_balance:
        weights = balancing_weights(wanted, weights, "channel")
    return {"affinities": wanted, "weights": weights}


def _affinity_loss(config: Config, logits: jax.Array, wanted: Mapping[str, jax.Array]) -> jax.Array:
    target, weights = wanted["affinities"], wanted["weights"]
    probability = jax.nn.sigmoid(logits.astype(jnp.float32))
    if config.loss == "bce":
        value = losses.binary_cross_entropy(logits, target, weights)
    else:
        value = losses.mean_squared_error(probability, target, weights)
    return value + config.dice_weight * losses.dice(probability, target, weights > 0)


def _hard_loss(config: Config, found: FGNetOutput, wanted: Mapping[str, jax.Array]) -> jax.Array:
    """Cross-entropy of the stride-4 focus map against the places where the coarse map is wrong."""
    assert found.coarse is not None
    wrong = jnp.abs(jax.nn.sigmoid(found.coarse) - wanted["affinities"]) > 0.5
    wrong = (wrong & (wanted["weights"] > 0)).any(-1).astype(jnp.float32)
    focus = found.guidance[4]
    cell = (config.model.z_stride(config.model.level(4)), 4, 4)
    share = mean_pool(pad_block(wrong, cell)[..., None], cell)[..., 0]
    logits = jax.scipy.special.logit(jnp.clip(focus, 1e-6, 1 - 1e-6))
    return losses.binary_cross_entropy(logits, jax.lax.stop_gradient((share > 0).astype(jnp.float32)))


def _order(config: Config, image: jax.Array, key: jax.Array | None) -> jax.Array | None:
    """Which slice's features each slice gets: a cyclic shift by a quarter to three quarters of the block, drawn in
    training, half of it in prediction. None without shuffling."""
    if not config.shuffle_slices:
        return None
    padded = -(-image.shape[1] // config.model.multiple()[0]) * config.model.multiple()[0]
    count = padded // config.model.thickness
    least = max(1, count // 4)
    shift = count // 2 if key is None else jax.random.randint(key, (), least, count - least + 1)
    within = (jnp.arange(count) + shift) % count
    return (count * jnp.arange(len(image))[:, None] + within).reshape(-1)


def loss(
    config: Config, model: FGNet, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Refined loss plus ``coarse_weight`` times the coarse one, plus the auxiliary loss; a single decoder counts 1.

    Logs both maps' balanced accuracy (recall and specificity of "same object").
    """
    wanted = targets(config, batch)
    image = unit_grey(batch["image"])
    found = model(image, _order(config, image, key if train else None))
    scalars: dict[str, jax.Array] = {}
    value = jnp.zeros((), jnp.float32)
    for name, logits in (("coarse", found.coarse), ("refined", found.refined)):
        if logits is None:
            continue
        part = _affinity_loss(config, logits, wanted)
        value += part * (config.coarse_weight if name == "coarse" and found.refined is not None else 1.0)
        positive, counted = wanted["affinities"] > 0.5, wanted["weights"] > 0
        right = (logits > 0) == positive
        scalars |= {
            f"{name}_loss": part,
            f"{name}_recall": losses.weighted_mean(right, counted & positive),
            f"{name}_specificity": losses.weighted_mean(right, counted & ~positive),
        }
    if config.hard_weight:
        scalars["hard_loss"] = _hard_loss(config, found, wanted)
        value += config.hard_weight * scalars["hard_loss"]
    return value, scalars


def predict(config: Config, model: FGNet, image: jax.Array) -> dict[str, jax.Array]:
    """``affinities`` (b, z, y, x, 3) in [0, 1] of the nearest neighbours: the refined ones, or the coarse decoder's where
    it is alone. With ``diagnostics``, ``coarse`` likewise and ``guidance`` (b, z, y, x, 1), the finest focus map."""
    grey = unit_grey(image)
    found = model(grey, _order(config, grey, None))
    chosen = found.coarse if found.refined is None else found.refined
    assert chosen is not None
    outputs = {"affinities": jax.nn.sigmoid(chosen[..., :3])}
    if config.diagnostics and found.coarse is not None and found.refined is not None:
        outputs["coarse"] = jax.nn.sigmoid(found.coarse[..., :3])
    if config.diagnostics and found.guidance:
        finest = min(found.guidance)
        focus = found.guidance[finest]
        z = config.model.z_stride(config.model.level(finest))
        depth, height, width = focus.shape[1] * z, focus.shape[2] * finest, focus.shape[3] * finest
        focus = resize(focus, (depth, height, width), axes=(1, 2, 3))
        outputs["guidance"] = focus[:, : image.shape[1], : image.shape[2], : image.shape[3], None]
    return outputs


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame."""
    flipped = {
        name: flip_back_affinities(outputs[name], NEAREST_OFFSETS, axes) for name in outputs if name != "guidance"
    }
    if "guidance" in outputs:
        flipped["guidance"] = jnp.flip(outputs["guidance"], [axis + 1 for axis in axes])
    return flipped


def outputs(config: Config) -> dict[str, Output]:
    """The nearest affinities, and with ``diagnostics`` the coarse ones and the guidance map, where the network has them."""
    offsets = [list(offset) for offset in NEAREST_OFFSETS]
    kind = Output(kind="affinities", channels=3, attributes={"offsets": offsets})
    made = {"affinities": kind}
    if config.diagnostics and config.model.coarse and config.model.refined:
        made["coarse"] = kind
    if config.diagnostics and _focus_strides(config.model):
        made["guidance"] = Output(kind="probability", channels=1)
    return made


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Labels uint32 (z, y, x) from ``affinities`` (3, z, y, x), float32 or uint8 (scaled by 255), by the recipe."""
    settings, wanted = config.segmentation, np.asarray(outputs["affinities"])
    if settings.recipe == "multicut":
        try:
            return foreground_multicut(wanted, None, settings.multicut)
        except ValueError as error:
            raise UserError(f"fgnet: {error}") from None
    chosen = settings.agglomeration
    fragments = watershed(wanted, chosen.low, chosen.high)
    tree = agglomerate(region_graph(wanted, fragments), chosen.threshold, score=chosen.score)
    return apply(tree.cut(chosen.threshold), fragments)


def agglomeration(config: Config) -> affinity_unet.Segmentation:
    """Settings of watershed and agglomeration, which also run block by block."""
    return config.segmentation.agglomeration


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan


def _text(voxel_size: tuple[float, ...]) -> str:
    return " x ".join(f"{side:g}" for side in voxel_size)


def _unfit(config: Config, voxel_size: tuple[float, float, float]) -> str | None:
    """A warning where the network's strides along z do not fit the voxels."""
    z, y, x = voxel_size
    model = config.model
    along_z = model.z_stride(model.levels - 1)
    thick = z / math.sqrt(y * x) >= 2
    if thick and along_z > 1:
        return (
            f"warning: voxels of {_text(voxel_size)} nm (z, y, x) are sections, the network is for isotropic volumes (stride "
            f"{along_z} along z); expected pools (1, 2, 2), patch[0] 1 and thickness 1"
        )
    if not thick and along_z == 1:
        return (
            f"warning: voxels of {_text(voxel_size)} nm (z, y, x) are isotropic, the network is for sections (no stride along "
            "z); expected pools (2, 2, 2) at the coarser levels"
        )
    return None


def domain(config: Config, voxel_size: tuple[float, float, float]) -> str | None:
    """A warning for volumes of another voxel size than the network's, first of all isotropic against sectioned."""
    if (text := _unfit(config, voxel_size)) is not None:
        return text
    if config.voxel_size is None or np.allclose(config.voxel_size, voxel_size, rtol=0.05):
        return None
    return (
        f"warning: voxels of {_text(voxel_size)} nm (z, y, x), the model was trained on {_text(config.voxel_size)} nm: expect "
        "worse results, or resample"
    )


ABLATIONS = {
    "A0": "no SAM 2: fine-grained encoder and refined decoder alone (the SuperHuman network)",
    "A0w": "A0 widened to the trainable parameters of A4",
    "A1": "frozen SAM 2 and coarse decoder alone",
    "A2": "A0 and SAM 2 features by concatenation",
    "A3": "A0 and feature-guided attention, no coarse decoder",
    "A4": "A3 and the coarse decoder: FGNet, frozen",
    "A5": "A4 with SAM 2 fine-tuned",
    "A5l": "A4 with adapters in SAM 2",
    "C1": "A4 with random SAM 2 weights, frozen",
    "C1t": "A4 with random SAM 2 weights, trained",
    "C2": "A4 with the SAM 2 features of another slice",
}
"""Rows of the ablation, and in words what they are."""


def ablation(config: Config, row: str, wide: tuple[int, ...]) -> Config:
    """The configuration of a row of :data:`ABLATIONS`, given that of A4 and the widths of A0w."""
    model, encoder = config.model, config.encoder
    tuned = dataclasses.replace(encoder, mode="finetune")
    alone = dataclasses.replace(model, mode="none", coarse=False)
    changes: dict[str, dict[str, Any]] = {
        "A0": {"model": alone},
        "A0w": {"model": dataclasses.replace(alone, fine=dataclasses.replace(model.fine, widths=wide))},
        "A1": {"model": dataclasses.replace(model, refined=False)},
        "A2": {"model": dataclasses.replace(model, mode="concat", coarse=False)},
        "A3": {"model": dataclasses.replace(model, coarse=False)},
        "A4": {},
        "A5": {"encoder": tuned},
        "A5l": {"encoder": dataclasses.replace(encoder, mode="lora")},
        "C1": {"encoder_checkpoint": RANDOM},
        "C1t": {"encoder_checkpoint": RANDOM, "encoder": tuned},
        "C2": {"shuffle_slices": True},
    }
    return dataclasses.replace(config, **changes[row])


def ablated(experiment: Any, row: str, wide: tuple[int, ...], held: int) -> Any:
    """The experiment of a row of :data:`ABLATIONS`, given that of A4 and the widths of A0w.

    Fine-tuning holds SAM 2 for ``held`` steps, a fifth of the training at the most. Rows that have no use for it start
    from no other run.
    """
    system = ablation(experiment.system, row, wide)
    train, optimizer = experiment.train, experiment.optimizer
    if system.encoder_checkpoint == RANDOM or not system.model.uses_sam2:
        train = dataclasses.replace(train, init_from="")
    if system.encoder.mode == "finetune":
        holds = ((r"^sam2\.", min(held, train.steps // 5)),)
        rates = layer_rates(system.encoder)
        optimizer = dataclasses.replace(optimizer, multipliers=rates, holds=holds, weight_decay=0.05)
    return dataclasses.replace(experiment, system=system, train=train, optimizer=optimizer)

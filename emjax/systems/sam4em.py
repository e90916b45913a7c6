"""SAM4EM (Shah et al., CVPRW 2025): semantic segmentation of EM stacks by an adapted SAM 2 that prompts itself.

A training sample is a chunk of consecutive slices; the memory starts empty in each. Fine-tuning is in one stage or two
(:data:`FINETUNE`), and what differs from the published code is a switch of :class:`Config` or of ``emjax.models.sam4em``;
:func:`published` sets all of them.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax import losses
from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.models import sam4em
from emjax.models.functional import Collections, define, paths
from emjax.models.layers.lora import LoRA, is_adapter
from emjax.models.layers.resize import resize
from emjax.models.sam2.config import STRIDE
from emjax.models.sam2.neck import MEAN, STD
from emjax.models.sam4em import Masks, State
from emjax.systems import hiera_pretraining, sam4em_stack
from emjax.systems.protocol import Block, Output, Streaming, unit_grey
from emjax.weights.family import read_checkpoint
from emjax.weights.sam2 import FAMILY
from emjax.weights.sam4em import started_from_sam2

logger = logging.getLogger(__name__)

FINETUNE = {
    "stage1": "the encoder's adapters, enhancer, memory, prompt encoders and decoders; trunk and neck are frozen",
    "stage2": "the decoders' adapters, enhancer and memory; all else is frozen",
    "frozen": "enhancer, memory, prompt encoders and decoders; the encoder is frozen and has no adapters",
    "full": "everything; the encoder has no adapters",
}
"""Which parameters train."""

Normalisation = Literal["imagenet", "balanced", "simple", "minmax", "standard"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Class:
    """A semantic class: its name, and the label values that are of it; () stands for all above 0."""

    name: str
    labels: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """SAM4EM.

    Attributes:
        model: the network; ``model.classes`` must be the number of ``classes``.
        classes: what is segmented. Classes are independent masks; where they overlap in the end, the most probable wins.
        finetune: a key of :data:`FINETUNE`.
        sam2_checkpoint: SAM 2 weights of the same trunk that a fresh run starts from; "" for none, which leaves the
            encoder random: start from an EM-prior run (``train.init_from``) instead.
        first_decoder: whether the first decoder and prompt encoder start from SAM 2, too: ``"sam2"``, or ``"random"`` as
            in the published code, where a slip leaves them random.
        shrink: slices are averaged over cells of ``shrink`` x ``shrink`` pixels before, and logits resized after.
        normalisation: of grey values: ``"imagenet"``, each channel by its own constants, as SAM 2 and the EM-prior were
            trained; ``"balanced"``, all channels by the first one's, the published default; ``"simple"`` 0..1;
            ``"minmax"`` and ``"standard"`` by each slice's own range, or mean and deviation.
        dice_share: d in the loss of a stage, (1 - d) BCE + d Dice; Dice is taken per class over all voxels of the batch.
        first_share: w in the loss, w stage 1 + (1 - w) stage 2.
        first_mask: prompt of a chunk's first slice: ``"empty"``; ``"predicted"``, the network's own answer to an empty
            prompt; or ``"truth"``, the label, which in the published code leaks into validation too (in prediction,
            where there is none, the prompt is empty).
        threshold: probability from which a voxel belongs to a class.
        voxel_size: nm (z, y, x) that the model is meant for; prediction warns when the volume's differs.
        plan: blocks of prediction without memory across blocks. ``emjax.segment`` takes tiles of the same size and
            overlap in plane, and carries their memory through the stack.
        tiles: tiles that ``emjax.segment`` works on at once.
    """

    model: sam4em.Config = sam4em.Config()
    classes: tuple[Class, ...] = (Class(name="foreground"),)
    finetune: Literal["stage1", "stage2", "frozen", "full"] = "stage1"
    sam2_checkpoint: str = ""
    first_decoder: Literal["sam2", "random"] = "sam2"
    shrink: int = 1
    normalisation: Normalisation = "imagenet"
    dice_share: float = 0.5
    first_share: float = 0.5
    first_mask: Literal["empty", "predicted", "truth"] = "empty"
    threshold: float = 0.5
    voxel_size: tuple[float, float, float] | None = None
    plan: Block = Block(size=(8, 512, 512), stride=(8, 384, 384), blending="gaussian")
    tiles: int = 1


def published(config: Config) -> Config:
    """``config`` with every switch as in the published code, whose evaluation takes the first decoder's masks."""
    return dataclasses.replace(
        config,
        model=sam4em.published(config.model),
        finetune="stage1",
        first_decoder="random",
        normalisation="balanced",
        first_mask="truth",
        dice_share=0.5,
        first_share=0.5,
        threshold=0.4,
    )


ABLATIONS = {
    "reference": "every switch as in the published code; the rank of the adapters stays",
    "frozen": "the encoder as it is, without adapters",
    "full": "the encoder trained whole, without adapters",
    "nomemory": "no memory; the mask of the slice before is still the prompt",
    "onestage": "the first decoder alone",
}
"""Rows of the ablation table, each one change of a configuration of stage 1."""


def ablation(config: Config, row: str) -> Config:
    """``config`` as the row says. Raises ``KeyError`` for an unknown one."""
    model = config.model
    if row == "reference":
        rank = 100 if model.lora is None else model.lora.rank
        changed = published(config)
        lora = dataclasses.replace(changed.model.lora or LoRA(), rank=rank)
        return dataclasses.replace(changed, model=dataclasses.replace(changed.model, lora=lora))
    if row == "nomemory":
        memory = dataclasses.replace(model.memory, update="none")
        return dataclasses.replace(config, model=dataclasses.replace(model, memory=memory))
    if row == "onestage":
        return dataclasses.replace(
            config, model=dataclasses.replace(model, decoders=1, output="stage1"), first_share=1.0
        )
    kind: Literal["frozen", "full"] = {"frozen": "frozen", "full": "full"}[row]  # type: ignore[assignment]
    return dataclasses.replace(config, model=dataclasses.replace(model, lora=None), finetune=kind)


def second_stage(config: Config, lora: LoRA) -> Config:
    """The configuration of the second stage that follows ``config``: adapters in the decoders, which are frozen."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder_lora=lora), finetune="stage2")


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    config.model.validate()
    config.plan.validate()
    if config.model.classes != len(config.classes):
        raise UserError(
            f"sam4em: model.classes {config.model.classes}, but {len(config.classes)} classes are listed "
            f"({', '.join(c.name for c in config.classes)})"
        )
    check_classes(config.classes)
    adapters = {"stage1": (True, False), "stage2": (True, True), "frozen": (False, False), "full": (False, False)}
    if config.finetune not in adapters:
        raise UserError(f"sam4em: finetune {config.finetune!r}, expected one of {', '.join(FINETUNE)}")
    found = config.model.lora is not None, config.model.decoder_lora is not None
    if config.finetune == "stage2" and not found[1]:
        raise UserError("sam4em: finetune 'stage2' trains the decoders' adapters, and model.decoder_lora is None")
    if config.finetune != "stage2" and found != adapters[config.finetune]:
        kinds = {True: "adapters", False: "none"}
        wanted = adapters[config.finetune]
        raise UserError(
            f"sam4em: finetune {config.finetune!r} needs model.lora and model.decoder_lora to be {kinds[wanted[0]]} and "
            f"{kinds[wanted[1]]}, found {kinds[found[0]]} and {kinds[found[1]]}"
        )
    if config.shrink < 1 or config.tiles < 1:
        raise UserError(f"sam4em: shrink {config.shrink} and tiles {config.tiles}, expected 1 or more")
    for name in ("dice_share", "first_share", "threshold"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"sam4em: {name} {getattr(config, name)}, expected 0 to 1")
    if config.model.decoders == 1 and config.first_share != 1:
        raise UserError(f"sam4em: first_share {config.first_share}, expected 1 where there is one decoder")


def check_classes(classes: tuple[Class, ...]) -> None:
    """Raises ``UserError`` for classes that cannot be told apart."""
    names = [c.name for c in classes]
    values = [value for c in classes for value in c.labels]
    if not classes or len(set(names)) < len(names) or len(set(values)) < len(values) or min(values, default=1) < 1:
        raise UserError(f"classes {classes}: expected different names and different label values from 1")
    if len(classes) > 1 and any(not c.labels for c in classes):
        raise UserError("classes: of several classes each must say its label values")


def build(config: Config, rngs: nnx.Rngs) -> sam4em.SAM4EM:
    """The network."""
    return sam4em.SAM4EM(config.model, rngs)


def trainable(config: Config, path: str) -> bool:
    """Whether the parameter at a dotted path trains; see :data:`FINETUNE`."""
    adapter, encoder = is_adapter(path), path.startswith("image_encoder.")
    if config.finetune == "full":
        return True
    if config.finetune == "stage2":
        return path.startswith(("fpn.", "mem.")) or (adapter and not encoder)
    return not encoder or adapter


def inherits(config: Config, other: Any) -> Mapping[str, str] | Callable[[str], bool] | None:
    """What ``train.init_from`` takes over: of an EM-prior run trunk and neck, of stage 1 all but the new adapters.

    Raises ``UserError`` where stage 2 is to start from anything else than stage 1 of the same network.
    """
    if config.finetune != "stage2":
        return hiera_pretraining.inherited(other, config.model.encoder)
    if isinstance(other, Config) and other.model == config.model:
        return None
    if not isinstance(other, Config) or other.model != dataclasses.replace(config.model, decoder_lora=None):
        kind = f"a run of {type(other).__module__}" if not isinstance(other, Config) else "a SAM4EM with other settings"
        raise UserError(
            f"train.init_from: stage 2 starts from a run of stage 1 with the same system.model, found {kind}"
        )
    return lambda path: not (is_adapter(path) and path.startswith("mask_decoder"))


def pretrained(config: Config) -> dict[str, Any]:
    """Parameters and constants that a fresh run takes from ``sam2_checkpoint``; empty where none is given.

    Raises ``UserError`` for weights that are missing, of another size, or not of SAM 2, and for stage 2, which starts
    from stage 1.
    """
    if config.finetune == "stage2":
        raise UserError("stage 2 starts from a run of stage 1: give --config.train.init_from=DIR of its work directory")
    if not config.sam2_checkpoint:
        if config.finetune != "full":
            logger.warning("no weights are given: the encoder is random and stays so but for its adapters")
        return {}
    path = pathlib.Path(config.sam2_checkpoint)
    if not path.exists():
        raise UserError(f"system.sam2_checkpoint: {path} does not exist; docs/sam2.md says where weights are")
    if (path / "config.json").is_file():
        raise UserError(f"system.sam2_checkpoint {path}: is a run of emjax.train; give --config.train.init_from={path}")
    checkpoint = read_checkpoint(path, [FAMILY])
    shapes = define(lambda rngs: build(config, rngs)).shapes
    return started_from_sam2(shapes, checkpoint.collections, config.first_decoder == "sam2", str(path))


def check_variables(config: Config, collections: Mapping[str, Mapping]) -> None:
    """Raises ``UserError`` if variables are not those of the configured network, such as stage 1 given as stage 2."""
    wanted = set(paths(define(lambda rngs: build(config, rngs)).shapes["params"]))
    found = set(paths(collections["params"]))
    missing, surplus = sorted(wanted - found), sorted(found - wanted)
    if missing and not surplus and all(is_adapter(path) and path.startswith("mask_decoder") for path in missing):
        raise UserError("the checkpoint is of stage 1 (its decoders have no adapters), the configuration of stage 2")
    if surplus and not missing and all(is_adapter(path) and path.startswith("mask_decoder") for path in surplus):
        raise UserError("the checkpoint is of stage 2 (its decoders have adapters), the configuration of stage 1")
    if missing or surplus:
        first = f"lacks {missing[0]}" if missing else f"has {surplus[0]}"
        raise UserError(
            f"the checkpoint is of another SAM4EM: it {first}; use the configuration that it was trained with"
        )


def normalised(grey: jax.Array, kind: Normalisation) -> jax.Array:
    """Grey slices (n, H, W), 0..1, as the network's input (n, H, W, 3)."""
    if kind == "imagenet":
        mean, deviation = jnp.asarray(MEAN, jnp.float32), jnp.asarray(STD, jnp.float32)
        return (grey[..., None] - mean) / deviation
    if kind == "balanced":
        grey = (grey - MEAN[0]) / STD[0]
    elif kind == "minmax":
        low, high = grey.min((1, 2), keepdims=True), grey.max((1, 2), keepdims=True)
        grey = (grey - low) / jnp.maximum(high - low, 1e-6)
    elif kind == "standard":
        mean, deviation = grey.mean((1, 2), keepdims=True), grey.std((1, 2), keepdims=True)
        grey = (grey - mean) / jnp.maximum(deviation, 1e-6)
    return jnp.repeat(grey[..., None], 3, axis=-1)


def network_size(config: Config, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of what the network sees of slices of ``shape``: shrunk, and padded to multiples of 32."""
    height, width = (-(-n // (STRIDE * config.shrink)) * STRIDE for n in shape)
    return height, width


def _padded(config: Config, image: jax.Array) -> jax.Array:
    """Slices (..., y, x) continued by reflection at the bottom and right, to what the network takes."""
    shape = image.shape[-2], image.shape[-1]
    whole = [n * config.shrink for n in network_size(config, shape)]
    if tuple(whole) == shape:
        return image
    logger.warning(
        "slices of %d x %d pixels are padded to %d x %d, multiples of %d, and masks cropped again",
        *shape,
        *whole,
        STRIDE * config.shrink,
    )
    margins = [(0, 0)] * (image.ndim - 2) + [(0, w - n) for w, n in zip(whole, shape)]
    return jnp.pad(image, margins, mode="symmetric")


def _shrunk(config: Config, array: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Means over cells of ``shrink`` x ``shrink`` along two neighbouring axes."""
    factor, first = config.shrink, axes[0]
    if factor == 1:
        return array
    shape = array.shape
    cells = (shape[first] // factor, factor, shape[first + 1] // factor, factor)
    return array.reshape(*shape[:first], *cells, *shape[first + 2 :]).mean((first + 1, first + 3))


def encode(config: Config, model: sam4em.SAM4EM, image: jax.Array, train: bool = False) -> jax.Array:
    """Features (n, H / 4, W / 4, c) of slices (n, y, x), uint8 or 0..1, (H, W) = ``network_size(config, (y, x))``."""
    grey = _shrunk(config, unit_grey(_padded(config, image)), (1, 2))
    return model.encode(normalised(grey, config.normalisation), train)


def full_size(config: Config, logits: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Logits (..., H, W, classes) of the network as those of slices of ``shape`` (y, x)."""
    whole = tuple(n * config.shrink for n in logits.shape[-3:-1])
    return resize(logits, whole)[..., : shape[0], : shape[1], :]


def initial_state(config: Config, model: sam4em.SAM4EM, features: jax.Array, truth: jax.Array | None = None) -> State:
    """The state before a stack whose first slice has ``features`` (batch, H / 4, W / 4, c), with its first prompt.

    ``truth`` (batch, y, x, classes): the first slice's masks, where they are known and ``first_mask`` wants them.
    """
    batch, size = features.shape[0], (4 * features.shape[1], 4 * features.shape[2])
    prompt = None
    if config.first_mask == "truth" and truth is not None:
        prompt = (_shrunk(config, _padded_masks(config, truth), (1, 2)) >= 0.5).astype(jnp.float32)
    empty = model.initial_state(batch, size, prompt)
    if config.first_mask != "predicted":
        return empty
    answered, _ = model.step(empty, features)
    return empty._replace(prompt=answered.prompt)


def _padded_masks(config: Config, masks: jax.Array) -> jax.Array:
    height, width = (n * config.shrink for n in network_size(config, (masks.shape[1], masks.shape[2])))
    margins = ((0, 0), (0, height - masks.shape[1]), (0, width - masks.shape[2]), (0, 0))
    return jnp.pad(masks, margins)


def run(
    config: Config,
    model: sam4em.SAM4EM,
    image: jax.Array,
    truth: jax.Array | None = None,
    key: jax.Array | None = None,
    train: bool = False,
) -> Masks:
    """Logits (b, z, y, x, classes) of chunks ``image`` (b, z, y, x), slices in order; ``truth`` alike, 0 or 1."""
    batch, depth, height, width = image.shape
    features = encode(config, model, image.reshape(batch * depth, height, width), train)
    ordered = jnp.swapaxes(features.reshape(batch, depth, *features.shape[1:]), 0, 1)
    state = initial_state(config, model, ordered[0], None if truth is None else truth[:, 0])
    _, masks = model.scan(state, ordered, key if train else None)
    return jax.tree.map(lambda logits: full_size(config, jnp.swapaxes(logits, 0, 1), (height, width)), masks)


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``masks`` (b, z, y, x, classes), 0 or 1, and ``weights`` (b, z, y, x, 1), float32."""
    labels = batch["labels"]
    masks = [jnp.isin(labels, jnp.asarray(c.labels, labels.dtype)) if c.labels else labels > 0 for c in config.classes]
    mask = batch.get("mask", jnp.ones(labels.shape, jnp.uint8))
    return {
        "masks": jnp.stack(masks, axis=-1).astype(jnp.float32),
        "weights": (mask > 0).astype(jnp.float32)[..., None],
    }


def terms(config: Config, masks: Masks, wanted: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The parts of the loss, float32 scalars: ``bce``, ``dice``, ``loss`` of both stages, ``total``; and ``iou_loss1``,
    1 - overlap / (union + 1) of the first stage's probabilities, which is only looked at."""
    truth, weights = wanted["masks"], wanted["weights"]
    found: dict[str, jax.Array] = {}
    for stage, logits in ((1, masks.first), (2, masks.second)):
        bce = losses.binary_cross_entropy(logits, truth, weights)
        dice = losses.linear_dice(jax.nn.sigmoid(logits), truth, weights)
        found |= {f"bce{stage}": bce, f"dice{stage}": dice}
        found[f"loss{stage}"] = (1 - config.dice_share) * bce + config.dice_share * dice
    found["total"] = config.first_share * found["loss1"] + (1 - config.first_share) * found["loss2"]
    probability = jax.nn.sigmoid(masks.first)
    overlap = (weights * probability * truth).sum()
    found["iou_loss1"] = 1 - overlap / ((weights * (probability + truth)).sum() - overlap + 1)
    return found


def loss(
    config: Config, model: sam4em.SAM4EM, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Both stages' loss; logs their parts, the IoU of each class in the batch (1 where there is none and none is
    found), and ``error``, 1 - the mean IoU."""
    wanted = targets(config, batch)
    masks = run(config, model, batch["image"], wanted["masks"], key, train)
    found = terms(config, masks, wanted)
    scalars = {name: found[name] for name in ("bce1", "dice1", "bce2", "dice2")}
    probability = jax.nn.sigmoid(masks.result(config.model))
    return found["total"], scalars | class_overlaps(config, probability, wanted)


def class_overlaps(config: Config, probability: jax.Array, wanted: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The IoU of each class in a batch, and ``error``, 1 - their mean; see :func:`loss`."""
    chosen = ((probability >= config.threshold) & (wanted["weights"] > 0)).astype(jnp.float32)
    truth = wanted["masks"] * wanted["weights"]
    axes = tuple(range(truth.ndim - 1))
    overlap = (chosen * truth).sum(axes)
    union = chosen.sum(axes) + truth.sum(axes) - overlap
    iou = jnp.where(union > 0, overlap / jnp.maximum(union, 1), 1.0)
    return {f"iou_{c.name}": iou[i] for i, c in enumerate(config.classes)} | {"error": 1 - iou.mean()}


def predict(config: Config, model: sam4em.SAM4EM, image: jax.Array) -> dict[str, jax.Array]:
    """``probabilities`` (b, z, y, x, classes) of chunks, each with an empty memory at first."""
    masks = run(config, model, image)
    return {"probabilities": jax.nn.sigmoid(masks.result(config.model))}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame; flipped in z, slices were seen in the other order."""
    return {name: jnp.flip(values, [axis + 1 for axis in axes]) for name, values in outputs.items()}


def outputs(config: Config) -> dict[str, Output]:
    """Probabilities of the classes, whose names are stored with the volume."""
    names = [c.name for c in config.classes]
    return {"probabilities": Output(kind="probability", channels=len(names), attributes={"classes": names})}


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Classes uint32 (z, y, x), 1, 2, ... in the order of ``classes``, 0 for none, of ``probabilities`` (classes, z, y,
    x), float32 or uint8 (scaled by 255), read slice by slice."""
    found = outputs["probabilities"]
    labels = np.zeros(found.shape[1:], np.uint32)
    for z in range(len(labels)):
        section = np.asarray(found[:, z : z + 1])[:, 0]
        least = np.ceil(config.threshold * 255) if section.dtype == np.uint8 else config.threshold
        best = section.argmax(0)
        labels[z] = np.where(section.max(0) >= least, best + 1, 0)
    return labels


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan


def stack_network(config: Config, collections: Collections) -> sam4em_stack.Net:
    """The network as inference over volumes takes it. Raises ``UserError`` for variables of another network."""
    check_variables(config, collections)

    def scan(
        model: sam4em.SAM4EM, state: State, features: jax.Array, shape: tuple[int, int]
    ) -> tuple[State, jax.Array]:
        state, masks = model.scan(state, features)
        return state, jax.nn.sigmoid(full_size(config, masks.result(config.model), shape))

    return sam4em_stack.Net(
        classes=len(config.classes),
        definition=define(lambda rngs: build(config, rngs)),
        collections=collections,
        encode=lambda model, image: encode(config, model, image),
        start=lambda model, features, truth: initial_state(config, model, features, truth),
        scan=scan,
    )


def stack_plan(config: Config) -> sam4em_stack.Plan:
    """How ``emjax.segment`` cuts a volume."""
    return sam4em_stack.plan_of(config.plan, STRIDE * config.shrink, config.tiles)


def segment_volume(config: Config, collections: Collections | None, image: Volume) -> Streaming:
    """A whole volume, slab by slab, memory carried along z; see ``emjax.systems.sam4em_stack``.

    Raises ``UserError`` without a checkpoint, or for one of another network.
    """
    if collections is None:
        raise UserError("SAM4EM needs a trained network: --checkpoint DIR")
    net = stack_network(config, collections)
    return sam4em_stack.segment_volume(
        stack_plan(config), net, image, lambda probabilities: decode(config, {"probabilities": probabilities})
    )

"""The first stage of SegNeuron (Zhang et al., MICCAI 2024): restore a patch and its HOG image from a patch with holes.

Random blocks are filled with noise of the patch's own mean and deviation; MNet without skip connections restores grey
values and gradients. Its encoder starts the fine-tuning (``train.init_from`` of ``emjax.systems.segneuron``).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.hog import hog_image
from emjax.data.masking import Fill, draw, hidden_patch
from emjax.errors import UserError
from emjax.models import mnet
from emjax.systems.protocol import Block, Output, Triple, unit_grey

SCALES: tuple[Triple, ...] = tuple((z, xy, xy) for z in (2, 4, 5) for xy in (4, 8, 16))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Pretraining, with the paper's ablations as switches.

    Attributes:
        model: MNet without skip connections, two heads of one channel.
        fill: what hidden blocks hold: ``"gaussian"``, ``"zero"`` or ``"mean"``.
        blocks: block shapes (z, y, x), one drawn for each sample; a single one is the ablation without multiple scales.
        ratio: smallest and largest share of hidden blocks.
        image_weight, hog_weight: of the two squared errors; ``hog_weight`` 0 is the ablation without HOG.
        plan: blocks of prediction, to look at restored volumes.
    """

    model: mnet.Config = mnet.pretraining(mnet.Config())
    fill: Fill = "gaussian"
    blocks: tuple[Triple, ...] = SCALES
    ratio: tuple[float, float] = (0.5, 0.7)
    image_weight: float = 0.2
    hog_weight: float = 1.0
    plan: Block = Block(
        size=(20, 128, 128), stride=(10, 64, 64), placement="centred", blending="gaussian_plus", sigma=0.2, floor=1e-6
    )


def validate(config: Config) -> None:
    """Raises ``UserError`` for a configuration that cannot work."""
    if config.model.skips or config.model.outputs != (1, 1):
        raise UserError(
            f"segneuron_pretraining: model.skips {config.model.skips} and model.outputs {config.model.outputs}, "
            "expected False and (1, 1); with skip connections the network copies its input"
        )
    if config.fill not in ("gaussian", "zero", "mean"):
        raise UserError(f"segneuron_pretraining: fill {config.fill!r}, expected 'gaussian', 'zero' or 'mean'")
    if not config.blocks or any(len(block) != 3 or min(block) < 1 for block in config.blocks):
        raise UserError(f"segneuron_pretraining: blocks {config.blocks}, expected shapes (z, y, x) from 1 up")
    if not 0 <= config.ratio[0] <= config.ratio[1] <= 1:
        raise UserError(f"segneuron_pretraining: ratio {config.ratio}, expected (smallest, largest) within 0 to 1")
    if min(config.image_weight, config.hog_weight) < 0 or config.image_weight + config.hog_weight == 0:
        raise UserError(
            f"segneuron_pretraining: image_weight {config.image_weight} and hog_weight {config.hog_weight}, expected "
            "numbers from 0 up that are not both 0"
        )
    config.plan.validate()


def build(config: Config, rngs: nnx.Rngs) -> mnet.MNet:
    """The network."""
    return mnet.MNet(config.model, rngs)


def trainable(config: Config, path: str) -> bool:
    """Every parameter trains."""
    return True


def targets(config: Config, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """``image`` and ``hog``, the clean patch 0..1 and its HOG image, both (b, z, y, x, 1) float32."""
    clean = unit_grey(batch["image"])
    return {"image": clean[..., None], "hog": hog_image(clean)[..., None]}


def terms(outputs: tuple[jax.Array, jax.Array], wanted: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Mean squared errors of the image and of the HOG image, over hidden and visible voxels alike."""
    return jnp.square(outputs[0] - wanted["image"]).mean(), jnp.square(outputs[1] - wanted["hog"]).mean()


def hidden(config: Config, clean: jax.Array, key: jax.Array) -> jax.Array:
    """Patches (b, z, y, x) with hidden blocks, each drawn by itself."""

    def one(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
        patch, key = arguments
        z, y, x = patch.shape
        return hidden_patch(patch, draw(key, (z, y, x), config.blocks, config.ratio), config.blocks, config.fill)

    # A loop over the batch, not vmap, which would compute the masks of all block shapes.
    return jax.lax.map(one, (clean, jax.random.split(key, len(clean))))


def loss(
    config: Config, model: mnet.MNet, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of the two squared errors."""
    wanted = targets(config, batch)
    outputs = model(hidden(config, wanted["image"][..., 0], key)[..., None])
    image, hog = terms(outputs, wanted)
    return config.image_weight * image + config.hog_weight * hog, {"image_loss": image, "hog_loss": hog}


def predict(config: Config, model: mnet.MNet, image: jax.Array) -> dict[str, jax.Array]:
    """``restored`` and ``hog`` (b, z, y, x, 1) of an image without hidden blocks."""
    restored, hog = model(unit_grey(image)[..., None])
    return {"restored": restored, "hog": hog}


def flip_back(config: Config, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Outputs of a flipped block in the unflipped frame."""
    if axes:
        raise UserError("segneuron_pretraining: no test-time flips, HOG images have no mirror image")
    return outputs


def outputs(config: Config) -> dict[str, Output]:
    """The two restored images."""
    return {name: Output(kind="probability", channels=1) for name in ("restored", "hog")}


def refuse_segmentation(config: Config) -> NoReturn:
    """Raises ``UserError``: this network restores images and segments nothing."""
    raise UserError(
        "this is a checkpoint of SegNeuron's pretraining, which restores images and segments nothing; fine-tune from "
        "it with configs/segneuron/finetune.py --config.train.init_from=DIR"
    )


def decode(config: Config, outputs: Mapping[str, Any]) -> np.ndarray:
    """Raises ``UserError``, see :func:`refuse_segmentation`."""
    refuse_segmentation(config)


def block(config: Config) -> Block:
    """The plan of prediction."""
    return config.plan

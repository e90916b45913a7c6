"""The demo: a small affinity U-Net on made-up neuropil, from nothing to a scored segmentation in minutes.

    python -m emjax.train --config configs/demo/phantom.py --workdir demo/run

``make demo`` makes the volumes first, and then segments, scores and reports. Hardware: any CPU with two cores.
The volumes are those of ``python -m emjax.prepare phantom``; ``EMJAX_DEMO`` (default ``demo``) says where they are.

Variants: "" and "untrained" (one step at a rate of nearly nothing, the network to compare with).
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import standard_chain
from emjax.data.pipeline import Source
from emjax.models.unet import UNetConfig
from emjax.systems import affinity_unet
from emjax.systems.protocol import Block

FOLDER = os.environ.get("EMJAX_DEMO", "demo")
OFFSETS = tuple(tuple(-step if axis == a else 0 for a in range(3)) for step in (1, 3) for axis in range(3))


def _source(name: str) -> Source:
    return Source(raw=f"{FOLDER}/{name}.zarr/raw", labels=f"{FOLDER}/{name}.zarr/labels", name=name)


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    crop = (16, 96, 96)
    config = Experiment(
        system=affinity_unet.Config(
            model=UNetConfig(
                widths=(16, 32, 48),
                pools=((2, 2, 2),) * 2,
                kernels=((3, 3, 3),) * 3,
                patch=(2, 2, 2),
                padding="replicate",
            ),
            offsets=OFFSETS,
            widen_borders=(3, 3, 3),
            plan=Block(size=(32, 96, 96), stride=(16, 48, 48), blending="gaussian"),
            # A network this briefly trained draws wide membranes, which break into crumbs.
            segmentation=affinity_unet.Segmentation(regrow=30, threshold=0.8),
        ),
        data=Data(
            train=(_source("train"),),
            validation=(_source("test"),),
            crop=crop,
            batch_size=2,
            augment=standard_chain(crop, anisotropic=False),
            threads=1,
            validation_batches=2,
        ),
        optimizer=Optimizer(lr=4e-3, warmup_steps=10),
        train=Train(steps=120, ema=0.95, log_every=10, validate_every=60, save_every=60),
    )
    if variant == "":
        return config
    if variant == "untrained":
        return dataclasses.replace(
            config,
            optimizer=Optimizer(lr=1e-12, warmup_steps=0),
            train=Train(steps=1, log_every=1, validate_every=0, save_every=1, overlays=0),
        )
    raise variant_error(variant, ["", "untrained"])

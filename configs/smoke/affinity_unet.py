"""A run of seconds on the small FIB-SEM crops, for tests and for a first look.

    python -m emjax.train --config configs/smoke/affinity_unet.py --workdir runs/smoke

Hardware: any CPU. Time: about a minute. Expected: the loss falls below its start; nothing to publish.
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``fibsem_mini``.
"""

import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import FlipTranspose
from emjax.data.pipeline import Source
from emjax.models.unet import UNetConfig
from emjax.systems import affinity_unet
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")


def get_config(variant: str = "") -> Experiment:
    """The experiment; it has no variants."""
    if variant:
        raise variant_error(variant, [""])
    volume = f"{DATA}/fibsem_mini/train.h5"
    held_out = f"{DATA}/fibsem_mini/test.h5"
    return Experiment(
        system=affinity_unet.Config(
            model=UNetConfig(widths=(8, 12), pools=((2, 2, 2),), kernels=((1, 3, 3), (3, 3, 3))),
            voxel_size=(10.0, 10.0, 10.0),
            plan=Block(size=(16, 48, 48), stride=(8, 32, 32), halo=(4, 8, 8)),
        ),
        data=Data(
            train=(Source(raw=f"{volume}:raw", labels=f"{volume}:labels", voxel_size=(10.0, 10.0, 10.0)),),
            validation=(Source(raw=f"{held_out}:raw", labels=f"{held_out}:labels", voxel_size=(10.0, 10.0, 10.0)),),
            crop=(16, 32, 32),
            batch_size=2,
            augment=(FlipTranspose(),),
            threads=2,
            validation_batches=2,
        ),
        optimizer=Optimizer(lr=2e-3, warmup_steps=5),
        train=Train(steps=40, log_every=5, validate_every=20, save_every=10, overlays=0),
    )

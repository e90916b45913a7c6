"""FGNet for a minute on the small FIB-SEM crops, with a random encoder, for tests and for a first look.

    python -m emjax.train --config configs/smoke/fgnet.py --workdir runs/smoke_fgnet

Hardware: any CPU. Time: about two minutes, most of it compilation. Expected: the loss falls below its start; nothing to publish.
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``fibsem_mini``.
"""

import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import FlipTranspose
from emjax.data.pipeline import Source
from emjax.models.fgnet import FGNetConfig
from emjax.models.unet import UNetConfig
from emjax.systems import fgnet
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (10.0, 10.0, 10.0)


def get_config(variant: str = "") -> Experiment:
    """The experiment; it has no variants."""
    if variant:
        raise variant_error(variant, [""])

    def source(name: str) -> Source:
        file = f"{DATA}/fibsem_mini/{name}.h5"
        return Source(raw=f"{file}:raw", labels=f"{file}:labels", voxel_size=VOXEL_SIZE)

    return Experiment(
        system=fgnet.Config(
            model=FGNetConfig(
                fine=UNetConfig(
                    widths=(8, 8, 12), pools=((1, 2, 2), (2, 2, 2)), kernels=((3, 3, 3),) * 3, patch=(2, 4, 4)
                ),
                guided=(4, 8, 16),
                context=12,
                thickness=4,
            ),
            encoder=fgnet.Encoder(size="nano", features=16),
            encoder_checkpoint=fgnet.RANDOM,
            voxel_size=VOXEL_SIZE,
            plan=Block(size=(16, 64, 64), stride=(8, 32, 32), blending="gaussian"),
        ),
        data=Data(
            train=(source("train"),),
            validation=(source("test"),),
            crop=(16, 64, 64),
            batch_size=2,
            augment=(FlipTranspose(),),
            threads=1,
            validation_batches=1,
        ),
        optimizer=Optimizer(lr=3e-3, warmup_steps=5),
        train=Train(steps=40, log_every=5, validate_every=20, save_every=20, overlays=0),
    )

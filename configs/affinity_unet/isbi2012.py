"""Affinity U-Net on the ISBI 2012 volume (ssTEM, 50 x 4 x 4 nm): the anisotropic case.

    python -m emjax.train --config configs/affinity_unet/isbi2012.py --workdir runs/isbi2012          # one GPU
    python -m emjax.train --config configs/affinity_unet/isbi2012.py:cpu --workdir runs/isbi2012_cpu  # 2 CPU cores

Then ``eval/affinity_unet.py isbi2012 --workdir ...`` predicts ``val.h5`` and writes
``eval/results/affinity_unet_isbi2012.md``, which has hardware, times and scores.

Variants: "" (full resolution, meant for a GPU; not trained by us so far), "cpu" (folded by two in the section),
"debug" (a minute).
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``isbi2012_vnc``; its licence is non-commercial.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import standard_chain
from emjax.data.pipeline import Source
from emjax.models.unet import UNetConfig
from emjax.systems import affinity_unet
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (50.0, 4.0, 4.0)
OFFSETS = ((-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, -9, 0), (0, 0, -9), (0, -27, 0), (0, 0, -27))


def _source(name: str) -> Source:
    file = f"{DATA}/isbi2012_vnc/{name}.h5"
    # Reflected sections make room for the crop in 6 validation sections and for missing sections in training.
    return Source(
        raw=f"{file}:raw",
        labels=f"{file}:labels",
        name=f"isbi2012 {name}",
        voxel_size=VOXEL_SIZE,
        pad=(2, 0, 0),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    crop = (8, 192, 192)
    full = Experiment(
        system=affinity_unet.Config(
            model=UNetConfig(
                widths=(32, 48, 64, 96),
                pools=((1, 2, 2),) * 3,
                kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
                padding="replicate",
                dtype="bfloat16",
            ),
            offsets=OFFSETS,
            # Membranes are a class of their own here, wide enough.
            widen_borders=None,
            voxel_size=VOXEL_SIZE,
            plan=Block(size=crop, stride=(4, 96, 96), blending="gaussian"),
        ),
        data=Data(
            train=(_source("train"),),
            validation=(_source("val"),),
            crop=crop,
            batch_size=4,
            augment=standard_chain(crop, anisotropic=True),
            validation_batches=4,
        ),
        optimizer=Optimizer(lr=1e-3, warmup_steps=200),
        train=Train(steps=20_000, ema=0.999, log_every=50, validate_every=1000, save_every=1000),
    )
    if variant == "":
        return full
    model = dataclasses.replace(full.system.model, patch=(1, 2, 2), widths=(24, 48, 64, 80), dtype="float32")
    cpu = dataclasses.replace(
        full,
        system=dataclasses.replace(full.system, model=model),
        data=dataclasses.replace(full.data, batch_size=2, threads=2),
        optimizer=Optimizer(lr=2e-3, warmup_steps=30),
        train=Train(steps=200, ema=0.97, log_every=10, validate_every=100, save_every=50),
    )
    if variant == "cpu":
        return cpu
    if variant == "debug":
        return dataclasses.replace(cpu, train=Train(steps=6, log_every=2, validate_every=3, save_every=3))
    raise variant_error(variant, ["", "cpu", "debug"])

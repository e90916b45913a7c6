"""Affinity U-Net on the FIB-SEM medulla crops (10 nm isotropic), the plain baseline of emjax.

    python -m emjax.train --config configs/affinity_unet/fib25.py --workdir runs/fib25          # one GPU
    python -m emjax.train --config configs/affinity_unet/fib25.py:cpu --workdir runs/fib25_cpu  # 2 CPU cores
    python -m emjax.train --config configs/affinity_unet/fib25.py:cpu_second --workdir runs/fib25_cpu2 \\
        --config.train.init_from=runs/fib25_cpu

Then ``eval/affinity_unet.py fib25 --workdir ...`` predicts ``val.h5``, chooses the threshold there, and writes
``eval/results/affinity_unet_fib25.md``, which has hardware, times and scores.

Variants: "" (full resolution, meant for a GPU; not trained by us so far), "cpu" (the network works on a grid folded by
two, a step costs an eighth), "cpu_second" (goes on from it with borders that are not widened), "debug" (a minute, for a look at
the machinery).
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``fib25_medulla``.
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
VOXEL_SIZE = (10.0, 10.0, 10.0)
OFFSETS = tuple(tuple(-step if axis == a else 0 for a in range(3)) for step in (1, 3, 9) for axis in range(3))


def _source(name: str, pad: int = 0) -> Source:
    file = f"{DATA}/fib25_medulla/{name}.h5"
    return Source(
        raw=f"{file}:raw",
        labels=f"{file}:labels",
        ignore=f"{file}:ignore_mask",
        name=f"fib25 {name}",
        voxel_size=VOXEL_SIZE,
        pad=(pad, 0, 0),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    crop = (32, 128, 128)
    full = Experiment(
        system=affinity_unet.Config(
            model=UNetConfig(
                widths=(32, 64, 96, 128),
                pools=((2, 2, 2),) * 3,
                kernels=((3, 3, 3),) * 4,
                padding="replicate",
                dtype="bfloat16",
            ),
            offsets=OFFSETS,
            widen_borders=(3, 3, 3),
            voxel_size=VOXEL_SIZE,
            plan=Block(size=crop, stride=(16, 64, 64), blending="gaussian"),
        ),
        data=Data(
            train=(_source("train"),),
            # 30 sections, continued by reflection to the crop's 32.
            validation=(_source("val", pad=1),),
            crop=crop,
            batch_size=4,
            augment=standard_chain(crop, anisotropic=False),
            validation_batches=4,
        ),
        optimizer=Optimizer(lr=1e-3, warmup_steps=200, weight_decay=1e-2),
        train=Train(steps=20_000, ema=0.999, log_every=50, validate_every=1000, save_every=1000),
    )
    if variant == "":
        return full
    system = dataclasses.replace(
        full.system,
        model=dataclasses.replace(full.system.model, patch=(2, 2, 2), widths=(24, 48, 72, 96), dtype="float32"),
    )
    cpu = dataclasses.replace(
        full,
        system=system,
        data=dataclasses.replace(full.data, batch_size=2, threads=2, validation_batches=4),
        optimizer=Optimizer(lr=2e-3, warmup_steps=50, weight_decay=1e-2),
        train=Train(steps=700, ema=0.99, log_every=10, validate_every=150, save_every=50),
    )
    if variant == "cpu":
        return cpu
    if variant == "cpu_second":
        # A widened border leaves nothing of a process of a few voxels: once borders are known, the true labels follow.
        return dataclasses.replace(
            cpu,
            system=dataclasses.replace(
                cpu.system,
                widen_borders=None,
                predicted="all",
                segmentation=affinity_unet.Segmentation(
                    fragments="mutex", regrow=600, score="hist_quant_90", threshold=0.54
                ),
            ),
            optimizer=Optimizer(lr=1e-3, warmup_steps=10, weight_decay=1e-2),
            train=Train(steps=430, ema=0.99, log_every=10, validate_every=100, save_every=50),
        )
    if variant == "debug":
        return dataclasses.replace(cpu, train=Train(steps=10, log_every=2, validate_every=5, save_every=5))
    raise variant_error(variant, ["", "cpu", "cpu_second", "debug"])

"""AGQ on the ISBI 2012 volume (fruit-fly larva, ssTEM, 50 x 4 x 4 nm).

    python -m emjax.train --config configs/agq/isbi2012.py --workdir runs/agq_isbi2012          # one GPU
    python -m emjax.train --config configs/agq/isbi2012.py:cpu --workdir runs/agq_isbi2012_cpu  # 2 CPU cores

Trained by us for 201 steps of "cpu" only (eval/results/agq_isbi2012.md). The sections are thick and few (16 for training,
6 for validation), so blocks have 5 of them; label 0 is membrane, a class of its own.

Variants: "" (the published network), "cpu" (a small network on small crops), "debug" (a look at the machinery).
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``isbi2012_vnc``.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Mesh, Optimizer, Train, variant_error
from emjax.data.augment import standard_chain
from emjax.data.pipeline import Source
from emjax.models.agq import AGQConfig
from emjax.systems import agq
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (50.0, 4.0, 4.0)
BLOCK = (5, 257, 257)


def _source(name: str) -> Source:
    file = f"{DATA}/isbi2012_vnc/{name}.h5"
    return Source(raw=f"{file}:raw", labels=f"{file}:labels", name=f"isbi2012 {name}", voxel_size=VOXEL_SIZE)


def _plan(block: tuple[int, int, int]) -> Block:
    z, y, x = block
    return Block(size=block, stride=(z - 1, y - 1, x - 1), blending="linear")


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    full = Experiment(
        system=agq.Config(
            model=AGQConfig(dtype="bfloat16", remat=True),
            voxel_size=VOXEL_SIZE,
            plan=_plan(BLOCK),
        ),
        data=Data(
            train=(_source("train"),),
            validation=(_source("val"),),
            crop=BLOCK,
            batch_size=4,
            augment=standard_chain(BLOCK, anisotropic=True),
            validation_batches=4,
        ),
        optimizer=Optimizer(
            name="adam", lr=2e-4, warmup_steps=1000, warmup_factor=0.001, weight_decay=1e-4, clip_norm=0.0
        ),
        train=Train(steps=40_000, log_every=50, validate_every=2000, save_every=2000),
    )
    if variant == "":
        return full
    block = (5, 129, 129)
    model = AGQConfig(
        filters=(8, 16, 24, 32),
        isotropic=(False, False, False, True),
        features=32,
        branch_convs=2,
        guided=40,
        learned=40,
        min_area=50,
    )
    cpu = dataclasses.replace(
        full,
        system=dataclasses.replace(full.system, model=model, plan=_plan(block)),
        data=dataclasses.replace(
            full.data, crop=block, batch_size=1, threads=1, augment=standard_chain(block, anisotropic=True)
        ),
        optimizer=dataclasses.replace(full.optimizer, lr=1e-3, warmup_steps=100),
        train=Train(steps=4000, log_every=20, validate_every=500, save_every=500),
        mesh=Mesh(cpu_devices=1),
    )
    if variant == "cpu":
        return cpu
    if variant == "debug":
        return dataclasses.replace(cpu, train=Train(steps=4, log_every=1, validate_every=2, save_every=4))
    raise variant_error(variant, ["", "cpu", "debug"])

"""AGQ on the FIB-SEM medulla crops (10 nm isotropic).

    python -m emjax.train --config configs/agq/fib25.py --workdir runs/agq_fib25          # one GPU
    python -m emjax.train --config configs/agq/fib25.py:cpu --workdir runs/agq_fib25_cpu  # 2 CPU cores, minutes

Then ``python -m emjax.segment --checkpoint runs/agq_fib25 --input val.h5:raw --output labels.zarr``. ``python
eval/agq.py`` trains all three "cpu" variants and an affinity U-Net of the same budget, scores them on ``val.h5``, and
writes ``eval/results/agq.md``, which has hardware, times and scores.

Variants: "" (the published network, strides in z one level earlier because voxels are isotropic; not trained by us),
"cpu" (a small network on small crops, a few minutes of two cores), "debug" (a look at the machinery), and the ablations
of the paper's table with either of the first two: "learned" and "cpu_learned" (learned queries only), "guided" and
"cpu_guided" (affinity-guided only).
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``fib25_medulla``.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Mesh, Optimizer, Train, variant_error
from emjax.data.augment import FlipTranspose, Grayscale, standard_chain
from emjax.data.pipeline import Source
from emjax.models.agq import AGQConfig
from emjax.systems import agq
from emjax.systems.agq_loss import LossConfig
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (10.0, 10.0, 10.0)
BLOCK = (17, 129, 129)
ABLATIONS = {"": {}, "learned": {"guided": 0}, "guided": {"learned": 0}}


def _source(name: str) -> Source:
    file = f"{DATA}/fib25_medulla/{name}.h5"
    return Source(
        raw=f"{file}:raw",
        labels=f"{file}:labels",
        ignore=f"{file}:ignore_mask",
        name=f"fib25 {name}",
        voxel_size=VOXEL_SIZE,
    )


def _plan(block: tuple[int, int, int]) -> Block:
    z, y, x = block
    return Block(size=block, stride=(z - 1, y - 1, x - 1), blending="linear")


def _full() -> Experiment:
    return Experiment(
        system=agq.Config(
            model=AGQConfig(isotropic=(False, False, True, True, True), dtype="bfloat16", remat=True),
            voxel_size=VOXEL_SIZE,
            plan=_plan(BLOCK),
        ),
        data=Data(
            train=(_source("train"),),
            validation=(_source("val"),),
            crop=BLOCK,
            batch_size=4,
            augment=standard_chain(BLOCK, anisotropic=False),
            validation_batches=4,
        ),
        optimizer=Optimizer(
            name="adam", lr=2e-4, warmup_steps=1000, warmup_factor=0.001, weight_decay=1e-4, clip_norm=0.0
        ),
        train=Train(steps=40_000, log_every=50, validate_every=2000, save_every=2000),
    )


def _cpu(full: Experiment) -> Experiment:
    block = (9, 65, 65)
    model = AGQConfig(
        filters=(8, 16, 24, 32),
        isotropic=(False, False, True, True),
        features=16,
        groups=4,
        heads=4,
        branch_convs=2,
        guided=24,
        learned=24,
        min_area=50,
    )
    system = dataclasses.replace(
        full.system,
        model=model,
        # A crop holds about 30 objects; the similarity of 4096 voxels would cost more than the network.
        criterion=LossConfig(instances=48, samples=1024),
        plan=_plan(block),
    )
    return dataclasses.replace(
        full,
        system=system,
        data=dataclasses.replace(
            full.data,
            crop=block,
            batch_size=1,
            threads=1,
            augment=(FlipTranspose(), Grayscale(p=0.5)),
            validation_batches=4,
        ),
        optimizer=dataclasses.replace(full.optimizer, lr=2e-3, warmup_steps=50),
        train=Train(steps=700, log_every=20, validate_every=175, save_every=50, overlays=0),
        mesh=Mesh(cpu_devices=1),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    known = ["", "learned", "guided", "cpu", "cpu_learned", "cpu_guided", "debug"]
    if variant not in known:
        raise variant_error(variant, known)
    if variant == "debug":
        return dataclasses.replace(_cpu(_full()), train=Train(steps=4, log_every=1, validate_every=2, save_every=4))
    base = _cpu(_full()) if variant.startswith("cpu") else _full()
    ablation = ABLATIONS[variant.removeprefix("cpu").removeprefix("_")]
    model = dataclasses.replace(base.system.model, **ablation)
    return dataclasses.replace(base, system=dataclasses.replace(base.system, model=model))

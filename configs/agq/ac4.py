"""AGQ on AC4, as published: 200,000 steps of 8 volumes, tested on AC3 (Kasthuri mouse cortex, 29 x 6 x 6 nm).

    python -m emjax.train --config configs/agq/ac4.py --workdir runs/agq_ac4               # 8 devices, a volume each
    python eval/agq_ac3.py --checkpoint runs/agq_ac4 --raw AC3_inputs.h5:main --labels AC3_labels.h5:main

Published scores of the released checkpoint on AC3: VOI split 0.681, merge 0.267, sum 0.947, adapted Rand error 0.089.
Not trained by us so far: the volumes are not freely at hand here.

Variants: "" (published), "bf16" (the same with bfloat16 convolutions and rematerialisation, for 16 GB devices),
"debug" (a small network on small crops, for a look at the machinery).
Data: ``EMJAX_DATA`` must hold ``ac3_ac4/AC4_inputs.h5`` and ``ac3_ac4/AC4_labels.h5`` (dataset ``main``), or override
``--config.data.train.0.raw`` and ``--config.data.train.0.labels``. Held-out sections for validation: the field's usual
split is the last 20 of AC4's 100 sections.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Mesh, Optimizer, Train, variant_error
from emjax.data.augment import (
    CutBlur,
    CutNoise,
    Elastic,
    FlipTranspose,
    Grayscale,
    Misalignment,
    MissingParts,
    MissingSection,
    MotionBlur,
    Rescale,
    Rotate90,
)
from emjax.data.pipeline import Source
from emjax.models.agq import AGQConfig
from emjax.systems import agq
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (29.0, 6.0, 6.0)
BLOCK = (17, 257, 257)

# In the order in which they act.
AUGMENT = (
    CutNoise(p=0.75),
    CutBlur(p=0.5),
    MotionBlur(p=0.5),
    Misalignment(p=0.5, displacement=16),
    MissingSection(p=0.5, count=2),
    MissingParts(p=0.9),
    Grayscale(p=0.75),
    Elastic(p=0.75, border="zero"),
    Rescale(p=0.5),
    Rotate90(p=1.0),
    FlipTranspose(p=1.0),
)


def _source(name: str, begin: int, end: int) -> Source:
    return Source(
        raw=f"{DATA}/ac3_ac4/AC4_inputs.h5:main",
        labels=f"{DATA}/ac3_ac4/AC4_labels.h5:main",
        name=name,
        voxel_size=VOXEL_SIZE,
        begin=(begin, 0, 0),
        end=(end, 1024, 1024),
        pad=(4, 64, 64),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    published = Experiment(
        system=agq.Config(voxel_size=VOXEL_SIZE),
        data=Data(
            train=(_source("AC4 train", 0, 80),),
            validation=(_source("AC4 val", 80, 100),),
            crop=BLOCK,
            batch_size=8,
            augment=AUGMENT,
            threads=16,
            transport="float32",
            validation_batches=4,
        ),
        optimizer=Optimizer(
            name="adam",
            lr=1e-4,
            schedule="cosine",
            warmup_steps=1000,
            warmup_factor=0.001,
            weight_decay=1e-4,
            clip_norm=0.0,
        ),
        train=Train(steps=200_000, log_every=100, validate_every=10_000, save_every=10_000),
        mesh=Mesh(),
    )
    if variant == "":
        return published
    if variant == "bf16":
        model = dataclasses.replace(published.system.model, dtype="bfloat16", remat=True)
        return dataclasses.replace(published, system=dataclasses.replace(published.system, model=model))
    if variant == "debug":
        small = AGQConfig(filters=(8, 8, 16), isotropic=(False, False, True), features=8, groups=2, heads=2)
        block = (9, 33, 33)
        return dataclasses.replace(
            published,
            system=agq.Config(
                model=small,
                voxel_size=VOXEL_SIZE,
                plan=Block(size=block, stride=tuple(n - 1 for n in block), blending="linear"),
            ),
            data=dataclasses.replace(published.data, crop=block, batch_size=1, threads=1, augment=()),
            train=Train(steps=4, log_every=1, validate_every=2, save_every=4),
            mesh=Mesh(cpu_devices=1),
        )
    raise variant_error(variant, ["", "bf16", "debug"])

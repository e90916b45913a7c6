"""FGNet on AC4, tested on AC3 (Kasthuri mouse cortex, 30 x 6 x 6 nm): the protocol of the AC3/AC4 literature.

    python -m emjax.train --config configs/fgnet/ac3ac4.py:frozen --workdir runs/fgnet_ac3 \\
        --config.system.encoder_checkpoint=weights/sam2.1_large              # one GPU of 24 GB
    python eval/fgnet_ac3.py --checkpoint runs/fgnet_ac3 --raw AC3_inputs.h5:main --labels AC3_labels.h5:main

200,000 steps of 8 volumes of 18 x 256 x 256, taken one after the other (``--config.train.accumulate=1`` on 8 devices).
AC4's first 80 sections train, its last 20 validate; AC3's first 100 sections are the test. Not trained by us so far: volumes,
weights and hardware are not at hand here. Reported for AC3 in the literature (docs/fgnet.md): SuperHuman 1.408 bits and 0.122
(multicut), AGQ 0.947 and 0.089; of FGNet itself a gain of 12.5 % is quoted second-hand.

Variants: "" and "frozen" (A4: SAM 2 large, frozen, weights in bfloat16), "lora", "finetune", the rows "A0", "A0w", "A1",
"A2", "A3", "A4", "A5", "A5l", "C1", "C1t", "C2"; "protocol" (A4 on 18 x 160 x 160, the crop of the older papers).
Data: ``EMJAX_DATA`` must hold ``ac3_ac4/AC4_inputs.h5`` and ``ac3_ac4/AC4_labels.h5`` (dataset ``main``), or override
``--config.data.train.0.raw`` and ``--config.data.train.0.labels``.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import Elastic, FlipTranspose, Grayscale, Rotate90
from emjax.data.pipeline import Source
from emjax.models.fgnet import FGNetConfig
from emjax.models.unet import UNetConfig
from emjax.systems import fgnet
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (30.0, 6.0, 6.0)
CROP = (18, 256, 256)
WARMUP = 3000
"""Steps for which SAM 2 is held before it is fine-tuned."""

MODEL = FGNetConfig(
    fine=UNetConfig(
        widths=(28, 36, 48, 64, 80),
        pools=((1, 2, 2),) * 4,
        kernels=((3, 3, 3),) * 5,
        padding="replicate",
        dtype="bfloat16",
        remat=True,
    ),
)
WIDE = (40, 52, 72, 92, 120)


AUGMENT = (
    Elastic(p=0.25),
    Rotate90(p=0.5),
    FlipTranspose(p=0.5),
    Grayscale(p=0.25),
)


def _source(name: str, begin: int, end: int) -> Source:
    return Source(
        raw=f"{DATA}/ac3_ac4/AC4_inputs.h5:main",
        labels=f"{DATA}/ac3_ac4/AC4_labels.h5:main",
        name=name,
        voxel_size=VOXEL_SIZE,
        begin=(begin, 0, 0),
        end=(end, 1024, 1024),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    names = {"": "A4", "frozen": "A4", "lora": "A5l", "finetune": "A5", **{row: row for row in fgnet.ABLATIONS}}
    if variant not in [*names, "protocol"]:
        raise variant_error(variant, [*names, "protocol"])
    full = Experiment(
        system=fgnet.Config(
            model=MODEL,
            encoder=fgnet.Encoder(size="large", dtype="bfloat16", weights="bfloat16"),
            encoder_checkpoint=os.environ.get("SAM2_WEIGHTS", "weights/sam2.1_large"),
            voxel_size=VOXEL_SIZE,
            plan=Block(size=CROP, stride=(9, 128, 128), blending="gaussian", sigma=0.2),
        ),
        data=Data(
            train=(_source("AC4 train", 0, 80),),
            validation=(_source("AC4 validation", 80, 100),),
            crop=CROP,
            batch_size=8,
            augment=AUGMENT,
            threads=16,
            validation_batches=4,
        ),
        optimizer=Optimizer(lr=1e-4, warmup_steps=1000, weight_decay=1e-2),
        train=Train(
            steps=200_000, accumulate=8, ema=0.999, log_every=100, validate_every=5000, save_every=5000, overlays=1
        ),
    )
    if variant == "protocol":
        crop = (18, 160, 160)
        return dataclasses.replace(
            full,
            system=dataclasses.replace(
                full.system, plan=dataclasses.replace(full.system.plan, size=crop, stride=(10, 80, 80))
            ),
            data=dataclasses.replace(full.data, crop=crop),
        )
    return fgnet.ablated(full, names[variant], WIDE, WARMUP)

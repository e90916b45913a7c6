"""FGNet on CREMI A, B and C (adult fly, 40 x 4 x 4 nm): first 100 sections train, last 25 test.

    python -m emjax.train --config configs/fgnet/cremi.py:frozen --workdir runs/fgnet_cremi \\
        --config.system.encoder_checkpoint=weights/sam2.1_large              # one GPU of 24 GB
    python eval/fgnet_cremi.py --checkpoint runs/fgnet_cremi --data ../cremi

``CREMI_SAMPLES=A`` (or B, C) trains on one volume alone, as the literature does; by default all three. Of the 100 sections
the last 10 validate and are not trained on. Not trained by us so far: volumes, weights and hardware are not at hand here, and no
table of published scores of this protocol could be read.

Variants: as in ``ac3ac4.py`` ("protocol" has the crop 18 x 160 x 160).
Data: ``CREMI`` (default ``../cremi``) must hold ``sample_A_20160501.hdf`` and so on.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import Elastic, FlipTranspose, Grayscale, Misalignment, MissingSection, Rotate90
from emjax.data.pipeline import Source
from emjax.models.fgnet import FGNetConfig
from emjax.models.unet import UNetConfig
from emjax.systems import fgnet
from emjax.systems.protocol import Block

DATA = os.environ.get("CREMI", "../cremi")
SAMPLES = os.environ.get("CREMI_SAMPLES", "ABC")
VOXEL_SIZE = (40.0, 4.0, 4.0)
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
    MissingSection(p=0.2, count=1),
    Misalignment(p=0.2, displacement=8),
    Elastic(p=0.25),
    Rotate90(p=0.5),
    FlipTranspose(p=0.5),
    Grayscale(p=0.25),
)


def _source(sample: str, begin: int, end: int) -> Source:
    file = f"{DATA}/sample_{sample}_20160501.hdf"
    return Source(
        raw=f"{file}:volumes/raw",
        labels=f"{file}:volumes/labels/neuron_ids",
        name=f"CREMI {sample}, sections {begin} to {end - 1}",
        voxel_size=VOXEL_SIZE,
        begin=(begin, 0, 0),
        end=(end, 1250, 1250),
        # 10 sections are continued by reflection to the crop's 18.
        pad=(0 if end - begin > CROP[0] else 4, 0, 0),
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
            train=tuple(_source(sample, 0, 90) for sample in SAMPLES),
            validation=tuple(_source(sample, 90, 100) for sample in SAMPLES),
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

"""EM-prior: SAM 2's image encoder pretrained on unlabelled EM slices, for SAM4EM and FGNet where SAM 2's weights are not.

    python -m emjax.train --config configs/em_prior/hiera.py --workdir runs/em_prior            # one GPU, Hiera-tiny
    python -m emjax.train --config configs/em_prior/hiera.py:nano --workdir runs/em_prior_nano  # 2 CPU cores

A system starts from it with ``--config.train.init_from=runs/em_prior_nano``; both must have the same trunk
(``HIERA["tiny"]``, or ``HIERA["nano"]`` with a neck of 64 channels). docs/em_prior.md says what was trained and measured.

Variants: "" (tiny, 256 x 256 pixels; not trained by us so far), "cpu" (tiny, 128 x 128 pixels), "nano" (a trunk for
CPUs, not one of SAM 2's), "debug" (a minute).
Data: every grey volume at hand but the validation parts, under ``EMJAX_DATA`` (default ``../shared/data``).
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import FlipTranspose, Grayscale
from emjax.data.pipeline import Source
from emjax.models.sam2.config import HieraConfig, SAM2Config, sam2_config
from emjax.systems import hiera_pretraining
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
NANO_FEATURES = 64

FIB, TEM = (10.0, 10.0, 10.0), (50.0, 4.0, 4.0)
# Name, voxel size, share of crops.
TRAIN = (
    ("fib25_medulla/train", FIB, 1.0),
    ("fib25_unlabelled/training1", FIB, 1.0),
    ("fib25_unlabelled/validation_crop", FIB, 1.0),
    ("isbi2012_vnc/train", TEM, 1.0),
    ("isbi2012_vnc/unlabelled_challenge_test", TEM, 1.5),
    ("vnc_semantic/train", (50.0, 4.6, 4.6), 1.5),
    ("vnc_semantic/unlabelled_stack2", (50.0, 4.6, 4.6), 1.5),
    ("mito_sbem/train", (40.0, 5.9, 5.9), 1.5),
)
# Grey values of the validation parts alone; they are not trained on.
VALIDATION = (
    ("fib25_medulla/val", FIB, 1.0),
    ("isbi2012_vnc/val", TEM, 1.0),
    ("vnc_semantic/val", (50.0, 4.6, 4.6), 1.0),
    ("mito_sbem/val", (40.0, 5.9, 5.9), 1.0),
)


def _sources(entries: tuple, pad: int = 0) -> tuple[Source, ...]:
    return tuple(
        Source(raw=f"{DATA}/{name}.h5:raw", name=name, voxel_size=voxel_size, weight=weight, pad=(0, pad, pad))
        for name, voxel_size, weight in entries
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    known = ["", "cpu", "nano", "debug"]
    if variant not in known:
        raise variant_error(variant, known)
    # The volumes of 250 pixels are continued by reflection to the crop's 256.
    full = Experiment(
        system=hiera_pretraining.Config(
            encoder=sam2_config("tiny", image_only=True, dtype="bfloat16"),
            plan=Block(size=(8, 256, 256), stride=(8, 128, 128), blending="gaussian"),
        ),
        data=Data(
            train=_sources(TRAIN, 16),
            validation=_sources(VALIDATION, 16),
            crop=(1, 256, 256),
            batch_size=64,
            augment=(FlipTranspose(axes=(1, 2)), Grayscale(p=0.8, contrast=0.3, brightness=0.15)),
            threads=8,
        ),
        optimizer=Optimizer(lr=1e-3, b2=0.95, weight_decay=0.05, warmup_steps=1000),
        train=Train(steps=50_000, ema=0.999, log_every=50, validate_every=2000, save_every=2000, overlays=0),
    )
    if variant == "":
        return full
    cpu = dataclasses.replace(
        full,
        system=hiera_pretraining.Config(encoder=sam2_config("tiny", image_only=True), width=64),
        data=dataclasses.replace(
            full.data,
            train=_sources(TRAIN),
            validation=_sources(VALIDATION),
            crop=(1, 128, 128),
            batch_size=8,
            threads=1,
        ),
        optimizer=dataclasses.replace(full.optimizer, lr=5e-4, warmup_steps=50),
        train=Train(steps=2000, ema=0.99, log_every=10, validate_every=100, save_every=50, overlays=0),
    )
    if variant == "cpu":
        return cpu
    nano = dataclasses.replace(
        cpu,
        system=dataclasses.replace(cpu.system, encoder=sam2_config("nano", image_only=True, features=NANO_FEATURES)),
        optimizer=dataclasses.replace(cpu.optimizer, lr=1e-3),
        train=dataclasses.replace(cpu.train, validate_every=250),
    )
    if variant == "nano":
        return nano
    smallest = SAM2Config(HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(8, 4, 4, 2)), features=16, image_only=True)
    return dataclasses.replace(
        nano,
        system=dataclasses.replace(nano.system, encoder=smallest, width=16),
        data=dataclasses.replace(nano.data, crop=(1, 64, 64), batch_size=4, validation_batches=1),
        train=dataclasses.replace(nano.train, steps=6, log_every=2, validate_every=3, save_every=3),
    )

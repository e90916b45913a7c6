"""SegNeuron, first stage: restore patches and their HOG images from patches with hidden blocks.

    python -m emjax.prepare emneuron --source DIR                     # once: checks the download, writes manifests
    EMNEURON=DIR python -m emjax.train --config configs/segneuron/pretrain.py --workdir runs/segneuron_pretrain
    python -m emjax.train --config configs/segneuron/pretrain.py:cpu --workdir runs/segneuron_pretrain_cpu

Variants: "" (EMNeuron, the published recipe: batch 8, 400,000 steps, meant for two GPUs of 24 GB; not trained by us),
"local" (the same network on every raw volume of the small public crops), "gpu" (half the widths, batch 4: a minute of
one GPU; goes with finetune.py:gpu), "cpu" (narrow network, small crops, batch 1: minutes; goes with finetune.py:cpu),
"debug" (for a look at the machinery).
Ablations of the paper: ``--config.system.fill=zero``, ``--config.system.fill=mean``,
``--config.system.blocks="((4,8,8),)"`` (one scale), ``--config.system.hog_weight=0``.
Data: ``EMNEURON`` for "", else ``EMJAX_DATA`` (default ``../shared/data``).
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Mesh, Optimizer, Train, variant_error
from emjax.data import emneuron
from emjax.data.augment import FlipTranspose
from emjax.data.pipeline import Source
from emjax.models import mnet
from emjax.systems import segneuron_pretraining

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
EMNEURON = os.environ.get("EMNEURON", "../emneuron")
HALF = (16, 32, 48, 64, 128)
CROP = (20, 128, 128)
LOCAL_CROP = (16, 128, 128)
CPU_CROP = (16, 64, 64)

# Held out for validation: its grey values only.
HELD_OUT = ("fib25_medulla/val", (10.0, 10.0, 10.0))
NONE = (0, 0, 0)
LOCAL = (
    ("fib25_medulla/train", (10.0, 10.0, 10.0), NONE),
    ("fib25_unlabelled/training1", (10.0, 10.0, 10.0), NONE),
    ("fib25_unlabelled/validation_crop", (10.0, 10.0, 10.0), NONE),
    # 100 rows, continued to the crop's 128; below, 11, 12 and 15 sections to its 16.
    ("fibsem_mini/train", (10.0, 10.0, 10.0), (0, 14, 0)),
    ("isbi2012_vnc/train", (50.0, 4.0, 4.0), NONE),
    ("isbi2012_vnc/unlabelled_challenge_test", (50.0, 4.0, 4.0), NONE),
    ("vnc_semantic/train", (50.0, 4.6, 4.6), (3, 0, 0)),
    ("vnc_semantic/unlabelled_stack2", (50.0, 4.6, 4.6), (2, 0, 0)),
    ("mito_sbem/train", (40.0, 5.9, 5.9), (1, 0, 0)),
)

OPTIMIZER = Optimizer(
    name="amsgrad",
    lr=0.01,
    final_lr=0.0001,
    schedule="poly_warm",
    power=1.5,
    decay_steps=200_000,
    warmup_steps=0,
    eps=0.01,
    weight_decay=1e-6,
    decay_norms=True,
    clip_norm=0.0,
)


def _source(name: str, voxel_size: tuple[float, float, float], pad: tuple[int, int, int] = NONE) -> Source:
    return Source(raw=f"{DATA}/{name}.h5:raw", name=name, voxel_size=voxel_size, pad=pad)


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    known = ["", "local", "gpu", "cpu", "debug"]
    if variant not in known:
        raise variant_error(variant, known)
    local_train = tuple(_source(*entry) for entry in LOCAL)
    full = Experiment(
        system=segneuron_pretraining.Config(model=mnet.pretraining(mnet.Config(remat=True))),
        data=Data(
            train=emneuron.sources(f"{EMNEURON}/unlabelled.json") if variant == "" else local_train,
            validation=() if variant == "" else (_source(*HELD_OUT),),
            crop=CROP,
            batch_size=8,
            augment=(FlipTranspose(p=0.5, transpose="yx"),),
            threads=8,
            cache_gb=32.0,
        ),
        optimizer=OPTIMIZER,
        train=Train(
            steps=400_000, log_every=100, validate_every=0 if variant == "" else 2000, save_every=2000, overlays=0
        ),
        seed=666,
    )
    if variant == "":
        return full
    local = dataclasses.replace(
        full,
        system=dataclasses.replace(
            full.system, plan=dataclasses.replace(full.system.plan, size=LOCAL_CROP, stride=(8, 64, 64))
        ),
        data=dataclasses.replace(full.data, crop=LOCAL_CROP, cache_gb=4.0, threads=4),
        optimizer=dataclasses.replace(OPTIMIZER, decay_steps=20_000),
        train=Train(steps=20_000, log_every=50, validate_every=1000, save_every=1000, overlays=0),
    )
    if variant == "local":
        return local
    if variant == "gpu":
        model = mnet.pretraining(mnet.Config(widths=HALF, remat=True, dtype="bfloat16"))
        return dataclasses.replace(
            local,
            system=dataclasses.replace(local.system, model=model),
            data=dataclasses.replace(local.data, batch_size=4, validation_batches=2),
            optimizer=Optimizer(name="adam", lr=1e-3, warmup_steps=50, weight_decay=1e-6, decay_norms=True),
            train=Train(steps=500, log_every=50, validate_every=250, save_every=250, overlays=0),
        )
    cpu = dataclasses.replace(
        local,
        system=dataclasses.replace(
            local.system,
            model=mnet.pretraining(mnet.Config(widths=(6, 8, 12, 16, 24))),
            plan=dataclasses.replace(local.system.plan, size=CPU_CROP, stride=(8, 32, 32)),
        ),
        data=dataclasses.replace(local.data, crop=CPU_CROP, batch_size=1, threads=1, validation_batches=4),
        # The published eps of 0.01 hardly moves in so few steps (docs/segneuron.md).
        optimizer=Optimizer(name="adam", lr=2e-3, warmup_steps=20, weight_decay=1e-6, decay_norms=True),
        train=Train(steps=200, log_every=20, validate_every=50, save_every=25, overlays=0),
        mesh=Mesh(cpu_devices=1),
    )
    if variant == "cpu":
        return cpu
    return dataclasses.replace(
        cpu,
        system=dataclasses.replace(cpu.system, model=mnet.pretraining(mnet.Config(widths=(2, 3, 4, 4, 4)))),
        data=dataclasses.replace(cpu.data, crop=(8, 64, 64), validation_batches=1),
        train=Train(steps=6, log_every=2, validate_every=3, save_every=3, overlays=0),
    )

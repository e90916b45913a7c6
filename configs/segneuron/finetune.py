"""SegNeuron, second stage: affinities and foreground on labelled volumes of many domains, mixed.

    python -m emjax.prepare emneuron --source DIR                     # once: checks the download, writes manifests
    EMNEURON=DIR python -m emjax.train --config configs/segneuron/finetune.py --workdir runs/segneuron \\
        --config.train.init_from=runs/segneuron_pretrain
    python -m emjax.train --config configs/segneuron/finetune.py:cpu --workdir runs/segneuron_cpu   # 2 CPU cores

Variants: "" (EMNeuron, the published recipe: batch 8, 400,000 steps, meant for two GPUs of 24 GB; published scores in
docs/segneuron.md, not trained by us), "local" (the same network on fib25_medulla and isbi2012_vnc, mixed with each
other), "gpu" (local data, a network of half the widths, batch 4: minutes of one GPU), "cpu" (local data, narrow network,
small crops, batch 1: minutes), "debug" (for a look at the machinery). ``python eval/segneuron_runs.py --variant gpu`` (or
``cpu``) trains with and without pretraining and writes ``eval/results/segneuron.md``.
Ablations: ``--config.system.mixing.frequency_p=0``, ``--config.system.mixing.spatial_p=0``,
``--config.system.segmentation.restrict=False``; the published code's slips: ``--config.system.mixing.reference=True``.
Data: ``EMNEURON`` for "", else ``EMJAX_DATA`` (default ``../shared/data``).
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Mesh, Optimizer, Train, variant_error
from emjax.data import emneuron
from emjax.data.augment import Blur, Cutout, ElasticGrid, FlipTranspose, GaussianNoise, Grayscale
from emjax.data.mixing import Mixing
from emjax.data.pipeline import Source
from emjax.models import mnet
from emjax.systems import segneuron

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
EMNEURON = os.environ.get("EMNEURON", "../emneuron")
HALF = (16, 32, 48, 64, 128)
CROP = (20, 128, 128)
LOCAL_CROP = (16, 128, 128)
CPU_CROP = (16, 64, 64)
LOCAL_PLAN = dataclasses.replace(segneuron.PLAN, size=LOCAL_CROP, stride=(8, 64, 64))

# In the published order; elastic deformation is decided twice, a quarter times a half.
AUGMENT = (
    FlipTranspose(p=0.5, transpose="yx"),
    Grayscale(p=0.25, contrast=0.1, brightness=0.1, gamma=1.0, sections=0.75),
    GaussianNoise(p=0.25, sigma=(0.01, 0.2)),
    Blur(p=0.25, radius=(1, 4), sigma=(0.0, 2.0)),
    Cutout(p=0.25, count=(20, 50), size_z=(5, 10), size_xy=(15, 25)),
    ElasticGrid(p=0.125, spacing=(4, 40, 40), sigma=(2.0, 2.0), pad=20, image_nearest=True),
)

# PyTorch's AMSGrad with decay added to the gradient, of every parameter, and no clipping.
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


def _source(folder: str, part: str, voxel_size: tuple[float, float, float], **options) -> Source:
    file = f"{DATA}/{folder}/{part}.h5"
    return Source(
        raw=f"{file}:raw",
        labels=f"{file}:labels",
        ignore=f"{file}:ignore_mask" if folder == "fib25_medulla" else None,
        name=f"{folder}/{part}",
        voxel_size=voxel_size,
        **options,
    )


def local_sources(part: str) -> tuple[Source, ...]:
    """The labelled volumes at hand; FIB sections are thinned out by up to 2, as their small depth allows."""
    fib_steps = (1, 2) if part == "train" else (1,)
    return (
        # Its objects touch each other; the published labels leave membrane unlabelled.
        _source("fib25_medulla", part, (10.0, 10.0, 10.0), z_steps=fib_steps, membrane=(1, 3, 3)),
        # 16 sections, and 6 for validation, which reflection continues to 16.
        _source("isbi2012_vnc", part, (50.0, 4.0, 4.0), pad=(0 if part == "train" else 5, 0, 0)),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    known = ["", "local", "gpu", "cpu", "debug"]
    if variant not in known:
        raise variant_error(variant, known)
    full = Experiment(
        system=segneuron.Config(model=mnet.Config(remat=True)),
        data=Data(
            train=emneuron.sources(f"{EMNEURON}/labelled.json") if variant == "" else local_sources("train"),
            validation=() if variant == "" else local_sources("val"),
            crop=CROP,
            batch_size=8,
            augment=AUGMENT,
            threads=8,
            cache_gb=32.0,
            transport="float32",
        ),
        optimizer=OPTIMIZER,
        train=Train(steps=400_000, log_every=100, validate_every=0 if variant == "" else 2000, save_every=2000),
        seed=666,
    )
    if variant == "":
        return full
    local = dataclasses.replace(
        full,
        system=dataclasses.replace(full.system, plan=LOCAL_PLAN),
        data=dataclasses.replace(full.data, crop=LOCAL_CROP, cache_gb=4.0, threads=4),
        optimizer=dataclasses.replace(OPTIMIZER, decay_steps=20_000),
        train=Train(steps=20_000, log_every=50, validate_every=1000, save_every=1000),
    )
    if variant == "local":
        return local
    if variant == "gpu":
        return dataclasses.replace(
            local,
            system=dataclasses.replace(local.system, model=mnet.Config(widths=HALF, remat=True, dtype="bfloat16")),
            data=dataclasses.replace(local.data, batch_size=4, validation_batches=2),
            optimizer=Optimizer(name="adam", lr=1e-3, warmup_steps=50, weight_decay=1e-6, decay_norms=True),
            train=Train(steps=1000, log_every=50, validate_every=250, save_every=250, overlays=0),
        )
    cpu = dataclasses.replace(
        local,
        system=dataclasses.replace(
            local.system,
            model=mnet.Config(widths=(6, 8, 12, 16, 24)),
            # The published 70 of 128 pixels.
            mixing=Mixing(square=35),
            plan=dataclasses.replace(LOCAL_PLAN, size=CPU_CROP, stride=(12, 48, 48)),
        ),
        data=dataclasses.replace(local.data, crop=CPU_CROP, batch_size=1, threads=1, validation_batches=4),
        # The published eps of 0.01 hardly moves in so few steps (docs/segneuron.md).
        optimizer=Optimizer(name="adam", lr=2e-3, warmup_steps=20, weight_decay=1e-6, decay_norms=True),
        train=Train(steps=300, log_every=20, validate_every=100, save_every=25, overlays=0),
        mesh=Mesh(cpu_devices=1),
    )
    if variant == "cpu":
        return cpu
    small = dataclasses.replace(
        cpu.system, model=mnet.Config(widths=(2, 3, 4, 4, 4)), mixing=Mixing(frequency_p=1.0, spatial_p=1.0, square=32)
    )
    return dataclasses.replace(
        cpu,
        system=small,
        data=dataclasses.replace(cpu.data, crop=(8, 64, 64), validation_batches=1),
        train=Train(steps=6, log_every=2, validate_every=3, save_every=3),
    )

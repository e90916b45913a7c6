"""SAM4EM on vnc_semantic (ssTEM, fly larva, 50 x 4.6 x 4.6 nm): mitochondria, glia and synapses in one run.

    python -m emjax.train --config configs/sam4em/vnc_semantic.py:stage1 --workdir runs/vnc1 \\
        --config.system.sam2_checkpoint=weights/sam2_base_plus           # one GPU of 24 GB; not trained by us so far
    python -m emjax.train --config configs/sam4em/vnc_semantic.py:stage2 --workdir runs/vnc2 \\
        --config.train.init_from=runs/vnc1
    python -m emjax.train --config configs/em_prior/hiera.py:nano --workdir runs/em_prior_nano   # 2 CPU cores, once
    python -m emjax.train --config configs/sam4em/vnc_semantic.py:cpu --workdir runs/vnc_cpu
    python -m emjax.train --config configs/sam4em/vnc_semantic.py:cpu_stage2 --workdir runs/vnc_cpu2 \\
        --config.train.init_from=runs/vnc_cpu

    python -m emjax.train --config configs/sam4em/vnc_semantic.py:gpu --workdir runs/vnc_gpu     # one GPU, minutes

``EM_PRIOR`` names the EM-prior run that ``cpu`` and ``gpu`` variants start from (default runs/em_prior_nano). Hardware, times and
scores: eval/results/sam4em.md.

Variants: "" and "stage1" (512 x 512, SAM 2 base+ with adapters), "stage2" (adapters in the decoders), "reference" (the published
code's settings); "cpu" (the trunk "nano" on slices halved in plane) and "gpu" (the same network on whole slices, four crops a
step), each with "_stage2", with the ablations "_reference", "_frozen", "_full", "_nomemory", "_onestage", "_random" (no
EM-prior), with "_long" ("_full" for more steps), and with "_gaps" and "_gaps_nomemory" (three of four chunks have a section without
content, whose masks are to be told from the others); "debug" (a minute).
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``vnc_semantic``; its licence is non-commercial.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Mesh, Optimizer, Train, variant_error
from emjax.data.augment import Elastic, FlipTranspose, GaussianNoise, Grayscale, MissingSection, Sam4emSlices
from emjax.data.pipeline import Source
from emjax.models import sam4em as network
from emjax.models.layers.lora import LoRA
from emjax.models.sam2.config import HIERA, HieraConfig
from emjax.systems import sam4em
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
EM_PRIOR = os.environ.get("EM_PRIOR", "runs/em_prior_nano")
VOXEL_SIZE = (50.0, 4.6, 4.6)
CLASSES = (
    sam4em.Class(name="mitochondria", labels=(1,)),
    sam4em.Class(name="glia", labels=(2,)),
    sam4em.Class(name="synapse", labels=(3,)),
)

LONG_STEPS = {"cpu": 800, "gpu": 1500}

# One draw for all slices of a chunk, but for grey values: neighbouring slices stay as they fit.
AUGMENT = (
    FlipTranspose(transpose="yx"),
    Elastic(p=0.25, alpha=32.0, sigma=8.0),
    Grayscale(p=0.75, sections=0.5),
    GaussianNoise(p=0.25, sigma=(0.01, 0.08)),
)


def _source(part: str, pad: int = 0) -> Source:
    file = f"{DATA}/vnc_semantic/{part}.h5"
    return Source(
        raw=f"{file}:raw",
        labels=f"{file}:labels",
        # 4 is membrane, which is not segmented here.
        label_values=(1, 2, 3, 4),
        name=f"vnc {part}",
        voxel_size=VOXEL_SIZE,
        pad=(pad, 0, 0),
    )


def _full() -> Experiment:
    crop = (8, 512, 512)
    return Experiment(
        system=sam4em.Config(
            model=network.Config(classes=len(CLASSES), dtype="bfloat16", remat=True),
            classes=CLASSES,
            voxel_size=VOXEL_SIZE,
            plan=Block(size=crop, stride=(8, 384, 384), blending="gaussian"),
        ),
        data=Data(
            train=(_source("train"),),
            # Four sections, continued by reflection to eight.
            validation=(_source("val", 2),),
            crop=crop,
            batch_size=1,
            augment=AUGMENT,
            threads=4,
        ),
        optimizer=Optimizer(lr=5e-4, warmup_steps=250),
        train=Train(steps=10_000, log_every=20, validate_every=500, save_every=500, best="error"),
    )


def _cpu() -> Experiment:
    crop = (6, 256, 256)
    model = network.Config(
        hiera=HIERA["nano"],
        lora=LoRA(rank=8, alpha=16.0),
        features=64,
        heads=4,
        inner=256,
        classes=len(CLASSES),
        memory=network.MemoryConfig(slots=4, dropout=0.0),
    )
    full = _full()
    return dataclasses.replace(
        full,
        system=dataclasses.replace(
            full.system,
            model=model,
            shrink=2,
            plan=Block(size=crop, stride=(6, 192, 192), blending="gaussian"),
        ),
        data=dataclasses.replace(
            full.data, validation=(_source("val", 1),), crop=crop, batch_size=1, threads=1, validation_batches=8
        ),
        optimizer=Optimizer(lr=1.5e-3, warmup_steps=20),
        train=Train(
            steps=150,
            log_every=10,
            validate_every=50,
            save_every=50,
            best="error",
            overlays=0,
            init_from=EM_PRIOR,
        ),
        # One step fills one core: two runs side by side take two.
        mesh=Mesh(cpu_devices=1),
    )


def _gpu() -> Experiment:
    small = _cpu()
    system = small.system
    return dataclasses.replace(
        small,
        system=dataclasses.replace(system, shrink=1, model=dataclasses.replace(system.model, dtype="bfloat16")),
        data=dataclasses.replace(small.data, batch_size=4, threads=4, validation_batches=4),
        optimizer=Optimizer(lr=1e-3, warmup_steps=50),
        train=dataclasses.replace(small.train, steps=500, log_every=50, validate_every=250, save_every=250),
        mesh=Mesh(),
    )


def _second(first: Experiment, lora: LoRA, lr: float, steps: int) -> Experiment:
    return dataclasses.replace(
        first,
        system=sam4em.second_stage(first.system, lora),
        optimizer=dataclasses.replace(first.optimizer, lr=lr),
        train=dataclasses.replace(first.train, steps=steps, init_from=""),
    )


def _published_augmentation(experiment: Experiment) -> Experiment:
    """Every slice deformed by itself, as in the published code."""
    augment = (Sam4emSlices(independent=True),)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, augment=augment))


def _debug() -> Experiment:
    small = _cpu()
    hiera = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(8, 4, 4, 2))
    model = dataclasses.replace(small.system.model, hiera=hiera, features=16, heads=2, inner=32)
    return dataclasses.replace(
        small,
        system=dataclasses.replace(
            small.system, model=model, plan=Block(size=(3, 64, 64), stride=(3, 48, 48), blending="gaussian")
        ),
        data=dataclasses.replace(small.data, crop=(3, 64, 64), validation_batches=1),
        train=Train(steps=6, log_every=2, validate_every=3, save_every=3, best="error", overlays=0),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    small = {"cpu": _cpu, "gpu": _gpu}
    rows = ["", *(f"_{row}" for row in (*sam4em.ABLATIONS, "random", "long", "stage2", "gaps", "gaps_nomemory"))]
    known = ["", "stage1", "stage2", "reference", "debug", *(f"{machine}{row}" for machine in small for row in rows)]
    if variant not in known:
        raise variant_error(variant, known)
    machine, _, row = variant.partition("_")
    if machine in small:
        return _small(small[machine](), row, LONG_STEPS[machine])
    if variant == "debug":
        return _debug()
    if variant == "stage2":
        return _second(_full(), LoRA(rank=16, alpha=16.0), 2e-4, 4_000)
    if variant == "reference":
        full = _full()
        schedule = Optimizer(
            lr=5e-4,
            final_lr=1e-6,
            schedule="epochs",
            epoch_steps=200,
            late_epochs=True,
            warmup_steps=250,
            warmup_factor=0.01,
            decay_norms=True,
            clip_norm=0.0,
        )
        return _published_augmentation(
            dataclasses.replace(full, system=sam4em.published(full.system), optimizer=schedule)
        )
    return _full()


def _small(base: Experiment, row: str, long_steps: int) -> Experiment:
    """``base``, or what is changed in it for a row of the ablation table."""
    if row == "stage2":
        return _second(base, LoRA(rank=8, alpha=16.0), 1e-3, base.train.steps * 2 // 3)
    if row == "random":
        return dataclasses.replace(base, train=dataclasses.replace(base.train, init_from=""))
    if row == "long":
        often = long_steps // 4
        train = dataclasses.replace(base.train, steps=long_steps, validate_every=often, save_every=often // 2)
        return dataclasses.replace(base, system=sam4em.ablation(base.system, "full"), train=train)
    if row.startswith("gaps"):
        gap = MissingSection(p=0.75, count=1, mode="blank", value=0.5)
        data = dataclasses.replace(base.data, augment=(*base.data.augment, gap))
        return _small(dataclasses.replace(base, data=data), row.removeprefix("gaps").removeprefix("_"), long_steps)
    if row:
        changed = dataclasses.replace(base, system=sam4em.ablation(base.system, row))
        return _published_augmentation(changed) if row == "reference" else changed
    return base

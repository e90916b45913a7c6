"""FGNet on the ISBI 2012 volume (ssTEM, 50 x 4 x 4 nm): the sectioned case, with the ablation of docs/fgnet.md.

    python -m emjax.train --config configs/fgnet/isbi2012.py --workdir runs/fgnet_isbi2012 \\
        --config.system.encoder_checkpoint=weights/sam2.1_tiny                                  # one GPU
    python eval/fgnet.py isbi2012 --rows A0,A1,A2,A3,A4,A5,C1,C2 --seeds 0,1,2                  # the matrix, one GPU
    python eval/fgnet.py isbi2012 --cpu --rows A0,A4,A1,A2,C1                                   # 2 CPU cores

Hardware, time and scores of what was run: eval/results/fgnet.md; the full-size variants have not been trained by us.

Variants: as in ``fib25.py``. Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``isbi2012_vnc``; its licence is
non-commercial.
"""

import dataclasses
import os

from emjax.config import Data, Experiment, Optimizer, Train, variant_error
from emjax.data.augment import standard_chain
from emjax.data.pipeline import Source
from emjax.models.fgnet import FGNetConfig
from emjax.models.unet import UNetConfig
from emjax.systems import fgnet
from emjax.systems.protocol import Block

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
PRIOR = os.environ.get("EM_PRIOR", "runs/em_prior_nano")
VOXEL_SIZE = (50.0, 4.0, 4.0)
CROP, CPU_CROP = (8, 192, 192), (8, 96, 96)
WARMUP = 1000
"""Steps for which SAM 2 is held before it is fine-tuned."""

FULL = FGNetConfig(
    fine=UNetConfig(
        widths=(28, 36, 48, 64, 80),
        pools=((1, 2, 2),) * 4,
        kernels=((3, 3, 3),) * 5,
        padding="replicate",
        dtype="bfloat16",
    ),
)
WIDE = (40, 52, 72, 92, 120)
SMALL = FGNetConfig(
    fine=UNetConfig(
        widths=(12, 20, 28, 40),
        pools=((1, 2, 2),) * 3,
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3)),
        patch=(1, 2, 2),
        padding="replicate",
    ),
    guided=(4, 8, 16),
    context=48,
)
SMALL_WIDE = (18, 30, 42, 60)


def _source(name: str) -> Source:
    file = f"{DATA}/isbi2012_vnc/{name}.h5"
    # Reflected sections make room for the crop in 6 validation sections and for missing sections in training.
    return Source(
        raw=f"{file}:raw",
        labels=f"{file}:labels",
        name=f"isbi2012 {name}",
        voxel_size=VOXEL_SIZE,
        pad=(2, 0, 0),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    names = {"": "A4", "frozen": "A4", "lora": "A5l", "finetune": "A5", **{row: row for row in fgnet.ABLATIONS}}
    if variant not in [*names, "debug", *(f"cpu_{row}" for row in fgnet.ABLATIONS)]:
        raise variant_error(variant, [*names, *(f"cpu_{row}" for row in fgnet.ABLATIONS), "debug"])
    full = Experiment(
        system=fgnet.Config(
            model=FULL,
            encoder=fgnet.Encoder(size="tiny", dtype="bfloat16", weights="bfloat16"),
            encoder_checkpoint=os.environ.get("SAM2_WEIGHTS", "weights/sam2.1_tiny"),
            # Membranes are a class of their own here, wide enough.
            widen_borders=None,
            diagnostics=True,
            voxel_size=VOXEL_SIZE,
            plan=Block(size=CROP, stride=(4, 96, 96), blending="gaussian", sigma=0.2),
        ),
        data=Data(
            train=(_source("train"),),
            validation=(_source("val"),),
            crop=CROP,
            batch_size=4,
            augment=standard_chain(CROP, anisotropic=True),
            validation_batches=4,
        ),
        optimizer=Optimizer(lr=1e-3, warmup_steps=200, weight_decay=1e-2),
        train=Train(steps=5000, ema=0.999, log_every=50, validate_every=500, save_every=500),
    )
    if variant in names:
        return fgnet.ablated(full, names[variant], WIDE, WARMUP)
    cpu = dataclasses.replace(
        full,
        system=dataclasses.replace(
            full.system,
            model=SMALL,
            encoder=fgnet.Encoder(size="nano", features=64, remat=False),
            encoder_checkpoint="",
            plan=Block(size=CPU_CROP, stride=(4, 48, 48), blending="gaussian", sigma=0.2),
        ),
        data=dataclasses.replace(
            full.data,
            crop=CPU_CROP,
            batch_size=1,
            augment=standard_chain(CPU_CROP, anisotropic=True),
            threads=1,
            validation_batches=6,
        ),
        optimizer=Optimizer(lr=3e-3, warmup_steps=20, weight_decay=1e-2),
        train=Train(steps=300, ema=0.98, log_every=10, validate_every=150, save_every=50, overlays=0, init_from=PRIOR),
    )
    if variant == "debug":
        system = dataclasses.replace(cpu.system, encoder_checkpoint=fgnet.RANDOM)
        data = dataclasses.replace(cpu.data, crop=(8, 64, 64), validation_batches=1, augment=())
        return dataclasses.replace(
            cpu,
            system=dataclasses.replace(system, plan=Block(size=(8, 64, 64), stride=(4, 64, 64))),
            data=data,
            train=Train(steps=6, log_every=2, validate_every=3, save_every=3, overlays=0),
        )
    return fgnet.ablated(cpu, variant.removeprefix("cpu_"), SMALL_WIDE, WARMUP)

"""Plain U-Net for classes, the baseline of SAM4EM: the same volumes, crops, steps, targets and loss.

    python -m emjax.train --config configs/semantic_unet/baseline.py:vnc_semantic --workdir runs/vnc_unet           # GPU
    python -m emjax.train --config configs/semantic_unet/baseline.py:vnc_semantic_cpu --workdir runs/vnc_unet_cpu   # 2 cores

Variants: "vnc_semantic", "mito_sbem", "isbi2012" (the data of ``configs/sam4em/NAME.py``; not trained by us so far), each
also with "_cpu" (slices halved in plane, as in SAM4EM's "cpu"), "_2d_cpu" (slice by slice) and "_gpu" (whole slices, crops and
steps of SAM4EM's "gpu"); "debug" (a minute). Scores: eval/results/sam4em.md.
Data: as of ``configs/sam4em``.
"""

import dataclasses
import pathlib

from emjax.config import Experiment, Optimizer, load, variant_error
from emjax.models.unet import UNetConfig
from emjax.systems import semantic_unet
from emjax.systems.protocol import Block

SETS = ("vnc_semantic", "mito_sbem", "isbi2012")
SECTIONS = pathlib.Path(__file__).parent.parent / "sam4em"


def get_config(variant: str = "vnc_semantic") -> Experiment:
    """The experiment of a variant."""
    known = [*SETS, *(f"{name}{kind}" for name in SETS for kind in ("_cpu", "_2d_cpu", "_gpu")), "debug"]
    variant = variant or "vnc_semantic"
    if variant not in known:
        raise variant_error(variant, known)
    name = next((name for name in SETS if variant.startswith(name)), "vnc_semantic")
    ending = variant.rpartition("_")[2]
    kind = ending if ending in ("cpu", "gpu", "debug") else "stage1"
    flat = variant.endswith("_2d_cpu")
    base = load(f"{SECTIONS / name}.py:{kind}")
    crop = base.data.crop
    deep = (1, 3, 3) if flat else (3, 3, 3)
    model = UNetConfig(
        widths=(32, 48, 64, 96),
        pools=((1, 2, 2),) * 3,
        kernels=((1, 3, 3), deep, deep, deep),
        padding="replicate",
        dtype="bfloat16",
    )
    if kind == "cpu":
        # 32 GFLOP a step; SAM4EM's "cpu" has 18, "cpu_full" 21.
        model = dataclasses.replace(model, patch=(1, 2, 2), widths=(12, 24, 36, 48), dtype="float32")
    if kind == "gpu":
        # 229 GFLOP a step; SAM4EM's "gpu" has 258, "gpu_full" 304.
        model = dataclasses.replace(model, patch=(1, 2, 2), widths=(16, 32, 48, 64))
    if kind == "debug":
        model = dataclasses.replace(model, widths=(4, 8, 8, 8), dtype="float32")
    stride = (max(1, crop[0] // 2), crop[1] * 3 // 4, crop[2] * 3 // 4)
    return dataclasses.replace(
        base,
        system=semantic_unet.Config(
            model=model, classes=base.system.classes, plan=Block(size=crop, stride=stride, blending="gaussian")
        ),
        optimizer=Optimizer(lr=1e-3, warmup_steps=base.optimizer.warmup_steps),
        train=dataclasses.replace(base.train, init_from=""),
    )

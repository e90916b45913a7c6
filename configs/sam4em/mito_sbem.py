"""SAM4EM on mito_sbem (SBEM, mouse brain, 40 x 5.9 x 5.9 nm, inferred): mitochondria.

    python -m emjax.train --config configs/sam4em/mito_sbem.py:stage1 --workdir runs/mito1 \\
        --config.system.sam2_checkpoint=weights/sam2_base_plus           # one GPU of 24 GB; not trained by us so far
    python -m emjax.train --config configs/sam4em/mito_sbem.py:cpu --workdir runs/mito_cpu       # 2 CPU cores

Network, stages, ablations and variants are those of ``vnc_semantic.py``. Scores: eval/results/sam4em.md.
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``mito_sbem``; its licence is non-profit.
"""

import dataclasses
import os
import pathlib

from emjax.config import Experiment, load
from emjax.data.pipeline import Source
from emjax.systems import sam4em

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (40.0, 5.9, 5.9)


def _source(part: str, pad: int = 0) -> Source:
    file = f"{DATA}/mito_sbem/{part}.h5"
    return Source(
        raw=f"{file}:raw", labels=f"{file}:labels", name=f"mito_sbem {part}", voxel_size=VOXEL_SIZE, pad=(pad, 0, 0)
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    base = load(f"{pathlib.Path(__file__).with_name('vnc_semantic.py')}:{variant}")
    classes = (sam4em.Class(name="mitochondria"),)
    return dataclasses.replace(
        base,
        system=dataclasses.replace(
            base.system,
            model=dataclasses.replace(base.system.model, classes=len(classes)),
            classes=classes,
            voxel_size=VOXEL_SIZE,
        ),
        # Five sections, continued by reflection.
        data=dataclasses.replace(base.data, train=(_source("train"),), validation=(_source("val", 2),)),
    )

"""SAM4EM on isbi2012_vnc (ssTEM, fly larva, 50 x 4 x 4 nm): mitochondria, glia and synapses in one run.

    python -m emjax.train --config configs/sam4em/isbi2012.py:stage1 --workdir runs/isbi1 \\
        --config.system.sam2_checkpoint=weights/sam2_base_plus           # one GPU of 24 GB; not trained by us so far
    python -m emjax.train --config configs/sam4em/isbi2012.py:cpu --workdir runs/isbi_cpu        # 2 CPU cores

Network, stages, ablations and variants are those of ``vnc_semantic.py``.
Data: ``EMJAX_DATA`` (default ``../shared/data``) must hold ``isbi2012_vnc``; its licence is non-commercial.
"""

import dataclasses
import os
import pathlib

from emjax.config import Experiment, load
from emjax.data.pipeline import Source
from emjax.data.semantic import ClassVolume

DATA = os.environ.get("EMJAX_DATA", "../shared/data")
VOXEL_SIZE = (50.0, 4.0, 4.0)


def _source(part: str, pad: int = 0) -> Source:
    file = f"{DATA}/isbi2012_vnc/{part}.h5"
    return Source(
        raw=f"{file}:raw",
        labels=tuple(
            ClassVolume(volume=f"{file}:{name}", value=value)
            for value, name in enumerate(("mito", "glia", "synapse"), 1)
        ),
        name=f"isbi2012 {part}",
        voxel_size=VOXEL_SIZE,
        pad=(pad, 0, 0),
    )


def get_config(variant: str = "") -> Experiment:
    """The experiment of a variant."""
    base = load(f"{pathlib.Path(__file__).with_name('vnc_semantic.py')}:{variant}")
    return dataclasses.replace(
        base,
        system=dataclasses.replace(base.system, voxel_size=VOXEL_SIZE),
        # Six sections, continued by reflection.
        data=dataclasses.replace(base.data, train=(_source("train"),), validation=(_source("val", 1),)),
    )

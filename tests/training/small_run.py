"""A run of seconds on a made-up volume, shared by the training tests."""

import dataclasses
import pathlib

import h5py
import numpy as np

from emjax.config import Data, Experiment, Optimizer, Train
from emjax.data.augment import FlipTranspose
from emjax.data.pipeline import Source
from emjax.models.unet import UNetConfig
from emjax.systems import affinity_unet
from emjax.systems.protocol import Block

CROP = (8, 16, 16)


def write_volume(path: pathlib.Path, shape=(12, 40, 40), seed: int = 0) -> str:
    """Columns with dark walls, and their ids; returns the path as text."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(shape)
    labels = (1 + (y + z) // 10 + 8 * ((x + z) // 10)).astype(np.uint32)
    wall = ((y + z) % 10 == 0) | ((x + z) % 10 == 0)
    raw = np.where(wall, 60, 160) + rng.normal(0, 12, shape)
    with h5py.File(path, "w") as file:
        file["raw"] = np.clip(raw, 0, 255).astype(np.uint8)
        file["labels"] = labels
        file.attrs["voxel_size_nm"] = (40.0, 8.0, 8.0)
    return str(path)


def experiment(volume: str, **changes) -> Experiment:
    """A one-level network on 8 x 16 x 16 crops, batch of 8; ``changes`` replace fields by dotted name with ``__``."""
    source = Source(raw=f"{volume}:raw", labels=f"{volume}:labels")
    config = Experiment(
        system=affinity_unet.Config(
            # Compilation is what these tests spend their time on.
            model=UNetConfig(widths=(8,), pools=(), kernels=((3, 3, 3),), patch=(1, 2, 2)),
            plan=Block(size=CROP, stride=(4, 8, 8), halo=(2, 4, 4)),
        ),
        data=Data(
            train=(source,),
            validation=(source,),
            crop=CROP,
            batch_size=8,
            augment=(FlipTranspose(),),
            threads=1,
            validation_batches=1,
        ),
        optimizer=Optimizer(lr=5e-3, warmup_steps=2),
        train=Train(steps=12, log_every=1, validate_every=6, save_every=4, overlays=0, ema=0.9),
    )
    for name, value in changes.items():
        path = name.split("__")
        if len(path) == 1:
            config = dataclasses.replace(config, **{name: value})
        else:
            part = dataclasses.replace(getattr(config, path[0]), **{path[1]: value})
            config = dataclasses.replace(config, **{path[0]: part})
    return config

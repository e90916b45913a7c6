"""A synthetic and a real volume through ``python -m emjax.segment``: blocks, stitching, labels, whatever the blocks.

The network has random weights: what is shown is the way, not the quality.
"""

import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from emjax import segment
from emjax.data.phantom import PhantomConfig, make_phantom
from emjax.data.volume import open_volume, save_volume
from emjax.models.agq import AGQConfig
from emjax.models.functional import initialise
from emjax.systems import agq
from emjax.systems.protocol import Block

CONFIG = agq.Config(
    model=AGQConfig(
        filters=(4, 8), isotropic=(False, False), features=8, groups=2, heads=2, branch_convs=1, learned=6, min_area=20
    ),
    merge=agq.Merge(ties="canonical", on_border=0.6),
    plan=Block(size=(5, 33, 33), stride=(4, 32, 32), blending="linear"),
)


@functools.cache
def collections():
    return jax.jit(lambda key: initialise(lambda rngs: agq.build(CONFIG, rngs), key))(jax.random.key(0))


@pytest.fixture
def run(monkeypatch):
    """``emjax.segment`` with this network as its checkpoint."""
    monkeypatch.setattr(segment, "load_system", _load)
    monkeypatch.setattr(segment, "trained_window", lambda *arguments: None)

    def run(image, output, *more):
        return segment.main(["--checkpoint", "none", "--input", str(image), "--output", str(output), *more])

    return run


def _load(directory, which, changes=()):
    return CONFIG, collections()


def check(run, image, tmp_path, shape):
    assert run(image, tmp_path / "whole.zarr") == 0
    whole = open_volume(tmp_path / "whole.zarr")
    assert whole.shape == shape
    assert whole.voxel_size == open_volume(image).voxel_size
    # What is predicted already is not predicted again.
    shutil.copytree(tmp_path / "whole.prediction.zarr", tmp_path / "blocks.prediction.zarr")
    run(image, tmp_path / "blocks.zarr", "--segment-block", "6,30,41")
    blocks = open_volume(tmp_path / "blocks.zarr")[...]
    pairs = np.unique(np.stack([whole[...].ravel(), blocks.ravel()]), axis=1)
    assert pairs.shape[1] == len(set(pairs[0])) == len(set(pairs[1]))
    assert len(set(pairs[0])) > 1


@pytest.mark.slow
def test_phantom(run, tmp_path):
    shape = (14, 60, 70)
    raw = np.asarray(make_phantom(PhantomConfig(shape=shape)).raw)
    save_volume(tmp_path / "phantom.zarr", raw, voxel_size=(8, 8, 8))
    check(run, tmp_path / "phantom.zarr", tmp_path, shape)


@pytest.mark.slow
def test_real_neuropil(run, real_data, tmp_path):
    check(run, f"{real_data}/fibsem_mini/test.h5:raw", tmp_path, (50, 100, 200))


@pytest.mark.slow
def test_a_volume_smaller_than_a_block(run, tmp_path):
    save_volume(tmp_path / "small.zarr", np.full((3, 20, 21), 90, np.uint8), voxel_size=(8, 8, 8))
    run(tmp_path / "small.zarr", tmp_path / "labels.zarr")
    assert open_volume(tmp_path / "labels.zarr").shape == (3, 20, 21)


@pytest.mark.slow
def test_blocks_that_do_not_halve_are_warned_of(run, tmp_path, capsys, monkeypatch):
    odd = dataclasses.replace(CONFIG, plan=Block(size=(5, 32, 33), stride=(4, 31, 32), blending="linear"))
    monkeypatch.setattr(segment, "load_system", lambda *arguments: (odd, collections()))
    save_volume(tmp_path / "small.zarr", np.full((5, 32, 33), 90, np.uint8), voxel_size=(8, 8, 8))
    run(tmp_path / "small.zarr", tmp_path / "labels.zarr")
    assert "warning: block has 32 along y" in capsys.readouterr().out

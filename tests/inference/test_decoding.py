"""Decoding by blocks: the labels of the whole volume at once, in bounded memory, resumable."""

import dataclasses

import numpy as np
import pytest

from emjax import segment
from emjax.data.volume import create_volume, mark_complete, open_volume
from emjax.errors import UserError
from emjax.inference import decoding
from emjax.postprocess.foreground_multicut import Settings
from emjax.systems import agq, segneuron
from emjax.systems.agq_blocks import INSTANCE_BITS, block_positions

SHAPE = (9, 40, 44)
OFFSETS = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]


def run(*arguments):
    return segment.main([str(argument) for argument in arguments])


def same_partition(one, other):
    pairs = np.unique(np.stack([one.ravel(), other.ravel()]), axis=1)
    return len(set(pairs[0])) == len(set(pairs[1])) == pairs.shape[1]


def smooth(rng, shape, grain):
    coarse = rng.random([-(-n // g) for n, g in zip(shape, grain)])
    return np.kron(coarse, np.ones(grain))[tuple(slice(n) for n in shape)]


def store(path, outputs):
    """Outputs of a prediction as ``emjax.predict`` writes them."""
    for name, values in outputs.items():
        attributes = {"offsets": OFFSETS, "scale": 1 / 255} if name == "affinities" else {}
        spec = f"{path}:{name}"
        with create_volume(
            spec,
            values.shape,
            values.dtype,
            voxel_size=(10, 10, 10),
            attributes={**attributes, "plan": "a test"},
            chunks=(1, 4, 16, 16),
        ) as out:
            out[...] = values
        mark_complete(spec)
    return path


def instances_of(seed=0):
    """Predicted blocks of AGQ: irregular instances, some touching over faces, some holes; and affinities."""
    rng = np.random.default_rng(seed)
    what = (smooth(rng, SHAPE, (3, 5, 5)) * 6).astype(np.uint64)
    instances = np.zeros(SHAPE, np.uint64)
    for number, start in enumerate(block_positions(SHAPE, (5, 17, 17), (4, 16, 16))):
        box = tuple(slice(a, a + n) for a, n in zip(start, (5, 17, 17)))
        instances[box] = np.where(what[box] > 0, what[box] | np.uint64((number + 1) << INSTANCE_BITS), 0)
    affinities = np.rint(255 * np.clip(0.5 + 0.5 * rng.random((3, *SHAPE)), 0, 1)).astype(np.uint8)
    return {"instances": instances[None], "affinities": affinities}


def probabilities(seed=0):
    """Affinities and foreground of SegNeuron's kind, uint8."""
    rng = np.random.default_rng(seed)
    wall = smooth(rng, SHAPE, (4, 12, 12))
    edge = np.zeros(SHAPE, bool)
    edge[:, 1:] |= wall[:, 1:] != wall[:, :-1]
    edge[:, :, 1:] |= wall[:, :, 1:] != wall[:, :, :-1]
    values = np.where(edge, 0.1, 0.95) + rng.normal(0, 0.03, (3, *SHAPE))
    inside = np.where(edge, 0.2, 0.97)[None] + rng.normal(0, 0.01, (1, *SHAPE))
    return {
        name: np.rint(255 * np.clip(array, 0, 1)).astype(np.uint8)
        for name, array in (("affinities", values), ("foreground", inside))
    }


@pytest.fixture
def agq_prediction(tmp_path):
    return store(tmp_path / "agq.zarr", instances_of())


@pytest.fixture
def segneuron_prediction(tmp_path):
    return store(tmp_path / "segneuron.zarr", probabilities())


def arguments_for(module, prediction, output, *more):
    config = {"agq": "configs/agq/fib25.py:cpu", "segneuron": "configs/segneuron/finetune.py:cpu"}[module]
    return "--config", config, "--input", prediction, "--output", output, *more


@pytest.mark.parametrize("block", ["4,16,20", "9,40,13", "2,7,44"])
def test_agq_in_blocks_gives_the_partition_of_the_whole(agq_prediction, tmp_path, block):
    canonical = ["--config.system.merge.ties=canonical"]
    run(*arguments_for("agq", agq_prediction, tmp_path / "whole.zarr"), *canonical)
    run(*arguments_for("agq", agq_prediction, tmp_path / "blocks.zarr"), *canonical, "--segment-block", block)
    whole, blocks = (open_volume(tmp_path / f"{name}.zarr")[...] for name in ("whole", "blocks"))
    assert len(np.unique(whole)) > 20
    assert same_partition(whole, blocks)
    np.testing.assert_array_equal(whole == 0, blocks == 0)
    assert not (tmp_path / "blocks.work").exists()


@pytest.mark.parametrize("mode", ["3d", "2d"])
@pytest.mark.parametrize("more", [[], ["--config.system.segmentation.background=0.5"]])
def test_segneuron_by_slabs_gives_the_very_same_labels(segneuron_prediction, tmp_path, mode, more):
    settings = [f"--config.system.segmentation.mode={mode}", "--config.system.segmentation.min_size=10", *more]
    run(*arguments_for("segneuron", segneuron_prediction, tmp_path / "whole.zarr"), *settings)
    for number, sections in enumerate((1, 2, 5)):
        output = tmp_path / f"slabs{number}.zarr"
        run(*arguments_for("segneuron", segneuron_prediction, output), *settings, "--segment-block", f"{sections},1,1")
        np.testing.assert_array_equal(open_volume(output)[...], open_volume(tmp_path / "whole.zarr")[...])


@pytest.mark.parametrize("module", ["agq", "segneuron"])
def test_a_volume_larger_than_the_allowed_memory_goes_by_blocks(module, tmp_path, capsys, request):
    prediction = request.getfixturevalue(f"{module}_prediction")
    run(*arguments_for(module, prediction, tmp_path / "out.zarr", "--memory-whole", "10kB", "--memory", "1MB"))
    assert "blocks of" in capsys.readouterr().out
    assert open_volume(tmp_path / "out.zarr").shape == SHAPE


@pytest.mark.parametrize("module", ["agq", "segneuron"])
def test_a_stopped_decoding_goes_on(module, tmp_path, monkeypatch, request):
    prediction = request.getfixturevalue(f"{module}_prediction")
    run(*arguments_for(module, prediction, tmp_path / "whole.zarr", "--segment-block", "3,40,44"))
    common = arguments_for(module, prediction, tmp_path / "stopped.zarr", "--segment-block", "3,40,44")
    common = (*common, "--threads", "1")
    original, calls = decoding.BlockStage._edges, []

    def stop_at_the_second(stage, place, block):
        calls.append(place)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(stage, place, block)

    monkeypatch.setattr(decoding.BlockStage, "_edges", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(*common)
    assert not (tmp_path / "stopped.zarr").exists()
    monkeypatch.setattr(decoding.BlockStage, "_fragments", None)
    run(*common)
    assert len(calls) == 4
    np.testing.assert_array_equal(
        open_volume(tmp_path / "stopped.zarr")[...], open_volume(tmp_path / "whole.zarr")[...]
    )


def test_other_blocks_at_the_same_place(agq_prediction, tmp_path):
    common = arguments_for("agq", agq_prediction, tmp_path / "labels.zarr")
    run(*common, "--segment-block", "3,40,44")
    first = open_volume(tmp_path / "labels.zarr")[...]
    run(*common, "--segment-block", "9,11,13", "--overwrite")
    assert same_partition(first, open_volume(tmp_path / "labels.zarr")[...])


@pytest.mark.slow
@pytest.mark.parametrize("module", ["agq", "segneuron"])
def test_processes_share_the_blocks(module, tmp_path, request):
    prediction = request.getfixturevalue(f"{module}_prediction")
    common = arguments_for(module, prediction, tmp_path / "one.zarr", "--segment-block", "3,40,44")
    run(*common)
    common = arguments_for(module, prediction, tmp_path / "many.zarr", "--segment-block", "3,40,44")
    run(*common, "--executor", "processes", "--workers", "2")
    np.testing.assert_array_equal(open_volume(tmp_path / "many.zarr")[...], open_volume(tmp_path / "one.zarr")[...])


def test_all_background_stays_background(tmp_path):
    outputs = {"instances": np.zeros((1, *SHAPE), np.uint64), "affinities": np.full((3, *SHAPE), 200, np.uint8)}
    prediction = store(tmp_path / "empty.zarr", outputs)
    for name, more in (("whole", ()), ("blocks", ("--segment-block", "4,16,16"))):
        run(*arguments_for("agq", prediction, tmp_path / f"{name}.zarr", *more))
        assert not open_volume(tmp_path / f"{name}.zarr")[...].any()


def test_a_volume_without_foreground_is_refused_by_slabs_too(tmp_path):
    outputs = probabilities()
    outputs["foreground"][:] = 20
    prediction = store(tmp_path / "dark.zarr", outputs)
    for more in ((), ("--segment-block", "3,40,44")):
        with pytest.raises(UserError, match="foreground is at most"):
            run(*arguments_for("segneuron", prediction, tmp_path / "out.zarr", *more))
    assert not (tmp_path / "out.zarr").exists()


def test_decoders_travel_as_text():
    # The plan of a run knows a decoder by its repr.
    for decoder in (agq.block_decoder(agq.Config()), segneuron.block_decoder(segneuron.Config())):
        assert repr(decoder) == repr(dataclasses.replace(decoder))
    other = segneuron.block_decoder(segneuron.Config(segmentation=Settings(beta=0.3)))
    assert repr(other) != repr(segneuron.block_decoder(segneuron.Config()))

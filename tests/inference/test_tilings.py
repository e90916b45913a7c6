import dataclasses

import numpy as np
import pytest

from emjax.inference.blocks import blocks_for, plan_axes
from emjax.inference.predictor import Blender, read_reflected
from emjax.inference.tilings import blend, tiling
from emjax.systems.protocol import Block, Output
from emjax.systems.segneuron import NOTEBOOK_PLAN, PLAN

SIZE, STRIDE = (4, 12, 16), (2, 6, 8)


def _predict(patches):
    ramp = np.linspace(0, 1, patches.shape[-1], dtype=np.float32)
    return {"p": (0.5 * patches + 0.5 * ramp)[..., None]}


@pytest.mark.parametrize(("plan", "variant"), [(PLAN, "centred"), (NOTEBOOK_PLAN, "notebook")])
@pytest.mark.parametrize("shape", [(7, 31, 40), (4, 12, 30)])
def test_blocks_of_the_predictor_blend_as_the_published_tiling(plan, variant, shape):
    volume = np.random.default_rng(0).random(shape, np.float32)
    want = blend(volume, tiling(shape, variant, SIZE, STRIDE), _predict)["p"]
    plan = dataclasses.replace(plan, size=SIZE, stride=STRIDE)
    axes = plan_axes(shape, plan)
    outputs = {"p": Output(kind="probability", channels=1)}
    box = (slice(1, 6), slice(5, 12), slice(0, 21))
    box = tuple(slice(part.start, min(part.stop, n)) for part, n in zip(box, shape))
    blender = Blender(axes, box, outputs)
    for block in blocks_for(axes, box):
        starts = [axis.starts[number] for axis, number in zip(axes, block)]
        seen = tuple(slice(start, start + size) for start, size in zip(starts, SIZE))
        patch = read_reflected(volume, seen)
        blender.add(block, {name: values[0] for name, values in _predict(patch[None]).items()})
    got = blender.result()["p"]
    assert np.abs(got - want[(slice(None), *box)] * 255).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("variant", ["centred", "clamped", "notebook"])
def test_result_does_not_depend_on_the_batch(variant):
    volume = np.random.default_rng(1).random((9, 30, 37), np.float32)
    plan = tiling(volume.shape, variant, SIZE, STRIDE)
    one, many = (blend(volume, plan, _predict, batch)["p"] for batch in (1, 5))
    np.testing.assert_array_equal(one, many)


def test_constant_predictions_come_back():
    volume = np.zeros((2, 20, 14), np.float32)
    for variant in ("centred", "clamped", "notebook"):
        found = blend(volume, tiling(volume.shape, variant, SIZE, STRIDE), lambda p: {"p": np.ones((*p.shape, 2))})
        assert found["p"].shape == (2, *volume.shape)
        np.testing.assert_allclose(found["p"], 1, atol=1e-6)


def test_centred_blocks_need_weights_and_no_halo():
    with pytest.raises(ValueError, match="centred placement"):
        Block(size=SIZE, stride=STRIDE, placement="centred").validate()
    with pytest.raises(ValueError, match="leave a voxel uncovered"):
        tiling((3, 12, 16), "clamped", SIZE, STRIDE)
    with pytest.raises(ValueError, match="the tiling is of"):
        blend(np.zeros((1, 2, 3)), tiling((4, 12, 16), "centred", SIZE, STRIDE), _predict)

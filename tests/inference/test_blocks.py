import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emjax.inference.blocks import (
    block_starts,
    block_weights,
    blocks_for,
    input_box,
    morton,
    plan_axes,
    plan_grid,
    redundancy,
)
from emjax.systems.protocol import Block


@st.composite
def lines(draw):
    halo = draw(st.integers(0, 4))
    size = draw(st.integers(2 * halo + 1, 2 * halo + 20))
    return draw(st.integers(1, 90)), size, draw(st.integers(1, size - 2 * halo)), halo


@settings(max_examples=200, deadline=None)
@given(lines(), st.sampled_from(["crop", "linear", "gaussian"]), st.booleans())
def test_every_voxel_has_a_weight_and_no_halo_counts(line, blending, whole):
    length, size, stride, halo = line
    starts = block_starts(length, size, stride, halo)
    weights = block_weights(starts, length, size, halo, blending, stride=whole * stride)
    total = np.zeros(length)
    for start, weight in zip(starts, weights):
        assert not weight[:halo].any()
        assert not weight[size - halo :].any()
        for voxel in np.flatnonzero(weight):
            total[start + voxel] += weight[voxel]
    assert (total > 0).all()
    if blending == "crop":
        np.testing.assert_array_equal(total, 1)


def test_crop_gives_each_voxel_to_the_nearest_centre():
    starts = block_starts(50, 16, 8, 4)
    weights = block_weights(starts, 50, 16, 4, "crop")
    centres = np.array(starts) + 7.5
    for voxel in range(50):
        owner = [
            number for number, start in enumerate(starts) if 0 <= voxel - start < 16 and weights[number][voxel - start]
        ]
        assert len(owner) == 1
        assert abs(centres[owner[0]] - voxel) == np.abs(centres - voxel).min()


def test_cropped_blocks_straddle_no_written_block():
    plan = Block(size=(32, 128, 128), stride=(30, 126, 126), halo=(1, 1, 1))
    shape = (96, 512, 1536)
    axes = plan_axes(shape, plan)
    grid = plan_grid(shape, plan, 30, 100_000_000)
    assert len(grid) > 4
    whole = math.prod(len(axis.starts) for axis in axes)
    assert sum(len(blocks_for(axes, grid.box(index))) for index in grid.indices()) == whole


def test_the_last_block_sees_real_voxels():
    starts = block_starts(50, 16, 8, 4)
    assert starts[0] == -4
    assert starts[-1] + 16 == 54
    assert block_starts(5, 16, 8, 4) == (-4,)


def test_grid_is_of_whole_strides_and_bounded_by_memory():
    plan = Block(size=(16, 48, 48), stride=(8, 32, 32), halo=(4, 8, 8))
    grid = plan_grid((1000, 2000, 3000), plan, 20, 50_000_000)
    assert math.prod(grid.step) * 20 <= 50_000_000
    for step, stride, chunk in zip(grid.step, plan.stride, grid.chunks):
        assert step % stride == 0
        assert step % chunk == 0
    assert redundancy(plan_axes((1000, 2000, 3000), plan), grid) == pytest.approx(2 * 1.5 * 1.5, rel=0.05)
    covered = np.zeros((30, 70, 65), int)
    small = plan_grid((30, 70, 65), plan, 20, 10_000)
    for index in small.indices():
        covered[small.box(index)] += 1
    assert (covered == 1).all()
    assert sorted(small.indices()) == small.indices("raster")


def test_blocks_of_a_box_cover_it():
    plan = Block(size=(8, 12, 12), stride=(5, 7, 9), halo=(1, 1, 1), blending="linear")
    axes = plan_axes((20, 31, 40), plan)
    box = (slice(3, 9), slice(0, 31), slice(12, 20))
    blocks = blocks_for(axes, box)
    seen = input_box(axes, blocks)
    assert all(part.start <= want.start and part.stop >= want.stop for part, want in zip(seen, box))


def test_morton_order_is_a_bijection():
    indices = [(z, y, x) for z in range(4) for y in range(4) for x in range(4)]
    assert sorted(morton(index) for index in indices) == list(range(64))
    assert morton((0, 0, 1)) == 1

"""The adapter around connectomics: x, y, z there, z, y, x here."""

import numpy as np
import pytest

from emjax.data.boxes import (
    block_grid,
    bounding_box,
    box_size,
    box_start,
    from_slices,
    merge_enclosed,
    split_disconnected,
    subvolume,
    to_slices,
)
from emjax.errors import UserError


def test_axes_are_turned_round():
    box = bounding_box((1, 2, 3), size=(10, 20, 30))
    assert tuple(box.start) == (3, 2, 1)
    assert tuple(box.size) == (30, 20, 10)
    assert box_start(box) == (1, 2, 3)
    assert box_size(box) == (10, 20, 30)
    assert to_slices(box) == (slice(1, 11), slice(2, 22), slice(3, 33))
    assert all(type(part.start) is int for part in to_slices(box))
    assert from_slices(to_slices(box)) == box
    assert bounding_box((1, 2, 3), end=(11, 22, 33)) == box
    for wrong in ({}, {"size": (1, 1, 1), "end": (2, 2, 2)}, {"size": (1, 1)}):
        with pytest.raises(UserError, match="a box needs"):
            bounding_box((0, 0, 0), **wrong)


@pytest.mark.parametrize("overlap", [(0, 0, 0), (2, 4, 2), (4, 0, 6)])
@pytest.mark.parametrize("start", [(0, 0, 0), (5, 7, 9)])
def test_written_parts_tile_the_volume_once(overlap, start):
    shape, block = (17, 33, 40), (8, 12, 16)
    grid = block_grid(shape, block, overlap, start=start)
    count = np.zeros(shape, int)
    for number in range(grid.num_boxes):
        read, write = grid.generate(number)[1], grid.index_to_cropped_box(number)
        inside = tuple(slice(part.start - s, part.stop - s) for part, s in zip(to_slices(write), start))
        count[inside] += 1
        assert all(w.start >= r.start and w.stop <= r.stop for w, r in zip(to_slices(write), to_slices(read)))
    assert (count == 1).all()


@pytest.mark.parametrize("overlap", [(1, 0, 0), (-2, 0, 0), (8, 0, 0)])
def test_impossible_overlap(overlap):
    with pytest.raises(UserError, match="cannot overlap"):
        block_grid((17, 33, 40), (8, 12, 16), overlap)


def test_subvolume():
    array = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    part = subvolume(array, (10, 20, 30))
    assert box_start(part.bbox) == (10, 20, 30)
    np.testing.assert_array_equal(part.data[0], array)
    inner = part.clip_abs(bounding_box((11, 21, 30), size=(1, 2, 2)))
    np.testing.assert_array_equal(inner.data[0], array[1:2, 1:3, :2])
    with pytest.raises(UserError):
        subvolume(array[0], (0, 0, 0))


def test_split_disconnected():
    labels = np.zeros((3, 5, 5), np.uint32)
    labels[0, 0, 0] = labels[2, 4, 4] = 7
    labels[1] = 9
    split = split_disconnected(labels)
    assert split.dtype == np.uint32
    assert split[0, 0, 0] != split[2, 4, 4]
    assert len(np.unique(split)) == 4
    assert ((split == 0) == (labels == 0)).all()


def test_merge_enclosed():
    labels = np.full((12, 14, 16), 3, np.uint32)
    labels[:, :, 10:] = 8
    labels[2:9, 2:9, 2:9] = 5
    labels[4:6, 4:6, 4:6] = 6
    labels[3:5, 9:11, 9:12] = 11
    merged = merge_enclosed(labels)
    expected = labels.copy()
    expected[np.isin(labels, (5, 6))] = 3
    np.testing.assert_array_equal(merged, expected)
    holed = labels.copy()
    holed[5, 8, 8] = 0
    # Background is outside: what touches it is not enclosed, but 6 is still inside of 5.
    expected = holed.copy()
    expected[holed == 6] = 5
    np.testing.assert_array_equal(merge_enclosed(holed), expected)
    assert merge_enclosed(np.zeros((2, 2, 2), np.uint32)).max() == 0

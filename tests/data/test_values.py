"""What the numbers of a volume mean: label ids, ignore masks, grey windows, affinities and their conventions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from emjax.data.affinities import (
    NEAREST,
    as_affinities,
    check_offsets,
    create_affinities,
    from_convention,
    open_affinities,
    quantise,
)
from emjax.data.ids import compact_labels, split_ignored
from emjax.data.intensity import as_uint8, percentile_window, to_uint8
from emjax.data.volume import create_volume, open_volume, save_volume
from emjax.errors import UserError


def test_special_ids_become_a_mask():
    labels = np.array([0, 1, 2**63, 2**64 - 4, 2**64 - 3, 2**64 - 2, 2**64 - 1], np.uint64)
    ids, ignored = split_ignored(labels)
    assert ids.tolist() == [0, 1, 2**63, 2**64 - 4, 0, 0, 0]
    assert ignored.tolist() == [False] * 4 + [True] * 3
    assert labels[-1] == 2**64 - 1
    ids, ignored = split_ignored(np.array([-1, 0, 5]))
    assert ids.tolist() == [0, 0, 5]
    assert ignored.tolist() == [True, False, False]
    plain = np.arange(4, dtype=np.uint32)
    assert split_ignored(plain)[0] is plain
    assert not split_ignored(plain)[1].any()


@settings(deadline=None)
@given(
    hnp.arrays(
        np.uint64, st.tuples(*[st.integers(0, 5)] * 3), elements=st.sampled_from([0, 1, 7, 2**31, 2**40, 2**63])
    ),
    st.booleans(),
)
def test_compact_labels_keep_the_partition(labels, always):
    compact, table = compact_labels(labels, always=always)
    assert compact.dtype == np.int32
    assert compact.shape == labels.shape
    if table is None:
        np.testing.assert_array_equal(compact, labels)
    else:
        np.testing.assert_array_equal(table[compact], labels)
        assert table[0] == 0
        assert len(table) == len(np.unique(labels)) + (0 not in labels)
    np.testing.assert_array_equal(compact == 0, labels == 0)


def test_compact_labels_refuse():
    with pytest.raises(UserError, match="negative ids, the least is -3"):
        compact_labels(np.array([1, -3]))
    with pytest.raises(UserError, match="expected integers"):
        compact_labels(np.zeros(3))
    small = np.arange(5, dtype=np.int32)
    assert compact_labels(small)[0] is small


def test_percentile_window_is_stored_and_used(tmp_path):
    array = (np.random.default_rng(0).normal(20000, 1000, (40, 90, 80))).astype(np.uint16)
    save_volume(tmp_path / "a.zarr", array, voxel_size=(1, 1, 1))
    volume = open_volume(tmp_path / "a.zarr")
    with pytest.raises(UserError, match="holds uint16 and no window"):
        as_uint8(volume)
    window = percentile_window(volume)
    assert window == percentile_window(volume)
    assert window == pytest.approx(np.percentile(array, (0.5, 99.5)), rel=0.02)
    grey = as_uint8(volume, window)
    assert grey.dtype == np.uint8
    block = (slice(3, 9), slice(10, 20), slice(0, 80))
    np.testing.assert_array_equal(grey[block], to_uint8(array[block], window))
    np.testing.assert_array_equal(grey[...][block], grey[block])
    save_volume(tmp_path / "b.zarr", array, voxel_size=(1, 1, 1), attributes={"window": window})
    stored = open_volume(tmp_path / "b.zarr")
    np.testing.assert_array_equal(as_uint8(stored)[block], grey[block])
    assert "window" not in as_uint8(stored).attributes
    assert as_uint8(grey) is grey
    with pytest.raises(UserError, match="not two rising numbers"):
        as_uint8(volume, (5, 5))
    save_volume(tmp_path / "c.zarr", np.full((4, 4, 4), 7, np.uint16), voxel_size=(1, 1, 1))
    with pytest.raises(UserError, match="no contrast"):
        percentile_window(open_volume(tmp_path / "c.zarr"))
    assert to_uint8(np.array([-5.0, 0.0, 0.5, 1.0, 9.0]), (0, 1)).tolist() == [0, 0, 128, 255, 255]


def affinities_of(labels, offsets):
    """Our convention, by the definition."""
    out = np.zeros((len(offsets), *labels.shape), np.float32)
    for channel, offset in enumerate(offsets):
        for voxel in np.ndindex(labels.shape):
            partner = tuple(a + b for a, b in zip(voxel, offset))
            if all(0 <= p < n for p, n in zip(partner, labels.shape)):
                out[(channel, *voxel)] = labels[voxel] == labels[partner]
    return out


FAR = NEAREST + ((-3, 0, 0), (0, -3, 0), (0, 0, -3))


def test_conventions():
    labels = np.random.default_rng(0).integers(1, 3, (5, 6, 7))
    ours = affinities_of(labels, FAR)
    xyz = labels.transpose(2, 1, 0)
    banis = np.zeros((6, *xyz.shape), np.float32)
    for distance, first in ((1, 0), (3, 3)):
        banis[first, :-distance] = xyz[:-distance] == xyz[distance:]
        banis[first + 1, :, :-distance] = xyz[:, :-distance] == xyz[:, distance:]
        banis[first + 2, :, :, :-distance] = xyz[:, :, :-distance] == xyz[:, :, distance:]
    found, offsets = from_convention(banis, "banis", long_range=3)
    assert offsets == FAR
    np.testing.assert_array_equal(found, ours)
    found, offsets = from_convention(banis[:3], "banis")
    assert offsets == NEAREST
    np.testing.assert_array_equal(found, ours[:3])
    seung = np.zeros((*xyz.shape, 3), np.float32)
    seung[1:, :, :, 0] = xyz[1:] == xyz[:-1]
    seung[:, 1:, :, 1] = xyz[:, 1:] == xyz[:, :-1]
    seung[:, :, 1:, 2] = xyz[:, :, 1:] == xyz[:, :, :-1]
    found, offsets = from_convention(seung, "seung")
    assert offsets == NEAREST
    np.testing.assert_array_equal(found, ours[:3])
    found, offsets = from_convention(1 - ours, "elf-boundary", offsets=FAR)
    assert offsets == FAR
    np.testing.assert_array_equal(found, ours)
    found, _ = from_convention(np.array([[[[0, 55, 255]]]] * 3, np.uint8), "elf-boundary")
    assert found[0, 0, 0].tolist() == [255, 200, 0]
    with pytest.raises(UserError, match="unknown affinity convention 'ours'"):
        from_convention(ours, "ours")
    with pytest.raises(UserError, match="6 channels need their offsets"):
        from_convention(ours, "elf-boundary")
    with pytest.raises(UserError, match="expected 4"):
        from_convention(ours[0], "banis")


def test_affinities_on_disk(tmp_path):
    values = np.random.default_rng(0).random((3, 6, 7, 8)).astype(np.float32)
    with create_affinities(tmp_path / "a.zarr", values.shape[1:], NEAREST, voxel_size=(40, 4, 4)) as out:
        out[...] = quantise(values)
    found = open_affinities(tmp_path / "a.zarr")
    assert found.offsets == NEAREST
    assert found.scale == 1 / 255
    assert found.volume.dtype == np.uint8
    block = found[:, 2:4, 1:5]
    assert block.dtype == np.float32
    np.testing.assert_allclose(block, values[:, 2:4, 1:5], atol=0.5 / 255 + 1e-6)
    assert found[:].max() <= 1.0
    assert "offsets (-1,0,0) (0,-1,0) (0,0,-1)" in found.describe()
    with create_affinities(tmp_path / "f.h5", values.shape[1:], NEAREST, voxel_size=(1, 1, 1), dtype=np.float32) as out:
        out[...] = values
    np.testing.assert_array_equal(open_affinities(tmp_path / "f.h5")[...], values)
    with create_affinities(tmp_path / "one.zarr", (4, 4, 4), [(-1, 0, 0)], voxel_size=(1, 1, 1)) as out:
        out[...] = 255
    assert open_affinities(tmp_path / "one.zarr")[:].shape == (1, 4, 4, 4)


def test_affinities_without_offsets_are_refused(tmp_path):
    save_volume(tmp_path / "a.zarr", np.zeros((3, 4, 4, 4), np.uint8), voxel_size=(1, 1, 1))
    with pytest.raises(UserError, match="has no offsets attribute"):
        open_affinities(tmp_path / "a.zarr")
    save_volume(
        tmp_path / "b.zarr", np.zeros((2, 4, 4, 4), np.uint8), voxel_size=(1, 1, 1), attributes={"offsets": NEAREST}
    )
    with pytest.raises(UserError, match="3 offsets for 2 channels"):
        open_affinities(tmp_path / "b.zarr")
    wide = {"offsets": NEAREST}
    save_volume(tmp_path / "c.zarr", np.zeros((3, 4, 4, 4), np.uint16), voxel_size=(1, 1, 1), attributes=wide)
    with pytest.raises(UserError, match="need a scale attribute"):
        open_affinities(tmp_path / "c.zarr")
    save_volume(
        tmp_path / "d.zarr", np.zeros((4, 4, 4), np.float32), voxel_size=(1, 1, 1), attributes={"offsets": [[-1, 0, 0]]}
    )
    assert as_affinities(open_volume(tmp_path / "d.zarr"))[0, :2].shape == (2, 4, 4)
    with pytest.raises(UserError, match="uint8 or a float"):
        create_affinities(tmp_path / "e.zarr", (4, 4, 4), NEAREST, dtype=np.int16, voxel_size=(1, 1, 1))


@pytest.mark.parametrize(
    "wrong", [[[1, 0, 0]], [[0, 0, 0]], [-1, 0, 0], [[-1, 0]], [[-1.5, 0, 0]], "offsets", None, [["a"] * 3]]
)
def test_wrong_offsets(wrong):
    with pytest.raises(UserError, match="offset"):
        check_offsets(wrong)
    assert check_offsets([[-1, 0, 0], [0, -9, 9]]) == ((-1, 0, 0), (0, -9, 9))


def test_bool_volume(tmp_path):
    with create_volume(tmp_path / "m.zarr", (4, 4, 4), bool, voxel_size=(1, 1, 1)) as out:
        out[:2] = True
    assert open_volume(tmp_path / "m.zarr")[...].sum() == 32

"""Every format written and read back: values, voxel size, offset, attributes; blocks, casts, finishing."""

import contextlib
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emjax.data.sources import resolve_index
from emjax.data.volume import (
    blocks,
    common_region,
    create_volume,
    is_complete,
    mark_complete,
    open_volume,
    read_cached,
    require_same_grid,
    save_volume,
    set_attributes,
)
from emjax.errors import UserError

FORMATS = {
    "zarr3": ("a.zarr", {}),
    "zarr3_inside": ("a.zarr:labels/neurons", {}),
    "zarr3_plain": ("plain.zarr", {"chunks": (8, 16, 16), "shards": (8, 16, 16)}),
    "zarr2": ("b.zarr", {"format": "zarr2"}),
    "n5": ("c.n5:volumes/raw", {}),
    "precomputed": ("precomputed://{}/p", {}),
    "hdf5": ("d.h5", {}),
    "hdf5_inside": ("d.h5:volumes/labels", {}),
    "tiff": ("e.tif", {}),
}
GEOMETRY = {"voxel_size": (40.0, 4.5, 4.0), "offset": (80.0, 9.0, -12.0)}


def spec_of(tmp_path, name):
    return name.format(tmp_path) if "://" in name else f"{tmp_path}/{name}"


def sample(shape, dtype, seed=0):
    values = np.random.default_rng(seed).integers(0, 200, shape)
    return (values / 7).astype(dtype) if np.dtype(dtype).kind == "f" else values.astype(dtype)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((17, 33, 41), np.uint8),
        ((17, 33, 41), np.uint32),
        ((5, 33, 41), np.uint64),
        ((3, 9, 20, 30), np.uint8),
        ((1, 9, 20, 30), np.float32),
        ((1, 33, 41), np.uint16),
    ],
)
def test_written_and_read_back(tmp_path, name, shape, dtype):
    name, options = FORMATS[name]
    if len(shape) == 4 and "chunks" in options:
        options = {"chunks": (1, 8, 16, 16), "shards": (1, 8, 16, 16)}
    spec = spec_of(tmp_path, name)
    array = sample(shape, dtype)
    if dtype == np.uint64:
        array += np.uint64(2**40)
    if (name, dtype) == ("e.tif", np.uint64):
        with pytest.raises(UserError, match="OME-TIFF has no uint64"):
            save_volume(spec, array, **GEOMETRY)
        assert not list(tmp_path.iterdir())
        return
    save_volume(spec, array, attributes={"offsets": [[-1, 0, 0]], "note": "x"}, **GEOMETRY, **options)
    volume = open_volume(spec)
    assert (volume.shape, volume.dtype, volume.axes) == (shape, np.dtype(dtype), "czyx"[4 - len(shape) :])
    assert volume.voxel_size == pytest.approx(GEOMETRY["voxel_size"])
    assert volume.offset == pytest.approx(GEOMETRY["offset"])
    assert volume.attributes["offsets"] == [[-1, 0, 0]]
    assert volume.attributes["note"] == "x"
    assert volume.complete
    np.testing.assert_array_equal(volume[...], array)
    np.testing.assert_array_equal(volume[..., 2:5, 3:17, -7:], array[..., 2:5, 3:17, -7:])
    assert volume[..., 1].shape == array[..., 1].shape
    assert volume[(0,) * len(shape)].shape == ()
    assert volume[:0].shape == (0, *shape[1:])
    assert volume[...].flags.c_contiguous
    assert "voxel size 40 x 4.5 x 4 nm" in volume.describe()
    copy = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(copy[..., 1:3], array[..., 1:3])


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_in_any_order(tmp_path, name):
    name, options = FORMATS[name]
    array = sample((17, 33, 41), np.uint32)
    order = list(blocks(array.shape, (8, 16, 16)))[::-1]
    with create_volume(spec_of(tmp_path, name), array.shape, array.dtype, **GEOMETRY, **options) as out:
        for box in order:
            out[box] = array[box]
        np.testing.assert_array_equal(out[3:9, 4, ::2], array[3:9, 4, ::2])
    np.testing.assert_array_equal(open_volume(spec_of(tmp_path, name))[...], array)


def test_blocks_tile_the_volume_once():
    count = np.zeros((7, 10, 5), int)
    for box in blocks(count.shape, (3, 4, 5)):
        count[box] += 1
    assert (count == 1).all()


one_axis = st.one_of(
    st.slices(7).filter(lambda s: s.step is None or s.step != 0), st.integers(-7, 6), st.just(slice(None))
)


@settings(deadline=None, max_examples=200)
@given(st.lists(one_axis, min_size=0, max_size=3), st.booleans())
def test_indexing_means_what_numpy_means(items, dots):
    array = np.arange(343).reshape(7, 7, 7)
    index = tuple(items[:1] + [Ellipsis] + items[1:]) if dots else tuple(items)
    box, after = resolve_index(index, array.shape)
    np.testing.assert_array_equal(array[box][after], array[index])


@pytest.mark.parametrize("index", [(0, 0, 0, 0), 7, "a", (Ellipsis, Ellipsis), 1.5])
def test_wrong_indices(tmp_path, index):
    save_volume(tmp_path / "v.zarr", np.zeros((4, 4, 4), np.uint8), voxel_size=(1, 1, 1))
    with pytest.raises(IndexError):
        open_volume(tmp_path / "v.zarr")[index]


def test_values_that_do_not_fit_are_refused(tmp_path):
    out = create_volume(tmp_path / "v.zarr", (4, 4, 4), np.uint8, voxel_size=(1, 1, 1))
    with pytest.raises(UserError, match="values 0 to 300 do not fit"):
        out[...] = np.linspace(0, 300, 64).astype(np.int64).reshape(4, 4, 4)
    with pytest.raises(UserError, match="float32 values would be cut"):
        out[...] = np.zeros((4, 4, 4), np.float32)
    with pytest.raises(UserError, match="a block of shape"):
        out[0:2] = np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(UserError, match="step 1"):
        out[::2] = 0
    out[0:2] = np.ones((2, 4, 4), bool)
    out[2:, 1] = np.full((2, 4), 7, np.int64)
    out[3, 3, 3] = 9
    read = open_volume(tmp_path / "v.zarr", allow_incomplete=True)[...]
    assert read[:2].all()
    assert (read[2:, 1] == 7).all()
    assert read[3, 3, 3] == 9


def test_nothing_is_overwritten_silently(tmp_path):
    for name, options in FORMATS.values():
        spec = spec_of(tmp_path, name)
        save_volume(
            spec, np.full((4, 4, 4), 1, np.uint8), voxel_size=(1, 1, 1), **{**options, "chunks": None, "shards": None}
        )
        with pytest.raises(UserError, match="exists"):
            create_volume(spec, (4, 4, 4), np.uint8, voxel_size=(1, 1, 1))
        assert (open_volume(spec)[...] == 1).all()
    for name in ("plain.zarr", "d.h5:volumes/labels", "e.tif", "c.n5:volumes/raw", "a.zarr:labels/neurons"):
        save_volume(spec_of(tmp_path, name), np.full((2, 2, 2), 5, np.uint8), voxel_size=(1, 1, 1), overwrite=True)
        assert open_volume(spec_of(tmp_path, name)).shape == (2, 2, 2)
    # Only what was named is replaced.
    assert (open_volume(tmp_path / "d.h5:main")[...] == 1).all()
    assert (open_volume(tmp_path / "a.zarr")[...] == 1).all()
    (tmp_path / "thesis.zarr").mkdir()
    (tmp_path / "thesis.zarr" / "chapter.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a volume"):
        create_volume(tmp_path / "thesis.zarr", (4, 4, 4), np.uint8, voxel_size=(1, 1, 1), overwrite=True)
    assert (tmp_path / "thesis.zarr" / "chapter.tex").exists()


@pytest.mark.parametrize("name", ["zarr3", "zarr2", "n5", "precomputed"])
def test_unfinished_stores_are_refused(tmp_path, name):
    name, options = FORMATS[name]
    spec = spec_of(tmp_path, name)
    out = create_volume(spec, (4, 4, 4), np.uint8, voxel_size=(1, 1, 1), attributes={"a": 1}, **options)
    out[...] = 3
    out.close()
    assert not is_complete(spec)
    with pytest.raises(UserError, match="not finished"):
        open_volume(spec)
    assert "NOT FINISHED" in open_volume(spec, allow_incomplete=True).describe()
    resumed = open_volume(spec, writable=True)
    resumed[0] = 4
    mark_complete(spec)
    assert is_complete(spec)
    set_attributes(spec, {"window": [1, 2]})
    volume = open_volume(spec)
    assert (volume.attributes["a"], volume.attributes["window"]) == (1, [1, 2])
    assert volume[0, 0, 0] == 4
    assert volume[1, 0, 0] == 3
    mark_complete(spec, False)
    assert not is_complete(spec)


@pytest.mark.parametrize("name", ["d.h5", "e.tif", "a.zarr", "a.zarr:labels/x", "c.n5:x", "precomputed://{}/p"])
def test_failure_leaves_nothing_behind(tmp_path, name):
    spec = spec_of(tmp_path, name)
    with contextlib.suppress(RuntimeError), create_volume(spec, (4, 4, 4), np.uint8, voxel_size=(1, 1, 1)) as out:
        out[0] = 1
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    assert not is_complete(spec)


@pytest.mark.parametrize("name", ["d.h5", "e.tif"])
def test_single_files_appear_when_whole(tmp_path, name):
    out = create_volume(tmp_path / name, (4, 4, 4), np.uint8, voxel_size=(1, 1, 1))
    out[...] = 2
    assert not (tmp_path / name).exists()
    assert not is_complete(tmp_path / name)
    out.close()
    out.close()
    assert is_complete(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    abandoned = create_volume(tmp_path / f"x{name}", (4, 4, 4), np.uint8, voxel_size=(1, 1, 1))
    with pytest.raises(TypeError, match="one process"):
        pickle.dumps(abandoned)
    del abandoned
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_ome_zarr_metadata_is_what_the_standard_says(tmp_path):
    save_volume(tmp_path / "v.zarr", np.zeros((4, 5, 6), np.uint8), voxel_size=(40, 4, 4), offset=(400, 0, 8))
    save_volume(tmp_path / "v.zarr:labels/neurons", np.zeros((4, 5, 6), np.uint32), voxel_size=(40, 4, 4))
    group = json.loads((tmp_path / "v.zarr" / "zarr.json").read_text())
    assert (group["zarr_format"], group["node_type"]) == (3, "group")
    assert group["attributes"]["ome"]["version"] == "0.5"
    image = group["attributes"]["ome"]["multiscales"][0]
    assert image["axes"] == [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    assert image["datasets"] == [
        {
            "path": "0",
            "coordinateTransformations": [
                {"type": "scale", "scale": [40, 4, 4]},
                {"type": "translation", "translation": [400, 0, 8]},
            ],
        }
    ]
    array = json.loads((tmp_path / "v.zarr" / "0" / "zarr.json").read_text())
    assert array["dimension_names"] == ["z", "y", "x"]
    labels = json.loads((tmp_path / "v.zarr" / "labels" / "zarr.json").read_text())
    assert labels["attributes"]["ome"]["labels"] == ["neurons"]
    assert json.loads((tmp_path / "v.zarr" / "zarr.json").read_text()) == group
    save_volume(tmp_path / "w.zarr", np.zeros((2, 4, 5, 6), np.uint8), voxel_size=(40, 4, 4), format="zarr2")
    image = json.loads((tmp_path / "w.zarr" / ".zattrs").read_text())["multiscales"][0]
    assert image["version"] == "0.4"
    assert image["axes"][0] == {"name": "c", "type": "channel"}
    assert image["datasets"][0]["coordinateTransformations"][0]["scale"] == [1, 40, 4, 4]
    assert json.loads((tmp_path / "w.zarr" / "0" / ".zarray").read_text())["dimension_separator"] == "/"


@pytest.mark.parametrize("budget", [10**9, 9000, 10])
def test_cached_reading(tmp_path, budget):
    array = sample((40, 50, 60), np.uint8)
    save_volume(tmp_path / "v.zarr", array, voxel_size=(1, 1, 1), chunks=(16, 16, 16), shards=(16, 16, 16))
    cached = read_cached(open_volume(tmp_path / "v.zarr"), budget)
    rng = np.random.default_rng(0)
    for _ in range(30):
        low = rng.integers(0, 30, 3)
        box = tuple(slice(a, a + n) for a, n in zip(low, rng.integers(1, 10, 3)))
        np.testing.assert_array_equal(cached[box], array[box])
        assert getattr(cached.source, "held_bytes", 0) <= budget
    block = cached[:2]
    block[...] = 0
    np.testing.assert_array_equal(cached[:2], array[:2])
    copy = pickle.loads(pickle.dumps(cached))
    np.testing.assert_array_equal(copy[5:9], array[5:9])


def test_crops_and_channels(tmp_path):
    array = sample((3, 10, 12, 14), np.uint8)
    save_volume(tmp_path / "v.zarr", array, voxel_size=(40, 4, 4), offset=(40, 0, 0))
    volume = open_volume(tmp_path / "v.zarr")
    part = volume.crop([slice(2, 8), slice(3, None), slice(0, 14)])
    assert part.offset == (120, 12, 0)
    np.testing.assert_array_equal(part[:, 1:3], array[:, 3:5, 3:])
    one = part.channel(1)
    assert one.axes == "zyx"
    np.testing.assert_array_equal(one[2:4, 1], array[1, 4:6, 4])
    with pytest.raises(UserError, match="no channel 3"):
        volume.channel(3)
    with pytest.raises(UserError, match="outside"):
        volume.crop([slice(10, 12), slice(None), slice(None)])
    with pytest.raises(UserError, match="4 axes czyx"):
        volume.require_axes("zyx")


def test_common_region_of_padded_image_and_labels(tmp_path):
    image, labels = sample((20, 30, 30), np.uint8), sample((10, 20, 12), np.uint32)
    save_volume(tmp_path / "i.zarr", image, voxel_size=(40, 4, 4))
    save_volume(tmp_path / "l.h5", labels, voxel_size=(40, 4, 4), offset=(200, 20, 80))
    i, l = open_volume(tmp_path / "i.zarr"), open_volume(tmp_path / "l.h5")
    with pytest.raises(UserError, match="must be the same"):
        require_same_grid(i, l)
    a, b = common_region(i, l)
    require_same_grid(a, b)
    np.testing.assert_array_equal(a[...], image[5:15, 5:25, 20:30])
    np.testing.assert_array_equal(b[...], labels[:, :, :10])
    far = open_volume(tmp_path / "l.h5", offset=(8000, 0, 0))
    with pytest.raises(UserError, match="do not overlap"):
        common_region(i, far)
    with pytest.raises(UserError, match="voxels apart"):
        common_region(i, open_volume(tmp_path / "l.h5", offset=(20, 0, 0)))
    with pytest.raises(UserError, match="voxels of"):
        common_region(i, open_volume(tmp_path / "l.h5", voxel_size=(30, 6, 6)))
    moved = open_volume(tmp_path / "i.zarr", offset=(40, 0, 0))
    with pytest.raises(UserError, match="starts at"):
        require_same_grid(i, moved)
    with pytest.raises(UserError, match="voxels of"):
        require_same_grid(i, open_volume(tmp_path / "i.zarr", voxel_size="30,6,6"))

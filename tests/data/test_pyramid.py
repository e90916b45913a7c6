"""Pyramids: values of mean and mode, geometry of the levels, metadata that others read."""

import json

import numpy as np
import pytest

from emjax.data.pyramid import level_factors, level_shapes, write_pyramid
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError


def mean_of(array, step):
    """Mean over blocks of even sizes, the incomplete last ones included."""
    out = array.astype(np.float64)
    for axis, f in enumerate(step):
        parts = [
            np.mean(np.take(out, range(i, min(i + f, out.shape[axis])), axis), axis)
            for i in range(0, out.shape[axis], f)
        ]
        out = np.stack(parts, axis)
    return out


def mode_of(array, step):
    out = np.zeros([-(-n // f) for n, f in zip(array.shape, step)], array.dtype)
    for index in np.ndindex(out.shape):
        block = array[tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, step))]
        ids, counts = np.unique(block, return_counts=True)
        out[index] = ids[counts.argmax()]
    return out


def test_voxels_become_cubes_first():
    assert level_factors((100, 1024, 1024), (40, 4, 4)) == [(1, 2, 2)] * 3 + [(2, 2, 2)]
    assert level_factors((300, 300, 300), (10, 10, 10)) == [(2, 2, 2)] * 3
    assert level_factors((300, 300, 300), (10, 10, 10), 1) == [(2, 2, 2)]
    assert level_factors((60, 60, 60), (10, 10, 10)) == []
    assert level_factors((1, 200, 200), (40, 4, 4), 9)[-1] == (1, 2, 2)
    assert len(level_factors((2, 2, 2), (1, 1, 1), 5)) == 1


@pytest.mark.parametrize("name", ["a.zarr", "b.zarr", "precomputed://{}/p"])
def test_image_levels(tmp_path, name):
    array = np.random.default_rng(0).integers(0, 255, (20, 50, 61)).astype(np.uint8)
    spec = name.format(tmp_path) if "://" in name else f"{tmp_path}/{name}"
    options = {"format": "zarr2"} if name == "b.zarr" else {}
    save_volume(spec, array, voxel_size=(40, 4, 4), offset=(40, 8, 0), chunks=(8, 16, 16), **options)
    shapes = write_pyramid(spec, levels=2)
    assert shapes == [(20, 50, 61), (20, 25, 31), (20, 13, 16)]
    assert level_shapes(spec) == shapes
    separator = ":" if "precomputed" in name else "/"
    level = open_volume(f"{spec}{separator}1")
    assert level.voxel_size == (40, 8, 8)
    assert level.offset == (40, 10, 2)
    np.testing.assert_allclose(level[...], mean_of(array, (1, 2, 2)), atol=0.51)
    np.testing.assert_array_equal(open_volume(spec)[...], array)
    # Once more, with fewer levels: the old ones are gone from the list.
    assert write_pyramid(spec, levels=1) == shapes[:2]
    assert level_shapes(spec) == shapes[:2]


@pytest.mark.parametrize("name", ["a.zarr:labels/neurons", "precomputed://{}/p"])
@pytest.mark.parametrize("dtype", [np.uint32, np.uint64])
def test_label_levels(tmp_path, name, dtype):
    rng = np.random.default_rng(0)
    array = rng.integers(1, 5, (10, 24, 25)).astype(dtype).repeat(2, 1).repeat(2, 2)
    spec = name.format(tmp_path) if "://" in name else f"{tmp_path}/{name}"
    save_volume(spec, array, voxel_size=(40, 4, 4), chunks=(8, 16, 16))
    write_pyramid(spec, levels=1)
    level = open_volume(f"{spec}:1" if "precomputed" in name else f"{spec}/1")
    assert level.dtype == dtype
    np.testing.assert_array_equal(level[...], array[:, ::2, ::2])
    np.testing.assert_array_equal(level[...], mode_of(array, (1, 2, 2)))


def test_precomputed_levels_of_an_odd_corner(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (4, 20, 21)).astype(np.uint8)
    spec = f"precomputed://{tmp_path}/p"
    save_volume(spec, array, voxel_size=(40, 4, 4), offset=(0, 4, 12))
    assert write_pyramid(spec, levels=1) == [(4, 20, 21), (4, 11, 11)]
    level = open_volume(f"{spec}:1")
    # Coarse voxels lie on even fine ones, so the first is half outside.
    assert level.offset == (0, 2, 10)
    np.testing.assert_allclose(level[:, 1:10, 1:], mean_of(array[:, 1:19, 1:], (1, 2, 2)), atol=0.51)


def test_metadata(tmp_path):
    save_volume(tmp_path / "a.zarr", np.zeros((3, 40, 40, 40), np.uint8), voxel_size=(8, 8, 8), attributes={"note": 1})
    write_pyramid(str(tmp_path / "a.zarr"), levels=1)
    image = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]
    assert image["type"] == "mean"
    assert [d["path"] for d in image["datasets"]] == ["0", "1"]
    assert image["datasets"][1]["coordinateTransformations"] == [
        {"type": "scale", "scale": [1, 16, 16, 16]},
        {"type": "translation", "translation": [0, 4, 4, 4]},
    ]
    volume = open_volume(tmp_path / "a.zarr")
    assert volume.attributes["note"] == 1
    assert volume.complete


def test_refusals(tmp_path):
    save_volume(tmp_path / "a.h5", np.zeros((4, 4, 4), np.uint8), voxel_size=(8, 8, 8))
    with pytest.raises(UserError, match="not for hdf5"):
        write_pyramid(str(tmp_path / "a.h5"))
    save_volume(tmp_path / "a.zarr", np.zeros((4, 4, 4), np.uint8), voxel_size=(8, 8, 8))
    with pytest.raises(UserError, match="'median' is unknown"):
        write_pyramid(str(tmp_path / "a.zarr"), method="median")
    with pytest.raises(UserError, match="not an OME-Zarr image"):
        write_pyramid(f"{tmp_path}/a.zarr/0")

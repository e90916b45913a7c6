"""The phantom: exact connected labels, dark membranes where they meet, reproducible, readable after writing."""

import dataclasses

import numpy as np
import pytest
import scipy.ndimage

from emjax import prepare
from emjax.data import phantom
from emjax.data.crops import split_components
from emjax.data.volume import open_volume
from emjax.errors import UserError

ISOTROPIC = phantom.PhantomConfig(shape=(40, 56, 64), seed=1, density=400.0, radius=40.0)
SECTIONED = dataclasses.replace(phantom.sectioned(shape=(8, 96, 96), seed=2), density=800.0, radius=40.0)


@pytest.fixture(scope="module", params=[ISOTROPIC, SECTIONED], ids=["isotropic", "sectioned"])
def made(request):
    return request.param, phantom.make_phantom(request.param)


def in_plane_border(labels):
    border = np.zeros(labels.shape, bool)
    for axis in (1, 2):
        differs = np.diff(labels, axis=axis) != 0
        low, high = [slice(None)] * 3, [slice(None)] * 3
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        border[tuple(low)] |= differs
        border[tuple(high)] |= differs
    return border


def test_every_voxel_is_labelled_and_every_label_connected(made):
    config, volume = made
    assert volume.raw.shape == volume.labels.shape == volume.mitochondria.shape == config.shape
    assert volume.raw.dtype == np.uint8
    assert volume.labels.dtype == np.uint32
    assert volume.labels.min() == 1
    ids = np.unique(volume.labels)
    assert len(ids) > 8
    np.testing.assert_array_equal(ids, np.arange(1, len(ids) + 1))
    assert split_components(volume.labels.astype(np.int32)).max() == len(ids)


def test_neurites_of_isotropic_phantoms_hang_together_by_faces():
    volume = phantom.make_phantom(dataclasses.replace(ISOTROPIC, seed=5))
    assert split_components(volume.labels.astype(np.int32), 6).max() == volume.labels.max()


def test_membranes_are_dark_and_lie_on_borders(made):
    _, volume = made
    border = in_plane_border(volume.labels)
    distance = np.stack([scipy.ndimage.distance_transform_edt(~section) for section in border])
    inside = (distance > 5) & (volume.mitochondria == 0)
    raw = volume.raw.astype(float)
    assert raw[border].mean() < raw[inside].mean() - 40
    assert raw[border].mean() < raw[distance == 3].mean()


def test_mitochondria_lie_inside_one_neurite():
    config = dataclasses.replace(ISOTROPIC, shape=(64, 64, 64), mitochondria=30.0, seed=3)
    volume = phantom.make_phantom(config)
    ids = np.unique(volume.mitochondria)[1:]
    assert len(ids) > 0
    for i in ids:
        assert len(np.unique(volume.labels[volume.mitochondria == i])) <= 2
    assert not in_plane_border(volume.labels)[volume.mitochondria > 0].any()
    dark = volume.raw[volume.mitochondria > 0].mean()
    distance = scipy.ndimage.distance_transform_edt(~in_plane_border(volume.labels))
    assert dark < volume.raw[(volume.mitochondria == 0) & (distance > 4)].mean() - 10


def test_the_configuration_alone_decides():
    first, second = phantom.make_phantom(ISOTROPIC), phantom.make_phantom(ISOTROPIC)
    for field in dataclasses.fields(phantom.Phantom):
        np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))
    other = phantom.make_phantom(dataclasses.replace(ISOTROPIC, seed=9))
    assert not np.array_equal(other.labels, first.labels)


def test_sections_jitter_and_differ_in_brightness():
    config = dataclasses.replace(SECTIONED, section_jitter=12.0, section_brightness=0.1, blur=0.0, noise=0.0)
    planes, margin, shape, _ = phantom._grid(config)
    column = np.broadcast_to(np.arange(1, shape[2] + 1, dtype=np.int32), shape)
    grey = column.astype(np.float32) / 500 + 0.2
    volume = phantom._sections(np.random.default_rng(0), config, grey, column, column * 0, planes, margin)
    ramps = volume.raw.astype(float)[:, 0]
    assert (ramps[:, -1] - ramps[:, 0]).min() > 20
    # Labels are numbered in raster order, so a shift shows in how many of the first section's columns are still there.
    seen = [len(np.intersect1d(volume.labels[0], section)) for section in volume.labels[1:]]
    assert min(seen) < 96
    assert ramps.mean(1).std() > 5


def test_distance_is_exact_up_to_its_limit():
    mask = np.random.default_rng(0).random((9, 17, 15)) < 0.01
    voxel = np.array([20.0, 4.0, 5.0])
    want = np.minimum(scipy.ndimage.distance_transform_edt(~mask, sampling=voxel), 48)
    np.testing.assert_allclose(phantom._near_distance(mask, voxel, 48.0), want, atol=1e-3)


@pytest.mark.parametrize("name", ["p.zarr", "p.h5"])
def test_written_phantoms_are_read_back(tmp_path, name):
    config = phantom.PhantomConfig(shape=(8, 24, 32), voxel_size=(16.0, 8.0, 8.0))
    specs = phantom.write_phantom(tmp_path / name, config)
    volume = phantom.make_phantom(config)
    for key, spec in specs.items():
        opened = open_volume(spec)
        assert opened.voxel_size == config.voxel_size
        np.testing.assert_array_equal(opened[...], getattr(volume, key))
    with pytest.raises(UserError, match="overwrite"):
        phantom.write_phantom(tmp_path / name, config)
    phantom.write_phantom(tmp_path / name, config, overwrite=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": (4, 32, 32)},
        {"shape": (32, 32)},
        {"voxel_size": (0.0, 8.0, 8.0)},
        {"density": 0.0},
        {"noise": -1.0},
    ],
)
def test_wrong_configurations(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        phantom.PhantomConfig(**wrong)


def test_wrong_format(tmp_path):
    with pytest.raises(UserError, match=r"\.zarr"):
        phantom.write_phantom(tmp_path / "p.tif", ISOTROPIC)


def test_the_command(tmp_path, capsys):
    arguments = [
        "phantom",
        "--output",
        f"{tmp_path}/p.zarr",
        "--shape",
        "8,24,32",
        "--voxel-size",
        "16,8,8",
        "--seed",
        "3",
    ]
    assert prepare.main(arguments) == 0
    assert "voxel size 16 x 8 x 8 nm" in capsys.readouterr().out
    config = phantom.PhantomConfig(shape=(8, 24, 32), voxel_size=(16.0, 8.0, 8.0), seed=3)
    np.testing.assert_array_equal(open_volume(f"{tmp_path}/p.zarr:labels")[...], phantom.make_phantom(config).labels)
    with pytest.raises(UserError, match="overwrite"):
        prepare.main(arguments)
    with pytest.raises(UserError, match="--shape"):
        prepare.main([*arguments[:3], "--shape", "8,24"])

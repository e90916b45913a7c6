"""Volumes as others write them: metadata conventions, compressions, axis orders, addresses."""

import json

import h5py
import imagecodecs
import numpy as np
import pytest
import tensorstore as ts
import tifffile
from local_server import served

from emjax.data.folder import kvstore
from emjax.data.location import Location, locate
from emjax.data.volume import create_volume, open_volume, save_volume, triple
from emjax.errors import UserError


def sample(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def write_zarr2(path, array, chunks=(8, 8, 8), attributes=None, **metadata):
    """A Zarr 2 array through TensorStore's own driver, with attributes beside it."""
    spec = {
        "driver": "zarr",
        "kvstore": f"file://{path}/",
        "metadata": {
            "shape": array.shape,
            "chunks": chunks[-array.ndim :] if array.ndim <= 3 else (1,) * (array.ndim - 3) + chunks,
            "dtype": array.dtype.str,
            **metadata,
        },
    }
    ts.open(spec, create=True).result().write(array).result()
    if attributes is not None:
        (path / ".zattrs").write_text(json.dumps(attributes))


def group2(path, attributes=None):
    path.mkdir(parents=True, exist_ok=True)
    (path / ".zgroup").write_text('{"zarr_format": 2}')
    if attributes is not None:
        (path / ".zattrs").write_text(json.dumps(attributes))


def ome04(levels, units=("micrometer",) * 3, channel=False):
    lead = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}] if channel else []
    axes = [{"name": n, "type": "space", **({"unit": u} if u else {})} for n, u in zip("zyx", units)]
    one = [1.0] * len(lead)
    return {
        "multiscales": [
            {
                "version": "0.4",
                "axes": lead + axes,
                "datasets": [
                    {
                        "path": path,
                        "coordinateTransformations": [
                            {"type": "scale", "scale": one + list(scale)},
                            {"type": "translation", "translation": [0.0] * len(lead) + list(shift)},
                        ],
                    }
                    for path, scale, shift in levels
                ],
            }
        ]
    }


LEVELS = [("s0", (0.04, 0.004, 0.004), (0.4, 0, 0)), ("s1", (0.04, 0.008, 0.008), (0.4, 0.002, 0.002))]


def test_ome_zarr_04_levels_and_units(tmp_path):
    array = sample((10, 16, 20))
    group2(tmp_path / "v.zarr", ome04(LEVELS))
    write_zarr2(tmp_path / "v.zarr" / "s0", array, dimension_separator="/")
    write_zarr2(tmp_path / "v.zarr" / "s1", array[:, ::2, ::2].copy())
    volume = open_volume(tmp_path / "v.zarr")
    assert volume.voxel_size == (40, 4, 4)
    assert volume.offset == (400, 0, 0)
    np.testing.assert_array_equal(volume[...], array)
    for spec in (f"{tmp_path}/v.zarr/s1", f"{tmp_path}/v.zarr:s1", f"zarr://{tmp_path}/v.zarr/s1"):
        level = open_volume(spec)
        assert level.voxel_size == (40, 8, 8)
        assert level.offset == (400, 2, 2)
    assert open_volume(tmp_path / "v.zarr", dataset="s1").shape == (10, 8, 10)


def test_ome_zarr_with_time_and_channel_axes(tmp_path):
    array = sample((1, 1, 6, 8, 9))
    group2(tmp_path / "v.zarr", ome04(LEVELS[:1], channel=True))
    write_zarr2(tmp_path / "v.zarr" / "s0", array)
    volume = open_volume(tmp_path / "v.zarr")
    assert (volume.axes, volume.shape, volume.voxel_size) == ("zyx", (6, 8, 9), (40, 4, 4))
    np.testing.assert_array_equal(volume[1:3, 2:5], array[0, 0, 1:3, 2:5])
    array = sample((1, 2, 6, 8, 9))
    group2(tmp_path / "w.zarr", ome04(LEVELS[:1], channel=True))
    write_zarr2(tmp_path / "w.zarr" / "s0", array)
    np.testing.assert_array_equal(open_volume(tmp_path / "w.zarr")[1, 3], array[0, 1, 3])
    group2(tmp_path / "x.zarr", ome04(LEVELS[:1], channel=True))
    write_zarr2(tmp_path / "x.zarr" / "s0", sample((3, 1, 6, 8, 9)))
    with pytest.raises(UserError, match="3 time points"):
        open_volume(tmp_path / "x.zarr")


def test_scale_without_unit_is_not_taken_for_nanometres(tmp_path):
    group2(tmp_path / "v.zarr", ome04(LEVELS[:1], units=(None,) * 3))
    write_zarr2(tmp_path / "v.zarr" / "s0", sample((4, 4, 4)))
    volume = open_volume(tmp_path / "v.zarr")
    assert volume.voxel_size is None
    with pytest.raises(UserError, match=r"\[0.04, 0.004, 0.004\] has no unit.*--voxel-size"):
        volume.require_voxel_size()
    assert open_volume(tmp_path / "v.zarr", voxel_size="40,4,4").require_voxel_size() == (40, 4, 4)


@pytest.mark.parametrize("codec", ["gzip", "zlib", "zstd", "bz2", None])
def test_lsd_zarr(tmp_path, codec):
    raw, ids = sample((9, 10, 11)), sample((5, 6, 7), np.uint64)
    root = tmp_path / "fib25.zarr"
    for group in ("", "volumes", "volumes/labels"):
        group2(root / group)
    compressor = {"id": codec, **({"level": 1} if codec else {})} if codec else None
    write_zarr2(root / "volumes" / "raw", raw, compressor=compressor, attributes={"resolution": [8, 8, 8]})
    write_zarr2(
        root / "volumes" / "labels" / "neuron_ids", ids, attributes={"resolution": [8, 8, 8], "offset": [16, 16, 24]}
    )
    volume = open_volume(f"{root}/volumes/raw")
    assert volume.voxel_size == (8, 8, 8)
    np.testing.assert_array_equal(volume[...], raw)
    labels = open_volume(f"{root}:volumes/labels/neuron_ids")
    assert labels.offset == (16, 16, 24)
    np.testing.assert_array_equal(labels[...], ids)
    with pytest.raises(UserError, match="2 arrays: volumes/labels/neuron_ids, volumes/raw; name one"):
        open_volume(root)
    with pytest.raises(UserError, match=r"no array 'volumes/rew': found .*did you mean 'volumes/raw'"):
        open_volume(root, dataset="volumes/rew")


def test_funlib_attributes_and_other_axes(tmp_path):
    array = sample((9, 10, 11))
    attributes = {"voxel_size": [0.008, 0.009, 0.02], "units": ["um"] * 3, "axis_names": ["x", "y", "z"]}
    write_zarr2(tmp_path / "n.zarr", array, attributes=attributes)
    volume = open_volume(tmp_path / "n.zarr")
    assert volume.shape == (11, 10, 9)
    np.testing.assert_array_equal(volume[1:4, 2], array.transpose(2, 1, 0)[1:4, 2])
    silent = tmp_path / "m.zarr"
    write_zarr2(silent, array)
    np.testing.assert_array_equal(open_volume(silent, axes="xyz")[...], array.transpose(2, 1, 0))
    with pytest.raises(UserError, match="axes 'xy' do not describe"):
        open_volume(silent, axes="xy")


def test_consolidated_zarr_over_http(tmp_path):
    array = sample((9, 10, 11))
    root = tmp_path / "v.zarr"
    group2(root)
    write_zarr2(root / "raw", array)
    metadata = {"raw/.zarray": json.loads((root / "raw" / ".zarray").read_text())}
    (root / ".zmetadata").write_text(json.dumps({"metadata": metadata}))
    with served(tmp_path) as address:
        np.testing.assert_array_equal(open_volume(f"{address}/v.zarr")[...], array)


def test_n5_multiscale(tmp_path):
    array = sample((6, 8, 10))
    root = tmp_path / "v.n5"
    for path, factors, data in (("s0", [1, 1, 1], array), ("s1", [2, 2, 1], array[:, ::2, ::2].copy())):
        metadata = {
            "dimensions": data.shape[::-1],
            "blockSize": [4, 4, 4],
            "dataType": "uint8",
            "compression": {"type": "gzip"},
            "downsamplingFactors": factors,
        }
        kv = f"file://{root}/em/{path}/"
        ts.open({"driver": "n5", "kvstore": kv, "metadata": metadata}, create=True).result().write(
            data.transpose()
        ).result()
        attributes = json.loads((root / "em" / path / "attributes.json").read_text())
        (root / "em" / path / "attributes.json").write_text(json.dumps({**attributes, "downsamplingFactors": factors}))
    (root / "em" / "attributes.json").write_text(
        json.dumps({"pixelResolution": {"dimensions": [4, 5, 40], "unit": "nm"}})
    )
    volume = open_volume(f"{root}:em")
    assert volume.voxel_size == (40, 5, 4)
    np.testing.assert_array_equal(volume[2:5, 1:7], array[2:5, 1:7])
    half = open_volume(f"{root}/em/s1")
    assert half.voxel_size == (40, 10, 8)
    assert half.offset == (0, 2.5, 2)
    with pytest.raises(UserError, match="no array 'img': found em/s0, em/s1"):
        open_volume(f"{root}:img")


def test_precomputed_scales_and_encodings(tmp_path):
    image = sample((12, 16, 20))
    spec = {
        "driver": "neuroglancer_precomputed",
        "kvstore": f"file://{tmp_path}/em/",
        "multiscale_metadata": {"data_type": "uint8", "num_channels": 1, "type": "image"},
    }
    scales = [((4, 4, 40), image, "png"), ((8, 8, 40), image[:, ::2, ::2].copy(), "raw")]
    for resolution, data, encoding in scales:
        scale = {
            "size": data.shape[::-1],
            "resolution": resolution,
            "voxel_offset": [100, 200, 30] if resolution[0] == 4 else [50, 100, 30],
            "chunk_size": [8, 8, 8],
            "encoding": encoding,
        }
        ts.open({**spec, "scale_metadata": scale}, create=True).result().write(data.transpose()[..., None]).result()
    full = open_volume(f"precomputed://{tmp_path}/em")
    assert full.voxel_size == (40, 4, 4)
    assert full.offset == (1200, 800, 400)
    np.testing.assert_array_equal(full[3:7, 2:9, 5], image[3:7, 2:9, 5])
    for spec in (f"precomputed://{tmp_path}/em:1", f"precomputed://{tmp_path}/em:8_8_40"):
        half = open_volume(spec)
        assert half.offset == (1200, 802, 402)
        np.testing.assert_array_equal(half[...], scales[1][1])
    assert open_volume(tmp_path / "em").shape == image.shape
    with pytest.raises(UserError, match="no scale '2_2_2': found 4_4_40, 8_8_40"):
        open_volume(f"precomputed://{tmp_path}/em:2_2_2")
    with served(tmp_path) as address:
        for spec in (f"precomputed://{address}/em", f"{address}/em", f"precomputed://{address}/em:4_4_40"):
            np.testing.assert_array_equal(open_volume(spec)[2:5, 3:9, 7:11], image[2:5, 3:9, 7:11])
        assert open_volume(f"precomputed://{address}/em:1").shape == (12, 8, 10)
        with pytest.raises(UserError, match="not a precomputed volume"):
            open_volume(f"precomputed://{address}/nothing")
        with pytest.raises(UserError, match="format unknown"):
            open_volume(f"{address}/nothing")
        with pytest.raises(UserError, match="download it first"):
            open_volume(f"{address}/volume.h5:raw")
        with pytest.raises(UserError, match="nothing can be written"):
            create_volume(f"{address}/new.zarr", (4, 4, 4), np.uint8, voxel_size=(1, 1, 1))


@pytest.mark.parametrize("options", [{}, {"format": "zarr2"}], ids=["zarr3", "zarr2"])
def test_ome_zarr_over_http(tmp_path, options):
    array = sample((40, 30, 20))
    save_volume(tmp_path / "v.zarr", array, voxel_size=(40, 4, 4), chunks=(16, 16, 16), **options)
    with served(tmp_path) as address:
        for spec in (f"{address}/v.zarr", f"{address}/v.zarr/0", f"{address}/v.zarr:0"):
            volume = open_volume(spec)
            assert volume.voxel_size == (40, 4, 4)
            np.testing.assert_array_equal(volume[3:21, 4:9], array[3:21, 4:9])
        with pytest.raises(UserError, match="is not a Zarr array"):
            open_volume(f"{address}/w.zarr")


def test_s3_through_an_endpoint(tmp_path, monkeypatch):
    array = sample((10, 11, 12))
    save_volume(tmp_path / "bucket" / "v.zarr", array, voxel_size=(40, 4, 4))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with served(tmp_path) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        np.testing.assert_array_equal(open_volume("s3://bucket/v.zarr")[2:4], array[2:4])


def test_a_bucket_that_forbids_instead_of_missing(tmp_path):
    array = sample((10, 11, 12))
    save_volume(tmp_path / "bucket" / "v.zarr", array, voxel_size=(40, 4, 4), format="zarr2")
    save_volume(f"precomputed://{tmp_path}/bucket/p", array, voxel_size=(40, 4, 4))
    with served(tmp_path) as address:
        for name in ("v.zarr", "p"):
            np.testing.assert_array_equal(open_volume(f"{address}/bucket/{name}")[...], array)
        with pytest.raises(UserError, match=r"is not a Zarr array .* \(access was denied\)"):
            open_volume(f"{address}/bucket/w.zarr")
        with pytest.raises(UserError, match=r"not a precomputed volume.* \(access was denied\)"):
            open_volume(f"precomputed://{address}/bucket/w")


def test_addresses(monkeypatch):
    for name in ("AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    assert kvstore("gs://b/p/q", anonymous=True) == {
        "driver": "http",
        "base_url": "https://storage.googleapis.com",
        "path": "/b/p/q/",
    }
    assert kvstore("gs://b/p/q") == {"driver": "gcs", "bucket": "b", "path": "p/q/"}
    assert kvstore("s3://b/p/", anonymous=True) == {
        "driver": "s3",
        "bucket": "b",
        "path": "p/",
        "aws_credentials": {"type": "anonymous"},
    }
    assert locate("precomputed://gs://b/em:8_8_8") == Location("precomputed", "gs://b/em", "8_8_8")
    assert locate("https://h:8000/a/v.zarr/s0") == Location("zarr", "https://h:8000/a/v.zarr", "s0")
    assert locate("s3://b/x.n5:em/s0") == Location("n5", "s3://b/x.n5", "em/s0")
    assert locate("a/b.h5:volumes/raw") == Location("hdf5", "a/b.h5", "volumes/raw")
    assert locate("a/b.tif") == Location("tiff", "a/b.tif", None)
    assert locate("a/*.png").kind == "sections"
    with pytest.raises(UserError, match="give one of them"):
        locate("a/b.h5:raw", "labels")


def test_cremi(tmp_path):
    raw = sample((5, 12, 12))
    ids = sample((3, 6, 6), np.uint64)
    with h5py.File(tmp_path / "sample_A.hdf", "w") as file:
        file["volumes/raw"] = raw
        file["volumes/raw"].attrs["resolution"] = (40.0, 4.0, 4.0)
        file["volumes/labels/neuron_ids"] = ids
        file["volumes/labels/neuron_ids"].attrs["resolution"] = (40.0, 4.0, 4.0)
        file["volumes/labels/neuron_ids"].attrs["offset"] = (40.0, 12.0, 12.0)
        file["annotations/ids"] = np.arange(4)
    volume = open_volume(tmp_path / "sample_A.hdf", dataset="volumes/raw")
    assert (volume.voxel_size, volume.offset) == ((40, 4, 4), (0, 0, 0))
    np.testing.assert_array_equal(volume[...], raw)
    labels = open_volume(f"{tmp_path}/sample_A.hdf:volumes/labels/neuron_ids")
    assert labels.offset == (40, 12, 12)
    with pytest.raises(UserError, match="2 arrays: volumes/labels/neuron_ids, volumes/raw"):
        open_volume(tmp_path / "sample_A.hdf")
    with pytest.raises(UserError, match=r"no dataset 'raw': found annotations/ids 4, .*volumes/raw 5x12x12"):
        open_volume(tmp_path / "sample_A.hdf:raw")


def test_other_hdf5_conventions(tmp_path):
    array = sample((4, 5, 6), ">u2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["main"] = array
    snemi = open_volume(tmp_path / "a.h5")
    assert snemi.voxel_size is None
    assert snemi.dtype == np.uint16
    np.testing.assert_array_equal(snemi[...], array)
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["raw"] = array
        file["raw"].attrs["element_size_um"] = [0.235, 0.15, 0.15]
    assert open_volume(tmp_path / "b.h5").voxel_size == (235, 150, 150)
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["exported_data"] = np.moveaxis(sample((2, 4, 5, 6)), 0, -1)
        axes = [{"key": key} for key in "zyxc"]
        file["exported_data"].attrs["axistags"] = json.dumps({"axes": axes})
    ilastik = open_volume(tmp_path / "c.h5")
    assert (ilastik.axes, ilastik.shape) == ("czyx", (2, 4, 5, 6))
    np.testing.assert_array_equal(ilastik[1, 2], sample((2, 4, 5, 6))[1, 2])


def test_real_volumes(real_data):
    found = sorted(real_data.glob("*/*.h5"))
    assert found
    for path in found:
        with h5py.File(path) as file:
            keys = [key for key in file if file[key].ndim == 3]
            size = tuple(file.attrs["voxel_size_nm"])
        for key in keys:
            volume = open_volume(f"{path}:{key}")
            assert (volume.voxel_size, volume.axes) == (size, "zyx")
            assert volume[0, :4, :4].shape == (4, 4)


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"imagej": True, "metadata": {"axes": "ZYX", "spacing": 0.04, "unit": "um"}}, (40, 4, 4)),
        ({"imagej": True, "metadata": {"axes": "ZYX", "unit": "um"}}, None),
        ({}, None),
        ({"compression": "zlib"}, None),
        ({"compression": "lzw", "bigtiff": True}, None),
        ({"metadata": None}, None),
        (
            {
                "ome": True,
                "metadata": {
                    "axes": "ZYX",
                    **{f"PhysicalSize{a}": s for a, s in zip("ZYX", (0.04, 0.004, 0.004))},
                },
            },
            (40, 4, 4),
        ),
    ],
)
def test_tiff(tmp_path, options, size):
    array = sample((7, 33, 22))
    resolution = {"resolution": (250, 250)} if options.get("imagej") else {}
    tifffile.imwrite(tmp_path / "stack.tif", array, **options, **resolution)
    volume = open_volume(tmp_path / "stack.tif")
    assert (volume.axes, volume.voxel_size) == ("zyx", size)
    np.testing.assert_array_equal(volume[2:5, 3:30, 4:9], array[2:5, 3:30, 4:9])
    np.testing.assert_array_equal(volume[...], array)
    with pytest.raises(UserError, match="no series '3'"):
        open_volume(f"{tmp_path}/stack.tif:3")


def test_tiff_with_channels_and_sections(tmp_path):
    array = sample((4, 3, 16, 17))
    tifffile.imwrite(tmp_path / "zc.tif", array, imagej=True, metadata={"axes": "ZCYX"})
    volume = open_volume(tmp_path / "zc.tif")
    assert volume.axes == "czyx"
    np.testing.assert_array_equal(volume[2, 1:3], array[1:3, 2])
    tifffile.imwrite(tmp_path / "rgb.tif", np.moveaxis(array, 1, -1).copy(), photometric="rgb")
    np.testing.assert_array_equal(open_volume(tmp_path / "rgb.tif")[...], array.transpose(1, 0, 2, 3))
    tifffile.imwrite(tmp_path / "t.tif", array[:, 0], imagej=True, metadata={"axes": "TYX"})
    assert open_volume(tmp_path / "t.tif").axes == "zyx"
    tifffile.imwrite(tmp_path / "one.tif", array[0, 0])
    assert open_volume(tmp_path / "one.tif").shape == (1, 16, 17)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_sections_in_natural_order(tmp_path, dtype):
    array = sample((12, 20, 30), dtype) * 1
    for z, section in enumerate(array):
        (tmp_path / f"im{z}.png").write_bytes(imagecodecs.png_encode(section))
    (tmp_path / "notes.txt").write_text("ignored")
    for spec in (tmp_path, f"{tmp_path}/*.png", f"{tmp_path}/im*.png"):
        volume = open_volume(spec, voxel_size=(30, 8, 8))
        assert (volume.shape, volume.dtype, volume.chunks) == ((12, 20, 30), dtype, (1, 20, 30))
        np.testing.assert_array_equal(volume[9:12, 3:7], array[9:12, 3:7])
    assert open_volume(tmp_path / "im3.png").shape == (1, 20, 30)
    (tmp_path / "im5.png").write_bytes(imagecodecs.png_encode(array[0, :10]))
    with pytest.raises(UserError, match=r"im5.png is 10x30 .* first section .*im0.png is 20x30"):
        open_volume(tmp_path)[...]
    tifffile.imwrite(tmp_path / "im13.tif", array[0])
    with pytest.raises(UserError, match="mixes files"):
        open_volume(tmp_path)


def test_colour_sections_and_tiff_sections(tmp_path):
    array = sample((3, 3, 20, 30))
    for z in range(3):
        (tmp_path / f"{z}.png").write_bytes(imagecodecs.png_encode(np.moveaxis(array[:, z], 0, -1).copy()))
    volume = open_volume(tmp_path)
    assert volume.axes == "czyx"
    np.testing.assert_array_equal(volume[...], array)
    (tmp_path / "tifs").mkdir()
    for z in range(3):
        tifffile.imwrite(tmp_path / "tifs" / f"{z}.tif", array[0, z])
    np.testing.assert_array_equal(open_volume(tmp_path / "tifs")[...], array[0])


def test_numpy(tmp_path):
    array = sample((4, 5, 6), np.float32)
    np.save(tmp_path / "a.npy", array)
    volume = open_volume(tmp_path / "a.npy")
    np.testing.assert_array_equal(volume[1:, ::2], array[1:, ::2])
    np.save(tmp_path / "f.npy", np.asfortranarray(array))
    np.testing.assert_array_equal(open_volume(tmp_path / "f.npy")[...], array)


def test_triple():
    assert triple("40,4,4", "voxel size") == (40, 4, 4)
    assert triple("40 x 4.5 x 4", "voxel size") == (40, 4.5, 4)
    for wrong in ("40,4", "a,b,c", (1, 2), (0, 1, 1), "40,4,inf", 3):
        with pytest.raises(UserError, match="voxel size: found"):
            triple(wrong, "voxel size", positive=True)

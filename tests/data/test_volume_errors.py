"""Bad input and bad places to write: one clear line each, nothing half-written."""

import os
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import tifffile

from emjax.data.volume import check_finite, create_volume, open_volume, save_volume
from emjax.errors import UserError


def sample(shape, dtype=np.uint8):
    return np.random.default_rng(0).integers(0, 200, shape).astype(dtype)


def refused(spec, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        open_volume(spec, **options)[...]
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    "name",
    [
        "no.zarr",
        "no.zarr/0",
        "no.n5:raw",
        "no.h5:raw",
        "no.tif",
        "no.npy",
        "precomputed://{}/no",
        "no.png",
        "no*.png",
        "no",
    ],
)
def test_missing(tmp_path, name):
    refused(name.format(tmp_path) if "://" in name else f"{tmp_path}/{name}", "does not exist|matches no files")


def test_the_nearest_name_is_proposed(tmp_path):
    np.save(tmp_path / "volume.npy", sample((4, 4, 4)))
    refused(tmp_path / "volumes.npy", r"does not exist; did you mean 'volume.npy'\?")


def test_unknown_format(tmp_path):
    (tmp_path / "a.nrrd").write_bytes(b"NRRD")
    refused(tmp_path / "a.nrrd", "format unknown; expected .zarr")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no PNG or TIFF")
    refused("", "empty name")
    refused("ftp://host/a.bin", "does not exist|format unknown")


def test_truncated_hdf5(tmp_path):
    save_volume(tmp_path / "a.h5", sample((40, 50, 60)), voxel_size=(1, 1, 1))
    whole = (tmp_path / "a.h5").read_bytes()
    (tmp_path / "a.h5").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "a.h5", rf"is truncated \({len(whole) // 2} of {len(whole)} bytes")
    (tmp_path / "a.h5").write_bytes(b"\x00" * 100 + whole)
    refused(tmp_path / "a.h5", "not an HDF5 file")
    (tmp_path / "a.h5").write_bytes(b"")
    refused(tmp_path / "a.h5", "cannot open|truncated|not an HDF5")


def test_damaged_hdf5_chunk(tmp_path):
    save_volume(tmp_path / "a.h5", sample((40, 50, 60)), voxel_size=(1, 1, 1), chunks=(40, 50, 60))
    with h5py.File(tmp_path / "a.h5") as file:
        start = file["main"].id.get_chunk_info(0).byte_offset
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[start + 5 : start + 500] = b"\xff" * 495
    (tmp_path / "a.h5").write_bytes(content)
    refused(tmp_path / "a.h5", r"cannot read .*a.h5:main at \[0:40, 0:50, 0:60\]")


@pytest.mark.parametrize("options", [{}, {"format": "zarr2"}], ids=["zarr3", "zarr2"])
def test_truncated_zarr(tmp_path, options):
    save_volume(tmp_path / "a.zarr", sample((40, 50, 60)), voxel_size=(1, 1, 1), **options)
    chunks = [
        path
        for path in (tmp_path / "a.zarr" / "0").rglob("*")
        if path.is_file() and not path.name.startswith(("z", "."))
    ]
    assert chunks
    for path in chunks:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(tmp_path / "a.zarr", r"cannot read .*a.zarr/0 at \[0:40, 0:50, 0:60\]")
    metadata = tmp_path / "a.zarr" / "0" / (".zarray" if options else "zarr.json")
    metadata.write_text(metadata.read_text()[:50])
    refused(tmp_path / "a.zarr", r"0/(\.zarray|zarr\.json) is damaged: not a JSON object \(50 bytes\)")
    metadata.unlink()
    refused(tmp_path / "a.zarr", "level '0' is missing")


def test_truncated_n5_and_precomputed(tmp_path):
    for spec in (f"{tmp_path}/a.n5:raw", f"precomputed://{tmp_path}/p"):
        save_volume(spec, sample((40, 50, 60)), voxel_size=(1, 1, 1))
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.name not in ("attributes.json", "info"):
                path.write_bytes(path.read_bytes()[:20])
        refused(spec, "cannot read .* at ")
    (tmp_path / "p" / "info").write_text('{"@type": "neuroglancer_legacy_mesh"}')
    refused(f"precomputed://{tmp_path}/p", "has no scales")
    (tmp_path / "a.n5" / "raw" / "attributes.json").write_text("{")
    refused(f"{tmp_path}/a.n5:raw", "attributes.json is damaged")


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}], ids=["plain", "zlib"])
def test_truncated_tiff(tmp_path, options):
    tifffile.imwrite(tmp_path / "a.tif", sample((20, 50, 60)), **options)
    whole = (tmp_path / "a.tif").read_bytes()
    for part in (whole[: len(whole) // 2], whole[:100], b"", b"not a tiff at all"):
        (tmp_path / "a.tif").write_bytes(part)
        refused(tmp_path / "a.tif", "truncated|damaged|cannot open")


def test_truncated_png_and_npy(tmp_path):
    np.save(tmp_path / "a.npy", sample((20, 50, 60)))
    whole = (tmp_path / "a.npy").read_bytes()
    for part in (whole[:1000], whole[:20], b""):
        (tmp_path / "a.npy").write_bytes(part)
        refused(tmp_path / "a.npy", "cannot open")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    refused(tmp_path / "a.png", "cannot read .*a.png")


@pytest.mark.parametrize("shape", [(5,), (5, 5), (2, 2, 2, 2, 2, 2)])
def test_wrong_dimensionality(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    refused(tmp_path / "a.npy", r"dimensions .*expected 3 \(z, y, x\) or 4 \(channel, z, y, x\)")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros(shape, np.uint8)
    refused(f"{tmp_path}/a.h5:x", "dimensions")


def test_empty_and_not_numeric(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 4, 4), np.uint8))
    refused(tmp_path / "a.npy", "is empty")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.zeros((3, 3, 3), "S4")
        file["group/y"] = 3
    refused(f"{tmp_path}/a.h5:x", "expected numbers")
    refused(f"{tmp_path}/a.h5:group", r"has no dataset 'group': found group/y , x 3x3x3|found group/y")
    with h5py.File(tmp_path / "b.h5", "w"):
        pass
    refused(tmp_path / "b.h5", "no arrays were found")
    np.save(tmp_path / "o.npy", np.array([[[None]]], object), allow_pickle=True)
    refused(tmp_path / "o.npy", "cannot open")


def test_missing_keys_list_those_found(tmp_path):
    save_volume(tmp_path / "a.zarr:volumes/raw", sample((4, 4, 4)), voxel_size=(1, 1, 1))
    save_volume(tmp_path / "a.zarr:volumes/labels", sample((4, 4, 4)), voxel_size=(1, 1, 1))
    refused(f"{tmp_path}/a.zarr:volumes/lables", "found volumes/labels, volumes/raw; did you mean")
    refused(f"{tmp_path}/a.zarr", "2 arrays: volumes/labels, volumes/raw; name one")
    save_volume(tmp_path / "a.h5:raw", sample((4, 4, 4)), voxel_size=(1, 1, 1))
    refused(f"{tmp_path}/a.h5:ram", r"found raw 4x4x4; did you mean 'raw'")


def test_unknown_voxel_size(tmp_path):
    np.save(tmp_path / "a.npy", sample((4, 4, 4)))
    volume = open_volume(tmp_path / "a.npy")
    assert "voxel size unknown" in volume.describe()
    with pytest.raises(UserError, match="voxel size unknown; give it in nm, z,y,x: --voxel-size 40,4,4"):
        volume.require_voxel_size()
    with pytest.raises(UserError, match="--voxel-size"):
        volume.crop([slice(1, 3)] * 3)


def test_not_a_number():
    block = np.zeros((4, 5, 6), np.float32)
    assert check_finite(block, "x") is block
    block[1, 2, 3] = np.nan
    block[3, 2, 3] = np.inf
    with pytest.raises(UserError, match=r"raw: 2 of 120 values are NaN or infinite, the first at \(1, 2, 3\)"):
        check_finite(block, "raw")
    check_finite(np.zeros((2, 2), np.uint8), "labels")


@pytest.mark.parametrize("name", ["a.zarr", "a.h5", "a.tif", "a.n5:raw", "precomputed://{}/p", "b.zarr"])
@pytest.mark.parametrize("place", ["/proc/no", "{}/file"])
def test_a_place_that_cannot_be_written(tmp_path, name, place):
    (tmp_path / "file").write_text("in the way")
    folder = place.format(tmp_path)
    spec = name.format(folder) if "://" in name else f"{folder}/{name}"
    options = {"format": "zarr2"} if name == "b.zarr" else {}
    with pytest.raises(UserError, match=r"cannot (create|write)"):
        create_volume(spec, (8, 8, 8), np.uint8, voxel_size=(1, 1, 1), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into read-only folders; the test above covers refusals")
@pytest.mark.parametrize("name", ["a.zarr", "a.h5", "a.tif", "a.n5:raw"])
def test_read_only_folder(tmp_path, name):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="ermission denied"):
            create_volume(tmp_path / name, (8, 8, 8), np.uint8, voxel_size=(1, 1, 1))
    finally:
        tmp_path.chmod(0o700)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.zarr", "b.zarr", "a.h5", "a.tif", "a.n5:raw", "precomputed://{}/p"])
def test_full_disk(tmp_path, name):
    spec = name.format(tmp_path) if "://" in name else f"{tmp_path}/{name}"
    # A limit on the size of files refuses writes as a full disk does, and needs no rights.
    script = f"""
        import numpy as np, resource, signal
        from emjax.data.volume import save_volume
        from emjax.errors import UserError
        array = np.random.default_rng(0).integers(0, 255, (64, 64, 64)).astype(np.uint8)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_volume({spec!r}, array, voxel_size=(1, 1, 1), format={"zarr2" if name == "b.zarr" else None!r})
        except UserError as error:
            print('refused:', error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("refused: cannot "), done.stderr
    assert done.stdout.count("\n") == 1
    assert "partial" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "options", "match"),
    [
        ("a.zarr", (4, 4), np.uint8, {}, "is not .z, y, x."),
        ("a.zarr", (4, 0, 4), np.uint8, {}, "positive lengths"),
        ("a.zarr", (4, 4, 4), "U3", {}, "only numbers"),
        ("a.zarr", (4, 4, 4), np.complex64, {}, "only numbers"),
        ("a.zarr", (4, 4, 4), np.uint8, {"voxel_size": (0, 1, 1)}, "three positive numbers"),
        ("a.zarr", (4, 4, 4), np.uint8, {"offset": (0, 1)}, "three numbers"),
        ("a.zarr", (4, 4, 4), np.uint8, {"chunks": (4, 4)}, "do not fit"),
        ("a.zarr", (9, 9, 9), np.uint8, {"chunks": (4, 4, 4), "shards": (6, 8, 8)}, "whole multiples"),
        ("a.zarr", (4, 4, 4), np.uint8, {"encoding": "raw"}, "precomputed"),
        ("a.zarr", (4, 4, 4), np.uint8, {"format": "zarr4"}, "unknown format"),
        ("a.xyz", (4, 4, 4), np.uint8, {}, "format to write is unknown"),
        ("a.npy", (4, 4, 4), np.uint8, {}, "cannot hold a voxel size"),
        ("s3://b/a.h5", (4, 4, 4), np.uint8, {}, "over the network"),
        ("a.n5:x", (4, 4, 4), np.uint8, {"shards": (4, 4, 4), "chunks": (2, 2, 2)}, "leave them out"),
        ("a.precomputed", (4, 4, 4), np.uint8, {"offset": (0.5, 0, 0)}, "whole voxel"),
        ("a.precomputed", (4, 4, 4), np.uint8, {"encoding": "jpeg"}, "cannot be written"),
        ("a.precomputed", (4, 4, 4), np.uint8, {"encoding": "compressed_segmentation"}, "uint32 or uint64"),
    ],
)
def test_wrong_requests_to_create(tmp_path, path, shape, dtype, options, match):
    spec = path if "://" in path else tmp_path / path
    with pytest.raises(UserError, match=match):
        create_volume(spec, shape, dtype, **{"voxel_size": (1, 1, 1), **options})
    assert not list(tmp_path.iterdir())


def test_dead_server_is_reported_soon():
    refused("http://127.0.0.1:9/v.zarr", "cannot read http://127.0.0.1:9/v.zarr")

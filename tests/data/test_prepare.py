"""The prepare command: conversions, data sets laid out as they come, boxes of streamed volumes, bad use."""

import subprocess
import sys

import h5py
import imagecodecs
import numpy as np
import pytest
import tifffile
from local_server import served

from emjax import prepare
from emjax.data.affinities import NEAREST, open_affinities
from emjax.data.catalogue import CATALOGUE, entry
from emjax.data.pyramid import level_shapes
from emjax.data.transfer import block_shape
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError


def run(*arguments):
    assert prepare.main([str(argument) for argument in arguments]) == 0


def sample(shape, dtype=np.uint8, high=200):
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def write_sections(folder, array):
    folder.mkdir(parents=True, exist_ok=True)
    for z, section in enumerate(array):
        (folder / f"im{z}.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(section)))


def test_sections_to_ome_zarr(tmp_path, capsys):
    array = sample((12, 70, 80))
    write_sections(tmp_path / "png", array)
    out = tmp_path / "out.zarr"
    run(
        "volume", "--input", tmp_path / "png", "--output", out, "--voxel-size", "30,8,8", "--pyramid", "--memory", "1MB"
    )
    volume = open_volume(out)
    np.testing.assert_array_equal(volume[...], array)
    assert volume.voxel_size == (30, 8, 8)
    assert level_shapes(str(out)) == [(12, 70, 80), (12, 35, 40)]
    printed = capsys.readouterr().out
    assert "axes zyx, shape 12 x 70 x 80, uint8, voxel size 30 x 8 x 8 nm" in printed
    assert f"values 0 to 199, mean {array.mean():.4g}" in printed
    with pytest.raises(UserError, match="exists; remove it"):
        run("volume", "--input", tmp_path / "png", "--output", out, "--voxel-size", "30,8,8")


@pytest.mark.parametrize("output", ["o.h5:raw", "o.tif", "o.n5:raw", "o.zarr", "precomputed://{}/o"])
def test_any_format_into_any(tmp_path, output):
    array = sample((10, 33, 40))
    save_volume(tmp_path / "a.h5", array, voxel_size=(40, 4, 4), offset=(80, 8, 16), attributes={"note": "kept"})
    target = output.format(tmp_path) if "://" in output else f"{tmp_path}/{output}"
    run("volume", "--input", f"{tmp_path}/a.h5", "--output", target, "--bbox", "2:8,:,3:21", "--memory", "10kB")
    volume = open_volume(target)
    np.testing.assert_array_equal(volume[...], array[2:8, :, 3:21])
    assert volume.offset == (160, 8, 28)
    assert volume.voxel_size == (40, 4, 4)
    assert volume.attributes["note"] == "kept"


def test_channels_windows_and_types(tmp_path, capsys):
    array = sample((2, 8, 20, 20), np.uint16, 4000)
    save_volume(tmp_path / "a.zarr", array, voxel_size=(1, 1, 1))
    a = tmp_path / "a.zarr"
    run("volume", "--input", a, "--output", tmp_path / "b.zarr", "--channel", 1, "--window", "1000,3000")
    volume = open_volume(tmp_path / "b.zarr")
    expected = np.clip(np.rint((array[1].astype(np.float32) - 1000) * np.float32(255 / 2000)), 0, 255)
    np.testing.assert_array_equal(volume[...], expected)
    assert volume.attributes["window_of_source"] == [1000, 3000]
    run("volume", "--input", tmp_path / "b.zarr", "--output", tmp_path / "c.zarr", "--dtype", "float32")
    assert open_volume(tmp_path / "c.zarr").dtype == np.float32
    run("volume", "--input", a, "--output", tmp_path / "d.zarr", "--channel", 0, "--window", "auto")
    assert open_volume(tmp_path / "d.zarr").dtype == np.uint8
    run("volume", "--input", a, "--output", tmp_path / "e.zarr", "--format", "zarr2", "--chunks", "4,10,10")
    assert open_volume(tmp_path / "e.zarr").chunks == (1, 4, 10, 10)
    np.testing.assert_array_equal(open_volume(tmp_path / "e.zarr")[...], array)
    for wrong, match in (
        (["--window", "a"], "expected auto"),
        (["--dtype", "uint9"], "NumPy type"),
        (["--dtype", "uint8"], "do not fit"),
        (["--bbox", "0:1,0:1,0:1", "--bbox-nm", "0:1,0:1,0:1"], "give one of them"),
        (["--bbox-nm", "0:1,0:1"], "expected z0:z1"),
        (["--bbox-nm", "0:1,0:1,0:100"], "along x the volume reaches from 0 to 20 nm"),
        (["--labels", "--channel", "0", "--window", "auto"], "give one of them"),
        (["--labels"], "4 axes czyx"),
        (["--channel", "7"], "no channel 7"),
    ):
        with pytest.raises(UserError, match=match):
            run("volume", "--input", a, "--output", tmp_path / "x.zarr", *wrong)
        assert not (tmp_path / "x.zarr").exists()
    np.save(tmp_path / "n.npy", np.full((4, 4, 4), np.nan))
    with pytest.raises(UserError, match="voxel size unknown"):
        run("volume", "--input", tmp_path / "n.npy", "--output", tmp_path / "x.zarr")
    with pytest.raises(UserError, match="64 of 64 values are NaN"):
        run("volume", "--input", tmp_path / "n.npy", "--output", tmp_path / "x.zarr", "--voxel-size", "1,1,1")
    assert not (tmp_path / "x.zarr").exists()


def test_labels_and_their_ignored_ids(tmp_path, capsys):
    ids = sample((8, 20, 21), np.uint64, 7)
    ids[3, 4:9] = 2**64 - 1
    save_volume(tmp_path / "a.h5", ids, voxel_size=(40, 4, 4))
    run("volume", "--labels", "--input", tmp_path / "a.h5", "--output", tmp_path / "b.zarr", "--pyramid")
    labels, mask = open_volume(tmp_path / "b.zarr"), open_volume(tmp_path / "b_ignore.zarr")
    assert labels.dtype == np.uint32
    np.testing.assert_array_equal(labels[...], np.where(ids == 2**64 - 1, 0, ids))
    np.testing.assert_array_equal(mask[...], ids == 2**64 - 1)
    assert "6 objects, ids 1 to 6" in capsys.readouterr().out
    big = ids.copy()
    big[0] = 2**40
    save_volume(tmp_path / "big.h5", big, voxel_size=(40, 4, 4))
    run("volume", "--labels", "--input", tmp_path / "big.h5", "--output", tmp_path / "c.zarr:labels/x")
    assert open_volume(tmp_path / "c.zarr:labels/x").dtype == np.uint64
    assert open_volume(tmp_path / "c.zarr:labels/x_ignore")[...].sum() == (ids == 2**64 - 1).sum()
    save_volume(tmp_path / "f.h5", np.zeros((4, 4, 4), np.float32), voxel_size=(1, 1, 1))
    with pytest.raises(UserError, match="labels are integers"):
        run("volume", "--labels", "--input", tmp_path / "f.h5", "--output", tmp_path / "d.zarr")
    damaged = tmp_path / "e.zarr"
    with pytest.raises(UserError, match="do not fit"):
        run("volume", "--labels", "--dtype", "uint8", "--input", tmp_path / "big.h5", "--output", damaged)
    assert not damaged.exists()
    assert not (tmp_path / "e_ignore.zarr").exists()


@pytest.mark.parametrize("memory", ["1GB", "1kB"])
def test_affinities_of_another_convention(tmp_path, memory):
    labels = sample((20, 24, 30), np.uint32, 3)
    xyz = labels.transpose(2, 1, 0)
    banis = np.zeros((3, *xyz.shape), np.float32)
    banis[0, :-1] = xyz[:-1] == xyz[1:]
    banis[1, :, :-1] = xyz[:, :-1] == xyz[:, 1:]
    banis[2, :, :, :-1] = xyz[:, :, :-1] == xyz[:, :, 1:]
    np.save(tmp_path / "a.npy", banis)
    out = tmp_path / "a.zarr"
    arguments = ["--convention", "banis", "--voxel-size", "20,9,9", "--memory", memory]
    run("affinities", "--input", tmp_path / "a.npy", "--output", out, *arguments)
    found = open_affinities(out)
    assert found.offsets == NEAREST
    expected = np.zeros((3, *labels.shape), np.float32)
    expected[0, 1:] = labels[1:] == labels[:-1]
    expected[1, :, 1:] = labels[:, 1:] == labels[:, :-1]
    expected[2, :, :, 1:] = labels[:, :, 1:] == labels[:, :, :-1]
    np.testing.assert_array_equal(found[:], expected)
    np.save(tmp_path / "e.npy", 1 - expected)
    arguments = ["--convention", "elf-boundary", "--voxel-size", "20,9,9", "--float"]
    run("affinities", "--input", tmp_path / "e.npy", "--output", tmp_path / "e.zarr", *arguments)
    np.testing.assert_array_equal(open_affinities(tmp_path / "e.zarr")[:], expected)
    np.save(tmp_path / "s.npy", np.moveaxis(expected[::-1], 0, -1).transpose(2, 1, 0, 3))
    run(
        "affinities",
        "--input",
        tmp_path / "s.npy",
        "--output",
        tmp_path / "s.zarr",
        *["--convention", "seung", "--voxel-size", "20,9,9"],
    )
    np.testing.assert_array_equal(open_affinities(tmp_path / "s.zarr")[:], expected)
    np.save(tmp_path / "o.npy", expected)
    with pytest.raises(UserError, match="no offsets attribute"):
        run("affinities", "--input", tmp_path / "o.npy", "--output", tmp_path / "o.zarr", "--voxel-size", "1,1,1")
    ours = ["--offsets", "-1,0,0;0,-1,0;0,0,-1", "--voxel-size", "1,1,1"]
    run(
        "affinities",
        "--input",
        tmp_path / "o.npy",
        "--output",
        tmp_path / "o.zarr",
        *[f"{a}={b}" for a, b in zip(ours[::2], ours[1::2])],
    )
    np.testing.assert_array_equal(open_affinities(tmp_path / "o.zarr")[:], expected)
    np.save(tmp_path / "w.npy", expected * 3)
    with pytest.raises(UserError, match="from 0 to 3; 0 to 1 is expected"):
        run(
            "affinities",
            "--input",
            tmp_path / "w.npy",
            "--output",
            tmp_path / "w.zarr",
            f"{ours[0]}={ours[1]}",
            *ours[2:],
        )
    assert not (tmp_path / "w.zarr").exists()


def test_levels_of_ids_are_never_averaged(tmp_path):
    ids = sample((4, 80, 80), np.uint32, 2) * 1000
    save_volume(tmp_path / "a.zarr", ids, voxel_size=(40, 4, 4))
    run("volume", "--input", tmp_path / "a.zarr", "--output", f"precomputed://{tmp_path}/p", "--pyramid")
    assert set(np.unique(open_volume(f"precomputed://{tmp_path}/p:1")[...])) <= {0, 1000}


def test_pyramid_command(tmp_path, capsys):
    save_volume(tmp_path / "a.zarr", sample((10, 100, 100)), voxel_size=(40, 4, 4))
    run("pyramid", "--input", tmp_path / "a.zarr")
    assert "levels 10x100x100, 10x50x50" in capsys.readouterr().out


def test_list(capsys):
    run("list")
    printed = capsys.readouterr().out
    for found in CATALOGUE:
        assert found.name in printed
    run("list", "cremi")
    printed = capsys.readouterr().out
    assert "sample_A_20160501.hdf:volumes/raw" in printed
    assert "licence" in printed
    with pytest.raises(UserError, match="no data set 'cremy'; did you mean 'cremi'"):
        run("cremy", "--source", ".", "--output", "x")
    with pytest.raises(UserError, match="ask the authors"):
        run("sam4em", "--source", ".", "--output", "x")


def test_catalogue_is_sound():
    names = [found.name for found in CATALOGUE]
    assert len(names) == len(set(names))
    assert not {"list", "volume", "affinities", "pyramid"} & set(names)
    for found in CATALOGUE:
        assert found.urls
        assert found.licence
        assert found.citation
        assert found.voxel_size is None or min(found.voxel_size) > 0
        for member in found.members:
            assert member.image
            assert not found.streamed or member.image[0].startswith("precomputed://")


def test_snemi(tmp_path, capsys):
    raw, ids = sample((6, 40, 40)), sample((6, 40, 40), np.uint16, 9)
    source = tmp_path / "source"
    source.mkdir()
    tifffile.imwrite(source / "train-input.tif", raw)
    tifffile.imwrite(source / "train-labels.tif", ids)
    tifffile.imwrite(source / "test-input.tif", raw[:4], photometric="minisblack")
    run("snemi3d", "--source", source, "--output", tmp_path / "out")
    image = open_volume(tmp_path / "out" / "train.zarr")
    assert image.voxel_size == (30, 6, 6)
    assert image.attributes["split"] == "train"
    assert image.attributes["dataset"] == "snemi3d"
    np.testing.assert_array_equal(image[...], raw)
    np.testing.assert_array_equal(open_volume(tmp_path / "out" / "train.zarr:labels/labels")[...], ids)
    assert open_volume(tmp_path / "out" / "test.zarr").shape == (4, 40, 40)
    run("snemi3d", "--source", source, "--output", tmp_path / "one.zarr", "--member", "test", "--voxel-size", "29,6,6")
    assert open_volume(tmp_path / "one.zarr").voxel_size == (29, 6, 6)
    with pytest.raises(UserError, match=r"is one volume, but there are 2: train, test"):
        run("snemi3d", "--source", source, "--output", tmp_path / "two.zarr")
    with pytest.raises(UserError, match=r"no volume 'val' in .*: found train, test"):
        run("snemi3d", "--source", source, "--output", tmp_path / "o", "--member", "val")
    with pytest.raises(UserError, match=r"holds no files of cremi: looked for sample_A_20160501.hdf:volumes/raw"):
        run("cremi", "--source", source, "--output", tmp_path / "o")
    with pytest.raises(UserError, match="is not a folder"):
        run("cremi", "--source", source / "nothing", "--output", tmp_path / "o")


def test_padded_cremi_box(tmp_path):
    raw, ids = sample((12, 40, 40)), sample((8, 20, 20), np.uint64, 9)
    ids[2, 3:5] = 2**64 - 1
    with h5py.File(tmp_path / "sample_B_padded_20160501.hdf", "w") as file:
        for name, data, offset in (("volumes/raw", raw, (0, 0, 0)), ("volumes/labels/neuron_ids", ids, (80, 40, 40))):
            file[name] = data
            file[name].attrs["resolution"] = (40.0, 4.0, 4.0)
            file[name].attrs["offset"] = [float(o) for o in offset]
    run("cremi", "--source", tmp_path, "--output", tmp_path / "whole")
    assert open_volume(tmp_path / "whole" / "B_padded.zarr:labels/labels").offset == (80, 40, 40)
    run("cremi", "--source", tmp_path, "--output", tmp_path / "box", "--bbox", "3:7,12:30,5:40")
    out = tmp_path / "box" / "B_padded.zarr"
    image, labels = open_volume(out), open_volume(f"{out}:labels/labels")
    np.testing.assert_array_equal(image[...], raw[3:7, 12:30, 5:40])
    assert image.offset == (120, 48, 20)
    assert labels.offset == (120, 48, 40)
    expected = ids[1:5, 2:20]
    np.testing.assert_array_equal(labels[...], np.where(expected == 2**64 - 1, 0, expected))
    np.testing.assert_array_equal(open_volume(f"{out}:labels/ignore_mask")[...], expected == 2**64 - 1)


def test_fib25_transforms(tmp_path):
    stack = sample((8, 20, 20), np.uint64, 6)
    folder = tmp_path / "training_sample2"
    folder.mkdir()
    with h5py.File(folder / "grayscale_maps.h5", "w") as file:
        file["raw"] = sample((8, 20, 20))
    with h5py.File(folder / "groundtruth.h5", "w") as file:
        file["stack"] = stack
        file["transforms"] = np.array([[5, 70], [1, 70], [2, 2], [3, 9], [4, 2]], np.uint64)
    run("fib25", "--source", tmp_path, "--output", tmp_path / "o")
    found = open_volume(tmp_path / "o" / "training_sample2.zarr:labels/labels")[...]
    np.testing.assert_array_equal(found, np.array([0, 70, 2, 9, 2, 70])[stack])


def test_mitoem_and_lucchi(tmp_path):
    raw = sample((410, 8, 9))
    write_sections(tmp_path / "m" / "im", raw)
    (tmp_path / "m" / "mito-val-v2").mkdir()
    ids = sample((10, 8, 9), np.uint16, 5)
    for z, section in enumerate(ids):
        tifffile.imwrite(tmp_path / "m" / "mito-val-v2" / f"seg{400 + z:04d}.tif", section)
    run("mitoem_r", "--source", tmp_path / "m", "--output", tmp_path / "o", "--member", "val")
    image, labels = open_volume(tmp_path / "o" / "val.zarr"), open_volume(tmp_path / "o" / "val.zarr:labels/labels")
    np.testing.assert_array_equal(image[...], raw[400:])
    np.testing.assert_array_equal(labels[...], ids)
    assert image.offset == labels.offset == (12000, 0, 0)
    drawn = sample((5, 12, 13), np.uint8, 2) * 255
    write_sections(tmp_path / "l" / "Lucchi++" / "Train_In", sample((5, 12, 13)))
    write_sections(tmp_path / "l" / "Lucchi++" / "Train_Out", np.repeat(drawn[..., None], 4, axis=-1))
    run("lucchi_pp", "--source", tmp_path / "l", "--output", tmp_path / "l.zarr")
    np.testing.assert_array_equal(open_volume(tmp_path / "l.zarr:labels/labels")[...], drawn // 255)


def test_sets_with_one_volume_per_file(tmp_path):
    folder = tmp_path / "e" / "labeled" / "source1"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        tifffile.imwrite(folder / f"{name}.tif", sample((5, 12, 13)))
        tifffile.imwrite(folder / f"{name}_MaskIns.tif", sample((5, 12, 13), np.uint16, 4))
    (tmp_path / "e" / "valid" / "group" / "s2").mkdir(parents=True)
    tifffile.imwrite(tmp_path / "e" / "valid" / "group" / "s2" / "raw.tif", sample((5, 12, 13)))
    tifffile.imwrite(tmp_path / "e" / "valid" / "group" / "s2" / "label_0.tif", sample((5, 12, 13), np.uint16, 4))
    members = {found.name: found for found in prepare.find_members(entry("emneuron"), str(tmp_path / "e"))}
    assert sorted(members) == ["a", "b", "group_s2"]
    assert all(found.labels for found in members.values())
    with pytest.raises(UserError, match="voxel size unknown"):
        run("emneuron", "--source", tmp_path / "e", "--output", tmp_path / "o")
    run("emneuron", "--source", tmp_path / "e", "--output", tmp_path / "o", "--voxel-size", "8,8,8")
    assert open_volume(tmp_path / "o" / "group_s2.zarr:labels/labels").attributes["split"] == "val"
    xyz = sample((9, 8, 7, 1)), sample((9, 8, 7), np.int32, 5) - 1
    place = tmp_path / "n" / "train" / "seed3" / "data.zarr"
    save_volume(f"{place}:img", np.moveaxis(xyz[0], -1, 0), voxel_size=(1, 1, 1), format="zarr2")
    save_volume(f"{place}:seg", xyz[1] + 1, voxel_size=(1, 1, 1), format="zarr2")
    found = list(prepare.find_members(entry("nisb"), str(tmp_path / "n")))
    assert [(part.name, part.image, part.labels) for part in found] == [("train_seed3", f"{place}:img", f"{place}:seg")]


def test_streamed_boxes_of_a_local_copy(tmp_path, capsys):
    image, ids = sample((20, 64, 70)), sample((20, 64, 70), np.uint64, 5)
    save_volume(f"precomputed://{tmp_path}/em", image, voxel_size=(8, 8, 8), offset=(800, 1600, 0), chunks=(16, 16, 16))
    save_volume(f"precomputed://{tmp_path}/seg", ids, voxel_size=(8, 8, 8), offset=(800, 1600, 0))
    with pytest.raises(UserError, match="hemibrain is large: give a box"):
        run("hemibrain", "--output", tmp_path / "o")
    with pytest.raises(UserError, match="choose one with --member"):
        run("hemibrain", "--source", f"precomputed://{tmp_path}/em", "--output", tmp_path / "o", "--whole")
    with served(tmp_path) as address:
        arguments = ["--member", "image", "--source", f"precomputed://{address}/em"]
        run("hemibrain", "--output", tmp_path / "a.zarr", *arguments, "--bbox", "3:11,10:50,:")
        run("hemibrain", "--output", tmp_path / "b.zarr", *arguments, "--bbox-nm", "824:888,1680:2000,0:560")
        arguments = ["--member", "segmentation", "--source", f"precomputed://{address}/seg"]
        run("hemibrain", "--output", tmp_path / "s.zarr", *arguments, "--bbox", "3:11,10:50,:")
    for name in ("a.zarr", "b.zarr"):
        volume = open_volume(tmp_path / name)
        np.testing.assert_array_equal(volume[...], image[3:11, 10:50])
        assert volume.offset == (824, 1680, 0)
        assert volume.attributes["dataset"] == "hemibrain"
        assert volume.attributes["source"].startswith("precomputed://http://127.0.0.1")
    labels = open_volume(tmp_path / "s.zarr")
    assert labels.dtype == np.uint64
    np.testing.assert_array_equal(labels[...], ids[3:11, 10:50])


def test_blocks_keep_to_the_memory():
    assert block_shape((100, 100, 100), (10, 10, 10), 1, 5000) == (10, 10, 50)
    assert block_shape((100, 100, 100), (10, 10, 10), 1, 30_000) == (10, 30, 100)
    assert block_shape((100, 100, 100), (10, 10, 10), 4, 10**9) == (100, 100, 100)
    assert block_shape((3, 100, 100, 100), (1, 10, 10, 10), 1, 10) == (1, 10, 10, 10)


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "emjax.prepare"]
    done = subprocess.run(
        [*command, "volume", "--input", "no.tif", "--output", "x.zarr"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no.tif does not exist\n"
    done = subprocess.run([*command, "volume", "--inptu", "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "prepare volume" in done.stdout

import json
import re

import h5py
import numpy as np
import pytest

from emjax import cli, evaluate, segment
from emjax.data.affinities import create_affinities
from emjax.data.volume import mark_complete, open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.evaluation import score_curve
from emjax.inference.scoring import block_of, count, read_filled
from emjax.inference.segmentation import load_merges
from emjax.metrics import contingency, fill_unlabelled, merge_list, score, split_list


def labels_of(shape=(20, 40, 36), seed=0, objects=12):
    rng = np.random.default_rng(seed)
    seeds = rng.random((objects, 3)) * shape
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    return (((grid[..., None, :] - seeds) ** 2).sum(-1).argmin(-1) + 1).astype(np.uint32)


@pytest.fixture
def pair(tmp_path):
    """A segmentation with holes and a ground truth with unlabelled voxels."""
    rng = np.random.default_rng(1)
    truth, found = labels_of(seed=0), labels_of(seed=2, objects=9)
    truth[:2] = 0
    found[rng.random(found.shape) < 0.3] = 0
    found[5:9, 10:20, 10:20] = 0
    save_volume(tmp_path / "truth.zarr", truth, voxel_size=(40, 4, 4), offset=(400, 8, 0), chunks=(8, 16, 16))
    save_volume(tmp_path / "found.zarr", found, voxel_size=(40, 4, 4), offset=(400, 8, 0), chunks=(8, 16, 16))
    return found, truth


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def numbers(tmp_path, *arguments):
    run(
        "--segmentation",
        tmp_path / "found.zarr",
        "--labels",
        tmp_path / "truth.zarr",
        *arguments,
        "--json",
        tmp_path / "n.json",
    )
    return json.loads((tmp_path / "n.json").read_text())


def test_numbers_equal_the_metrics_of_the_whole(pair, tmp_path, capsys):
    found, truth = pair
    stored = numbers(tmp_path)
    for name, value in score(found, truth).as_dict().items():
        assert stored["scores"][name] == pytest.approx(value, abs=1e-12)
    printed = capsys.readouterr().out
    assert f"{stored['scores']['voi_sum']:.4f} bits" in printed
    assert "segment 0 as one ordinary segment" in printed
    assert "axes zyx" in printed


def test_filled_and_masked_variants_are_stated(pair, tmp_path, capsys):
    found, truth = pair
    stored = numbers(tmp_path, "--fill")
    filled = fill_unlabelled(found, (40, 4, 4))
    assert stored["scores"]["voi_sum"] == pytest.approx(score(filled, truth).voi_sum, abs=1e-12)
    assert "filled with the nearest segment" in stored["variant"]
    mask = np.zeros(truth.shape, np.uint8)
    mask[5:15, 5:30] = 1
    save_volume(tmp_path / "mask.zarr", mask, voxel_size=(40, 4, 4), offset=(400, 8, 0))
    masked = numbers(tmp_path, "--mask", tmp_path / "mask.zarr")
    assert masked["scores"]["voi_sum"] == pytest.approx(score(found, truth, mask).voi_sum, abs=1e-12)
    ignored = numbers(tmp_path, "--ignore", tmp_path / "mask.zarr")
    assert ignored["scores"]["voi_sum"] == pytest.approx(score(found, truth, 1 - mask).voi_sum, abs=1e-12)
    assert "mask.zarr is not 0" in ignored["variant"]
    capsys.readouterr()


def test_lists_have_places_in_voxels_and_nm(pair, tmp_path):
    found, truth = pair
    stored = numbers(tmp_path)
    table = contingency(found, truth)
    for name, entries, owners, parts in (
        ("splits", split_list(table), truth, found),
        ("merges", merge_list(table), found, truth),
    ):
        assert [entry["id"] for entry in stored[name]] == [entry.id for entry in entries][:50]
        for entry in stored[name][:3]:
            for piece in entry["pieces"]:
                z, y, x = piece["position_voxel"]
                assert owners[z, y, x] == entry["id"]
                assert parts[z, y, x] == piece["id"]
                assert piece["position_nm"] == [400 + 40 * z, 8 + 4 * y, 4 * x]


def test_small_blocks_give_the_same_table(pair, tmp_path):
    volumes = [open_volume(tmp_path / name) for name in ("found.zarr", "truth.zarr")]
    for fill in (False, True):
        whole = count(volumes[:1], volumes[1], fill=fill)[0]
        for most in (1, 5000):
            assert np.prod(block_of(volumes[0], most)) <= max(most, 8 * 16 * 16)
            small = count(volumes[:1], volumes[1], fill=fill, most_voxels=most)[0]
            if fill:
                # Ties of distance may fall either way; the scores agree.
                assert abs(whole.total - small.total) == 0
            else:
                np.testing.assert_array_equal(whole.counts, small.counts)
                np.testing.assert_array_equal(whole.first, small.first)


def test_filling_by_blocks_takes_the_nearest_segment(tmp_path):
    labels = np.zeros((12, 60, 60), np.uint32)
    labels[5, 2, 3], labels[7, 55, 50] = 4, 9
    save_volume(tmp_path / "sparse.zarr", labels, voxel_size=(10, 3, 3))
    volume = open_volume(tmp_path / "sparse.zarr")
    expected = fill_unlabelled(labels, (10, 3, 3))
    box = (slice(0, 4), slice(10, 50), slice(0, 60))
    np.testing.assert_array_equal(read_filled(volume, box, (10, 3, 3), 1 << 30), expected[box])


@pytest.fixture
def segmented(tmp_path):
    rng = np.random.default_rng(3)
    truth = labels_of(seed=0)
    values = np.zeros((3, *truth.shape), np.float32)
    for axis, channel in enumerate(values):
        same = np.moveaxis(truth, axis, 0)[1:] == np.moveaxis(truth, axis, 0)[:-1]
        np.moveaxis(channel, axis, 0)[1:] = np.where(same, 0.85, 0.25)
    values = np.clip(values + rng.normal(0, 0.15, values.shape), 0, 1)
    offsets = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
    out = create_affinities(str(tmp_path / "affinities.zarr"), truth.shape, offsets, voxel_size=(40, 4, 4))
    out[...] = np.rint(values * 255).astype(np.uint8)
    mark_complete(str(tmp_path / "affinities.zarr"))
    save_volume(tmp_path / "truth.zarr", truth, voxel_size=(40, 4, 4))
    save_volume(tmp_path / "image.zarr", np.rint(values.mean(0) * 255).astype(np.uint8), voxel_size=(40, 4, 4))
    segment.main(
        ["--input", str(tmp_path / "affinities.zarr"), "--output", str(tmp_path / "found.zarr"), "--threshold", "0.3"]
    )
    return truth


def test_curve_equals_scoring_each_threshold(segmented, tmp_path):
    stored = numbers(tmp_path, "--thresholds", "0.1,0.3,0.6")
    assert [point["threshold"] for point in stored["curve"]] == [0.1, 0.3, 0.6]
    for point in stored["curve"]:
        segment.main(["--output", str(tmp_path / "found.zarr"), "--threshold", str(point["threshold"])])
        scores = score(open_volume(tmp_path / "found.zarr")[...], segmented)
        assert point["voi_sum"] == pytest.approx(scores.voi_sum, abs=1e-12)
        assert point["arand"] == pytest.approx(scores.arand_skimage, abs=1e-12)
    best = min(stored["curve"], key=lambda point: point["voi_sum"])
    assert stored["best_threshold"] == best
    merges = load_merges(str(tmp_path / "found.merges.npz"))
    assert score_curve(contingency(segmented, segmented), merges, []) == ()


def test_history_of_another_folder(segmented, tmp_path):
    (tmp_path / "plain").mkdir()
    save_volume(tmp_path / "plain" / "found.zarr", open_volume(tmp_path / "found.zarr")[...], voxel_size=(40, 4, 4))
    arguments = ["--segmentation", tmp_path / "plain" / "found.zarr", "--labels", tmp_path / "truth.zarr"]
    with pytest.raises(UserError, match="--history"):
        run(*arguments, "--thresholds", "0.2")
    assert run(*arguments, "--history", tmp_path / "found.merges.npz", "--thresholds", "0.2") == 0


def test_report_is_one_file_with_everything(segmented, tmp_path):
    folder = tmp_path / "report"
    stored = numbers(
        tmp_path,
        "--report",
        folder,
        "--image",
        tmp_path / "image.zarr",
        "--affinities",
        tmp_path / "affinities.zarr",
        "--fill",
    )
    page = (folder / "index.html").read_text()
    assert f"{stored['scores']['voi_sum']:.3f}" in page
    assert "segment 0 filled with the nearest segment" in page
    assert page.count("data:image/png;base64,") >= 15
    assert "<svg" in page
    assert "python -m emjax.evaluate" in page
    assert "python -m emjax.view" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    # Nothing is fetched: the only addresses are links that the reader may follow.
    assert not re.findall(r'(?:src|rel="stylesheet" href)="(?!data:)', page)
    assert json.loads((folder / "scores.json").read_text())["scores"] == stored["scores"]


def test_box_and_alignment(pair, tmp_path):
    found, truth = pair
    boxed = numbers(tmp_path, "--bbox", "2:10,5:30,:")
    part = (slice(2, 10), slice(5, 30), slice(None))
    assert boxed["scores"]["voi_sum"] == pytest.approx(score(found[part], truth[part]).voi_sum, abs=1e-12)
    save_volume(tmp_path / "truth.zarr", truth[part], voxel_size=(40, 4, 4), offset=(480, 28, 0), overwrite=True)
    with pytest.raises(UserError, match="--align"):
        numbers(tmp_path)
    aligned = numbers(tmp_path, "--align")
    assert aligned["scores"] == boxed["scores"]
    piece, same = boxed["splits"][0]["pieces"][0], aligned["splits"][0]["pieces"][0]
    assert piece["position_nm"] == same["position_nm"]


def test_cremi_ignore_ids_are_not_scored(tmp_path):
    truth = labels_of().astype(np.uint64)
    found = labels_of(seed=2)
    marked = truth.copy()
    marked[:5] = 2**64 - 1
    save_volume(tmp_path / "truth.zarr", marked, voxel_size=(1, 1, 1))
    save_volume(tmp_path / "found.zarr", found, voxel_size=(1, 1, 1))
    assert numbers(tmp_path)["scores"]["voi_sum"] == pytest.approx(score(found[5:], truth[5:]).voi_sum, abs=1e-12)


def test_real_oversegmentation(real_data, tmp_path):
    """The scores that ship with the FIB-25 crop: filled, 1.693 bits and ARAND 0.183."""
    volume = real_data / "fib25_medulla" / "val.h5"
    run("--segmentation", f"{volume}:overseg", "--labels", f"{volume}:labels", "--fill", "--json", tmp_path / "n.json")
    scores = json.loads((tmp_path / "n.json").read_text())["scores"]
    assert scores["voi_sum"] == pytest.approx(1.693, abs=5e-4)
    assert scores["arand_skimage"] == pytest.approx(0.183, abs=5e-4)


def test_bad_input_is_one_line(pair, tmp_path):
    _, truth = pair
    save_volume(tmp_path / "small.zarr", truth[:10], voxel_size=(40, 4, 4))
    save_volume(tmp_path / "float.zarr", truth.astype(np.float32), voxel_size=(40, 4, 4))
    save_volume(tmp_path / "four.zarr", np.stack([truth, truth]), voxel_size=(40, 4, 4))
    save_volume(tmp_path / "empty.zarr", np.zeros_like(truth), voxel_size=(40, 4, 4))
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["labels"] = truth
    good, labels = tmp_path / "found.zarr", tmp_path / "truth.zarr"
    cases = [
        ([tmp_path / "no.zarr", labels], "does not exist"),
        ([good, f"{tmp_path}/file.h5:label"], "labels"),
        ([tmp_path / "small.zarr", labels], "shape"),
        ([tmp_path / "float.zarr", labels], "integer ids"),
        ([good, tmp_path / "four.zarr"], "czyx"),
        ([good, tmp_path / "empty.zarr"], "no labelled voxel"),
        ([good, labels, "--mask", tmp_path / "small.zarr"], "shape"),
        ([good, labels, "--mask", good, "--ignore", good], "not both"),
        ([good, labels, "--bbox", "0:99,:,:"], "not inside"),
        ([good, labels, "--thresholds", "0.1"], "merge history"),
        ([good, labels, "--image", tmp_path / "small.zarr"], "shape"),
    ]
    for (segmentation, truth_spec, *rest), text in cases:
        with pytest.raises(UserError) as caught:
            run("--segmentation", segmentation, "--labels", truth_spec, *rest, "--report", tmp_path / "report")
        assert text in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "report").exists()
    with pytest.raises(UserError, match="cannot write"):
        run("--segmentation", good, "--labels", labels, "--report", tmp_path / "file.h5" / "report")


def test_exit_code(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(evaluate.main, ["--segmentation", "no.zarr"])
    assert caught.value.code == 2
    assert "labels" in capsys.readouterr().err

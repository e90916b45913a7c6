import json
import pathlib

import numpy as np
import pytest

from emjax import cli, segment
from emjax.data.affinities import create_affinities
from emjax.data.pyramid import level_shapes
from emjax.data.volume import mark_complete, open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.blockwise import block_shape
from emjax.inference.segmentation import load_merges
from emjax.postprocess import agglomerate, apply, mutex_watershed, region_graph, watershed
from emjax.systems import affinity_unet

NEAREST = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))


def affinities_of(shape=(18, 40, 36), seed=0, dtype=np.uint8):
    """Affinities of random blobs: high inside, low between, noisy."""
    rng = np.random.default_rng(seed)
    seeds = rng.random((14, 3)) * shape
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    labels = ((grid[..., None, :] - seeds) ** 2).sum(-1).argmin(-1)
    made = np.zeros((3, *shape), np.float32)
    for axis, channel in enumerate(made):
        same = np.moveaxis(labels, axis, 0)[1:] == np.moveaxis(labels, axis, 0)[:-1]
        np.moveaxis(channel, axis, 0)[1:] = np.where(same, 0.85, 0.2)
    made += rng.normal(0, 0.12, made.shape).astype(np.float32)
    made = np.clip(made, 0, 1)
    return np.rint(made * 255).astype(np.uint8) if dtype == np.uint8 else made


def save(path, values, offsets=NEAREST, **options):
    out = create_affinities(str(path), values.shape[1:], offsets, dtype=values.dtype, voxel_size=(40, 4, 4), **options)
    out[...] = values
    mark_complete(str(path))
    return str(path)


@pytest.fixture
def stored(tmp_path):
    return save(tmp_path / "affinities.zarr", affinities_of())


def run(*arguments):
    return segment.main([str(argument) for argument in arguments])


def expected(values, threshold, score="mean"):
    fragments = watershed(values, 0.0001, 0.9999)
    statistics = ("mean",) if score == "mean" else ("max",)
    tree = agglomerate(region_graph(values, fragments, statistics), 1.0, score=score)
    return apply(tree.cut(threshold), fragments)


def test_labels_fragments_and_history(stored, tmp_path, capsys):
    assert run("--input", stored, "--output", tmp_path / "labels.zarr", "--threshold", "0.4") == 0
    printed = capsys.readouterr().out
    assert "axes czyx" in printed
    assert "segments at threshold 0.4" in printed
    labels = open_volume(tmp_path / "labels.zarr")
    np.testing.assert_array_equal(labels[...], expected(affinities_of(), 0.4))
    assert labels.voxel_size == (40, 4, 4)
    assert labels.attributes["threshold"] == 0.4
    fragments = open_volume(tmp_path / "labels.fragments.zarr")[...]
    np.testing.assert_array_equal(fragments, watershed(affinities_of(), 0.0001, 0.9999))
    merges = load_merges(str(tmp_path / "labels.merges.npz"))
    np.testing.assert_array_equal(merges.sizes, np.bincount(fragments.ravel()))


def test_another_threshold_costs_nothing(stored, tmp_path, monkeypatch):
    output = tmp_path / "labels.zarr"
    run("--input", stored, "--output", output, "--threshold", "0.4")
    first = open_volume(output)[...]

    def refuse(*_, **__):
        raise AssertionError("the watershed ran again")

    monkeypatch.setattr("emjax.inference.segmentation.watershed", refuse)
    run("--output", output, "--threshold", "0.2")
    np.testing.assert_array_equal(open_volume(output)[...], expected(affinities_of(), 0.2))
    run("--input", stored, "--output", output, "--threshold", "0.4")
    np.testing.assert_array_equal(open_volume(output)[...], first)
    run("--output", output, "--thresholds", "0.1,0.6")
    for threshold in (0.1, 0.6):
        found = open_volume(f"{output}:{threshold}")
        np.testing.assert_array_equal(found[...], expected(affinities_of(), threshold))
    with pytest.raises(UserError, match="another score"):
        run("--input", stored, "--output", output, "--score", "max")


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("score", ["mean", "hist_quant_50"])
def test_block_by_block_equals_the_whole(tmp_path, dtype, score):
    stored = save(tmp_path / "affinities.zarr", affinities_of(dtype=dtype))
    save_volume(tmp_path / "mask.zarr", (affinities_of()[0] > 40).astype(np.uint8), voxel_size=(40, 4, 4))
    for number, mask in enumerate([[], ["--mask", tmp_path / "mask.zarr"]]):
        common = ["--input", stored, "--score", score, *mask]
        run(*common, "--output", tmp_path / f"whole{number}.zarr")
        run(*common, "--output", tmp_path / f"blocks{number}.zarr", "--segment-block", "7,16,20")
        for name in ("", ".fragments"):
            whole = open_volume(tmp_path / f"whole{number}{name}.zarr")[...]
            blocks = open_volume(tmp_path / f"blocks{number}{name}.zarr")[...]
            np.testing.assert_array_equal(whole, blocks)
        whole, blocks = (load_merges(str(tmp_path / f"{kind}{number}.merges.npz")) for kind in ("whole", "blocks"))
        for name in ("a", "b", "score"):
            np.testing.assert_array_equal(getattr(whole.tree, name), getattr(blocks.tree, name))
        np.testing.assert_array_equal(whole.sizes, blocks.sizes)
    assert not (tmp_path / "blocks0.work").exists()


def test_a_stopped_block_run_goes_on(stored, tmp_path, monkeypatch):
    from emjax.inference import blockwise

    run("--input", stored, "--output", tmp_path / "whole.zarr")
    common = ["--input", stored, "--output", tmp_path / "blocks.zarr", "--segment-block", "7,16,20", "--threads", "1"]
    original, calls = blockwise.block_graph, []

    def stop_at_the_fifth(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(blockwise, "block_graph", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        run(*common)
    assert not (tmp_path / "blocks.zarr").exists()
    with pytest.raises(UserError, match="not finished"):
        open_volume(tmp_path / "blocks.fragments.zarr")
    monkeypatch.setattr(blockwise, "block_fragments", None)
    before = len(calls)
    run(*common)
    assert len(calls) - before == 3 * 3 * 2 - 4
    np.testing.assert_array_equal(open_volume(tmp_path / "blocks.zarr")[...], open_volume(tmp_path / "whole.zarr")[...])


def test_stripes_share_the_blocks(stored, tmp_path):
    import threading

    run("--input", stored, "--output", tmp_path / "whole.zarr")
    common = ["--input", stored, "--output", tmp_path / "striped.zarr", "--segment-block", "7,16,20"]
    common += ["--executor", "stripes", "--threads", "1", "--stripe"]
    second = threading.Thread(target=run, args=(*common, "1/2"))
    second.start()
    run(*common, "0/2")
    second.join(60)
    np.testing.assert_array_equal(
        open_volume(tmp_path / "striped.zarr")[...], open_volume(tmp_path / "whole.zarr")[...]
    )


def test_block_shape_is_bounded():
    assert block_shape((1000, 1000, 1000), 40 * 128**3) == (128, 128, 128)
    assert block_shape((10, 1000, 1000), 40 * 10 * 256 * 256) == (10, 256, 256)
    assert block_shape((50, 60, 70), 1 << 40) == (50, 60, 70)


def test_dust_and_mask(stored, tmp_path):
    run("--input", stored, "--output", tmp_path / "a.zarr", "--dust", "200")
    labels = open_volume(tmp_path / "a.zarr")[...]
    ids, counts = np.unique(labels[labels > 0], return_counts=True)
    assert len(ids)
    assert counts.min() >= 200
    mask = np.zeros((18, 40, 36), np.uint8)
    mask[:, 10:30] = 1
    save_volume(tmp_path / "mask.zarr", mask, voxel_size=(40, 4, 4))
    run("--input", stored, "--output", tmp_path / "b.zarr", "--mask", tmp_path / "mask.zarr")
    masked = open_volume(tmp_path / "b.zarr")[...]
    assert not masked[mask == 0].any()
    assert masked[mask == 1].any()


def test_other_output_formats(stored, tmp_path):
    run("--input", stored, "--output", tmp_path / "labels.zarr")
    for name in ("labels.h5", "labels.tif"):
        run("--input", stored, "--output", tmp_path / "other" / name) if (tmp_path / "other").mkdir(
            exist_ok=True
        ) else None
        run("--input", stored, "--output", tmp_path / "other" / name, "--overwrite")
        np.testing.assert_array_equal(
            open_volume(tmp_path / "other" / name)[...], open_volume(tmp_path / "labels.zarr")[...]
        )


def test_levels_for_viewers(tmp_path):
    stored = save(tmp_path / "affinities.zarr", affinities_of((12, 150, 140)))
    run("--input", stored, "--output", tmp_path / "labels.zarr", "--pyramid")
    assert len(level_shapes(str(tmp_path / "labels.zarr"))) > 1
    with pytest.raises(UserError, match="--pyramid"):
        run("--input", stored, "--output", tmp_path / "labels.h5", "--pyramid")


def test_small_fragments_give_way(stored, tmp_path):
    values = affinities_of()
    mask = np.ones(values.shape[1:], np.uint8)
    mask[:, :5] = 0
    save_volume(tmp_path / "mask.zarr", mask, voxel_size=(40, 4, 4))
    run("--input", stored, "--output", tmp_path / "labels.zarr", "--regrow", "40", "--mask", tmp_path / "mask.zarr")
    fragments = open_volume(tmp_path / "labels.fragments.zarr")[...]
    assert ((fragments > 0) == mask).all()
    assert fragments.max() < watershed(values, 0.0001, 0.9999).max()
    config = affinity_unet.Config(segmentation=affinity_unet.Segmentation(regrow=40, threshold=0.4))
    run("--input", stored, "--output", tmp_path / "all.zarr", "--regrow", "40", "--threshold", "0.4")
    whole = open_volume(tmp_path / "all.zarr")[...]
    np.testing.assert_array_equal(whole, affinity_unet.decode(config, {"affinities": values}))
    assert (whole > 0).all()


def test_mutex_watershed_of_all_offsets(tmp_path):
    near = affinities_of()
    # Stored out of order: the nearest come first for the algorithm.
    offsets = ((0, -4, 0), *NEAREST, (0, 0, -4))
    values = np.stack([near[1] // 2, *near, near[2] // 2])
    stored = save(tmp_path / "far.zarr", values, offsets)
    run("--input", stored, "--output", tmp_path / "a.zarr", "--fragments", "mutex", "--threshold", "0")
    order = [1, 2, 3, 0, 4]
    wanted = mutex_watershed(values[order], [offsets[channel] for channel in order])
    np.testing.assert_array_equal(open_volume(tmp_path / "a.zarr")[...], wanted)
    config = affinity_unet.Config(
        offsets=tuple(offsets[channel] for channel in order),
        predicted="all",
        segmentation=affinity_unet.Segmentation(fragments="mutex", regrow=30, threshold=0.3),
    )
    run("--input", stored, "--output", tmp_path / "b.zarr", "--fragments", "mutex", "--regrow", 30, "--threshold", 0.3)
    decoded = affinity_unet.decode(config, {"affinities": values[order]})
    np.testing.assert_array_equal(open_volume(tmp_path / "b.zarr")[...], decoded)


def test_system_decoding_and_settings_from_a_config(stored, tmp_path):
    config = pathlib.Path(__file__).parent.parent / "configs" / "smoke" / "affinity_unet.py"
    run(
        "--input",
        stored,
        "--output",
        tmp_path / "a.zarr",
        "--config",
        config,
        "--config.system.segmentation.threshold=0.3",
    )
    assert open_volume(tmp_path / "a.zarr").attributes["threshold"] == 0.3
    run("--input", stored, "--output", tmp_path / "b.zarr", "--config", config, "--method", "system")
    np.testing.assert_array_equal(open_volume(tmp_path / "b.zarr")[...], expected(affinities_of(), 0.5))


def test_bad_input_is_one_line_and_leaves_nothing(stored, tmp_path):
    values = affinities_of()
    save_volume(tmp_path / "bare.zarr", values, voxel_size=(1, 1, 1))
    save_volume(tmp_path / "three.zarr", values[0], voxel_size=(1, 1, 1), attributes={"offsets": [[-1, 0, 0]]})
    save(tmp_path / "far.zarr", values, offsets=((-1, 0, 0), (0, -1, 0), (0, 0, -5)))
    broken = affinities_of(dtype=np.float32)
    broken[1, 3, 4, 5] = np.nan
    save(tmp_path / "nan.zarr", broken)
    save_volume(tmp_path / "labels.zarr", values[0].astype(np.uint32), voxel_size=(1, 1, 1))
    save_volume(tmp_path / "mask.zarr", values[0, :5], voxel_size=(1, 1, 1))
    (tmp_path / "file").write_text("")
    before = sorted(path.name for path in tmp_path.iterdir())
    cases = [
        (["--input", tmp_path / "no.zarr"], "does not exist"),
        (["--input", tmp_path / "bare.zarr"], "offsets"),
        (["--input", tmp_path / "three.zarr"], "lack"),
        (["--input", tmp_path / "far.zarr"], "lack"),
        (["--input", tmp_path / "nan.zarr"], "NaN"),
        (["--input", stored, "--threshold", "1.5"], "--threshold"),
        (["--input", stored, "--thresholds", "a,b"], "--thresholds"),
        (["--input", stored, "--score", "median"], "--score"),
        (["--input", stored, "--low", "0.9", "--high", "0.1"], "low"),
        (["--input", stored, "--regrow", "-1"], "--regrow"),
        (["--input", stored, "--fragments", "mutex"], "predicted=all"),
        (["--input", stored, "--fragments", "mutex", "--segment-block", "9,9,9"], "--fragments watershed"),
        (["--input", stored, "--config.system.predicted=all"], "--checkpoint"),
        (["--input", stored, "--regrow", "9", "--segment-block", "9,9,9"], "--regrow 0"),
        (["--input", stored, "--regrow", "9", "--executor", "stripes"], "--regrow 0"),
        (["--input", stored, "--regrow", "9", "--memory-whole", "1KB"], "--regrow 0"),
        (["--input", stored, "--mask", tmp_path / "mask.zarr"], "shape"),
        (["--input", stored, "--method", "system"], "--config"),
        (["--threshold", "0.5"], "merge history"),
    ]
    for arguments, text in cases:
        with pytest.raises(UserError) as caught:
            run(*arguments, "--output", tmp_path / "out.zarr")
        assert text in str(caught.value), arguments
        assert "\n" not in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == before, arguments
    with pytest.raises(UserError, match=r"out\.fragments|file"):
        run("--input", stored, "--output", tmp_path / "file" / "out.zarr")


def test_exit_code_and_single_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.run(segment.main, ["--input", str(tmp_path / "no.zarr"), "--output", str(tmp_path / "out.zarr")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_history(stored, tmp_path):
    run("--input", stored, "--output", tmp_path / "labels.zarr")
    path = tmp_path / "labels.merges.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="not a merge history"):
        run("--output", tmp_path / "labels.zarr", "--threshold", "0.3")


def test_history_says_how_it_was_made(stored, tmp_path):
    run("--input", stored, "--output", tmp_path / "labels.zarr")
    with np.load(tmp_path / "labels.merges.npz") as file:
        plan = json.loads(str(file["plan"]))
    assert plan["score"] == "mean"
    assert plan["affinities"] == stored

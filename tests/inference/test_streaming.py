"""Streams: slabs are written once and whole, a killed run goes on to the same result, wrong outputs are refused."""

import numpy as np
import pytest

from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.ledger import read_plan
from emjax.inference.predictor import Window
from emjax.inference.segmentation import Places
from emjax.inference.streaming import Run, draw_overlays, stream, windowed
from emjax.status import main as status
from emjax.systems.protocol import Layer, Slab, Streaming

SHAPE = (11, 30, 40)
SLAB = 4
GREY = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)


def running_sum(image, read, stop_before=None):
    """Backward the sum of all slices so far into a layer, forward the sum of both ways: a state in either direction."""
    parts = [range(z, min(z + SLAB, SHAPE[0])) for z in range(0, SHAPE[0], SLAB)]
    steps = [(-1, part) for part in reversed(parts)] + [(1, part) for part in parts]

    def run(written, state):
        done = 0 if state is None else state["done"]
        total = np.zeros(SHAPE[1:], np.uint32) if state is None else state["total"].copy()
        for number, (direction, part) in enumerate(steps[done:], done):
            if number == stop_before:
                raise KeyboardInterrupt
            if number == len(parts):
                total = np.zeros_like(total)
            sums = np.zeros((len(part), *SHAPE[1:]), np.uint32)
            read.append(part)
            grey = image[part.start : part.stop]
            for k in range(len(part))[::direction]:
                total = total + grey[k]
                sums[k] = total
            if direction > 0:
                sums += written["behind"][part.start : part.stop]
                grey = np.stack([grey, 255 - grey])
                arrays = [("labels", part.start, sums), ("grey", part.start, grey)]
            else:
                arrays = [("behind", part.start, sums)]
            yield Slab(arrays, {"done": number + 1, "total": total, "nothing": None, "list": [1.5]})

    layers = {
        "labels": Layer(dtype=np.uint32),
        "behind": Layer(dtype=np.uint32, kept=False),
        "grey": Layer(dtype=np.uint8, channels=2, attributes={"scale": 1 / 255}),
    }
    return Streaming(run=run, steps=len(steps), layers=layers, slab=SLAB)


EXPECTED = np.cumsum(GREY, 0, np.uint32) + np.cumsum(GREY[::-1], 0, np.uint32)[::-1]


@pytest.fixture
def start(tmp_path):
    save_volume(tmp_path / "raw.zarr", GREY, voxel_size=(40, 4, 4), offset=(80, 0, 0))
    image = open_volume(tmp_path / "raw.zarr")

    def go(name="labels.zarr", stop_before=None, overwrite=False, content=None, **options):
        read: list[range] = []
        streaming = running_sum(image, read, stop_before)
        places = Places(str(tmp_path / name))
        try:
            stream(Run(streaming, image, places, content or {"input": "raw"}, overwrite, keep_every=-1.0), **options)
        finally:
            go.read = len(read)
        return open_volume(tmp_path / name)

    return go


@pytest.mark.parametrize("name", ["labels.zarr", "labels.h5", "labels.n5", "labels.tif"])
def test_layers_are_written_and_work_is_removed(start, tmp_path, name):
    labels = start(name, overlays=3)
    np.testing.assert_array_equal(labels[...], EXPECTED)
    assert (labels.voxel_size, labels.offset) == ((40, 4, 4), (80, 0, 0))
    grey = open_volume(tmp_path / "labels.prediction.zarr")
    np.testing.assert_array_equal(grey[...], np.stack([GREY, 255 - GREY]))
    assert grey.attributes["scale"] == 1 / 255
    assert grey.shards[1] == SLAB
    assert len(list((tmp_path / "labels.overlays").iterdir())) == 3
    assert not (tmp_path / "labels.work").exists()


def test_levels_for_viewers(start, tmp_path):
    start("labels.zarr", pyramid=True)
    assert (tmp_path / "labels.zarr").is_dir()


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("name", ["labels.zarr", "labels.h5"])
def test_a_killed_run_goes_on(start, tmp_path, name, stop, capsys):
    with pytest.raises(KeyboardInterrupt):
        start(name, stop_before=stop)
    if name.endswith("zarr"):
        with pytest.raises(UserError, match="not finished"):
            open_volume(tmp_path / name)
        assert status([str(tmp_path / name)]) == 0
        assert f"segment: {stop} of 6 blocks done" in capsys.readouterr().out
    np.testing.assert_array_equal(start(name)[...], EXPECTED)
    assert start.read == 6 - stop
    assert f"{stop} of 6 slabs were done before" in capsys.readouterr().out


def test_killed_before_and_after_the_slabs(start, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        start(stop_before=0)
    np.testing.assert_array_equal(start()[...], EXPECTED)

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("emjax.inference.streaming.draw_overlays", stopped)
    with pytest.raises(KeyboardInterrupt):
        start("b.zarr", overlays=2)
    monkeypatch.setattr("emjax.inference.streaming.draw_overlays", draw_overlays)
    np.testing.assert_array_equal(start("b.zarr", overlays=2)[...], EXPECTED)
    assert start.read == 0
    assert len(list((tmp_path / "b.overlays").iterdir())) == 2


def test_what_is_there(start, capsys):
    start()
    start()
    assert start.read == 0
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists; choose another output, or pass --overwrite"):
        start(content={"input": "another"})
    start(content={"input": "another"}, overwrite=True)
    assert start.read == 6


def test_another_plan_does_not_go_on(start, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(stop_before=3)
    with pytest.raises(UserError, match=r"another plan: input \(was raw, now other\)"):
        start(content={"input": "other"})
    np.testing.assert_array_equal(start(content={"input": "other"}, overwrite=True)[...], EXPECTED)
    assert start.read == 6


def test_a_run_that_fails_at_once_leaves_nothing(tmp_path):
    save_volume(tmp_path / "raw.zarr", GREY, voxel_size=(40, 4, 4))
    image = open_volume(tmp_path / "raw.zarr")

    def run(written, state):
        raise UserError("no")
        yield

    streaming = Streaming(run=run, steps=1, layers={"labels": Layer(dtype=np.uint32)}, slab=1)
    with pytest.raises(UserError, match="no"):
        stream(Run(streaming, image, Places(str(tmp_path / "labels.zarr")), {}))
    assert [path.name for path in tmp_path.iterdir()] == ["raw.zarr"]
    assert read_plan(str(tmp_path / "labels.work")) is None


def test_windows_are_applied_block_by_block(tmp_path):
    save_volume(tmp_path / "raw.zarr", GREY.astype(np.float32) * 2, voxel_size=(1, 1, 1))
    image = windowed(open_volume(tmp_path / "raw.zarr"), Window(0.0, 510.0))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[2:4], GREY[2:4] / 255, atol=1e-6)
    save_volume(tmp_path / "nan.zarr", np.full(SHAPE, np.nan, np.float32), voxel_size=(1, 1, 1))
    with pytest.raises(UserError, match="NaN"):
        windowed(open_volume(tmp_path / "nan.zarr"), Window(0.0, 1.0))[0]

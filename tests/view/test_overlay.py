import io

import numpy as np
import pytest
from PIL import Image

from emjax.metrics import contingency
from emjax.systems.protocol import Output
from emjax.view import overlay


def test_grey_of_every_type():
    ramp = np.arange(12).reshape(3, 4)
    assert (overlay.grey(ramp.astype(np.uint8))[..., 0] == ramp).all()
    assert overlay.grey(ramp > 5).max() == 255
    assert overlay.grey((ramp / 11).astype(np.float32)).max() == 255
    for dtype in (np.uint16, np.float32, np.int32):
        wide = overlay.grey((ramp * 100).astype(dtype))
        assert wide.dtype == np.uint8
        assert wide.min() == 0
        assert wide.max() == 255
    assert overlay.grey(np.full((2, 2), 7, np.uint16)).shape == (2, 2, 3)


def test_affinities_are_red_green_blue():
    section = np.stack([np.full((2, 2), value, np.float32) for value in (1.0, 0.5, 0.0)])
    np.testing.assert_array_equal(overlay.affinities_as_rgb(section)[0, 0], [255, 128, 0])
    assert overlay.affinities_as_rgb(np.ones((1, 2, 2), np.uint8)).shape == (2, 2, 3)


def test_colours_are_stable_distinct_and_bright():
    ids = np.arange(1, 500, dtype=np.uint64)
    made = overlay.colours(ids)
    np.testing.assert_array_equal(made, overlay.colours(ids.astype(np.uint32)))
    assert len(np.unique(made, axis=0)) > 490
    assert made.max(-1).min() >= 170
    assert (overlay.colours(np.zeros(3, int)) == 0).all()


def test_error_amounts_mark_what_spilled_and_what_broke():
    truth = np.ones((1, 10, 20), np.uint32)
    truth[..., 10:] = 2
    found = np.ones_like(truth)
    found[..., 12:] = 5
    found[0, :3, :2] = 9
    merge, split = overlay.error_amounts(found, truth, contingency(found, truth))
    # Segment 1 holds 94 voxels of object 1 and spilled into 20 of object 2.
    assert merge[0, 5, 5] == pytest.approx(20 / 114)
    assert merge[0, 5, 11] == pytest.approx(94 / 114)
    assert merge[0, 5, 15] == 0
    assert split[0, 0, 0] == pytest.approx(94 / 100)
    assert split[0, 5, 5] == pytest.approx(6 / 100)
    unlabelled = overlay.error_amounts(found, np.zeros_like(truth), contingency(found, truth))
    assert not unlabelled[0].any()
    empty = overlay.error_amounts(found, truth, contingency(found, np.zeros_like(truth)))
    assert not empty[1].any()


def test_errors_are_red_and_blue():
    merge, split = np.zeros((2, 2)), np.zeros((2, 2))
    merge[0, 0], split[1, 1] = 1, 1
    picture = overlay.errors_over(None, merge, split).astype(int)
    assert picture[0, 0, 0] > picture[0, 0, 2] + 80
    assert picture[1, 1, 2] > picture[1, 1, 0] + 80
    assert len(set(picture[0, 1])) == 1


def test_panels():
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 255, (5, 40, 30), dtype=np.uint8)
    labels, truth = rng.integers(0, 4, (2, 5, 40, 30))
    whole = overlay.panel(raw, rng.random((3, 5, 40, 30)), labels, truth, contingency(labels, truth))
    assert whole.dtype == np.uint8
    assert whole.shape[1] > 5 * 30
    assert overlay.panel(raw).shape[1] < 100
    outputs = {
        "affinities": (Output(kind="affinities", channels=3), rng.random((5, 40, 30, 3), np.float32)),
        "foreground": (Output(kind="probability", channels=1), rng.random((5, 40, 30, 1), np.float32)),
        "ids": (Output(kind="instances", channels=1), rng.integers(0, 5, (5, 40, 30, 1))),
    }
    panel = overlay.training_panel(raw.astype(np.float32) / 255, outputs, truth.astype(np.int32) - 1)
    assert panel.shape[1] > 5 * 160


def test_png_is_exact_and_small():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (16, 20, 3), dtype=np.uint8)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(overlay.png(picture)))), picture)
    grey = overlay.grey(picture[..., 0])
    assert Image.open(io.BytesIO(overlay.png(grey, small=True))).mode == "L"
    assert Image.open(io.BytesIO(overlay.png(picture, small=True))).mode == "P"


def test_scaling_and_windows():
    picture = np.zeros((10, 20, 3), np.uint8)
    assert overlay.scaled(picture, 40).shape == (20, 40, 3)
    assert overlay.scaled(picture, 10).shape == (5, 10, 3)
    assert overlay.crop_about((0, 99), (5, 100, 100), 20) == (slice(0, 20), slice(80, 100))
    assert overlay.crop_about((3, 3), (5, 10, 8), 20) == (slice(0, 10), slice(0, 8))

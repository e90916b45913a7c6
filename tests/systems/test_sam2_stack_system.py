"""A stack from prompts to labels with a small network: both ways, groups, pieces, corrections, errors."""

import dataclasses

import numpy as np
import pytest
from models.sam2.small_sam2 import network

from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.models.sam2.stack import BACKWARD
from emjax.systems import sam2_stack
from emjax.systems.sam2_prompts import Prompt
from emjax.systems.sam2_session import ImagePredictor, Session, fill_holes, points_for_network
from emjax.systems.sam2_stack import Config, Tracker, frame_of, segment_stack, validate

SHAPE = (7, 50, 70)
GREY = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
CONFIG = Config(input_size=(64, 64), batch=3, objects=2, holes=0, prompts="unused")


def disc(y, x, radius=12):
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    return (rows - y) ** 2 + (columns - x) ** 2 < radius**2


PROMPTS = [
    Prompt(1, 2, mask=lambda: disc(15, 15)),
    Prompt(4, 4, mask=lambda: disc(30, 50)),
    Prompt(5, 4, np.float32([[20, 30]]), np.int32([1])),
]


def labels_of(config, prompts=PROMPTS):
    tracker = Tracker(config, network(), lambda a, b: GREY[a:b], SHAPE, prompts)
    found = np.zeros(SHAPE, np.uint32)
    written = []
    tracker.labels(lambda z, labels: (written.append(z), found.__setitem__(z, labels)))
    assert sorted(written) == list(range(SHAPE[0]))
    return found


@pytest.fixture(scope="module")
def whole():
    return labels_of(CONFIG)


def test_every_slice_is_written_once_with_object_ids(whole):
    assert set(np.unique(whole)) <= {0, 1, 4, 5}
    prompted = disc(15, 15, 9) & ~disc(30, 50)
    assert np.isin(whole[2][prompted], (1, 4, 5)).all()


def test_batches_and_groups_do_not_matter(whole):
    for changes in ({"batch": 5}, {"objects": 3}, {"batch": 1, "objects": 1}):
        assert (labels_of(dataclasses.replace(CONFIG, **changes)) != whole).mean() < 1e-3


def test_padded_frames_keep_pixels():
    frame = frame_of(dataclasses.replace(CONFIG, input_size=(0, 0)), SHAPE[1:])
    assert frame.size == (64, 96)
    assert frame.mask(disc(20, 30))[:50, :70].sum() == disc(20, 30).sum()
    assert frame.fit(GREY[:1]).shape == (1, 64, 96)
    assert labels_of(dataclasses.replace(CONFIG, input_size=(0, 0))).shape == SHAPE


def test_written_volume_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(sam2_stack, "network", lambda config: network())
    save_volume(tmp_path / "raw.h5", GREY, voxel_size=(40, 4, 4), offset=(80, 0, 0))
    (tmp_path / "p.json").write_text('{"prompts": [{"object": 3, "z": 1, "points": [[20, 30]]}]}')
    config = dataclasses.replace(CONFIG, prompts=str(tmp_path / "p.json"), overlays=2)
    volume = open_volume(tmp_path / "raw.h5")
    counts = segment_stack(config, volume, str(tmp_path / "out.zarr"), pictures=tmp_path / "pictures")
    out = open_volume(tmp_path / "out.zarr")
    assert (out.shape, out.voxel_size, out.offset) == (SHAPE, (40, 4, 4), (80, 0, 0))
    assert counts == {"3": int((out[...] == 3).sum())}
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_sixteen_bits_need_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(sam2_stack, "network", lambda config: network())
    save_volume(tmp_path / "raw.h5", GREY.astype(np.uint16) * 100, voxel_size=(40, 4, 4))
    (tmp_path / "p.json").write_text('{"prompts": [{"object": 3, "z": 1, "points": [[20, 30]]}]}')
    config = dataclasses.replace(CONFIG, prompts=str(tmp_path / "p.json"))
    volume = open_volume(tmp_path / "raw.h5")
    with pytest.raises(UserError, match=r"uint16: SAM 2 needs 8 bits.*--window"):
        segment_stack(config, volume, str(tmp_path / "out.zarr"))
    assert not (tmp_path / "out.zarr").exists()
    segment_stack(config, volume, str(tmp_path / "out.zarr"), window=(0, 25500))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": (100, 64)}, "multiples of 32"),
        ({"input_size": (0, 64)}, "multiples of 32"),
        ({"batch": 0}, "batch 0"),
        ({"holes": -1}, "holes -1"),
    ],
)
def test_wrong_configuration(changes, message):
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(CONFIG, **changes))


def test_no_prompts():
    with pytest.raises(UserError, match="no prompts"):
        labels_of(CONFIG, [])
    with pytest.raises(UserError, match="no prompts are given"):
        sam2_stack.prompts_of(dataclasses.replace(CONFIG, prompts=""), SHAPE)


def session(**options):
    return Session(network(), lambda z: GREY[z, :32, :64], SHAPE[0], (32, 64), (32, 64), holes=0, **options)


@pytest.mark.parametrize("sticks", [True, False])
def test_corrections_stick_unless_told(sticks):
    with session(corrections_stick=sticks) as run:
        run.add_points(1, 0, [[16, 20]], [1])
        dict(run.propagate())
        corrected = run.add_points(1, 3, [[8, 50], [25, 10]], [1, 0])
        after = dict(run.propagate())
        assert np.allclose(after[3], corrected, atol=1e-3) == sticks


def test_session_equals_the_streamed_run():
    with Session(network(), lambda z: GREY[z, :32, :64], SHAPE[0], (32, 64), holes=0) as run:
        run.add_points(5, 4, [[20, 30]], [1])
        found = dict(run.propagate()) | dict(run.propagate(3, BACKWARD))
    prompts = [Prompt(5, 4, np.float32([[20, 30]]), np.int32([1]))]
    shape = (SHAPE[0], 32, 64)
    config = dataclasses.replace(CONFIG, input_size=(32, 64))
    tracker = Tracker(config, network(), lambda a, b: GREY[a:b, :32, :64], shape, prompts)
    labels = np.zeros(shape, np.uint32)
    tracker.labels(lambda z, plane: labels.__setitem__(z, plane))
    assert sorted(found) == list(range(SHAPE[0]))
    assert np.mean([((found[z][0] > 0) != (labels[z] == 5)).mean() for z in found]) < 0.02


def test_session_errors():
    with session() as run:
        with pytest.raises(UserError, match="no prompt is given for any object"):
            next(run.propagate())
        with pytest.raises(UserError, match="slice 9; the stack has slices 0 to 6"):
            run.add_points(1, 9, [[1, 1]], [1])
        with pytest.raises(UserError, match="neither a point nor a box"):
            run.add_points(1, 0, [], [])
        with pytest.raises(UserError, match="slices are"):
            run.add_mask(1, 0, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="multiples of 32"):
        Session(network(), lambda z: GREY[z], 7, (50, 70))


def test_image_predictor_refines_its_own_mask():
    predictor = ImagePredictor(network(), GREY[0], (64, 96))
    masks, ious, low = predictor.predict([[20, 30]], [1])
    assert masks.shape == (3, 50, 70)
    assert low.shape == (3, 16, 24)
    again, _, _ = predictor.predict([[20, 30]], [1], mask=low[ious.argmax()], several=False)
    assert again.shape == (1, 50, 70)
    assert np.abs(low).max() <= 32
    with pytest.raises(UserError, match="no prompt"):
        predictor.predict()


def test_small_holes_are_filled_and_large_ones_not():
    logits = np.full((1, 12, 12), 3.0, np.float32)
    logits[0, 2, 2] = logits[0, 3, 3] = -1
    logits[0, 6:10, 6:10] = -1
    filled = fill_holes(logits, 8)
    assert filled[0, 2, 2] == filled[0, 3, 3] == np.float32(0.1)
    assert (filled[0, 6:10, 6:10] == -1).all()
    assert np.array_equal(fill_holes(logits, 0), logits)


def test_boxes_go_ahead_of_clicks_as_x_y():
    points, labels = points_for_network([[10, 20]], [1], [0, 5, 30, 40], (64, 128), (32, 64))
    assert points.tolist() == [[[10, 0], [80, 60], [40, 20]]]
    assert labels.tolist() == [[2, 3, 1]]

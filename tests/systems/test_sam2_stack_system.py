"""A stack from prompts to labels with a small network: both ways, groups, pieces, corrections, errors."""

import dataclasses
import functools
import pathlib

import numpy as np
import pytest
from models.sam2 import small_sam2
from PIL import Image

from emjax import segment
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.inference import streaming
from emjax.models.sam2.stack import BACKWARD
from emjax.systems import sam2_stack
from emjax.systems.sam2_prompts import Prompt
from emjax.systems.sam2_session import ImagePredictor, Session, fill_holes, points_for_network
from emjax.systems.sam2_stack import Config, Tracker, frame_of, validate
from emjax.weights.files import write_safetensors

# One network, so that its steps are traced once.
network = functools.cache(small_sam2.network)
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


def tracker_of(config, prompts=PROMPTS, grey=GREY):
    return Tracker(config, network(), lambda a, b: grey[a:b], grey.shape, prompts)


def labels_of(config, prompts=PROMPTS, grey=GREY):
    layers = {"labels": np.zeros(grey.shape, np.uint32)}
    layers |= {"logit": np.zeros(grey.shape, np.float32), "owner": np.zeros(grey.shape, np.int32)}
    written = []
    for slab in tracker_of(config, prompts, grey).slabs(layers):
        for name, z, values in slab.arrays:
            layers[name][z : z + len(values)] = values
            written += range(z, z + len(values)) if name == "labels" else []
    assert sorted(written) == list(range(grey.shape[0]))
    return layers["labels"]


@pytest.fixture(scope="module")
def whole():
    return labels_of(CONFIG)


def test_every_slice_is_written_once_with_object_ids(whole):
    assert set(np.unique(whole)) <= {0, 1, 4, 5}
    prompted = disc(15, 15, 9) & ~disc(30, 50)
    assert np.isin(whole[2][prompted], (1, 4, 5)).all()


@pytest.mark.slow
def test_batches_and_groups_do_not_matter(whole):
    for changes in ({"batch": 5}, {"objects": 3}, {"batch": 1, "objects": 1}):
        assert (labels_of(dataclasses.replace(CONFIG, **changes)) != whole).mean() < 1e-3


def test_padded_frames_keep_pixels():
    frame = frame_of(dataclasses.replace(CONFIG, input_size=(0, 0)), SHAPE[1:])
    assert frame.size == (64, 96)
    assert frame.mask(disc(20, 30))[:50, :70].sum() == disc(20, 30).sum()
    assert frame.fit(GREY[:1]).shape == (1, 64, 96)
    assert labels_of(dataclasses.replace(CONFIG, input_size=(0, 0))).shape == SHAPE


@pytest.fixture
def stack(tmp_path, monkeypatch):
    """A command that follows one object and two masks of a layer through a stored stack."""
    monkeypatch.setattr(sam2_stack, "network", lambda config, collections: network())
    layer = np.zeros(SHAPE, np.uint32)
    layer[1][disc(15, 15)] = 7
    save_volume(tmp_path / "raw.h5", GREY, voxel_size=(40, 4, 4), offset=(80, 0, 0))
    save_volume(tmp_path / "layer.h5", layer, voxel_size=(40, 4, 4))
    (tmp_path / "p.json").write_text(
        '{"prompts": [{"object": 3, "z": 4, "points": [[20, 30]]}, '
        f'{{"object": 5, "z": 1, "mask": "{tmp_path}/layer.h5:main", "id": 7}}]}}'
    )

    def command(name, *more, source="raw.h5", prompts="p.json"):
        fields = {"prompts": tmp_path / prompts, "input_size": "(64,64)", "batch": 3, "holes": 0}
        config = pathlib.Path(__file__).parents[2] / "configs" / "sam2" / "stack.py"
        given = [f"--config.system.{key}={value}" for key, value in fields.items()]
        paths = ["--input", str(tmp_path / source), "--output", str(tmp_path / name)]
        return segment.main(["--config", f"{config}:debug", *given, *paths, *map(str, more)])

    return command


def test_command_writes_labels_and_pictures(stack, tmp_path, capsys):
    assert stack("out.zarr", "--overlays", 2, "--pyramid") == 0
    out = open_volume(tmp_path / "out.zarr")
    assert (out.shape, out.voxel_size, out.offset) == (SHAPE, (40, 4, 4), (80, 0, 0))
    assert set(np.unique(out[...])) <= {0, 3, 5}
    pictures = sorted((tmp_path / "out.overlays").iterdir())
    assert [path.name for path in pictures] == ["slice_00000.png", "slice_00006.png"]
    assert Image.open(pictures[0]).size == (70, 50)
    assert not (tmp_path / "out.work").exists()
    stack("out.h5", "--overlays", 0)
    np.testing.assert_array_equal(open_volume(tmp_path / "out.h5")[...], out[...])
    assert not (tmp_path / "out.overlays" / "x").exists()
    stack("out.zarr")
    assert "already finished" in capsys.readouterr().out
    stack("layer.zarr", prompts="layer.h5")
    assert set(np.unique(open_volume(tmp_path / "layer.zarr")[...])) <= {0, 7}


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_run_goes_on_to_the_same_labels(stack, tmp_path, monkeypatch, capsys, after):
    stack("whole.zarr", "--overlays", 0)
    monkeypatch.setattr(segment, "Run", functools.partial(streaming.Run, keep_every=-1.0))
    track, calls = Tracker.track, []

    def killed(self, memories, part, direction):
        calls.append((part, direction))
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return track(self, memories, part, direction)

    monkeypatch.setattr(Tracker, "track", killed)
    with pytest.raises(KeyboardInterrupt):
        stack("out.zarr")
    with pytest.raises(UserError, match="not finished"):
        open_volume(tmp_path / "out.zarr")
    stack("out.zarr")
    assert f"{after} of 5 slabs were done before" in capsys.readouterr().out
    assert len(calls) == 5 + 1
    np.testing.assert_array_equal(open_volume(tmp_path / "out.zarr")[...], open_volume(tmp_path / "whole.zarr")[...])


def test_only_the_same_run_goes_on(stack, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "track", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        stack("out.zarr")
    with pytest.raises(UserError, match="begun with another plan: configuration"):
        stack("out.zarr", "--config.system.holes=3")
    (tmp_path / "p.json").write_text((tmp_path / "p.json").read_text() + " ")
    with pytest.raises(UserError, match="begun with another plan: sources"):
        stack("out.zarr")


def test_sixteen_bits_need_a_window(stack, tmp_path):
    save_volume(tmp_path / "deep.h5", GREY.astype(np.uint16) * 100, voxel_size=(40, 4, 4), offset=(80, 0, 0))
    with pytest.raises(UserError, match=r"uint16, and nothing says which grey values.*--window"):
        stack("out.zarr", source="deep.h5")
    assert not (tmp_path / "out.zarr").exists()
    stack("deep.zarr", "--window", "0,25500", source="deep.h5")
    stack("out.zarr")
    same = open_volume(tmp_path / "deep.zarr")[...] == open_volume(tmp_path / "out.zarr")[...]
    assert same.mean() > 0.999


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--threshold", "0.3"], "--threshold is not for"),
        (["--config.system.input_size=(100,64)"], "multiples of 32"),
        (["--config.system.prompts="], "no prompts are given"),
        (["--config.system.prompts=none.json"], "are not there"),
        (["--config.system.checkpoint=none.pt"], "is not there"),
        (["--config.system.checkpoint=other.safetensors"], "is no checkpoint of sam2"),
        (["--input", "channels.h5"], "4 axes czyx .*, expected 3 axes zyx"),
        (["--bbox", "0:4,:,:"], r"the stack is \(4, 50, 70\)"),
    ],
)
def test_wrong_use_of_the_command_leaves_nothing(stack, tmp_path, monkeypatch, more, message):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    save_volume("channels.h5", np.stack([GREY] * 3), voxel_size=(40, 4, 4))
    write_safetensors(tmp_path / "other.safetensors", {"fc.weight": np.zeros((2, 2), np.float32)}, {})
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(UserError, match=message):
        stack("out.zarr", *more)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


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
    labels = labels_of(dataclasses.replace(CONFIG, input_size=(32, 64)), prompts, GREY[:, :32, :64])
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

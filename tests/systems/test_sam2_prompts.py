"""Prompts: what a file or a label layer may hold, and one clear error for all else."""

import json

import numpy as np
import pytest

from emjax.data.volume import save_volume
from emjax.errors import UserError
from emjax.systems.sam2_prompts import from_layer, read_json

SHAPE = (5, 40, 60)


def write(path, prompts):
    path.write_text(json.dumps({"prompts": prompts}))
    return path


def test_points_and_boxes(tmp_path):
    path = write(
        tmp_path / "p.json",
        [
            {"object": 2, "z": 4, "points": [[1, 2], [30, 50]], "labels": [1, 0]},
            {"object": 1, "z": 0, "box": [3, 4, 20, 30], "points": [[5, 6]]},
        ],
    )
    first, second = read_json(path, SHAPE)
    assert (first.number, first.z, first.points.tolist(), first.labels.tolist()) == (2, 4, [[1, 2], [30, 50]], [1, 0])
    assert second.box.tolist() == [3, 4, 20, 30]
    assert second.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"object": 1, "z": 5, "points": [[1, 2]]}, "slice 5; the stack has slices 0 to 4"),
        ({"object": 1, "z": 0, "points": [[1, 61]]}, "row 1, column 61; slices have 40 rows"),
        ({"object": 1, "z": 0, "points": []}, "neither a point nor a box"),
        ({"object": 1, "z": 0, "points": [[1, 2]], "labels": [1, 1]}, "1 points and 2 labels"),
        ({"object": 1, "z": 0, "points": [[1, 2]], "labels": [3]}, "expected 1"),
        ({"object": 1, "z": 0, "box": [20, 4, 3, 30]}, "smaller first"),
        ({"object": 0, "z": 0, "points": [[1, 2]]}, "numbered from 1"),
        ({"object": 1, "z": 0, "point": [[1, 2]]}, "did you mean 'points'"),
        ({"object": 1, "z": "0", "points": [[1, 2]]}, "expected a whole number"),
        ({"object": 1, "z": 0, "points": [[1, 2, 3]]}, "2 numbers each"),
        ({"object": 1, "z": 0, "points": [[1, 2, 3], [4, 5, 6]]}, "2 numbers each"),
        ({"object": 1, "z": 0, "points": [[1, 2], [3]]}, "2 numbers each"),
        ("click", "expected an object"),
    ],
)
def test_wrong_prompt(tmp_path, entry, message):
    with pytest.raises(UserError, match=message):
        read_json(write(tmp_path / "p.json", [entry]), SHAPE)


def test_wrong_files(tmp_path):
    with pytest.raises(UserError, match="has no prompts"):
        read_json(write(tmp_path / "p.json", []), SHAPE)
    with pytest.raises(UserError, match="twice on slice 0"):
        read_json(write(tmp_path / "p.json", [{"object": 1, "z": 0, "points": [[1, 2]]}] * 2), SHAPE)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_json(tmp_path / "bad.json", SHAPE)
    with pytest.raises(UserError, match="are not there"):
        read_json(tmp_path / "none.json", SHAPE)


@pytest.fixture
def layer(tmp_path):
    labels = np.zeros(SHAPE, np.uint32)
    labels[1, :10, :10] = 7
    labels[3, :20, :20] = 7
    labels[2, 30:, 30:] = 9
    labels[4, 0, :5] = 9
    save_volume(tmp_path / "labels.h5", labels, voxel_size=(40, 4, 4))
    return str(tmp_path / "labels.h5")


def test_objects_of_a_layer(layer):
    prompts = from_layer(layer, SHAPE)
    assert [(p.number, p.z) for p in prompts] == [(7, 3), (9, 2)]
    assert int(prompts[0].mask().sum()) == 400
    assert [(p.number, p.z) for p in from_layer(layer, SHAPE, (1, 3))] == [(7, 1), (7, 3)]


def test_masks_of_a_layer(tmp_path, layer):
    entry = {"object": 3, "z": 2, "mask": layer, "id": 9}
    (prompt,) = read_json(write(tmp_path / "p.json", [entry]), SHAPE)
    assert int(prompt.mask().sum()) == 300
    for change, message in (
        ({"id": 7}, "prompt 0: mask .* has no pixel of id 7 on slice 2"),
        ({"z": 5}, "slice 5; the stack has slices 0 to 4"),
        ({"points": [[1, 2]]}, "has a mask and points"),
        ({"mask": str(tmp_path / "none.h5")}, "none.h5"),
    ):
        with pytest.raises(UserError, match=message):
            read_json(write(tmp_path / "p.json", [entry | change]), SHAPE)
    with pytest.raises(UserError, match=r"is \(5, 40, 60\); the stack is \(5, 40, 61\)"):
        read_json(write(tmp_path / "p.json", [entry]), (5, 40, 61))


def test_wrong_layers(layer):
    with pytest.raises(UserError, match="the stack is"):
        from_layer(layer, (5, 40, 61))
    with pytest.raises(UserError, match=r"slices \[8\] are outside"):
        from_layer(layer, SHAPE, (8,))
    with pytest.raises(UserError, match="has no prompts"):
        from_layer(layer, SHAPE, (0,))

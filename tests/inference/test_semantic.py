import json

import numpy as np
import pytest

from emjax import evaluate
from emjax.data.volume import open_volume, save_volume
from emjax.errors import UserError
from emjax.inference.semantic import ANY, SemanticClass, classes_in, evaluate_classes, parse_classes
from emjax.metrics import score_class

SIZE = (40.0, 4.0, 4.0)


@pytest.fixture
def pair(tmp_path):
    """Predicted and true classes 1 to 3 of a small volume, and their volumes."""
    rng = np.random.default_rng(0)
    true = np.kron(rng.integers(0, 4, (4, 6, 6)), np.ones((2, 5, 5))).astype(np.uint32)
    predicted = np.where(rng.random(true.shape) < 0.1, 0, np.roll(true, 1, 2)).astype(np.uint32)
    for name, values in (("predicted", predicted), ("true", true), ("image", (true * 60).astype(np.uint8))):
        save_volume(tmp_path / f"{name}.zarr", values, voxel_size=SIZE)
    return predicted, true


def test_classes_are_parsed():
    assert parse_classes("mito=1, glia=2:7,psd=3:any") == (
        SemanticClass("mito", 1, 1),
        SemanticClass("glia", 2, 7),
        SemanticClass("psd", 3, ANY),
    )
    for wrong in ("mito", "=1", "mito=0", "mito=x", "mito=1,glia=1", "mito=1,mito=2"):
        with pytest.raises(UserError, match="--classes"):
            parse_classes(wrong)


def test_slabs_give_the_numbers_of_the_whole(pair, tmp_path):
    predicted, true = pair
    volumes = [open_volume(str(tmp_path / f"{name}.zarr")) for name in ("predicted", "true")]
    classes = classes_in(volumes[1])
    assert [one.true for one in classes] == [1, 2, 3]
    whole = evaluate_classes(*volumes, classes)
    for one in classes:
        wanted = score_class(predicted == one.predicted, true == one.true, voxel_size=SIZE)
        assert whole.scores[one.name] == wanted
    slabs = evaluate_classes(*volumes, classes, most_voxels=2000)
    assert "do not fit" in slabs.notes[0]
    assert slabs.scores["class 2"].slice_dice == whole.scores["class 2"].slice_dice
    assert np.isnan(slabs.scores["class 2"].hd95)


def test_the_command_prints_and_writes(pair, tmp_path, capsys):
    predicted, true = pair
    given = ["--segmentation", tmp_path / "predicted.zarr", "--labels", tmp_path / "true.zarr"]
    written = ["--json", tmp_path / "n.json", "--report", tmp_path / "report", "--image", tmp_path / "image.zarr"]
    code = evaluate.main([str(text) for text in (*given, "--classes", "mito=1,none=9", *written)])
    assert code == 0
    out = capsys.readouterr()
    assert "mito" in out.out
    assert "class none is not in either" in out.err
    stored = json.loads((tmp_path / "n.json").read_text())
    assert stored["classes"]["mito"]["iou"] == pytest.approx(score_class(predicted == 1, true == 1).iou)
    assert stored["classes"]["none"]["ap"] is None
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<img") == 12
    assert "http" not in page.replace("http-equiv", "")


def test_object_ids_are_no_classes(tmp_path):
    ids = np.arange(2 * 10 * 10, dtype=np.uint32).reshape(2, 10, 10)
    save_volume(tmp_path / "ids.zarr", ids, voxel_size=SIZE)
    volume = open_volume(str(tmp_path / "ids.zarr"))
    with pytest.raises(UserError, match="objects rather than classes"):
        classes_in(volume)
    arguments = ["--segmentation", volume.spec, "--labels", volume.spec, "--semantic", "--fill"]
    with pytest.raises(UserError, match="--fill is for objects"):
        evaluate.main(arguments)

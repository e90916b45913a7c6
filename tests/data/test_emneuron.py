import numpy as np
import pytest
import tifffile

from emjax.data import emneuron
from emjax.data.pipeline import Sampler
from emjax.errors import UserError

TABLE = (
    emneuron.DataSet("J0126-sbem", "ZFinch", 2, (20.0, 9.0, 9.0), (1, 2), (emneuron.UNLABELLED,)),
    emneuron.DataSet("Kasthuri-atum", "Kasthuri", 1, (30.0, 6.0, 6.0), ignored_in_first=(121, 122)),
)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for one in TABLE:
        (tmp_path / "labeled" / one.folder).mkdir(parents=True)
        for number in range(one.volumes):
            stem = tmp_path / "labeled" / one.folder / str(number)
            tifffile.imwrite(f"{stem}.tif", rng.integers(0, 255, (8, 20, 20)).astype(np.uint8))
            tifffile.imwrite(f"{stem}_MaskIns.tif", rng.integers(0, 9, (8, 20, 20)).astype(np.uint32))
    out = tmp_path / "valid" / "OutofDistribution" / "Harris"
    copy = tmp_path / "valid" / "InDistribution" / "InDistribution" / "x"
    for place in (out, copy):
        place.mkdir(parents=True)
        for name in ("raw", "label", "label_0"):
            tifffile.imwrite(place / f"{name}.tif", np.zeros((2, 4, 4), np.uint8))
    return tmp_path


def test_published_table():
    assert sum(one.volumes for one in emneuron.LABELLED) == 76
    assert emneuron.data_set_of_volume(0) == (0, 0)
    assert emneuron.data_set_of_volume(33) == (1, 0)
    assert emneuron.data_set_of_volume(75) == (9, 3)
    assert emneuron.LABELLED[1].ignored_by(0) == (121, 122)
    assert emneuron.LABELLED[1].ignored_by(1) == ()


def test_prepare_writes_manifests_that_train(folder):
    lines = emneuron.prepare(folder)
    assert any("not there, left out" in line for line in lines)
    assert any("2 volumes, the published set has 33" in line for line in lines)
    made = emneuron.sources(folder / "labelled.json")
    assert [source.name for source in made] == ["J0126-sbem/0", "J0126-sbem/1", "Kasthuri-atum/0"]
    assert [source.weight for source in made] == [0.5, 0.5, 1.0]
    assert made[2].ignore_labels == (121, 122)
    assert made[0].z_steps == (1, 2)
    sampler = Sampler(made, (4, 16, 16))
    assert sampler.make(sampler.draw(np.random.default_rng(0)))["labels"].shape == (4, 16, 16)
    raws = emneuron.sources(folder / "unlabelled.json")
    assert [source.weight for source in raws] == [1.0, 1.0, 1.0]
    assert raws[0].labels is None
    tests = emneuron.read_manifest(folder / "validation.json")
    assert [(one.set, one.labels) for one in tests] == [
        ("OutofDistribution/Harris", "valid/OutofDistribution/Harris/label_0.tif")
    ]


def test_bad_folders_are_one_clear_line(folder):
    (folder / "labeled/J0126-sbem/1_MaskIns.tif").unlink()
    with pytest.raises(UserError, match=r"3 files, expected pairs .*; 1_MaskIns\.tif is missing"):
        emneuron.prepare(folder)
    tifffile.imwrite(folder / "labeled/J0126-sbem/1_MaskIns.tif", np.zeros((8, 20, 21), np.uint16))
    with pytest.raises(UserError, match=r"1\.tif has shape \(8, 20, 20\), 1_MaskIns\.tif \(8, 20, 21\)"):
        emneuron.prepare(folder)
    large = np.full((8, 20, 20), 70_000, np.uint32)
    tifffile.imwrite(folder / "labeled/J0126-sbem/1_MaskIns.tif", large)
    assert any("labels up to 70000" in line for line in emneuron.prepare(folder))
    with pytest.raises(UserError, match="none of the folders"):
        emneuron.scan_labelled(folder / "valid")
    with pytest.raises(UserError, match="no manifest there"):
        emneuron.sources(folder / "nothing.json")
    (folder / "odd.json").write_text('{"volumes": [{"set": "a", "rav": "x"}]}')
    with pytest.raises(UserError, match="unknown field 'rav'; did you mean 'raw'"):
        emneuron.sources(folder / "odd.json")

"""SAM4EM over whole volumes with the real network, and the table of its evaluation (``eval/sam4em.py``)."""

import dataclasses
import importlib

import h5py
import jax
import numpy as np
import pytest

from emjax import segment
from emjax.config import Data, Experiment, Train
from emjax.data.pipeline import Source
from emjax.data.volume import open_volume, save_volume
from emjax.models import sam4em as network
from emjax.models.functional import initialise
from emjax.models.layers.lora import LoRA
from emjax.models.sam2.config import HieraConfig
from emjax.systems import sam4em
from emjax.systems.protocol import Block
from emjax.systems.sam4em_stack import stored
from emjax.training.checkpoints import Checkpoints
from emjax.training.state import with_parameters

evaluation = importlib.import_module("eval.sam4em")

MODEL = network.Config(
    hiera=HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2)),
    lora=LoRA(rank=2),
    features=16,
    heads=2,
    inner=16,
    classes=2,
    memory=network.MemoryConfig(slots=2, dropout=0.0),
)
CLASSES = (sam4em.Class(name="mito", labels=(1,)), sam4em.Class(name="glia", labels=(2,)))
CONFIG = sam4em.Config(
    model=MODEL, classes=CLASSES, plan=Block(size=(2, 32, 32), stride=(2, 24, 24), blending="gaussian")
)


@pytest.fixture(scope="module")
def collections():
    return initialise(lambda rngs: sam4em.build(CONFIG, rngs), jax.random.key(0))


def image_of(shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def test_the_length_of_slabs_changes_nothing(collections):
    image = image_of((5, 32, 32))
    found = []
    for slab in (1, 2):
        config = dataclasses.replace(CONFIG, plan=dataclasses.replace(CONFIG.plan, size=(slab, 32, 32)))
        found.append(evaluation.stack_of(config, collections, image, None).probabilities())
    assert found[0].shape == (2, 5, 32, 32)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    # The last slice is not what it is alone: it knows those before.
    alone = evaluation.stack_of(CONFIG, collections, image[4:], None).probabilities()
    assert np.abs(alone[:, 0] - found[0][:, 4]).max() > 1e-4


def save_run(folder, source, collections):
    """A work directory with a checkpoint."""
    experiment = Experiment(
        system=CONFIG, data=Data(train=(source,), validation=(source,)), train=Train(steps=1, overlays=0)
    )
    checkpoints = Checkpoints(folder, experiment)
    checkpoints.save(1, with_parameters(experiment, collections), 1.0)
    checkpoints.close()


@pytest.mark.slow
def test_segment_writes_what_the_stack_says(collections, tmp_path):
    image = image_of((5, 32, 32))
    save_volume(tmp_path / "image.zarr", image, voxel_size=(50, 4, 4))
    save_run(tmp_path / "run", Source(raw=str(tmp_path / "image.zarr")), collections)
    given = ["--checkpoint", tmp_path / "run", "--input", tmp_path / "image.zarr", "--output", tmp_path / "labels.zarr"]
    assert segment.main([str(text) for text in (*given, "--overlays", 0)]) == 0
    wanted = stored(evaluation.stack_of(CONFIG, collections, image, None).probabilities())
    np.testing.assert_array_equal(open_volume(str(tmp_path / "labels.prediction.zarr"))[...], wanted)
    labels = open_volume(str(tmp_path / "labels.zarr"))[...]
    np.testing.assert_array_equal(labels, sam4em.decode(CONFIG, {"probabilities": wanted}))


@pytest.mark.slow
def test_table_of_a_run(collections, tmp_path, capsys):
    labels = np.zeros((3, 40, 32), np.uint32)
    labels[:, 4:20, 4:20], labels[1:, 25:35, 10:30] = 1, 2
    with h5py.File(tmp_path / "val.h5", "w") as file:
        file["raw"], file["labels"] = image_of(labels.shape), labels
        file.attrs["voxel_size_nm"] = (50.0, 4.0, 4.0)
    source = Source(raw=f"{tmp_path}/val.h5:raw", labels=f"{tmp_path}/val.h5:labels", name="val")
    save_run(tmp_path / "run", source, collections)
    output = tmp_path / "table.md"
    given = ["--run", str(tmp_path / "run"), "--first-mask", "empty", "--first-mask", "gt", "--blank"]
    assert evaluation.main([*given, "--output", str(output)]) == 0
    text = output.read_text()
    assert text.count("| mito |") == text.count("| glia |") == 2
    assert text.count("gt (leaks)") == 2
    assert "| run | val | memory alone |" in text
    assert "| run | val | mask of the slice before |" in text
    assert "IoU mito | IoU glia" in text
    config = dataclasses.replace(CONFIG, first_mask="empty")
    part = evaluation.part_of(config, source)
    scores = evaluation.scores_of(config, part, part.masks.astype(np.float32))
    assert all(one.iou == 1 for one in scores.values())

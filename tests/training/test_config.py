import pathlib

import pytest
from small_run import experiment

from emjax.config import Mesh, from_json, load, mesh_sizes, override, to_json, validate
from emjax.errors import UserError
from emjax.systems.protocol import Block

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if not path.name.startswith("_"))


@pytest.fixture
def config():
    return experiment("volume.h5")


def test_overrides_reach_every_depth(config):
    assert override(config, "optimizer.lr", "3e-4").optimizer.lr == 3e-4
    assert override(config, "optimizer.lr", "1").optimizer.lr == 1.0
    assert override(config, "system.model.widths", "(4,)").system.model.widths == (4,)
    assert override(config, "data.train.0.raw", "other.h5:raw").data.train[0].raw == "other.h5:raw"
    assert override(config, "mesh.fsdp", "true").mesh.fsdp is True
    assert override(config, "system.widen_borders", "none").system.widen_borders is None
    assert override(config, "system.plan.size", "(8, 8, 8)").system.plan.size == (8, 8, 8)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("optimizer.learning_rate", "1", "no field 'learning_rate'"),
        ("optimzer.lr", "1", "did you mean 'optimizer'"),
        ("optimizer.lr", "fast", "'fast' is not"),
        ("optimizer.name", "adan", "not one of"),
        ("data.crop", "(1, 2)", "2 values, 3 are expected"),
        ("data.train.3.raw", "x", "not an index below 1"),
        ("train.steps", "1.5", "1.5 is not"),
        ("train.steps", "true", "is not"),
    ],
)
def test_wrong_overrides_are_named(config, key, value, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        override(config, key, value)


def test_json_gives_the_same_configuration(config):
    assert from_json(to_json(config)) == config


def test_json_builds_only_our_classes():
    with pytest.raises(UserError, match="not one of emjax"):
        from_json('{"class": "subprocess.Popen", "args": "true"}')


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_file_loads_and_is_documented(path):
    text = path.read_text()
    assert "python -m emjax." in text.split('"""')[1], "the docstring states the command"
    try:
        config = load(str(path))
    except UserError as missing:
        # A configuration may need a manifest of downloaded data, and then says how to make it.
        if "python -m emjax.prepare" not in str(missing):
            raise
    else:
        assert from_json(to_json(config)) == config
    with pytest.raises(UserError, match=r"variant .* is unknown"):
        load(f"{path}:nosuchvariant")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__batch_size": 7}, "not divisible"),
        ({"data__batch_size": 8, "train__accumulate": 3}, "not divisible"),
        ({"data__train": ()}, "no training volume"),
        ({"mesh": Mesh(data=1, space=8, space_axis="z"), "data__crop": (12, 16, 16)}, "not divisible"),
        ({"mesh": Mesh(data=3)}, "does not fit 8 devices"),
        ({"system__plan": Block(size=(8, 18, 16), stride=(4, 8, 8))}, None),
        ({"system__plan": Block(size=(8, 17, 16), stride=(4, 8, 8))}, "not a multiple"),
        ({"system__plan": Block(size=(8, 16, 16), stride=(4, 16, 16), halo=(2, 4, 4))}, "leave gaps"),
    ],
)
def test_validation_before_anything_runs(changes, words):
    config = experiment("volume.h5", **changes)
    if words is None:
        validate(config, 8)
        return
    with pytest.raises(UserError, match=words):
        validate(config, 8)


def test_mesh_takes_what_is_left():
    assert mesh_sizes(Mesh(data=-1, model=2, space=2), 8) == {"data": 2, "model": 2, "space": 2}


def test_missing_config_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load(str(tmp_path / "absent.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(UserError, match="no get_config"):
        load(str(tmp_path / "empty.py"))


@pytest.mark.parametrize(
    "spec",
    [
        "sam4em/vnc_semantic.py:gpu_long",
        "sam4em/mito_sbem.py:cpu_gaps_nomemory",
        "sam4em/isbi2012.py:gpu_stage2",
        "semantic_unet/baseline.py:mito_sbem_gpu",
        "segneuron/pretrain.py:gpu",
        "segneuron/finetune.py:gpu",
    ],
)
def test_variants_are_sound(spec):
    validate(load(f"{ROOT / 'configs' / spec}"))

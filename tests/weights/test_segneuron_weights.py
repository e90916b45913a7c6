import dataclasses

import jax
import numpy as np
import pytest

from emjax.errors import UserError
from emjax.models.functional import define
from emjax.models.mnet import Config, MNet, pretraining
from emjax.weights.files import read_state_file, write_safetensors
from emjax.weights.segneuron import config_of, read_segneuron, write_segneuron

TINY = Config(widths=(2, 3, 4, 5, 6))


def _random(config):
    shapes = define(lambda rngs: MNet(config, rngs)).shapes
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module", params=[TINY, pretraining(TINY), dataclasses.replace(TINY, merge="cat")])
def network(request):
    return request.param, _random(request.param)


def test_round_trip_on_462_names(network):
    config, collections = network
    state = write_segneuron(collections, config)
    assert len(state) == 462
    assert config_of(state) == config
    for names in (state, {f"module.{name}": value for name, value in state.items()}):
        back = read_segneuron(names, config)
        assert jax.tree.structure(back["params"]) == jax.tree.structure(collections["params"])
        for one, other in zip(jax.tree.leaves(back), jax.tree.leaves(collections)):
            np.testing.assert_array_equal(one, other)


def test_every_problem_is_named(network):
    config, collections = network
    state = write_segneuron(collections, config)
    lacking = {name: value for name, value in state.items() if name != "up31.CB3d.conv1.conv.bias"}
    with pytest.raises(UserError, match=r"missing: up31\.CB3d\.conv1\.conv\.bias"):
        read_segneuron(lacking, config)
    with pytest.raises(UserError, match=r"network has not: up51\.weight"):
        read_segneuron(state | {"up51.weight": np.zeros(1)}, config)
    with pytest.raises(UserError, match=r"outputs\.3\.weight is \(1,\)"):
        read_segneuron(state | {"outputs.3.weight": np.zeros(1)}, config)
    with pytest.raises(UserError, match="not a SegNeuron network"):
        read_segneuron({"conv.weight": np.zeros(1)}, config, "a.pth")


def test_pretraining_checkpoint_is_refused_for_inference():
    config = pretraining(TINY)
    state = write_segneuron(_random(config), config)
    with pytest.raises(UserError, match=r"b\.ckpt: holds SegNeuron's pretraining network"):
        read_segneuron(state, TINY, "b.ckpt")


def test_safetensors_whose_length_looks_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    for pad in range(0, 4096, 8):
        write_safetensors(path, {"a": np.arange(3, dtype=np.float32)}, {"pad": "x" * pad})
        if path.read_bytes()[:1] == b"\x80":
            break
    else:
        raise AssertionError("no header length begins with the byte of a pickle")
    state, metadata = read_state_file(path)
    assert metadata["pad"] == "x" * pad
    np.testing.assert_array_equal(state["a"], [0, 1, 2])

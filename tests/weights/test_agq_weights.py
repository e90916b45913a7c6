import dataclasses
import json

import jax
import numpy as np
import pytest

from emjax.errors import UserError
from emjax.models.agq import AGQ, AGQConfig
from emjax.models.functional import initialise
from emjax.weights.agq import FAMILY, config_from, config_of, read_agq, read_training_state, write_agq
from emjax.weights.family import from_state, to_state

SMALL = AGQConfig(filters=(8, 8, 16), isotropic=(False, False, True), features=8, learned=5)


@pytest.fixture(scope="module")
def state():
    fresh = jax.jit(lambda key: initialise(lambda rngs: AGQ(SMALL, rngs=rngs), key))(jax.random.key(0))
    return write_agq(fresh, SMALL, batches=7)


def test_round_trip_is_bit_exact(state):
    back = write_agq(read_agq(state, SMALL), SMALL, batches=7)
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


def test_published_network_has_257_names():
    shapes = jax.eval_shape(lambda: initialise(lambda rngs: AGQ(AGQConfig(), rngs=rngs), jax.random.key(0)))
    state = write_agq(jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes), AGQConfig())
    assert len(state) == 257
    assert sum(value.size for name, value in state.items() if "running" not in name and "num_" not in name) == 4_743_919
    assert state["inst_decoder.rpn.inst_convs.0.0.weight"].shape == (64, 67, 1, 3, 3)
    assert config_of(state) == AGQConfig()


def test_configuration_is_read_from_the_shapes(state):
    assert config_of(state) == SMALL
    assert config_of(state, guided=3).guided == 3


def test_first_background_is_the_last_of_the_checkpoint(state):
    collections = read_agq(state, SMALL)
    np.testing.assert_array_equal(
        collections["params"]["decoder"]["backgrounds"]["0"]["conv"]["kernel"][0, :, :, :, 0],
        np.moveaxis(state["inst_decoder.bg_convs.2.0.weight"][0, :, 0], 0, -1),
    )


def test_missing_and_foreign_names_are_all_listed(state):
    broken = {name: value for name, value in state.items() if "c_attn" not in name}
    broken["down_layers.0.1.0.wieght"] = broken.pop("down_layers.0.1.0.weight")
    with pytest.raises(UserError) as error:
        read_agq(broken, SMALL, "some.pth")
    for part in ("some.pth", "5 missing", "c_attn.weight", "wieght", "did you mean 'down_layers.0.1.0.weight'"):
        assert part in str(error.value)


def test_another_network_is_refused():
    with pytest.raises(UserError, match="not an AGQ network"):
        config_of({"layer.weight": np.zeros(3)}, "other.pth")


def checkpoint(state):
    names = [name for name in state if "running" not in name and "num_batches" not in name]
    moments = {
        number: {"step": 11, "exp_avg": state[name] * 2, "exp_avg_sq": state[name] ** 2}
        for number, name in enumerate(names)
    }
    groups = [{"params": [number], "lr": 1e-4} for number in range(len(names))]
    return {"state_dict": state, "optimizer": {"state": moments, "param_groups": groups}, "iteration": 11}


def test_training_state(state):
    found = read_training_state(checkpoint(state), SMALL)
    assert found.iteration == 11
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a * 2, b), found.collections["params"], found.first)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a**2, b), found.collections["params"], found.second)


def test_incomplete_training_state_is_refused(state):
    broken = checkpoint(state)
    del broken["optimizer"]["param_groups"][3]
    with pytest.raises(UserError, match="optimiser"):
        read_training_state(broken, SMALL)
    with pytest.raises(UserError, match="'optimizer'"):
        read_training_state({"state_dict": state}, SMALL)
    with pytest.raises(UserError, match="expected"):
        read_training_state(checkpoint(state), dataclasses.replace(SMALL, learned=6))


def test_family_reads_and_writes(state):
    checkpoint = from_state(state, [FAMILY], "some.pth.tar")
    assert config_from(checkpoint.settings) == SMALL
    assert config_from(json.loads(json.dumps(checkpoint.settings))) == SMALL
    back = to_state(checkpoint, "official")
    assert set(back) == set(state)
    np.testing.assert_array_equal(back["conv_in.0.weight"], state["conv_in.0.weight"])

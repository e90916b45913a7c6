"""The memory block, the decoders' switches, and the network slice by slice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small_sam4em import definition, drawn, small, variables

from emjax.errors import UserError
from emjax.models.functional import define, paths
from emjax.models.sam4em import Masks, Memory, MemoryConfig, published
from emjax.weights.rules import leaves

GRID = (8, 16)


def memory_of(**changes):
    config = small(memory=MemoryConfig(**{"slots": 3, "window": 0, "dropout": 0.0} | changes))
    network = define(lambda rngs: Memory(config, rngs))
    return network, drawn(network.shapes), config


def stack(slices, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    embeddings = jax.random.normal(keys[0], (slices, 1, *GRID, 16))
    masks = jax.random.bernoulli(keys[1], 0.5, (slices, 1, 4 * GRID[0], 4 * GRID[1], 1)).astype(jnp.float32)
    return embeddings, masks


def gradients(slices, **changes):
    """Largest gradient of each of the memory's arrays after a stack of slices."""
    network, collections, config = memory_of(**changes)
    embeddings, masks = stack(slices)

    @jax.jit
    def gradient(params):
        def total(params):
            memory = network.bind({**collections, "params": params})
            slots = jnp.zeros((1, config.memory.slots, *GRID, 8))
            value = 0.0
            for z in range(slices):
                out, slots = memory(slots, jnp.int32(z), embeddings[z], masks[z])
                value += (out**2).mean()
            return value

        return jax.grad(total)(params)

    return {path: float(jnp.abs(value).max()) for path, value in leaves(gradient(collections["params"])).items()}


def test_ring_passes_gradients_to_every_branch():
    # The key's bias moves the scores of all slots alike, so that the softmax does not see it.
    found = gradients(4)
    assert all(value > 1e-6 for path, value in found.items() if path != "key_proj.bias"), found


def test_broadcast_gives_no_gradient_to_four_branches():
    found = gradients(4, update="broadcast")
    silent = ("query_proj", "key_proj", "feature_proj", "mask_conv")
    loud = min(value for path, value in found.items() if path.startswith(("value_proj", "output_proj")))
    assert loud > 1e-6, found
    # What is left is rounding.
    assert all(value < 1e-4 * loud for path, value in found.items() if path.startswith(silent)), found


@functools.cache
def reach(window):
    """How much the memory-enhanced slice 3 changes with each slice, by gradients through the memory."""
    network, collections, config = memory_of(window=window)
    embeddings, masks = stack(4)

    @jax.jit
    def gradient(embeddings):
        def last(embeddings):
            memory = network.bind(collections)
            slots = jnp.zeros((1, config.memory.slots, *GRID, 8))
            for z in range(4):
                out, slots = memory(slots, jnp.int32(z), embeddings[z], masks[z])
            return (out**2).sum()

        return jax.grad(last)(embeddings)

    return np.abs(np.asarray(gradient(embeddings))).max(axis=(1, 2, 3, 4))


def test_gradients_stop_at_the_window():
    assert (reach(0) > 0).all()
    # Slice 2 begins a window: what slices 0 and 1 left is seen, but not trained through.
    assert reach(2)[:2].tolist() == [0, 0]
    assert (reach(2)[2:] > 0).all()


def test_empty_slots_do_not_count():
    network, collections, config = memory_of()
    embeddings, masks = stack(1)
    run = jax.jit(lambda slots: network.bind(collections)(slots, jnp.int32(1), embeddings[0], masks[0])[0])
    slots = jax.random.normal(jax.random.key(5), (1, config.memory.slots, *GRID, 8))
    np.testing.assert_array_equal(run(slots), run(slots.at[:, 1:].set(100.0)))
    assert float(jnp.abs(run(slots) - run(slots.at[:, 0].set(0.0))).max()) > 1e-4


def test_slots_are_written_in_turn():
    network, collections, _ = memory_of()
    embeddings, masks = stack(1)
    memory = network.bind(collections)
    slots = jnp.zeros((1, 3, *GRID, 8))
    _, after = memory(slots, jnp.int32(4), embeddings[0], masks[0])
    assert [bool(jnp.any(after[:, slot] != 0)) for slot in range(3)] == [False, True, False]


@functools.cache
def masks_of(config, slices):
    """Features drawn at random, as if they came from the encoder, to masks, in one scan."""
    features = jax.random.normal(jax.random.key(1), (slices, 1, *GRID, 16))

    @jax.jit
    def run(collections):
        model = definition(config).bind(collections)
        return model.scan(model.initial_state(1, (4 * GRID[0], 4 * GRID[1])), features)

    return jax.tree.map(np.asarray, run(variables(config)))


@pytest.mark.slow
def test_a_stack_goes_on_where_it_was():
    config = small(classes=2)
    state, masks = masks_of(config, 4)
    assert masks.first.shape == (4, 1, 32, 64, 2)
    assert int(state.seen) == 4
    features = jax.random.normal(jax.random.key(1), (4, 1, *GRID, 16))

    @jax.jit
    def halves(collections):
        model = definition(config).bind(collections)
        half, first = model.scan(model.initial_state(1, (32, 64)), features[:2])
        return first.second, model.scan(half, features[2:])[1].second

    found = np.concatenate(halves(variables(config)))
    np.testing.assert_allclose(found, masks.second, atol=1e-5)


@pytest.mark.slow
def test_second_prompt_matters_and_one_slice_is_a_stack():
    config = small()
    _, masks = masks_of(config, 1)
    _, reused = masks_of(dataclasses.replace(config, second_prompt="reuse_first"), 1)
    np.testing.assert_allclose(masks.first, reused.first, atol=1e-6)
    assert np.abs(masks.second - reused.second).max() > 1e-4


def test_result_is_the_chosen_stage():
    masks = Masks(jnp.zeros((1, 1, 8, 8, 1)), jnp.ones((1, 1, 8, 8, 1)))
    assert masks.result(small()) is masks.second
    assert masks.result(small(output="stage1")) is masks.first
    np.testing.assert_allclose(masks.result(small(output="mean")), (masks.first + masks.second) / 2)


def test_parts_that_are_switched_off_have_no_parameters():
    alone = small(decoders=1, output="stage1", memory=MemoryConfig(update="none"), lora=None)
    names = paths(definition(alone).shapes["params"])
    assert not [
        name for name in names if name.startswith(("mem.", "mask_decoder2.", "prompt_encoder2.")) or "lora" in name
    ]


def test_published_sets_every_switch():
    config = published(small())
    assert (config.memory.update, config.second_prompt, config.output) == ("broadcast", "reuse_first", "stage1")
    assert config.lora.faithful_halves
    assert config.lora.scale == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 0}, "classes 0"),
        ({"features": 12}, "features 12"),
        ({"decoders": 1}, "'stage2'"),
        ({"memory": MemoryConfig(slots=0)}, "slots 0"),
        ({"memory": MemoryConfig(dropout=1.0)}, "dropout 1.0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small(**changes).validate()


def test_dropout_needs_a_key():
    network, collections, _ = memory_of(dropout=0.5)
    memory = network.bind(collections)
    embeddings, masks = stack(1)
    content = memory.content(embeddings[0], masks[0], None)
    np.testing.assert_array_equal(content, memory.content(embeddings[0], masks[0], None))
    assert float(jnp.abs(content - memory.content(embeddings[0], masks[0], jax.random.key(0))).max()) > 0

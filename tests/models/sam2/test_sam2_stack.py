"""Tracking: pieces equal the whole, objects together equal objects alone, and the memory does not grow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.sam2.small_sam2 import config, network

from emjax.models.sam2.model import NO_OBJECT, Features
from emjax.models.sam2.stack import BACKWARD, EMPTY, FORWARD, TrackOptions, _nearest, bank, condition, empty_memory
from emjax.systems.sam2_session import normalised

SLICES = 9
GREY = np.random.default_rng(1).random((SLICES, 64, 64), np.float32)
OPTIONS = TrackOptions(memory_dtype="float32")
NET = network(OPTIONS)


@pytest.fixture(scope="module")
def features() -> Features:
    return NET.compiled(lambda model, grey: model.encode(normalised(grey)))(jnp.asarray(GREY))


def at(features: Features, z: int) -> Features:
    return Features(*(x[z : z + 1] for x in features))


def prompted(features: Features, places: dict[int, float], objects: int = 1):
    """A memory with a click for every object on each of the given slices."""
    memory = NET.empty_memory(objects, len(places), (4, 4))
    for place, (z, position) in enumerate(places.items()):
        points = jnp.asarray([[[position + 9 * i, position]] for i in range(objects)])
        heads = NET.click(at(features, z), points, jnp.ones((objects, 1), jnp.int32), None)
        memory = condition(memory, place, z, NET.remember_prompted(at(features, z), heads))
    return memory


def run(features, memory, order, start, direction, keep=True):
    chosen = Features(*(x[np.maximum(order, 0)] for x in features))
    return NET.propagate(memory, chosen, np.int32(order), np.int32(start), direction, SLICES, keep=keep)


@pytest.mark.slow
def test_pieces_equal_the_whole(features):
    memory = prompted(features, {0: 20.0})
    order = np.arange(SLICES)
    _, whole = run(features, memory, order, [0], FORWARD)
    first_memory, first = run(features, memory, order[:4], [0], FORWARD)
    _, second = run(features, first_memory, order[4:], [0], FORWARD)
    joined = jnp.concatenate([first.low, second.low])
    assert np.abs(np.asarray(joined - whole.low)).max() < 1e-4
    padded_memory, padded = run(features, memory, np.int32([0, 1, 2, 3, EMPTY, EMPTY]), [0], FORWARD)
    assert np.abs(np.asarray(padded.low[:4] - first.low)).max() < 1e-4
    assert np.array_equal(padded_memory.recent, first_memory.recent)


def test_objects_together_equal_objects_alone(features):
    together = prompted(features, {4: 12.0}, objects=3)
    _, all_found = run(features, together, np.arange(4, SLICES), [4] * 3, FORWARD)
    for i in range(3):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], together)
        _, found = run(features, alone, np.arange(4, SLICES), [4], FORWARD)
        assert np.abs(np.asarray(found.low[:, 0] - all_found.low[:, i])).max() < 1e-4


def test_backward_is_forward_of_the_reversed_stack(features):
    _, back = run(features, prompted(features, {8: 20.0}), np.arange(8, -1, -1), [8], BACKWARD)
    turned = Features(*(x[::-1] for x in features))
    _, forth = run(turned, prompted(turned, {0: 20.0}), np.arange(SLICES), [0], FORWARD)
    assert np.abs(np.asarray(back.low - forth.low)).max() < 1e-4


def test_prompted_slices_keep_their_own_result(features):
    memory = prompted(features, {0: 20.0, 5: 40.0})
    _, found = run(features, memory, np.arange(SLICES), [0], FORWARD)
    for place, z in enumerate((0, 5)):
        assert np.array_equal(found.low[z, 0], memory.prompted_low[0, place])


@pytest.mark.slow
def test_objects_begin_at_their_own_slice(features):
    memory = prompted(features, {0: 20.0}, objects=2)
    after, found = run(features, memory, np.arange(4), [0, 2], FORWARD)
    assert (np.asarray(found.low[:2, 1]) == NO_OBJECT).all()
    assert sorted(np.asarray(after.recent[1])[np.asarray(after.recent[1]) != EMPTY].tolist()) == [2, 3]


def test_memory_has_one_size_for_every_length(features):
    memory = prompted(features, {0: 20.0})
    sizes = [x.shape for x in jax.tree.leaves(memory)]
    for _ in range(3):
        memory, _ = run(features, memory, np.arange(1, SLICES), [0], FORWARD, keep=False)
    assert [x.shape for x in jax.tree.leaves(memory)] == sizes


def test_nearest_conditioning_slices():
    slices = jnp.asarray([0, 10, 20, 30, EMPTY])
    assert _nearest(slices, jnp.asarray(19), 2).tolist() == [False, True, True, False, False]
    assert _nearest(slices, jnp.asarray(35), 2).tolist() == [False, False, True, True, False]
    assert _nearest(slices, jnp.asarray(19), 3).tolist() == [False, True, True, True, False]
    assert _nearest(slices, jnp.asarray(19), -1).tolist() == [True, True, True, True, False]


def test_strided_memories_and_what_stands_in_for_them():
    options = TrackOptions(memory_dtype="float32", stride=3, most_conditioning=2)
    net = network(options)
    memory = empty_memory(net._definition.bind(net.variables), options, 1, 3, (4, 4))
    memory = memory._replace(prompted=jnp.asarray([[0, 10, 4]]))
    known = [z for z in range(14) if z not in (0, 4, 10)]
    for z in known:
        memory = memory._replace(recent=memory.recent.at[:, z % memory.recent.shape[1]].set(z))
    found = bank(net._definition.bind(net.variables), options, memory, 13, FORWARD, 20)
    # Slices 10 and 4 are chosen; 12, 9, 6, 3 are there, 0 is the conditioning slice that was not chosen, -3 is none.
    assert found.spatial_valid[0].tolist() == [False, True, True, True, True, True, True, True, False]


def test_pointer_distances_depend_on_short_stacks_unless_told():
    for by_stack, most in ((True, 4), (False, 15)):
        options = TrackOptions(pointer_span_of_stack=by_stack, memory_dtype="float32")
        net = network(options)
        model = net._definition.bind(net.variables)
        memory = empty_memory(model, options, 1, 1, (4, 4))._replace(prompted=jnp.zeros((1, 1), jnp.int32))
        assert np.isclose(float(bank(model, options, memory, 2, FORWARD, 5).distance[0, 0]), 2 / most)


@pytest.mark.parametrize(("changes", "message"), [({"most_conditioning": 1}, "at least 2"), ({"stride": 0}, "stride")])
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        TrackOptions(**changes)


def test_exclusive_memories_are_of_disjoint_objects(features):
    options = TrackOptions(memory_dtype="float32", exclusive=True)
    net = network(options)
    heads = net.click(at(features, 0), jnp.asarray([[[9.0, 9.0]], [[9.0, 9.0]]]), jnp.ones((2, 1), jnp.int32), None)
    made = net.remember_prompted(at(features, 0), heads)
    assert made.features.shape == (2, 4, 4, config().memory_features)

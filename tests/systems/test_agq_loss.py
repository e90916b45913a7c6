"""AGQ's criterion: targets, matching, and that empty slots, empty crops and uncounted voxels change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emjax.errors import UserError
from emjax.models.agq import ABSENT
from emjax.models.layers.interpolate import resize_linear
from emjax.systems.agq_loss import (
    LossConfig,
    Targets,
    affinity_loss,
    criterion,
    instance_ids,
    make_targets,
    match,
    match_on_host,
    soft_masks,
)

SMALL = LossConfig(instances=8, samples=32)
SHAPE = (2, 8, 10)
GRID = (2, 4, 5)
compiled_match = jax.jit(match)
compiled_criterion = jax.jit(criterion, static_argnums=0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 4))
def test_matching_equals_scipy(seed, queries, targets):
    rng = np.random.default_rng(seed)
    scores = rng.random((7, 4)).astype(np.float32)
    scores[0] = 0
    rows = np.r_[True, rng.permutation(np.arange(6) < queries)]
    columns = rng.permutation(np.arange(4) < targets)
    got = np.asarray(compiled_match(scores, rows, columns))
    want = match_on_host(scores, rows, columns)
    assert (got >= 0).sum() == min(queries, targets)
    assert (got[~columns] == -1).all()
    assert rows[got[got >= 0]].all()
    paid = lambda found: sum(scores[found[k], k] for k in range(4) if found[k] > 0)  # noqa: E731
    np.testing.assert_allclose(paid(got), paid(want), atol=1e-5)


def test_more_targets_than_queries_leaves_the_worst_unmatched():
    scores = np.zeros((3, 6), np.float32)
    scores[1, 4], scores[2, 1], scores[1, 1] = 0.9, 0.8, 0.7
    found = np.asarray(compiled_match(scores, np.ones(3, bool), np.ones(6, bool)))
    assert found.tolist() == [-1, 2, -1, -1, 1, -1]


def test_ids_of_the_largest_objects():
    labels = np.repeat([0, 7, 900, 3, 5], [10, 3, 8, 1, 4]).astype(np.int32)
    ids, valid = jax.jit(instance_ids, static_argnums=1)(np.random.default_rng(0).permutation(labels), 3)
    assert ids.tolist() == [5, 7, 900]
    assert valid.all()
    ids, valid = instance_ids(jnp.zeros(12, jnp.int32), 3)
    assert not valid.any()


@pytest.mark.parametrize("shape", [(2, 8, 10), (1, 9, 7), (3, 5, 12)])
def test_soft_masks_equal_a_resize_of_each_mask(shape):
    slots = np.random.default_rng(0).integers(-1, 3, shape).astype(np.int32)
    grid = (shape[0], (shape[1] - 1) // 2 + 1, (shape[2] - 1) // 2 + 1)
    whole = jnp.stack([jnp.asarray(slots == slot, jnp.float32) for slot in range(3)], -1)
    got = soft_masks(jnp.asarray(slots), 3, grid)
    np.testing.assert_allclose(got, resize_linear(whole[None], grid)[0], atol=1e-6)


def test_sections_of_labels_and_masks_must_agree():
    with pytest.raises(UserError, match="3 sections"):
        soft_masks(jnp.zeros((3, 4, 4), jnp.int32), 2, (2, 2, 2))


def problem(queries: int = 5, volumes: int = 2, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.zeros((volumes, *SHAPE), np.int32)
    labels[:, :, :4, :5], labels[:, :, 4:, :5], labels[:, :, :, 6:] = 3, 8, 9
    stages = [jnp.asarray(rng.normal(size=(volumes, *GRID, 1 + queries)), jnp.float32) for _ in range(3)]
    features = jnp.asarray(rng.normal(size=(volumes, *GRID, 6)), jnp.float32)
    logits = jnp.asarray(rng.normal(size=(volumes, *GRID, 3)), jnp.float32)
    noise = jnp.asarray(rng.gumbel(size=(volumes, np.prod(GRID))), jnp.float32)
    return stages, jnp.ones((volumes, queries), bool), features, logits, make_targets(jnp.asarray(labels)), noise


def test_empty_slots_change_no_term_and_no_gradient():
    stages, valid, features, logits, targets, noise = problem()
    place = np.array([0, 2, 3, 5, 8])

    def padded(stages):
        wide = [jnp.full((*masks.shape[:-1], 11), ABSENT).at[..., 0].set(masks[..., 0]) for masks in stages]
        return [full.at[..., place + 1].set(masks[..., 1:]) for full, masks in zip(wide, stages)]

    wide_valid = jnp.zeros((2, 10), bool).at[:, place].set(True)

    def value(stages, slots):
        chosen, present = (padded(stages), wide_valid) if slots else (stages, valid)
        terms, _ = criterion(SMALL, chosen, present, features, logits, targets, noise)
        return sum(terms.values()), terms

    run = jax.jit(jax.grad(value, has_aux=True), static_argnums=1)
    (gradient, terms), (plain_gradient, plain_terms) = run(stages, True), run(stages, False)
    for name in terms:
        np.testing.assert_allclose(terms[name], plain_terms[name], rtol=1e-6)
    for got, want in zip(gradient, plain_gradient):
        np.testing.assert_allclose(got, want, atol=1e-7)


def test_every_volume_counts_alike():
    stages, valid, features, logits, targets, noise = problem()
    both, _ = compiled_criterion(SMALL, stages, valid, features, logits, targets, noise)
    alone = []
    for index in range(2):
        one = slice(index, index + 1)
        parts = Targets(targets.labels[one], targets.affinities[one])
        terms, _ = compiled_criterion(
            SMALL, [masks[one] for masks in stages], valid[one], features[one], logits[one], parts, noise[one]
        )
        alone.append(terms)
    for name in both:
        np.testing.assert_allclose(both[name], (alone[0][name] + alone[1][name]) / 2, rtol=1e-5)


def test_a_crop_without_an_instance_is_all_background():
    stages, valid, features, logits, _, noise = problem(volumes=1)
    targets = make_targets(jnp.zeros((1, *SHAPE), jnp.int32))

    def value(stages):
        terms, matched = criterion(SMALL, stages, valid, features, logits, targets, noise)
        return sum(terms.values()), (terms, matched)

    gradient, (terms, matched) = jax.jit(jax.grad(value, has_aux=True))(stages)
    assert not matched.targets.any()
    assert matched.void.all()
    assert terms["loss_dice"] == 0
    assert terms["loss_pixel"] == 0
    assert terms["loss_mask"] > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, terms)))


def test_more_instances_than_queries_become_background():
    stages, valid, features, logits, targets, noise = problem(queries=2, volumes=1)
    _, matched = compiled_criterion(SMALL, stages, valid, features, logits, targets, noise)
    rows, exist = np.asarray(matched.rows[0]), np.asarray(matched.targets[0])
    assert exist.sum() == 3
    assert (rows[exist] > 0).sum() == 2
    # Connected parts are numbered 1, 2, 3.
    lost = np.asarray(targets.labels[0]) == int(np.flatnonzero(rows[exist] < 0)[0]) + 1
    inside = (
        np.asarray(resize_linear(jnp.asarray(lost, jnp.float32)[None, ..., None], GRID)[0, ..., 0]).reshape(-1) == 1
    )
    assert (np.asarray(matched.masks[0])[inside, 0] == 1).all()


def test_target_masks_sum_to_one_where_they_count():
    stages, valid, features, logits, targets, noise = problem()
    _, matched = compiled_criterion(SMALL, stages, valid, features, logits, targets, noise)
    np.testing.assert_allclose(matched.masks.sum(-1), 1, atol=1e-6)


def test_uncounted_voxels_do_not_matter():
    stages, valid, features, logits, _, noise = problem(volumes=1)
    labels = np.zeros((1, *SHAPE), np.int32)
    labels[..., :4, :] = 1
    mask = np.ones_like(labels)
    mask[..., 6:] = 0
    other = labels.copy()
    other[..., 6:] = 5
    first, second = (make_targets(jnp.asarray(ids), jnp.asarray(mask)) for ids in (labels, other))
    hidden = np.zeros(GRID, bool)
    hidden[..., 3:] = True
    changed = [masks.at[:, :, :, 3:].add(3.0 * (jnp.arange(6) == 2)) for masks in stages[1:]]
    got, _ = compiled_criterion(SMALL, stages, valid, features, logits, first, noise)
    want, matched = compiled_criterion(
        SMALL, [stages[0], *changed], valid, features, logits.at[:, :, :, 3:].add(2.0), second, noise
    )
    for name in got:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    assert (np.asarray(matched.masks[0]).sum(-1)[hidden.reshape(-1)] == 0).all()


def test_affinity_loss_is_smallest_at_the_target():
    wanted = jnp.asarray(np.random.default_rng(0).random((1, *SHAPE, 3)) < 0.5, jnp.float32)
    small = jnp.clip(resize_linear(wanted, GRID), 1e-5, 1 - 1e-5)
    logits = jnp.log(small / (1 - small))
    best = affinity_loss(logits, wanted)
    assert affinity_loss(logits + 0.3, wanted) > best
    assert affinity_loss(logits - 0.3, wanted) > best


@pytest.mark.parametrize("changes", [{"dice": -1.0}, {"samples": 0}, {"instances": 0}, {"temperature": 0.0}])
def test_wrong_settings_are_refused(changes):
    with pytest.raises(UserError, match="AGQ loss"):
        dataclasses.replace(SMALL, **changes).validate()

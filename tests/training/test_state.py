"""One step: the same on one device and on eight, in one batch and in parts, and safe against NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import CROP, experiment

from emjax.config import Mesh
from emjax.models.functional import paths
from emjax.systems import affinity_unet
from emjax.training import flops, sharding
from emjax.training.state import averaged, definition, fresh, make_train_step, split_trainable


def _batch(rows=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(1, 4, (rows, CROP[0] // 4, CROP[1] // 4, CROP[2] // 4), np.int32)
    labels = np.repeat(np.repeat(np.repeat(labels, 4, 1), 4, 2), 4, 3)
    return {"image": rng.integers(0, 255, (rows, *CROP)).astype(np.uint8), "labels": labels}


def _steps(config, devices, count=2):
    mesh = sharding.make_mesh(config.mesh, devices)
    network = definition(config)
    shapes = jax.eval_shape(lambda: fresh(config, jax.random.key(0)))
    shardings = sharding.state_shardings(config.mesh, mesh, shapes)
    state = jax.device_put(jax.jit(lambda: fresh(config, jax.random.key(0)))(), shardings)
    step = jax.jit(make_train_step(config, network), out_shardings=(shardings, None))
    batch = _batch()
    over = sharding.batch_shardings(config.mesh, mesh, batch)
    losses = []
    for _ in range(count):
        state, scalars = step(state, sharding.to_devices(batch, over, 8), jax.random.key(1))
        losses.append(float(scalars["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def alone():
    return _steps(experiment("none"), jax.devices()[:1])


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(data=8),
        Mesh(data=4, model=2, fsdp=True, fsdp_min_size=1),
        Mesh(data=2, space=4, space_axis="y"),
    ],
    ids=["data", "fully sharded", "spatial"],
)
def test_eight_devices_equal_one(alone, mesh):
    state, losses = _steps(experiment("none", mesh=mesh), jax.devices())
    np.testing.assert_allclose(losses, alone[1], rtol=1e-5)
    # Adam divides by the root of tiny moments, so that rounding shows in parameters more than in losses.
    for ours, theirs in zip(jax.tree.leaves(state["params"]), jax.tree.leaves(alone[0]["params"])):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_fully_sharded_state_is_split():
    config = experiment("none", mesh=Mesh(data=8, fsdp=True, fsdp_min_size=64))
    mesh = sharding.make_mesh(config.mesh)
    shapes = jax.eval_shape(lambda: fresh(config, jax.random.key(0)))
    shardings = sharding.state_shardings(config.mesh, mesh, shapes)
    whole = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    parts = jax.tree.map(lambda leaf, where: int(np.prod(where.shard_shape(leaf.shape))), shapes, shardings)
    assert sum(jax.tree.leaves(parts["params"])) < whole / 2
    assert sum(jax.tree.leaves(parts["opt_state"])) < whole


def test_rules_go_before_the_general_rule():
    config = Mesh(data=8, fsdp=True, fsdp_min_size=1, rules=((r"head", -1), (r"kernel$", 0)))
    mesh = sharding.make_mesh(config)
    assert sharding.parameter_spec(config, mesh, "params.head.kernel", (8, 8)) == jax.sharding.PartitionSpec()
    assert sharding.parameter_spec(config, mesh, "params.up.kernel", (8, 16))[0] == "data"


def test_accumulated_parts_equal_the_whole_batch(alone):
    # Without balancing per sample each part's loss would weigh its voxels differently.
    config = experiment("none", train__accumulate=4)
    state, losses = _steps(config, jax.devices()[:1])
    whole = alone[1]
    np.testing.assert_allclose(losses[0], whole[0], rtol=2e-2)
    assert int(state["step"]) == 2


def test_accumulation_is_exact_where_samples_weigh_alike():
    def plain(**changes):
        config = experiment("none", **changes)
        system = dataclasses.replace(config.system, class_balance=False)
        return _steps(dataclasses.replace(config, system=system), jax.devices()[:1])

    (_, whole), (_, parts) = plain(), plain(train__accumulate=4)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_a_step_that_is_not_finite_changes_nothing(alone):
    config = experiment("none")
    state = fresh(config, jax.random.key(0))
    step = jax.jit(make_train_step(config, definition(config)))
    batch = _batch()
    bad = {"image": np.full((8, *CROP), np.nan, np.float32), "labels": batch["labels"]}
    after, scalars = step(state, bad, jax.random.key(1))
    assert not np.isfinite(scalars["loss"])
    assert int(after["skipped"]) == 1
    assert int(after["step"]) == 1
    for name in ("params", "opt_state", "ema"):
        for old, new in zip(jax.tree.leaves(state[name]), jax.tree.leaves(after[name])):
            np.testing.assert_array_equal(old, new)
    again, _ = step(after, batch | {"image": batch["image"].astype(np.float32) / 255}, jax.random.key(1))
    assert int(again["skipped"]) == 0


def test_average_follows_the_parameters(alone):
    config, state = experiment("none"), alone[0]
    mean = averaged(config, state)["params"]
    assert paths(mean) == paths(state["params"])
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(state["params"])))


def test_frozen_parameters_get_no_state_and_do_not_move(monkeypatch):
    monkeypatch.setattr(affinity_unet, "trainable", lambda config, path: path.startswith("head"))
    config = experiment("none")
    chosen, frozen = split_trainable(config, definition(config).shapes["params"])
    assert set(chosen) == {"head"}
    state = fresh(config, jax.random.key(0))
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert len(moments) == 2 * len(jax.tree.leaves(chosen))
    after, _ = jax.jit(make_train_step(config, definition(config)))(state, _batch(), jax.random.key(1))
    for path in paths(frozen):
        old, new = state["params"], after["params"]
        for key in path.split("."):
            old, new = old[key], new[key]
        np.testing.assert_array_equal(old, new)


def test_bfloat16_and_remat_keep_float32_parameters_and_a_close_loss(alone):
    config = experiment("none")
    model = dataclasses.replace(config.system.model, dtype="bfloat16", remat=True)
    config = dataclasses.replace(config, system=dataclasses.replace(config.system, model=model))
    state, losses = _steps(config, jax.devices()[:1], count=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses[0], alone[1][0], rtol=0.03)


def test_operations_are_counted_through_loops():
    weights, rows = jnp.ones((4, 5)), jnp.ones((3, 4))
    assert flops.count(lambda a, b: a @ b, rows, weights) == 2 * 3 * 4 * 5
    looped = lambda a, b: jax.lax.scan(lambda c, _: (c, a @ b), 0, length=7)  # noqa: E731
    assert flops.count(looped, rows, weights) == 7 * 2 * 3 * 4 * 5

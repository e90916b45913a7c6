"""What single parts of the chain do to updates."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from emjax.config import Optimizer
from emjax.training import optimizers

PARAMS = {"encoder": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}


def _run(config: Optimizer, steps: int) -> list[dict]:
    """Parameters before and after each step with a gradient of one half."""
    optimizer = optimizers.make(config, steps)
    state, params, seen = optimizer.init(PARAMS), PARAMS, [PARAMS]
    gradient = {name: {"kernel": jnp.full((2, 2), 0.5)} for name in PARAMS}
    for _ in range(steps):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
    return seen


def test_multipliers_scale_the_first_match():
    config = Optimizer(
        schedule="constant", warmup_steps=0, multipliers=((r"^encoder\.", 0.1), (r"kernel", 1.0)), weight_decay=0.0
    )
    before, after = _run(config, 1)
    moved = {name: float((before[name]["kernel"] - after[name]["kernel"])[0, 0]) for name in PARAMS}
    # Parameters near 1 are 6e-8 apart.
    assert moved["encoder"] == pytest.approx(0.1 * moved["head"], rel=1e-3)


def test_held_parameters_wait_and_then_move_as_if_they_had_not():
    config = Optimizer(schedule="constant", warmup_steps=0, holds=((r"^encoder\.", 3),), weight_decay=0.1, clip_norm=0)
    seen = _run(config, 5)
    for number in range(4):
        np.testing.assert_array_equal(seen[number]["encoder"]["kernel"], PARAMS["encoder"]["kernel"])
        assert number == 0 or float(seen[number]["head"]["kernel"][0, 0]) < float(
            seen[number - 1]["head"]["kernel"][0, 0]
        )
    first = float((seen[3]["encoder"]["kernel"] - seen[4]["encoder"]["kernel"])[0, 0])
    # A constant gradient moves Adam by the rate at every step; moments that began at zero here would give more.
    assert first == pytest.approx(config.lr * 1.1, rel=1e-2)

"""Optimisers and schedules by name, as optax transformations."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from emjax.config import Optimizer


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of step 0, 1, ...: linear warm-up times the chosen decay over all ``steps``.

    ``"poly_warm"`` is the schedule of SegNeuron's code: iterations count from 1, the decay takes ``decay_steps`` and
    the warm-up rises from ``final_lr`` with the same power. ``"epochs"`` is that of SAM4EM's.
    """

    def poly_warm(step: jax.Array) -> jax.Array:
        # A quotient of int32 is float32 even where the parameters are float64.
        iteration, warmup = jnp.asarray(step + 1, jnp.result_type(float)), config.warmup_steps
        decay = config.decay_steps or steps
        # The left time as a whole number: subtracting a share from 1 would lose digits near the end.
        left = jnp.clip((decay + warmup - iteration) / decay, 0.0, 1.0)
        rising = jnp.clip(iteration / warmup, 0.0, 1.0) if warmup else 1.0
        # The warm-up moves the decay back, but not its end.
        share = jnp.where(iteration < warmup, rising, jnp.where(iteration < decay, left, 0.0))
        return config.final_lr + (config.lr - config.final_lr) * share**config.power

    def epochs(step: jax.Array) -> jax.Array:
        count, warm = steps // config.epoch_steps, config.warmup_steps // config.epoch_steps
        epoch = step // config.epoch_steps
        now = jnp.maximum(epoch - 1, 0) if config.late_epochs else epoch
        share = jnp.clip((now - warm) / max(count - warm, 1), 0.0, 1.0)
        value = config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        rising = config.lr * (config.warmup_factor + (1 - config.warmup_factor) * now / max(warm, 1))
        value = jnp.where(now < warm, rising, value)
        return jnp.where(epoch == 0, config.lr, value) if config.late_epochs else value

    def rate(step: jax.Array) -> jax.Array:
        if config.schedule == "poly_warm":
            return poly_warm(step)
        if config.schedule == "epochs":
            return epochs(step)
        share = jnp.clip(step / steps, 0.0, 1.0)
        if config.schedule == "cosine":
            value = config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        elif config.schedule == "poly":
            value = config.final_lr + (config.lr - config.final_lr) * (1 - share) ** config.power
        else:
            value = jnp.asarray(config.lr)
        if config.warmup_steps:
            done = jnp.clip(step / config.warmup_steps, 0.0, 1.0)
            value = value * (config.warmup_factor * (1 - done) + done)
        return value

    return rate


class AmsgradState(NamedTuple):
    """Moments of :func:`scale_by_amsgrad`."""

    steps: jax.Array
    mean: Any
    square: Any
    largest: Any


def scale_by_amsgrad(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """AMSGrad as PyTorch computes it: the maximum is taken over the uncorrected second moment, ``eps`` is added to the
    bias-corrected root (optax corrects before the maximum)."""

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return AmsgradState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(updates, state, params=None):
        del params
        steps = state.steps + 1
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, updates)
        square = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.square, updates)
        largest = jax.tree.map(jnp.maximum, state.largest, square)
        # 1 - b**count loses half its digits in the first steps; this form keeps them.
        first, second = -jnp.expm1(steps * math.log(b1)), -jnp.expm1(steps * math.log(b2))
        scaled = jax.tree.map(lambda m, v: (m / first) / (jnp.sqrt(v) / jnp.sqrt(second) + eps), mean, largest)
        return scaled, AmsgradState(steps, mean, square, largest)

    return optax.GradientTransformation(init, update)


def _decays(path: str, value: jax.Array, config: Optimizer) -> bool:
    return config.decay_norms or value.ndim > 1


def _by_path(function, tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, value: function(".".join(str(key.key) for key in path), value), tree
    )


def _multiplier(config: Optimizer, path: str) -> float:
    return next((factor for pattern, factor in config.multipliers if re.search(pattern, path)), 1.0)


def _hold(holds: tuple[tuple[str, int], ...]) -> optax.GradientTransformation:
    """Makes updates zero before their parameter's step.

    It comes after the moments, which are warm by then: Adam's would give updates several times too large at first.
    """

    def update(updates, state, params=None):
        del params

        def held(path: str, value: jax.Array) -> jax.Array:
            first = next((steps for pattern, steps in holds if re.search(pattern, path)), 0)
            return value * (state.count >= first).astype(value.dtype) if first else value

        return _by_path(held, updates), optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)), update)


def make(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """The whole chain: clip, (coupled decay), moments, (decoupled decay), multipliers, holds, rate."""
    decay_mask = lambda params: _by_path(lambda path, value: _decays(path, value, config), params)  # noqa: E731
    decay = optax.add_decayed_weights(config.weight_decay, decay_mask) if config.weight_decay else optax.identity()
    moments = {
        "adamw": lambda: [optax.scale_by_adam(config.b1, config.b2, config.eps), decay],
        "adam": lambda: [decay, optax.scale_by_adam(config.b1, config.b2, config.eps)],
        "amsgrad": lambda: [decay, scale_by_amsgrad(config.b1, config.b2, config.eps)],
        "sgd": lambda: [decay, optax.trace(config.b1, nesterov=True)],
    }[config.name]()
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    scales = []
    if config.multipliers:
        scales = [
            optax.stateless(lambda updates, params: _by_path(lambda path, u: u * _multiplier(config, path), updates))
        ]
    if config.holds:
        scales.append(_hold(config.holds))
    return optax.chain(*clip, *moments, *scales, optax.scale_by_learning_rate(schedule(config, steps)))

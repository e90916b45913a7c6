"""The training state and the pure functions on it: initialise, one step, one evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from emjax.config import Experiment
from emjax.models.functional import Collections, Definition, define, initialise, join, partition, paths, variables
from emjax.systems.protocol import system_of
from emjax.training import optimizers

State = dict[str, Any]
"""``params``, ``batch_stats``, ``constants`` (nested dicts), ``opt_state`` and ``ema`` (of the trainable parameters),
``step`` and ``skipped`` (consecutive steps without an update)."""


def definition(config: Experiment) -> Definition:
    """Structure and shapes of the experiment's network."""
    return define(lambda rngs: system_of(config.system).build(config.system, rngs))


def split_trainable(config: Experiment, params: Mapping) -> tuple[dict, dict]:
    """Parameters as (trainable, frozen)."""
    system = system_of(config.system)
    return partition(params, lambda path: system.trainable(config.system, path))


def fresh(config: Experiment, key: jax.Array) -> State:
    """The state before step 0, a pure function of ``key``."""
    system = system_of(config.system)
    collections = initialise(lambda rngs: system.build(config.system, rngs), key)
    return with_parameters(config, collections)


def with_given(config: Experiment, given: Mapping) -> Collections:
    """Fresh variables but for the ``given`` ones: parameters and constants, a nested dict by the network's paths, cast
    to its types.

    Raises ``ValueError`` for one that the network has not, or has in another shape.
    """
    # Not compiled as a whole: hundreds of random draws in one program take minutes to compile.
    made = initialise(lambda rngs: system_of(config.system).build(config.system, rngs), jax.random.key(config.seed))

    def put(fresh: Mapping, given: Mapping, prefix: str) -> dict:
        if unknown := sorted(set(given) - set(fresh)):
            raise ValueError(f"given parameter {prefix}{unknown[0]} is not one of the network's")
        return {
            name: value if name not in given else fill(value, given[name], prefix + name)
            for name, value in fresh.items()
        }

    def fill(fresh: Any, given: Any, path: str) -> Any:
        if isinstance(fresh, Mapping):
            return put(fresh, given, f"{path}.")
        if fresh.shape != given.shape:
            raise ValueError(f"given parameter {path} is {given.shape}, the network's {fresh.shape}")
        return jnp.asarray(given, fresh.dtype)

    fixed = set(paths(made["constants"]))
    constants, params = partition(given, lambda path: path in fixed)
    return {**made, "params": put(made["params"], params, ""), "constants": put(made["constants"], constants, "")}


def with_parameters(config: Experiment, collections: Mapping) -> State:
    """A state before step 0 that starts from given variables."""
    chosen, _ = split_trainable(config, collections["params"])
    return {
        **collections,
        "opt_state": optimizers.make(config.optimizer, config.train.steps).init(chosen),
        "ema": chosen if config.train.ema else {},
        "step": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
    }


def averaged(config: Experiment, state: Mapping) -> dict[str, Any]:
    """Variables to evaluate with: the moving average of the parameters where the run keeps one."""
    params = state["params"]
    if config.train.ema:
        _, frozen = split_trainable(config, params)
        params = join(state["ema"], frozen)
    return {"params": params, "batch_stats": state["batch_stats"], "constants": state["constants"]}


def _micro_batches(batch: Mapping[str, jax.Array], count: int) -> dict[str, jax.Array]:
    # Rows r, r + count, ... form a micro-batch, so that each one is spread over all devices.
    def fold(array: jax.Array) -> jax.Array:
        return array.reshape(array.shape[0] // count, count, *array.shape[1:]).swapaxes(0, 1)

    return {name: fold(array) for name, array in batch.items()}


def make_train_step(config: Experiment, network: Definition) -> Callable[[State, Mapping, jax.Array], tuple]:
    """``step(state, batch, key) -> (state, scalars)``, pure. The key of a step is folded from ``key`` and its number.

    A step whose loss or gradient is not finite leaves parameters, moments and statistics as they were.
    """
    system = system_of(config.system)
    optimizer = optimizers.make(config.optimizer, config.train.steps)
    rate = optimizers.schedule(config.optimizer, config.train.steps)
    count = config.train.accumulate

    def loss(chosen, frozen, batch_stats, constants, batch, key):
        collections = {"params": join(chosen, frozen), "batch_stats": batch_stats, "constants": constants}
        model = network.bind(collections)
        value, scalars = system.loss(config.system, model, batch, key, True)
        return value, (scalars, variables(model)["batch_stats"])

    def gradients(chosen, frozen, state, batch, key):
        differentiate = jax.value_and_grad(loss, has_aux=True)
        if count == 1:
            (value, (scalars, batch_stats)), gradient = differentiate(
                chosen, frozen, state["batch_stats"], state["constants"], batch, key
            )
            return {"loss": value, **scalars}, batch_stats, gradient

        def one(carry, micro):
            batch_stats, total = carry
            part, number = micro
            (value, (scalars, batch_stats)), gradient = differentiate(
                chosen, frozen, batch_stats, state["constants"], part, jax.random.fold_in(key, number)
            )
            return (batch_stats, jax.tree.map(jnp.add, total, gradient)), {"loss": value, **scalars}

        start = (state["batch_stats"], jax.tree.map(jnp.zeros_like, chosen))
        (batch_stats, total), scalars = jax.lax.scan(one, start, (_micro_batches(batch, count), jnp.arange(count)))
        mean = lambda tree: jax.tree.map(lambda value: value / count, tree)  # noqa: E731
        return jax.tree.map(lambda value: value.mean(0), scalars), batch_stats, mean(total)

    def step(state: State, batch: Mapping, key: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state["step"])
        chosen, frozen = split_trainable(config, state["params"])
        scalars, batch_stats, gradient = gradients(chosen, frozen, state, batch, key)
        gradient_norm = optax.tree.norm(gradient)
        good = jnp.isfinite(scalars["loss"]) & jnp.isfinite(gradient_norm)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], chosen)
        updated = optax.apply_updates(chosen, updates)
        keep = lambda new, old: jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)  # noqa: E731
        updated = keep(updated, chosen)
        ema = state["ema"]
        if config.train.ema:
            # The average of the first steps would be dominated by the initial values.
            done = state["step"].astype(jnp.float32)
            decay = jnp.minimum(config.train.ema, (1 + done) / (10 + done))
            ema = keep(jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, ema, updated), ema)
        new = {
            "params": join(updated, frozen),
            "batch_stats": keep(batch_stats, state["batch_stats"]),
            "constants": state["constants"],
            "opt_state": keep(opt_state, state["opt_state"]),
            "ema": ema,
            "step": state["step"] + 1,
            "skipped": jnp.where(good, 0, state["skipped"] + 1),
        }
        scalars |= {
            "gradient_norm": gradient_norm,
            "update_norm": optax.tree.norm(updates),
            "parameter_norm": optax.tree.norm(updated),
            "learning_rate": rate(state["step"]),
            "skipped": new["skipped"],
        }
        return new, scalars

    return step


def make_evaluation_step(config: Experiment, network: Definition) -> Callable[[State, Mapping], dict]:
    """``evaluate(state, batch) -> scalars`` with the averaged parameters and nothing random."""
    system = system_of(config.system)

    def evaluate(state: State, batch: Mapping) -> dict[str, jax.Array]:
        model = network.bind(averaged(config, state))
        value, scalars = system.loss(config.system, model, batch, jax.random.key(0), False)
        return {"loss": value, **scalars}

    return evaluate


def make_prediction(config: Experiment, network: Definition) -> Callable[[State, jax.Array], dict]:
    """``predict(state, image) -> outputs`` with the averaged parameters."""
    system = system_of(config.system)

    def predict(state: State, image: jax.Array) -> dict[str, jax.Array]:
        return system.predict(config.system, network.bind(averaged(config, state)), image)

    return predict

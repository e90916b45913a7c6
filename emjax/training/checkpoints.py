"""Checkpoints: separate items for parameters, optimiser state, the rest, and a readable description of the run."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from emjax import __version__
from emjax.config import Experiment, from_json, to_json
from emjax.errors import UserError
from emjax.models.functional import Collections, initialise, join, partition, paths
from emjax.models.layers.lora import is_adapter
from emjax.systems.protocol import system_of
from emjax.training.state import State, definition, split_trainable

FOLDER = "checkpoints"


def _best(metrics: Mapping[str, float]) -> float:
    return metrics["best"]


def _items(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as checkpoint items; empty trees are left out, Orbax cannot store them."""
    extra = {name: state[name] for name in ("batch_stats", "constants", "ema", "step", "skipped")}
    return {
        "params": state["params"],
        "opt_state": state["opt_state"],
        "extra": {name: value for name, value in extra.items() if not (isinstance(value, dict) and not value)},
    }


class Checkpoints:
    """The checkpoints of one run: asynchronous saving, the latest and the best are kept."""

    def __init__(self, workdir: pathlib.Path, config: Experiment):
        self.config = config
        policies = ocp.checkpoint_managers
        kept = [policies.LatestN(max(config.train.keep_latest, 1))]
        if config.train.keep_best:
            kept.append(policies.BestN(n=config.train.keep_best, get_metric_fn=_best, reverse=True))
        self.manager = ocp.CheckpointManager(
            (workdir / FOLDER).resolve(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept), enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """Number of steps done at the newest checkpoint, or None."""
        return self.manager.latest_step()

    def save(self, step: int, state: State, best: float | None = None) -> None:
        """Starts saving the state after ``step`` steps; ``best`` is the validation figure, lower is better."""
        if self.manager.latest_step() == step:
            return
        meta = {
            "config": json.loads(to_json(self.config)),
            "versions": {"emjax": __version__, "jax": jax.__version__, "orbax": ocp.__version__},
            "step": step,
            "next_sample": step * self.config.data.batch_size,
            "best_of": self.config.train.best,
        }
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        self.manager.save(
            step,
            args=ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta)),
            metrics={"best": math.inf if best is None else float(best)},
            force=True,
        )

    def restore(self, step: int, target: State) -> State:
        """The state after ``step`` steps, laid out as ``target`` (shapes with shardings). The mesh may have changed."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(target).items()}
        restored = self.manager.restore(step, args=ocp.args.Composite(**items))
        return {
            **{name: value for name, value in target.items() if isinstance(value, dict) and not value},
            "params": restored["params"],
            "opt_state": restored["opt_state"],
            **restored["extra"],
        }

    def close(self) -> None:
        """Waits for the last save."""
        self.manager.wait_until_finished()
        self.manager.close()


def differences(stored: Any, wanted: Any, prefix: str = "") -> list[str]:
    """Dotted fields in which two configurations differ, with both values."""
    if dataclasses.is_dataclass(stored) and type(stored) is type(wanted):
        found = []
        for field in dataclasses.fields(stored):
            path = f"{prefix}.{field.name}" if prefix else field.name
            found += differences(getattr(stored, field.name), getattr(wanted, field.name), path)
        return found
    return [] if stored == wanted else [f"{prefix}: {stored!r} in the checkpoint, {wanted!r} now"]


def _steps(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / "meta").is_dir())


def find(directory: pathlib.Path, which: str | int = "best") -> pathlib.Path:
    """The folder of one checkpoint.

    ``directory`` is a work directory, its ``checkpoints`` folder, or one checkpoint; ``which`` is ``"best"`` (the
    lowest validation figure, the latest where none was validated), ``"latest"``, or a step. Raises ``UserError``.
    """
    directory = pathlib.Path(directory)
    if (directory / "meta").is_dir():
        return directory
    folder = directory / FOLDER if (directory / FOLDER).is_dir() else directory
    if not folder.is_dir():
        raise UserError(f"--checkpoint {directory}: no such folder")
    steps = _steps(folder)
    if not steps:
        raise UserError(f"--checkpoint {directory}: holds no finished checkpoint (expected {folder}/STEP/meta)")
    if which == "latest":
        return folder / str(steps[-1])
    if which == "best":
        return folder / str(min(steps, key=lambda step: (_metric(folder / str(step)), -step)))
    if not str(which).isdigit() or int(which) not in steps:
        raise UserError(f"--which {which}: {folder} holds steps {', '.join(map(str, steps))}")
    return folder / str(int(which))


def _metric(checkpoint: pathlib.Path) -> float:
    file = checkpoint / "metrics" / "metrics"
    return float(json.loads(file.read_text())["best"]) if file.is_file() else math.inf


def read_meta(checkpoint: pathlib.Path) -> dict[str, Any]:
    """The description stored with a checkpoint; ``UserError`` if it is not one of emjax."""
    file = checkpoint / "meta" / "metadata"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {checkpoint}: {file} cannot be read ({error})") from None


def restore_for_inference(directory: pathlib.Path, which: str | int = "best") -> tuple[Experiment, Collections]:
    """Experiment and variables of a checkpoint, on one device, ready for ``definition(experiment).bind``.

    The averaged parameters are given where the run kept them. Raises ``UserError`` for a missing or unreadable
    checkpoint, or one whose arrays do not fit the network that its own configuration describes.
    """
    checkpoint = find(directory, which)
    config = from_json(json.dumps(read_meta(checkpoint)["config"]))
    collections = _restore_variables(checkpoint, config)
    return config, collections


def _restore_variables(checkpoint: pathlib.Path, config: Experiment) -> Collections:
    shapes = definition(config).shapes
    place = SingleDeviceSharding(jax.local_devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes)
    chosen, frozen = split_trainable(config, target["params"])
    extra = {name: target[name] for name in ("batch_stats", "constants") if target[name]}
    if config.train.ema:
        extra["ema"] = chosen
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=place)
    extra |= {"step": scalar, "skipped": scalar}
    _check_same_arrays(checkpoint, "params", target["params"])
    with ocp.StandardCheckpointer() as reader:
        params = reader.restore((checkpoint / "params").resolve(), target["params"])
        restored = reader.restore((checkpoint / "extra").resolve(), extra)
    if config.train.ema:
        _, frozen = split_trainable(config, params)
        params = join(restored["ema"], frozen)
    return {
        "params": params,
        "batch_stats": restored.get("batch_stats", {}),
        "constants": restored.get("constants", {}),
    }


def _check_same_arrays(checkpoint: pathlib.Path, item: str, target: Mapping) -> None:
    """One clear error for a checkpoint of another network, instead of Orbax's tree comparison."""
    with ocp.StandardCheckpointer() as reader:
        try:
            stored = reader.metadata((checkpoint / item).resolve()).item_metadata.tree
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"checkpoint {checkpoint}: {item} cannot be read ({reason})") from None
    found = {path: tuple(leaf.shape) for path, leaf in _leaves(stored)}
    wanted = {path: tuple(leaf.shape) for path, leaf in _leaves(target)}
    missing, surplus = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    other = [
        f"{path} is {found[path]}, expected {wanted[path]}"
        for path in sorted(wanted)
        if path in found and found[path] != wanted[path]
    ]
    if missing or surplus or other:
        parts = [f"{len(missing)} missing (first {missing[0]})"] if missing else []
        parts += [f"{len(surplus)} unknown (first {surplus[0]})"] if surplus else []
        parts += [f"{len(other)} of another shape (first {other[0]})"] if other else []
        raise UserError(f"checkpoint {checkpoint}: not of this model: {item} has {', '.join(parts)}")


def _check_inherited(checkpoint: pathlib.Path, found: Mapping, wanted: Mapping) -> None:
    shapes = [{path: tuple(leaf.shape) for path, leaf in _leaves(tree)} for tree in (found, wanted)]
    if shapes[0] != shapes[1]:
        wrong = sorted(path for path in set(shapes[0]) | set(shapes[1]) if shapes[0].get(path) != shapes[1].get(path))
        path = wrong[0]
        raise UserError(
            f"checkpoint {checkpoint}: {len(wrong)} parameters do not fit, first {path}: {shapes[0].get(path)}, "
            f"expected {shapes[1].get(path)}; both runs need the same widths"
        )


def _leaves(tree: Mapping) -> list[tuple[str, Any]]:
    found = []
    for path in paths(tree):
        leaf: Any = tree
        for key in path.split("."):
            leaf = leaf[key]
        found.append((path, leaf))
    return found


def initial_variables(directory: str, config: Experiment) -> Collections:
    """Variables for ``train.init_from``: those of another run's checkpoint of the same network.

    A system with ``inherits(config, other)`` may also start from a run of another system: the function gives a
    predicate on dotted paths, of the parameters that are taken over, or a mapping from branches of the other network to
    branches of this one (all but adapters), or None. All others are fresh.
    """
    checkpoint = find(pathlib.Path(directory))
    stored = from_json(json.dumps(read_meta(checkpoint)["config"]))
    inherits = getattr(system_of(config.system), "inherits", None)
    taken_over = inherits(config.system, stored.system) if inherits else None
    if taken_over is not None:
        found = _restore_variables(checkpoint, stored)
        if isinstance(taken_over, Mapping):
            chosen: dict = {}
            for source, branch in taken_over.items():
                _put(chosen, branch, _branch(found["params"], source))
            belongs = _within(tuple(taken_over.values()))
            _check_inherited(checkpoint, chosen, partition(definition(config).shapes["params"], belongs)[0])
        made = initialise(lambda rngs: system_of(config.system).build(config.system, rngs), jax.random.key(config.seed))
        if isinstance(taken_over, Mapping):
            _, rest = partition(made["params"], belongs)
            return {**made, "params": join(chosen, rest)}
        # Statistics and constants belong to the parameters beside them.
        variables = {}
        for name, tree in made.items():
            chosen, _ = partition(found[name], taken_over)
            replaced, rest = partition(tree, taken_over)
            _check_inherited(checkpoint, chosen, replaced)
            variables[name] = join(chosen, rest)
        return variables
    _check_same_arrays(checkpoint, "params", definition(config).shapes["params"])
    return _restore_variables(checkpoint, dataclasses.replace(stored, system=config.system))


def _within(branches: tuple[str, ...]) -> Callable[[str], bool]:
    return lambda path: any(path.startswith(f"{branch}.") for branch in branches) and not is_adapter(path)


def _branch(tree: Mapping, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _put(tree: dict, path: str, value: Any) -> None:
    *upper, last = path.split(".")
    for key in upper:
        tree = tree.setdefault(key, {})
    tree[last] = value

"""Flax NNX modules define a network; plain nested dicts hold its variables.

``nnx.jit`` and eager split/merge cost more than ten times the dispatch of a plain dict, so a module is split once, and
rebuilt from dicts only while a function is traced.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Collections = dict[str, Any]
"""``{"params": ..., "batch_stats": ..., "constants": ...}``, nested dicts of arrays with string keys."""


def _collection(variable: nnx.Variable) -> str:
    if isinstance(variable, nnx.Param):
        return "params"
    return "batch_stats" if isinstance(variable, nnx.BatchStat) else "constants"


def _insert(tree: dict, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(str(key), {})
    tree[str(path[-1])] = value


def _lookup(tree: Mapping, path: tuple, where: str) -> Any:
    for depth, key in enumerate(path):
        try:
            tree = tree[str(key)]
        except (KeyError, TypeError):
            raise KeyError(f"{where} lacks {'.'.join(map(str, path[: depth + 1]))}") from None
    return tree


def variables(module: nnx.Module) -> Collections:
    """The variables of a module as nested dicts. All three collections are present, possibly empty."""
    collections: Collections = {"params": {}, "batch_stats": {}, "constants": {}}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        _insert(collections[_collection(variable)], path, variable.get_value())
    return collections


@dataclasses.dataclass(frozen=True, eq=False)
class Definition:
    """A network without its values: what :func:`define` returns and :meth:`bind` fills."""

    graph: Any
    state: Any
    shapes: Collections

    def bind(self, collections: Mapping) -> Any:
        """The module with the given variables (arrays or tracers). Raises ``KeyError`` for a missing one."""
        filled = []
        for path, variable in nnx.to_flat_state(self.state):
            name = _collection(variable)
            filled.append((path, variable.replace(_lookup(collections[name], path, name))))
        return nnx.merge(self.graph, nnx.from_flat_state(filled))


def define(build: Callable[[nnx.Rngs], nnx.Module]) -> Definition:
    """Shapes and structure of the module that ``build(rngs)`` makes, without computing anything."""
    abstract = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    graph, state = nnx.split(abstract)
    return Definition(graph, state, variables(abstract))


def initialise(build: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> Collections:
    """Fresh variables, a pure function of ``key`` (jit-able, so that they can be born sharded)."""
    return variables(build(nnx.Rngs(key)))


def paths(tree: Mapping, prefix: str = "") -> list[str]:
    """Dotted paths of all leaves, in order."""
    found: list[str] = []
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        found += paths(value, path) if isinstance(value, Mapping) else [path]
    return found


def partition(tree: Mapping, predicate: Callable[[str], bool], prefix: str = "") -> tuple[dict, dict]:
    """Splits a nested dict by dotted path into (chosen, rest); empty branches are left out."""
    chosen: dict = {}
    rest: dict = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(value, Mapping):
            inside, outside = partition(value, predicate, path)
            if inside:
                chosen[name] = inside
            if outside:
                rest[name] = outside
        elif predicate(path):
            chosen[name] = value
        else:
            rest[name] = value
    return chosen, rest


def join(first: Mapping, second: Mapping) -> dict:
    """The inverse of :func:`partition`."""
    joined = dict(first)
    for name, value in second.items():
        joined[name] = join(joined[name], value) if name in joined else value
    return joined

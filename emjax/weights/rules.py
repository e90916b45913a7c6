"""How a PyTorch network's arrays are called and laid out, as rules on the paths of ours.

A Flax path such as ``trunk.blocks.3.attn.qkv.kernel`` tells nearly everything: the leaf's name and rank say what it
is (a linear layer, a convolution, a norm, an embedding), the rest is the module's name. A network adds only its
exceptions.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emjax.errors import UserError, nearest

State = dict[str, np.ndarray]
"""A PyTorch state dict: flat names to arrays."""

COLLECTIONS = ("params", "batch_stats", "constants")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Reads their array as ours and writes ours as theirs; both only move axes (views, no arithmetic)."""

    read: Callable[[np.ndarray], np.ndarray]
    write: Callable[[np.ndarray], np.ndarray]


def permuted(*axes: int) -> Layout:
    """Ours is theirs with the axes permuted."""
    return Layout(lambda x: x.transpose(axes), lambda x: x.transpose(np.argsort(axes)))


SAME = Layout(lambda x: x, lambda x: x)
CHANNELS_LAST = Layout(lambda x: np.moveaxis(x, 1, -1), lambda x: np.moveaxis(x, -1, 1))
"""(n, channels, ...) maps to (n, ..., channels)."""
KERNEL = Layout(
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)
"""Linear layers (out, in) to (in, out) and convolutions (out, in, ...) to (..., in, out), of any rank."""
TRANSPOSED_KERNEL = Layout(
    lambda x: np.moveaxis(x, (0, 1), (-2, -1)),
    lambda x: np.moveaxis(x, (-2, -1), (0, 1)),
)
"""Transposed convolutions (in, out, ...) to (..., in, out), not mirrored."""

LEAVES = {
    "kernel": ("weight", KERNEL),
    "scale": ("weight", SAME),
    "embedding": ("weight", SAME),
    "mean": ("running_mean", SAME),
    "var": ("running_var", SAME),
}
"""Our leaf names to theirs; a leaf that is not here has the same name and layout."""


@dataclasses.dataclass(frozen=True)
class Rules:
    """The exceptions of one network.

    ``renames``: (regular expression, replacement) applied in order to the whole translated name; ``layouts``: (regular
    expression on our path, layout), the first that matches counts; ``ignored``: regular expressions of their names that
    carry nothing and are not written back (counters of batches).
    """

    renames: Sequence[tuple[str, str]] = ()
    layouts: Sequence[tuple[str, Layout]] = ()
    ignored: Sequence[str] = (r"\.num_batches_tracked$",)

    def name(self, path: str) -> str:
        """Their name of our dotted path."""
        module, _, leaf = path.rpartition(".")
        theirs = LEAVES.get(leaf, (leaf, SAME))[0]
        name = f"{module}.{theirs}" if module else theirs
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def layout(self, path: str) -> Layout:
        for pattern, layout in self.layouts:
            if re.search(pattern, path):
                return layout
        return LEAVES.get(path.rpartition(".")[2], ("", SAME))[1]


def leaves(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Dotted path -> leaf of a nested dict."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        found.update(leaves(value, path) if isinstance(value, Mapping) else {path: value})
    return found


def nested(flat: Mapping[str, Any]) -> dict:
    """The inverse of :func:`leaves`."""
    tree: dict = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


@dataclasses.dataclass(frozen=True)
class Entry:
    """One array: where it is in ours, and its shape in theirs."""

    collection: str
    path: str
    shape: tuple[int, ...]
    layout: Layout


def entries(shapes: Mapping[str, Mapping], rules: Rules) -> dict[str, Entry]:
    """Their name -> entry, for a network whose collections have the given abstract arrays."""
    found: dict[str, Entry] = {}
    for collection in COLLECTIONS:
        for path, leaf in leaves(shapes.get(collection, {})).items():
            name, layout = rules.name(path), rules.layout(path)
            if name in found:
                raise AssertionError(f"rules give {name} to both {found[name].path} and {path}")
            shape = layout.write(np.broadcast_to(np.float32(0), leaf.shape)).shape
            found[name] = Entry(collection, path, shape, layout)
    return found


def _as_float32(array: np.ndarray) -> np.ndarray | None:
    """The array in float32 if that loses nothing, else None."""
    if array.dtype == np.float32:
        return array
    narrow = array.astype(np.float32)
    return narrow if np.array_equal(narrow.astype(array.dtype), array, equal_nan=True) else None


def _listed(title: str, lines: list[str]) -> list[str]:
    return [f"{len(lines)} {title}: " + "; ".join(lines)] if lines else []


def read_state(state: Mapping[str, np.ndarray], shapes: Mapping[str, Mapping], rules: Rules, what: str) -> dict:
    """A PyTorch state dict as our collections, float32, contiguous.

    ``shapes`` are the collections of the network with abstract arrays; ``what`` names the checkpoint and the network in
    messages. Raises :class:`UserError` that lists every unmatched, missing, misshapen and non-finite array.
    """
    expected = entries(shapes, rules)
    carried = {name for name in state if not any(re.search(pattern, name) for pattern in rules.ignored)}
    missing = sorted(set(expected) - carried)
    unmatched = [name + nearest(name, missing) for name in sorted(carried - set(expected))]
    misshapen, wrong = [], []
    flat: dict[str, dict[str, np.ndarray]] = {collection: {} for collection in COLLECTIONS}
    for name, entry in expected.items():
        if name not in carried:
            continue
        theirs = np.asarray(state[name])
        if theirs.shape != entry.shape:
            misshapen.append(f"{name} is {theirs.shape}, expected {entry.shape}")
            continue
        narrow = _as_float32(theirs)
        if narrow is None:
            wrong.append(f"{name} is {theirs.dtype} and does not fit float32")
        elif not np.isfinite(narrow).all():
            wrong.append(f"{name} has values that are not finite")
        else:
            flat[entry.collection][entry.path] = np.ascontiguousarray(entry.layout.read(narrow))
    problems = (
        _listed("names that the network has not", unmatched)
        + _listed("missing", missing)
        + _listed("of another shape", misshapen)
        + _listed("unusable", wrong)
    )
    if problems:
        raise UserError(f"{what}: " + " | ".join(problems))
    return {collection: nested(arrays) for collection, arrays in flat.items()}


def write_state(collections: Mapping[str, Mapping], rules: Rules) -> State:
    """Our collections under their names and in their layout; the exact inverse of :func:`read_state`."""
    state: State = {}
    for collection in COLLECTIONS:
        for path, array in leaves(collections.get(collection, {})).items():
            state[rules.name(path)] = np.ascontiguousarray(rules.layout(path).write(np.asarray(array)))
    return state


def parameter_count(tree: Mapping) -> int:
    """Number of values in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in leaves(tree).values())

"""A family of published networks: how its checkpoints are recognised, named and converted, both ways."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import emjax
from emjax.errors import UserError
from emjax.models.functional import Definition
from emjax.weights.files import (
    flatten,
    is_orbax,
    read_orbax,
    read_state_file,
    unflatten,
    write_orbax,
    write_safetensors,
    write_torch,
)
from emjax.weights.rules import Rules, State, leaves, read_state, write_state

EMJAX_NAMES = "emjax"
Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Spelling:
    """One way to name the arrays: rules, and what rules cannot say (tables that are split or doubled)."""

    rules: Rules
    prepare: Callable[[State], State] = dict
    finish: Callable[[State], State] = dict


@dataclasses.dataclass(frozen=True)
class Family:
    """``recognise`` gives the spelling of a state dict's names and shapes, or None if it is another network's;
    ``identify`` the settings (JSON values) of the network from them, raising :class:`UserError` where none fits;
    ``network`` the network of settings. ``spellings``: name -> how it is written; the first is the authors' own."""

    name: str
    spellings: Mapping[str, Spelling]
    recognise: Callable[[Shapes], str | None]
    identify: Callable[[Shapes, str, str], dict[str, Any]]
    network: Callable[[Mapping[str, Any]], Definition]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Collections of NumPy arrays with the settings of their network and where they came from."""

    family: Family
    settings: dict[str, Any]
    collections: dict[str, dict]
    source: dict[str, str]

    @property
    def meta(self) -> dict[str, Any]:
        """What is written beside the arrays."""
        return {
            "format": "emjax",
            "emjax": emjax.__version__,
            "model": self.family.name,
            "settings": self.settings,
            "source": self.source,
        }


def _from_own(collections: dict, meta: Mapping[str, Any], families: Sequence[Family], path: pathlib.Path) -> Checkpoint:
    """A checkpoint in emjax's own names, checked against its network."""
    known = {family.name: family for family in families}
    if meta.get("model") not in known:
        raise UserError(f"{path} holds a {meta.get('model')!r} network; expected one of {', '.join(known)}")
    family = known[meta["model"]]
    definition = family.network(meta["settings"])
    expected = {name: leaf.shape for name, leaf in leaves(definition.shapes).items()}
    found = {name: np.shape(leaf) for name, leaf in leaves(collections).items()}
    wrong = [f"{name} is not known" for name in sorted(found.keys() - expected.keys())]
    wrong += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    wrong += [
        f"{name} is {found[name]}, expected {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if wrong:
        raise UserError(f"{path} does not fit {family.name} {meta['settings']}: {'; '.join(wrong)}")
    return Checkpoint(family, dict(meta["settings"]), collections, dict(meta.get("source", {})))


def from_state(state: Mapping[str, np.ndarray], families: Sequence[Family], what: str) -> Checkpoint:
    """A state dict of any spelling of one of ``families``, strictly; :class:`UserError` names all that is wrong."""
    shapes = {name: tuple(np.shape(value)) for name, value in state.items()}
    for family in families:
        spelling = family.recognise(shapes)
        if spelling is None:
            continue
        settings = family.identify(shapes, spelling, what)
        definition = family.network(settings)
        chosen = family.spellings[spelling]
        label = f"{what} read as {family.name} {' '.join(str(value) for value in settings.values())} ({spelling} names)"
        collections = read_state(chosen.prepare(dict(state)), definition.shapes, chosen.rules, label)
        return Checkpoint(family, settings, collections, {"file": what, "names": spelling})
    known, some = ", ".join(family.name for family in families), ", ".join(sorted(state)[:5])
    raise UserError(f"{what} is no checkpoint of {known}: it has {len(state)} arrays such as {some}")


def read_checkpoint(path: str | pathlib.Path, families: Sequence[Family]) -> Checkpoint:
    """Any supported file or folder as a checkpoint of one of ``families``, every name and shape accounted for.

    Raises :class:`UserError` for a file that is damaged, holds code, or is not wholly and exactly one of the networks.
    """
    path = pathlib.Path(path)
    if is_orbax(path):
        return _from_own(*read_orbax(path), families, path)
    state, metadata = read_state_file(path)
    if "emjax" in metadata:
        return _from_own(unflatten(state), json.loads(metadata["emjax"]), families, path)
    return from_state(state, families, path.name)


def to_state(checkpoint: Checkpoint, names: str) -> State:
    """The arrays under the given spelling's names, in its layout. Raises :class:`UserError` for an unknown one."""
    if names == EMJAX_NAMES:
        return flatten(checkpoint.collections)
    if names not in checkpoint.family.spellings:
        known = ", ".join([*checkpoint.family.spellings, EMJAX_NAMES])
        raise UserError(f"names {names!r} are not known for {checkpoint.family.name}; expected one of {known}")
    spelling = checkpoint.family.spellings[names]
    return spelling.finish(write_state(checkpoint.collections, spelling.rules))


def write_checkpoint(path: str | pathlib.Path, checkpoint: Checkpoint, names: str | None = None) -> str:
    """Writes by the target's ending: ``.safetensors``, ``.pt``, anything else an Orbax folder. Returns the names used.

    A ``.pt`` has the authors' names unless told otherwise, ``.safetensors`` emjax's own; Orbax has no other.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        names = names or EMJAX_NAMES
        own = {"emjax": json.dumps(checkpoint.meta)} if names == EMJAX_NAMES else {}
        write_safetensors(path, to_state(checkpoint, names), {"format": "pt"} | own)
    elif path.suffix in (".pt", ".pth"):
        names = names or next(iter(checkpoint.family.spellings))
        if names == EMJAX_NAMES:
            raise UserError("a .pt file takes the names of its authors; write .safetensors or an Orbax folder instead")
        write_torch(path, to_state(checkpoint, names))
    else:
        if names not in (None, EMJAX_NAMES):
            raise UserError(f"an Orbax folder has emjax's own names; for {names} names give a .safetensors or .pt file")
        names = EMJAX_NAMES
        write_orbax(path, checkpoint.collections, checkpoint.meta)
    return names

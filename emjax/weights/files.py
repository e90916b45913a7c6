"""Checkpoint files: PyTorch (weights only), safetensors, Orbax. Nothing in a file is ever executed."""

import json
import os
import pathlib
import pickle
import re
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from emjax.errors import UserError
from emjax.weights.rules import COLLECTIONS, State, leaves, nested

_WRAPPERS = ("model", "state_dict", "model_state_dict", "model_weights", "net")
_DAMAGED = "is truncated or damaged: fetch the file again and compare its size"


def _without_torch(path: pathlib.Path) -> UserError:
    return UserError(
        f"{path} is a PyTorch file and PyTorch is not installed: pip install 'emjax[torch]', or use a .safetensors file"
    )


def _numpy(tensor: Any) -> np.ndarray:
    """A CPU tensor as an array; bfloat16 through its bits."""
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def read_torch(path: pathlib.Path, inside: tuple[str, ...] = _WRAPPERS) -> State:
    """The state dict of a ``.pt`` file, read with ``weights_only=True``.

    A dict that holds one under the first of the keys ``inside`` is unwrapped. Raises :class:`UserError` for a file with
    Python objects in it, a damaged file, a file without tensors, or where PyTorch is missing.
    """
    try:
        import torch
    except ImportError:
        raise _without_torch(path) from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function|type) `?([\w.]+)", str(error))
        what = f" ({found[1]})" if found else ""
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise UserError(
                f"{path} holds Python objects besides tensors{what}; loading it could run code, so it is refused: save "
                "its state dict alone, or use a .safetensors file"
            ) from None
        raise UserError(f"{path} {_DAMAGED}") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"{path} {_DAMAGED} ({str(error).splitlines()[0][:120]})") from None
    for key in inside:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise UserError(f"{path} holds a {type(loaded).__name__}; expected a dict of named tensors")
    others = [str(name) for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(f"{path} holds values that are not tensors: {', '.join(others[:10])}; expected a state dict")
    return {str(name): _numpy(value) for name, value in loaded.items()}


def read_safetensors(path: pathlib.Path) -> tuple[State, dict[str, str]]:
    """Arrays and metadata of a ``.safetensors`` file. Raises :class:`UserError` for a damaged one."""
    import safetensors
    from safetensors.numpy import load_file

    try:
        with safetensors.safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
        return load_file(path), metadata
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise UserError(f"{path} {_DAMAGED} ({str(error)[:120]})") from None


def _read_folder(path: pathlib.Path) -> tuple[State, dict[str, str]]:
    """A folder as Hugging Face lays it out: one safetensors file, or several with an index."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        state: State = {}
        for name in names:
            state.update(read_safetensors(path / name)[0])
        return state, {}
    if (path / "model.safetensors").is_file():
        return read_safetensors(path / "model.safetensors")
    raise UserError(f"{path} is a folder without model.safetensors and no Orbax checkpoint of emjax")


def is_orbax(path: pathlib.Path) -> bool:
    return path.is_dir() and (path / "params").is_dir() and (path / "meta").is_dir()


def read_state_file(path: str | pathlib.Path) -> tuple[State, dict[str, str]]:
    """A flat state dict, and the file's metadata, from a PyTorch or safetensors file or a Hugging Face folder.

    The kind is told by the content, not by the name. Raises :class:`UserError` for anything else.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise UserError(f"checkpoint {path} is not there")
    if path.is_dir():
        return _read_folder(path)
    with path.open("rb") as file:
        start = file.read(16)
    # Safetensors first: the length of its header, at the start, may begin with the byte of a pickle.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return read_safetensors(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return read_torch(path), {}
    if path.suffix in (".pt", ".pth", ".bin", ".safetensors") and (len(start) < 16 or start[8:9] == b"{"):
        raise UserError(f"{path} {_DAMAGED} (it has {path.stat().st_size} bytes)")
    raise UserError(f"{path} is neither a PyTorch nor a safetensors file (it starts with {start[:8]!r})")


def check_target(path: pathlib.Path, overwrite: bool) -> None:
    """Raises :class:`UserError` if ``path`` is there and may not be replaced, or its folder is not there."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} is there already; choose another name or pass --overwrite")
    if not path.absolute().parent.is_dir():
        raise UserError(f"folder {path.absolute().parent} of the target is not there")


def write_safetensors(path: pathlib.Path, state: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a whole file or none."""
    from safetensors.numpy import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, partial, dict(metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_torch(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes ``{"model": state dict}`` as the official SAM 2 files have it; a whole file or none."""
    try:
        import torch
    except ImportError:
        raise _without_torch(path) from None
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save({"model": {name: torch.from_numpy(np.array(value)) for name, value in state.items()}}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _checkpointer():
    import orbax.checkpoint as ocp

    return ocp, ocp.Checkpointer(ocp.CompositeCheckpointHandler())


def write_orbax(path: pathlib.Path, collections: Mapping[str, Mapping], meta: Mapping[str, Any]) -> None:
    """Saves ``params``, ``extra`` (the other collections that are not empty) and ``meta`` (JSON) as Orbax items."""
    ocp, checkpointer = _checkpointer()
    extra = {name: dict(tree) for name, tree in collections.items() if name != "params" and tree}
    items = {"params": ocp.args.StandardSave(dict(collections["params"])), "meta": ocp.args.JsonSave(dict(meta))}
    if extra:
        items["extra"] = ocp.args.StandardSave(extra)
    if path.exists():
        shutil.rmtree(path)
    with checkpointer:
        checkpointer.save(path.absolute(), args=ocp.args.Composite(**items))


def read_orbax(path: pathlib.Path) -> tuple[dict[str, dict], dict[str, Any]]:
    """Collections (NumPy arrays) and ``meta`` of :func:`write_orbax`. Raises :class:`UserError` for a damaged one."""
    import jax

    ocp, checkpointer = _checkpointer()
    items = {"params": ocp.args.StandardRestore(), "meta": ocp.args.JsonRestore()}
    if (path / "extra").is_dir():
        items["extra"] = ocp.args.StandardRestore()
    try:
        with checkpointer:
            restored = checkpointer.restore(path.absolute(), args=ocp.args.Composite(**items))
    except Exception as error:
        raise UserError(f"Orbax checkpoint {path} {_DAMAGED} ({str(error).splitlines()[0][:120]})") from None
    collections: dict[str, dict] = {name: {} for name in COLLECTIONS}
    collections["params"] = jax.tree.map(np.asarray, restored["params"])
    if "extra" in items:
        collections |= jax.tree.map(np.asarray, restored["extra"])
    return collections, dict(restored["meta"])


def flatten(collections: Mapping[str, Mapping]) -> State:
    """Collections as one flat dict, ``params.trunk.blocks.0...``: emjax's own names."""
    return {f"{name}.{path}": leaf for name, tree in collections.items() for path, leaf in leaves(tree).items()}


def unflatten(state: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """The inverse of :func:`flatten`."""
    return {name: {} for name in COLLECTIONS} | nested(state)

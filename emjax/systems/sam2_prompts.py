"""Prompts of a stack: from a JSON file, or from a label layer whose objects are to be followed."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emjax.data.volume import open_volume
from emjax.errors import UserError, nearest
from emjax.systems.sam2_session import check_points

_KEYS = ("object", "z", "points", "labels", "box", "mask", "id")


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One object on one slice: clicks (m, 2) row, column with labels (m,) 1 inside, 0 outside; a box (4,) row, column,
    row, column; or ``mask()``, which reads a binary mask (rows, columns) and excludes the others."""

    number: int
    z: int
    points: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.float32))
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    box: np.ndarray | None = None
    mask: Callable[[], np.ndarray] | None = None


def check_prompts(prompts: Sequence[Prompt], shape: tuple[int, int, int], where: str) -> None:
    """Raises :class:`UserError` for an empty list, and for prompts outside of a stack of ``shape`` (z, y, x)."""
    if not prompts:
        raise UserError(f"{where} has no prompts; expected at least one point, box or mask")
    seen = set()
    for prompt in prompts:
        if prompt.number < 1:
            raise UserError(f"{where}: object {prompt.number}; objects are numbered from 1")
        if not 0 <= prompt.z < shape[0]:
            raise UserError(
                f"{where}: object {prompt.number} is prompted on slice {prompt.z}; the stack has slices 0 to "
                f"{shape[0] - 1}"
            )
        if (prompt.number, prompt.z) in seen:
            raise UserError(f"{where}: object {prompt.number} is prompted twice on slice {prompt.z}; join the two")
        seen.add((prompt.number, prompt.z))
        if prompt.mask is None:
            check_points(prompt.number, prompt.z, prompt.points, prompt.labels, prompt.box, shape[1:])
        elif len(prompt.points) or prompt.box is not None:
            raise UserError(f"{where}: object {prompt.number} on slice {prompt.z} has a mask and points; give only one")


def _array(entry: Mapping[str, Any], key: str, width: int, where: str) -> np.ndarray:
    wrong = UserError(f"{where}: {key} is {entry.get(key)!r}; expected {width} numbers each")
    try:
        found = np.asarray(entry.get(key, []), np.float32)
    except (TypeError, ValueError):
        raise wrong from None
    if found.size and (found.ndim > 2 or found.shape[-1] != width):
        raise wrong
    return found.reshape(-1, width)


def _mask_of_layer(spec: str, z: int, number: int | None) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        plane = open_volume(spec)[z]
        return plane != 0 if number is None else plane == number

    return read


def _checked_mask(spec: str, z: int, number: int | None, shape: tuple[int, int, int], where: str) -> Callable:
    """A mask of a layer, once it is known to be there and not empty."""
    layer = open_volume(spec).require_axes("zyx")
    if layer.shape != tuple(shape):
        raise UserError(f"{where}: mask {spec} is {layer.shape}; the stack is {tuple(shape)}")
    mask = _mask_of_layer(spec, z, number)
    if 0 <= z < shape[0] and not mask().any():
        raise UserError(f"{where}: mask {spec} has no pixel{'' if number is None else f' of id {number}'} on slice {z}")
    return mask


def _from_entry(entry: Any, place: str, shape: tuple[int, int, int]) -> Prompt:
    if not isinstance(entry, Mapping):
        raise UserError(f'{place} is {entry!r}; expected an object such as {{"object": 1, "z": 0, "points": [[y, x]]}}')
    for key in entry:
        if key not in _KEYS:
            raise UserError(f"{place} has the key {key!r}{nearest(key, _KEYS)}; expected {', '.join(_KEYS)}")
    for key in ("object", "z"):
        if not isinstance(entry.get(key), int) or isinstance(entry.get(key), bool):
            raise UserError(f"{place}: {key} is {entry.get(key)!r}; expected a whole number")
    points = _array(entry, "points", 2, place)
    labels = np.asarray(entry.get("labels", [1] * len(points)))
    box = _array(entry, "box", 4, place)
    if len(box) > 1:
        raise UserError(f"{place} has {len(box)} boxes; expected one: row, column, row, column")
    mask = None
    if "mask" in entry:
        mask = _checked_mask(str(entry["mask"]), entry["z"], entry.get("id"), shape, place)
    return Prompt(entry["object"], entry["z"], points, labels, box[0] if len(box) else None, mask)


def read_json(path: str | pathlib.Path, shape: tuple[int, int, int]) -> list[Prompt]:
    """Prompts of a file ``{"prompts": [{"object": 1, "z": 4, "points": [[y, x], ...], "labels": [1, 0, ...],
    "box": [y0, x0, y1, x1]}, {"object": 2, "z": 0, "mask": "layer.h5:labels", "id": 7}]}``, in voxels.

    Labels are 1 by default. Raises :class:`UserError` for anything that does not fit a stack of ``shape``.
    """
    path = pathlib.Path(path)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"prompts {path} are not there") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"prompts {path} are not valid JSON: {error}") from None
    entries = content.get("prompts") if isinstance(content, Mapping) else content
    if not isinstance(entries, list):
        raise UserError(f'prompts {path}: expected a list, or an object with the list "prompts"')
    prompts = [_from_entry(entry, f"{path}, prompt {i}", shape) for i, entry in enumerate(entries)]
    check_prompts(prompts, shape, str(path))
    return prompts


def from_layer(spec: str, shape: tuple[int, int, int], slices: Sequence[int] = (), least: int = 16) -> list[Prompt]:
    """Every object of a label layer as a mask prompt with its own id: on ``slices``, or where its area is largest.

    Parts of less than ``least`` pixels are left out. Reads one slice at a time. Raises :class:`UserError` if the
    layer's shape is not ``shape``, a slice is outside of it, or nothing is labelled.
    """
    layer = open_volume(spec).require_axes("zyx")
    if layer.shape != tuple(shape):
        raise UserError(f"label layer {spec} is {layer.shape}; the stack is {tuple(shape)}")
    if not np.issubdtype(layer.dtype, np.integer):
        raise UserError(f"label layer {spec} is {layer.dtype}; expected integer ids, 0 for background")
    outside = [z for z in slices if not 0 <= z < shape[0]]
    if outside:
        raise UserError(f"prompt slices {outside} are outside of the stack, which has slices 0 to {shape[0] - 1}")
    areas: dict[int, dict[int, int]] = {}
    for z in slices or range(shape[0]):
        numbers, counts = np.unique(layer[z], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist()):
            if number > 0 and count >= least:
                areas.setdefault(number, {})[z] = count
    chosen = {number: list(found) if slices else [max(found, key=found.__getitem__)] for number, found in areas.items()}
    places = [(number, z) for number in sorted(chosen) for z in chosen[number]]
    prompts = [Prompt(number, z, mask=_mask_of_layer(spec, z, number)) for number, z in places]
    where = f"slices {list(slices)}" if slices else "all slices"
    check_prompts(prompts, shape, f"label layer {spec} ({where}, parts of at least {least} pixels)")
    return prompts

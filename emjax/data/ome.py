"""Metadata of volumes: units, OME-Zarr multiscales (0.4 and 0.5), and the attribute names that EM files use."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Triple = tuple[float, float, float]

NANOMETRES = {
    "nm": 1.0,
    "nanometer": 1.0,
    "nanometre": 1.0,
    "nanometers": 1.0,
    "um": 1e3,
    "µm": 1e3,
    "μm": 1e3,
    "micron": 1e3,
    "microns": 1e3,
    "micrometer": 1e3,
    "micrometre": 1e3,
    "micrometers": 1e3,
    "mm": 1e6,
    "millimeter": 1e6,
    "millimetre": 1e6,
    "cm": 1e7,
    "centimeter": 1e7,
    "centimetre": 1e7,
    "m": 1e9,
    "meter": 1e9,
    "metre": 1e9,
    "inch": 2.54e7,
    "angstrom": 0.1,
    "ångström": 0.1,
    "å": 0.1,
    "pm": 1e-3,
    "picometer": 1e-3,
    "picometre": 1e-3,
}

# Ours first: a file that carries several of them was written by us.
_VOXEL_SIZE_NM = ("voxel_size_nm", "resolution", "voxel_size")
_OFFSET_NM = ("offset_nm", "offset")

# Names that say where and how large voxels are; they are not handed on as attributes of the volume.
GEOMETRY = frozenset(
    {*_VOXEL_SIZE_NM, *_OFFSET_NM, "element_size_um", "units", "unit", "axes", "axis_names", "axistags", "transform"}
    | {"pixelResolution", "downsamplingFactors", "_ARRAY_DIMENSIONS", "ome", "omero", "multiscales"}
)


def in_nanometres(value: float, unit: str) -> float | None:
    """``value`` in nm, or None if the unit is unknown. Rounded to 12 digits, so that 0.004 um is 4 nm."""
    factor = NANOMETRES.get(unit.strip().lower())
    return None if factor is None else float(f"{value * factor:.12g}")


def _triple(value: Any) -> Triple | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
    if numbers.shape not in ((3,), (4,)) or not np.isfinite(numbers).all():
        return None
    # A fourth, leading number belongs to the channel axis.
    return tuple(float(number) for number in numbers[-3:])  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """A JSON-able copy of an attribute value (NumPy scalars and arrays, bytes, nested mappings)."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def voxel_size_of(attributes: Mapping[str, Any]) -> Triple | None:
    """Voxel size in nm, zyx, from the attribute names of CREMI, LSD/funlib, PlantSeg and emjax files.

    ``voxel_size_nm``, ``resolution`` and ``voxel_size`` are nm unless ``units`` says otherwise; ``element_size_um`` is
    micrometres.
    """
    for name in _VOXEL_SIZE_NM:
        size = _triple(attributes.get(name))
        if size and min(size) > 0:
            units = attributes.get("units", attributes.get("unit"))
            if name == "voxel_size_nm" or not units:
                return size
            names = [units] * 3 if isinstance(units, str) else [str(unit) for unit in units if unit][-3:]
            converted = [in_nanometres(value, unit) for value, unit in zip(size, names)]
            return tuple(converted) if len(converted) == 3 and None not in converted else None  # type: ignore[return-value]
    size = _triple(attributes.get("element_size_um"))
    return tuple(float(f"{value * 1e3:.12g}") for value in size) if size and min(size) > 0 else None  # type: ignore[return-value]


def offset_of(attributes: Mapping[str, Any]) -> Triple | None:
    """Offset in nm, zyx, from ``offset_nm`` or ``offset``."""
    for name in _OFFSET_NM:
        if (offset := _triple(attributes.get(name))) is not None:
            return offset
    return None


def axes_of(attributes: Mapping[str, Any]) -> str | None:
    """Stored axes as a string of t, c, z, y, x, from ``axes``, ``axis_names`` or ilastik's ``axistags``."""
    found = attributes.get("axes", attributes.get("axis_names", attributes.get("_ARRAY_DIMENSIONS")))
    if found is None and isinstance(attributes.get("axistags"), str):
        try:
            found = [axis["key"] for axis in json.loads(attributes["axistags"])["axes"]]
        except (ValueError, KeyError, TypeError):
            return None
    if found is None:
        return None
    if isinstance(found, str):
        names = list(found.replace(",", "").replace(" ", ""))
    else:
        names = [str(axis.get("name", "") if isinstance(axis, Mapping) else axis) for axis in found]
    letters = "".join(name.strip("^ ").lower()[:1] for name in names)
    return letters if set(letters) <= set("tczyx") and len(set(letters)) == len(letters) else None


def multiscales_of(attributes: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first multiscale image of a group's attributes: 0.5 (under ``ome``) or 0.4 (at the top)."""
    ome = attributes.get("ome")
    found = ome.get("multiscales") if isinstance(ome, Mapping) else attributes.get("multiscales")
    if isinstance(found, Sequence) and found and isinstance(found[0], Mapping) and found[0].get("datasets"):
        return found[0]
    return None


def level_paths(multiscale: Mapping[str, Any]) -> list[str]:
    return [str(dataset["path"]) for dataset in multiscale["datasets"]]


def multiscale_axes(multiscale: Mapping[str, Any], dimensions: int) -> str:
    """Stored axes of a multiscale image; version 0.1 to 0.3 without axes means the last of t, c, z, y, x."""
    axes = axes_of({"axes": multiscale["axes"]}) if multiscale.get("axes") else None
    return axes if axes and len(axes) == dimensions else "tczyx"[-dimensions:]


def level_geometry(multiscale: Mapping[str, Any], path: str) -> tuple[Triple | None, Triple, Triple | None]:
    """Voxel size and offset (nm, zyx) of one level, and the bare scale if the axes carry no unit of length.

    Transformations of the level come first, those of the whole image after them (OME-NGFF 0.4 and 0.5, section
    "multiscales").
    """
    axes = multiscale.get("axes") or []
    names = [str(axis.get("name", "")).lower() if isinstance(axis, Mapping) else str(axis).lower() for axis in axes]
    units = {
        name: axis.get("unit") for name, axis in zip(names, axes) if isinstance(axis, Mapping) and axis.get("unit")
    }
    if not names:
        return None, (0.0, 0.0, 0.0), None
    scale = np.ones(len(names))
    translation = np.zeros(len(names))
    dataset = next(item for item in multiscale["datasets"] if str(item["path"]) == path)
    steps = list(dataset.get("coordinateTransformations") or [])
    steps += list(multiscale.get("coordinateTransformations") or [])
    for step in steps:
        if step.get("type") == "scale" and len(step.get("scale", ())) == len(names):
            scale = scale * step["scale"]
            translation = translation * step["scale"]
        elif step.get("type") == "translation" and len(step.get("translation", ())) == len(names):
            translation = translation + step["translation"]
    if not set("zyx") <= set(names):
        return None, (0.0, 0.0, 0.0), None
    order = [names.index(name) for name in "zyx"]
    if not steps:
        return None, (0.0, 0.0, 0.0), None
    size = [in_nanometres(float(scale[i]), str(units[names[i]])) if names[i] in units else None for i in order]
    if None in size:
        return None, (0.0, 0.0, 0.0), tuple(float(scale[i]) for i in order)  # type: ignore[return-value]
    offset = [in_nanometres(float(translation[i]), str(units[names[i]])) for i in order]
    return tuple(size), tuple(offset), None  # type: ignore[return-value,arg-type]


def build_multiscales(
    name: str, axes: str, levels: Sequence[tuple[str, Triple, Triple]], version: str, method: str | None = None
) -> list[dict[str, Any]]:
    """The ``multiscales`` list of an image.

    Args:
        name: name of the image.
        axes: "zyx" or "czyx".
        levels: for each level its path, its voxel size and its offset (nm, zyx).
        version: "0.4" (written inside the list) or "0.5" (written by the caller beside it).
        method: how the levels were made, e.g. "mean" or "mode".
    """
    channel = [{"name": "c", "type": "channel"}] if axes.startswith("c") else []
    image: dict[str, Any] = {
        "name": name,
        "axes": channel + [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"],
        "datasets": [
            {
                "path": path,
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0] * len(channel) + list(size)},
                    {"type": "translation", "translation": [0.0] * len(channel) + list(offset)},
                ],
            }
            for path, size, offset in levels
        ],
    }
    if version == "0.4":
        image["version"] = "0.4"
    if method:
        image["type"] = method
    return [image]

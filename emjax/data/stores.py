"""Opening chunked stores through TensorStore: Zarr 2 and 3 (OME-Zarr 0.4 and 0.5), N5 and Neuroglancer precomputed.

Precomputed and N5 keep x, y, z on disk; the sources here say so in their axes and hand blocks over in Fortran order,
so that the transpose costs nothing.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emjax.data import ome
from emjax.data.folder import Folder, context, join, one_line, sibling
from emjax.data.sources import Box, Opened, describe_box
from emjax.errors import UserError, nearest

MARKER = "emjax"
WRITTEN_CACHE = 1 << 20  # bytes, of each volume opened for writing
Triple = tuple[float, float, float]


# --- the source ------------------------------------------------------------------------------------------------------


class StoreSource:
    """An array opened by TensorStore on first use; reads and writes in stored axis order."""

    def __init__(self, where: str, spec: Mapping[str, Any], *, fortran: bool = False, writable: bool = False):
        self.where = where
        self.spec = dict(spec)
        self.fortran = fortran
        self.writable = writable
        self._handle: ts.TensorStore | None = None
        array = self._array()
        layout = array.chunk_layout
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = np.dtype(array.dtype.numpy_dtype)
        self.chunks: tuple[int, ...] | None = tuple(int(n or 1) for n in layout.read_chunk.shape or ())
        self.shards: tuple[int, ...] | None = tuple(int(n or 1) for n in layout.write_chunk.shape or ())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _array(self) -> ts.TensorStore:
        if self._handle is None:
            with one_line(f"cannot open {self.where}"):
                # Written volumes would fill the cache of the process with pieces that are not asked for again.
                small = {"cache_pool": {"total_bytes_limit": WRITTEN_CACHE}} if self.writable else {}
                opened = ts.open(
                    {**self.spec, **small}, open=True, read=True, write=self.writable or None, context=context()
                ).result()
                # Precomputed volumes start at their voxel offset; boxes here start at 0.
                self._handle = opened[ts.d[:].translate_to[0]] if opened.rank else opened
        return self._handle

    def read(self, box: Box) -> np.ndarray:
        with one_line(f"cannot read {self.where} at {describe_box(box)}"):
            return self._array()[box].read(order="F" if self.fortran else "C").result()

    def write(self, box: Box, array: np.ndarray) -> None:
        with one_line(f"cannot write {self.where} at {describe_box(box)}"):
            self._array()[box].write(array).result()


# --- opening ---------------------------------------------------------------------------------------------------------

MARKS = {
    "zarr": ("zarr.json", ".zarray", ".zgroup", ".zattrs"),
    "n5": ("attributes.json",),
    "precomputed": ("info",),
}


def detect(location: str) -> str | None:
    """Format of a folder ("zarr", "n5", "precomputed") by its name, else by the documents in it; None if unknown."""
    names = re.findall(r"\.(zarr2?3?|n5|precomputed)(?=/|$)", location)
    if names:
        return "zarr" if names[-1].startswith("zarr") else names[-1]
    folder = Folder(location)
    for name, marks in MARKS.items():
        if any(folder.bytes(mark) is not None for mark in marks):
            return name
    return None


def open_store(location: str, kind: str, dataset: str | None, *, writable: bool = False) -> Opened:
    """Open an array of a store.

    Args:
        location: local folder or address.
        kind: "zarr", "n5" or "precomputed".
        dataset: path inside the store; a level of a multiscale image; the key or number of a precomputed scale.
        writable: open for writing too.

    Raises:
        UserError: nothing there, damaged metadata, or several arrays and none chosen (the message lists them).
    """
    if "://" not in location and not os.path.isdir(location):
        raise UserError(f"{location} does not exist" + sibling(location))
    opener = {"zarr": _open_zarr, "n5": _open_n5, "precomputed": _open_precomputed}[kind]
    return opener(location, dataset, writable)


def _open_zarr(location: str, dataset: str | None, writable: bool) -> Opened:
    folder = Folder(location, write=writable)
    node = folder.child(dataset) if dataset else folder
    kind, attributes, metadata = zarr_node(node)
    if kind == "group":
        multiscale = ome.multiscales_of(attributes)
        if multiscale is None:
            return _open_only_array(location, dataset, node, metadata, writable)
        path = ome.level_paths(multiscale)[0]
        level = node.child(path)
        kind, own, metadata = zarr_node(level)
        if kind != "array":
            raise UserError(f"{node.location} is an OME-Zarr image but its level {path!r} is missing")
        return _opened_zarr(level, own, metadata, writable, image=(attributes, multiscale, path))
    if kind == "array":
        return _opened_zarr(node, attributes, metadata, writable, image=_image_above(node))
    if dataset and zarr_node(folder)[0]:
        return _no_such_key(location, dataset, _zarr_keys(folder, zarr_node(folder)[2]))
    raise UserError(
        f"{node.location} is not a Zarr array or group: no zarr.json, .zarray, .zgroup or .zattrs in it{node.denied}"
    )


def zarr_node(folder: Folder) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Kind ("array", "group" or ""), attributes and metadata of a node, Zarr 3 before Zarr 2."""
    if (found := folder.json("zarr.json")) is not None:
        return str(found.get("node_type", "array")), dict(found.get("attributes") or {}), found
    if (found := folder.json(".zarray")) is not None:
        return "array", folder.json(".zattrs") or {}, found
    group, attributes = folder.json(".zgroup"), folder.json(".zattrs")
    if group is None and attributes is None:
        return "", {}, {}
    return "group", attributes or {}, {"consolidated": folder.json(".zmetadata")}


def _image_above(node: Folder) -> tuple[dict[str, Any], Mapping[str, Any], str] | None:
    """The multiscale image of which an array is a level, if it is one: attributes, multiscale, path of the level."""
    path, upper = node.location.rstrip("/").rpartition("/")[2], node.parent()
    for _ in range(2):
        if upper is None:
            return None
        kind, attributes, _ = zarr_node(upper)
        multiscale = ome.multiscales_of(attributes) if kind == "group" else None
        if multiscale is not None:
            return (attributes, multiscale, path) if path in ome.level_paths(multiscale) else None
        path, upper = f"{upper.location.rpartition('/')[2]}/{path}", upper.parent()
    return None


def _opened_zarr(
    node: Folder,
    own: dict[str, Any],
    metadata: dict[str, Any],
    writable: bool,
    image: tuple[dict[str, Any], Mapping[str, Any], str] | None,
) -> Opened:
    driver = "zarr3" if metadata.get("zarr_format") == 3 else "zarr"
    source = StoreSource(node.location, {"driver": driver, "kvstore": node.spec}, writable=writable)
    dimensions = len(source.shape)
    named = metadata.get("dimension_names")
    axes = ome.axes_of(own) or (ome.axes_of({"axes": named}) if named and all(named) else None)
    size, offset = ome.voxel_size_of(own), ome.offset_of(own)
    attributes = dict(own)
    if image is not None:
        above, multiscale, path = image
        axes = ome.multiscale_axes(multiscale, dimensions)
        level_size, level_offset, unitless = ome.level_geometry(multiscale, path)
        if size is None:
            size, offset = level_size, level_offset if level_size else offset
        attributes = {**above, **attributes}
        if unitless:
            attributes["scale_without_unit"] = list(unitless)
    return _finish(source, axes or "tczyx"[-dimensions:], size, offset, attributes)


def _finish(
    source: StoreSource, axes: str, size: Triple | None, offset: Triple | None, attributes: dict[str, Any]
) -> Opened:
    marker = attributes.pop(MARKER, None)
    marker = marker if isinstance(marker, Mapping) else {}
    kept = {key: value for key, value in attributes.items() if key not in ome.GEOMETRY}
    kept.update(marker.get("attributes", {}))
    complete, keep = bool(marker.get("complete", True)), marker.get("axes") == "czyx"
    return Opened(source, axes, size, offset or (0.0, 0.0, 0.0), kept, complete, keep)


def _zarr_keys(folder: Folder, metadata: Mapping[str, Any]) -> list[str]:
    """Paths of the arrays under a group: from consolidated metadata, else by walking a local folder."""
    consolidated = metadata.get("consolidated") or metadata.get("consolidated_metadata") or {}
    entries = consolidated.get("metadata") or {}
    keys = [key.removesuffix("/.zarray") for key in entries if key.endswith("/.zarray")]
    keys += [key for key, node in entries.items() if isinstance(node, Mapping) and node.get("node_type") == "array"]
    return sorted(keys) or _walk_zarr(folder)


def _walk_zarr(folder: Folder, depth: int = 5) -> list[str]:
    """Arrays and multiscale images under a local group; the levels of an image are not listed one by one."""
    if folder.spec["driver"] != "file":
        return []
    multiscale = ome.multiscales_of(zarr_node(folder)[1])
    levels = set(ome.level_paths(multiscale)) if multiscale else set()
    found: list[str] = []
    for name in sorted(os.listdir(folder.spec["path"])):
        if name in levels or not os.path.isdir(os.path.join(folder.spec["path"], name)):
            continue
        child = folder.child(name)
        kind, attributes, _ = zarr_node(child)
        if kind == "array" or ome.multiscales_of(attributes):
            found.append(name)
        if kind != "array" and depth:
            found += [f"{name}/{key}" for key in _walk_zarr(child, depth - 1)]
    return found


def _walk(folder: Folder, is_array: Callable[[Folder], bool], depth: int = 5) -> list[str]:
    if folder.spec["driver"] != "file":
        return []
    found: list[str] = []
    for name in sorted(os.listdir(folder.spec["path"])):
        if not os.path.isdir(os.path.join(folder.spec["path"], name)):
            continue
        child = folder.child(name)
        if is_array(child):
            found.append(name)
        elif depth:
            found += [f"{name}/{key}" for key in _walk(child, is_array, depth - 1)]
    return found


def _open_only_array(
    location: str, dataset: str | None, node: Folder, metadata: Mapping[str, Any], writable: bool
) -> Opened:
    keys = _zarr_keys(node, metadata)
    if len(keys) != 1:
        raise UserError(choose_one(node.location, keys))
    return _open_zarr(location, join(dataset, keys[0]) if dataset else keys[0], writable)


def choose_one(where: str, keys: Sequence[str]) -> str:
    if not keys:
        return f"{where} is a group in which no arrays were found; name one: {where}:ARRAY"
    return f"{where} holds {len(keys)} arrays: {', '.join(keys)}; name one, e.g. {where}:{keys[0]}"


def _no_such_key(where: str, dataset: str, keys: Sequence[str]) -> Opened:
    found = f"found {', '.join(keys)}" if keys else "no arrays were found"
    raise UserError(f"{where} has no array {dataset!r}: {found}{nearest(dataset, keys)}")


# --- N5 --------------------------------------------------------------------------------------------------------------


def _reverse(value: Triple | None) -> Triple | None:
    return value and (value[2], value[1], value[0])


def _n5_resolution(attributes: Mapping[str, Any]) -> Triple | None:
    """Voxel size in nm, zyx, of N5 attributes, which are x, y, z (N5 viewer, Paintera, COSEM conventions)."""
    transform = attributes.get("transform")
    if isinstance(transform, Mapping) and {"axes", "scale", "units"} <= set(transform):
        axes = [str(axis).lower() for axis in transform["axes"]]
        if set("zyx") <= set(axes):
            places = [axes.index(axis) for axis in "zyx"]
            size = [ome.in_nanometres(float(transform["scale"][i]), str(transform["units"][i])) for i in places]
            return None if None in size else tuple(size)  # type: ignore[return-value]
    pixel = attributes.get("pixelResolution")
    if isinstance(pixel, Mapping):
        return _reverse(
            ome.voxel_size_of({"resolution": pixel.get("dimensions"), "units": pixel.get("unit") or "unknown"})
        )
    resolution, units = attributes.get("resolution", pixel), attributes.get("units")
    spatial = [value[:3] if isinstance(value, list) else value for value in (resolution, units)]
    return _reverse(ome.voxel_size_of({"resolution": spatial[0], "units": spatial[1]}))


def _open_n5(location: str, dataset: str | None, writable: bool) -> Opened:
    folder = Folder(location, write=writable)
    node = folder.child(dataset) if dataset else folder
    attributes = node.json("attributes.json")
    is_array = lambda child: "dimensions" in (child.json("attributes.json") or {})  # noqa: E731
    if attributes is None or "dimensions" not in attributes:
        if is_array(node.child("s0")):
            return _open_n5(location, join(dataset, "s0") if dataset else "s0", writable)
        keys = _walk(folder, is_array)
        if dataset and not any(key.startswith(dataset.strip("/") + "/") for key in keys):
            return _no_such_key(location, dataset, keys)
        below = [key for key in keys if not dataset or key.startswith(dataset.strip("/") + "/")]
        if len(below) != 1:
            raise UserError(choose_one(location, below))
        return _open_n5(location, below[0], writable)
    source = StoreSource(node.location, {"driver": "n5", "kvstore": node.spec}, fortran=True, writable=writable)
    above: Mapping[str, Any] = {}
    upper = node.parent()
    if upper is not None:
        above = upper.json("attributes.json") or {}
    factors = ome._triple(attributes.get("downsamplingFactors")) or (1.0, 1.0, 1.0)
    size, base = _n5_resolution(attributes), _n5_resolution(above)
    offset = _reverse(ome.offset_of({"offset": attributes.get("offset")}))
    if size is None and base is not None:
        size = tuple(b * f for b, f in zip(base, factors[::-1]))  # type: ignore[assignment]
        if offset is None:
            offset = tuple(b * (f - 1) / 2 for b, f in zip(base, factors[::-1]))  # type: ignore[assignment]
    hidden = {"dimensions", "blockSize", "dataType", "compression"}
    kept = {key: value for key, value in {**above, **attributes}.items() if key not in hidden}
    named = ome.axes_of(attributes)
    return _finish(source, named or "xyzct"[: len(source.shape)], size, offset, kept)


# --- precomputed -----------------------------------------------------------------------------------------------------


def _open_precomputed(location: str, dataset: str | None, writable: bool) -> Opened:
    folder = Folder(location, write=writable)
    info = folder.json("info")
    if info is None:
        raise UserError(f"{location} is not a precomputed volume: no info file in it{folder.denied}")
    scales = info.get("scales")
    if not scales or "data_type" not in info:
        kind = info.get("@type", "unknown type")
        raise UserError(f"{location}/info has no scales ({kind}); a neuroglancer_multiscale_volume is expected")
    keys = [str(scale.get("key")) for scale in scales]
    if dataset is None:
        level = 0
    elif dataset in keys:
        level = keys.index(dataset)
    elif dataset.isdigit() and int(dataset) < len(keys):
        level = int(dataset)
    else:
        raise UserError(f"{location} has no scale {dataset!r}: found {', '.join(keys)} (numbers 0 to {len(keys) - 1})")
    source = StoreSource(
        location,
        {"driver": "neuroglancer_precomputed", "kvstore": folder.spec, "scale_index": level},
        fortran=True,
        writable=writable,
    )
    scale = scales[level]
    size = tuple(float(value) for value in scale["resolution"][::-1])
    finest = tuple(float(value) for value in scales[0]["resolution"][::-1])
    corner = tuple(float(value) for value in (scale.get("voxel_offset") or [0, 0, 0])[::-1])
    # The corner of a coarse voxel is that of its first fine one; offsets here are centres, as in OME-Zarr.
    offset = tuple(c * s + (s - f) / 2 for c, s, f in zip(corner, size, finest))
    kept = {key: value for key, value in info.items() if key in ("type", MARKER)}
    return _finish(source, "xyzc", size, offset, kept)  # type: ignore[arg-type]

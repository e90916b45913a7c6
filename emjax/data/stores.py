"""Chunked stores through TensorStore: Zarr 2 and 3 (OME-Zarr 0.4 and 0.5), N5 and Neuroglancer precomputed.

Local folders and ``gs://``, ``s3://``, ``http(s)://`` addresses are treated alike. Precomputed and N5 keep x, y, z on
disk; the sources here say so in their axes and hand blocks over in Fortran order, so that the transpose costs nothing.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emjax.data import ome
from emjax.data.sources import Box, Opened
from emjax.errors import UserError, nearest

MARKER = "emjax"
Triple = tuple[float, float, float]


@functools.cache
def context() -> ts.Context:
    """One context per process: it bounds the cache of shard indices and gives up on a dead server within seconds."""
    return ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 64 << 20},
            "http_request_retries": {"max_retries": 5, "initial_delay": "100ms", "max_delay": "2s"},
        }
    )


def reason(error: BaseException) -> str:
    """The message of a TensorStore, HDF5 or system error, without the specifications that TensorStore appends."""
    if isinstance(error, OSError) and error.strerror and error.args[1:2] != ("",):
        return error.strerror
    text = re.split(r" \[(?:tensorstore_spec|source locations|http_response_code|domain)=?", str(error))[0]
    return " ".join(text.split())[:300] or type(error).__name__


@contextlib.contextmanager
def one_line(doing: str) -> Iterator[None]:
    """Turn errors of TensorStore and of the system into one :class:`UserError` that starts with ``doing``."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, RuntimeError, KeyError, NotImplementedError) as error:
        raise UserError(f"{doing}: {reason(error)}") from None


# --- addresses -------------------------------------------------------------------------------------------------------


def is_remote(location: str) -> bool:
    return re.match(r"(gs|s3|https?)://", location) is not None


def join(location: str, *parts: str) -> str:
    return "/".join([location.rstrip("/")] + [part.strip("/") for part in parts if part.strip("/")])


def _machine_of(vendor: str) -> bool:
    """Whether this machine is rented from ``vendor``, where credentials come from the machine itself."""
    card = pathlib.Path("/sys/class/dmi/id/sys_vendor")
    return card.is_file() and vendor in card.read_text(errors="replace")


def _has_google_credentials() -> bool:
    default = pathlib.Path.home() / ".config" / "gcloud" / "application_default_credentials.json"
    return bool(os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")) or default.exists() or _machine_of("Google")


def _has_amazon_credentials() -> bool:
    names = ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_FULL_URI")
    stored = (pathlib.Path.home() / ".aws" / "credentials").exists()
    return any(os.environ.get(name) for name in names) or stored or _machine_of("Amazon")


def kvstore(location: str, *, anonymous: bool = False) -> dict[str, Any]:
    """TensorStore key-value store of a folder: a local path, ``gs://``, ``s3://`` or ``http(s)://``.

    ``anonymous`` reads a public ``gs://`` bucket through its https address and a public ``s3://`` bucket unsigned,
    which needs no account. ``AWS_ENDPOINT_URL`` and ``AWS_REGION`` are honoured.
    """
    scheme, _, rest = location.rpartition("://")
    if scheme == "file":
        location, scheme = rest, ""
    if not scheme:
        return {"driver": "file", "path": os.path.abspath(location) + "/"}
    host, _, path = rest.partition("/")
    path = path.rstrip("/") + "/" if path.strip("/") else ""
    if scheme == "gs":
        if anonymous:
            return {"driver": "http", "base_url": "https://storage.googleapis.com", "path": f"/{host}/{path}"}
        return {"driver": "gcs", "bucket": host, "path": path}
    if scheme == "s3":
        store: dict[str, Any] = {"driver": "s3", "bucket": host, "path": path}
        if anonymous:
            store["aws_credentials"] = {"type": "anonymous"}
        if os.environ.get("AWS_ENDPOINT_URL"):
            store["endpoint"] = os.environ["AWS_ENDPOINT_URL"]
        if os.environ.get("AWS_REGION"):
            store["aws_region"] = os.environ["AWS_REGION"]
        return store
    if scheme in ("http", "https"):
        return {"driver": "http", "base_url": f"{scheme}://{host}", "path": f"/{path}"}
    raise UserError(f"{location}: unknown scheme {scheme}://, expected gs://, s3://, http://, https:// or a local path")


class Folder:
    """A folder that holds a store: JSON documents and child folders, local or remote."""

    def __init__(self, location: str, *, write: bool = False):
        self.location = location.rstrip("/") or "/"
        credentials = _has_google_credentials if location.startswith("gs://") else _has_amazon_credentials
        self.anonymous = not write and location.startswith(("gs://", "s3://")) and not credentials()
        self.spec = kvstore(self.location, anonymous=self.anonymous)
        with one_line(f"cannot reach {self.location}"):
            self._kv = ts.KvStore.open(self.spec, context=context()).result()

    def bytes(self, name: str) -> bytes | None:
        if self.spec["driver"] == "file" and not os.path.isfile(os.path.join(self.spec["path"], name)):
            return None
        with one_line(f"cannot read {join(self.location, name)}"):
            found = self._kv.read(name).result()
        return found.value if found.state == "value" else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object ``name``, or None if there is none.

        Raises:
            UserError: it is not a JSON object.
        """
        raw = self.bytes(name)
        if raw is None:
            return None
        try:
            document = json.loads(raw)
        except ValueError:
            document = None
        if not isinstance(document, dict):
            raise UserError(f"{join(self.location, name)} is damaged: not a JSON object ({len(raw)} bytes)")
        return document

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        with one_line(f"cannot write {join(self.location, name)}"):
            self._kv.write(name, json.dumps(ome.plain(document), indent=2).encode()).result()

    def child(self, *parts: str) -> "Folder":
        return Folder(join(self.location, *parts), write=not self.anonymous)

    def parent(self) -> "Folder | None":
        scheme, mark, rest = self.location.rpartition("://")
        if "/" not in rest.rstrip("/"):
            return None
        upper = rest.rstrip("/").rpartition("/")[0]
        return Folder(f"{scheme}{mark}{upper}", write=not self.anonymous) if upper else None

    def remove(self) -> None:
        with one_line(f"cannot remove {self.location}"):
            if self.spec["driver"] == "file":
                shutil.rmtree(self.spec["path"])
            else:
                self._kv.delete_range(ts.KvStore.KeyRange()).result()


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
        self.chunks = tuple(int(n) for n in layout.read_chunk.shape)
        self.shards = tuple(int(n) for n in layout.write_chunk.shape)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _array(self) -> ts.TensorStore:
        if self._handle is None:
            with one_line(f"cannot open {self.where}"):
                opened = ts.open(
                    self.spec, open=True, read=True, write=self.writable or None, context=context()
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


def describe_box(box: Box) -> str:
    return "[" + ", ".join(f"{part.start}:{part.stop}" for part in box) + "]"


# --- opening ---------------------------------------------------------------------------------------------------------

_MARKS = {
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
    for name, marks in _MARKS.items():
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


def sibling(location: str) -> str:
    folder = os.path.dirname(os.path.abspath(location))
    return nearest(os.path.basename(location), os.listdir(folder)) if os.path.isdir(folder) else ""


def _open_zarr(location: str, dataset: str | None, writable: bool) -> Opened:
    folder = Folder(location, write=writable)
    node = folder.child(dataset) if dataset else folder
    kind, attributes, metadata = _zarr_node(node)
    if kind == "group":
        multiscale = ome.multiscales_of(attributes)
        if multiscale is None:
            return _open_only_array(location, dataset, node, metadata, writable)
        path = ome.level_paths(multiscale)[0]
        level = node.child(path)
        kind, own, metadata = _zarr_node(level)
        if kind != "array":
            raise UserError(f"{node.location} is an OME-Zarr image but its level {path!r} is missing")
        return _opened_zarr(level, own, metadata, writable, image=(attributes, multiscale, path))
    if kind == "array":
        return _opened_zarr(node, attributes, metadata, writable, image=_image_above(node))
    if dataset and _zarr_node(folder)[0]:
        return _no_such_key(location, dataset, _zarr_keys(folder, _zarr_node(folder)[2]))
    raise UserError(f"{node.location} is not a Zarr array or group: no zarr.json, .zarray, .zgroup or .zattrs in it")


def _zarr_node(folder: Folder) -> tuple[str, dict[str, Any], dict[str, Any]]:
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
        kind, attributes, _ = _zarr_node(upper)
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
    return sorted(keys) or _walk(folder, lambda child: _zarr_node(child)[0] == "array")


def _walk(folder: Folder, is_array: Any, depth: int = 5) -> list[str]:
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
        raise UserError(f"{location} is not a precomputed volume: no info file in it")
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


# --- creating --------------------------------------------------------------------------------------------------------


def default_chunks(shape: Sequence[int], voxel_size: Sequence[float] | None) -> tuple[int, ...]:
    """Chunks of about 64^3 voxels, flatter for anisotropic volumes; one channel each."""
    thick = voxel_size is not None and voxel_size[0] >= 3 * min(voxel_size[1:])
    spatial = (16, 128, 128) if thick else (64, 64, 64)
    return (1,) * (len(shape) - 3) + tuple(min(c, n) for c, n in zip(spatial, shape[-3:]))


def default_shards(shape: Sequence[int], chunks: Sequence[int]) -> tuple[int, ...]:
    """Shards of up to four chunks along each spatial axis, no larger than what the volume needs."""
    spatial = tuple(c * min(4, -(-n // c)) for c, n in zip(chunks[-3:], shape[-3:]))
    return tuple(chunks[:-3]) + spatial


def check_chunks(where: str, shape: Sequence[int], chunks: Sequence[int], shards: Sequence[int] | None) -> None:
    for name, value in (("chunks", chunks), ("shards", shards)):
        if value is not None and (len(value) != len(shape) or min(value) < 1):
            raise UserError(f"{where}: {name} {tuple(value)} do not fit a volume of {len(shape)} axes")
    if shards is not None and any(s % c for s, c in zip(shards, chunks)):
        raise UserError(f"{where}: shards {tuple(shards)} are not whole multiples of the chunks {tuple(chunks)}")


def zarr_array_spec(
    version: int,
    shape: Sequence[int],
    dtype: np.dtype,
    axes: str,
    chunks: Sequence[int],
    shards: Sequence[int] | None,
) -> dict[str, Any]:
    """Driver and metadata of a new Zarr array (blosc with zstd; 0 where nothing was written)."""
    if version == 2:
        return {
            "driver": "zarr",
            "metadata": {
                "shape": list(shape),
                "chunks": list(chunks),
                "dtype": dtype.str if dtype.itemsize > 1 else "|" + dtype.str[1:],
                "dimension_separator": "/",
                "compressor": {"id": "blosc", "cname": "zstd", "clevel": 3, "shuffle": 1},
                "fill_value": 0,
            },
        }
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    shuffled = {
        "cname": "zstd",
        "clevel": 3,
        "shuffle": "shuffle" if dtype.itemsize > 1 else "noshuffle",
        "typesize": dtype.itemsize,
        "blocksize": 0,
    }
    codecs: list[dict[str, Any]] = [
        little if dtype.itemsize > 1 else {"name": "bytes"},
        {"name": "blosc", "configuration": shuffled},
    ]
    if shards is not None:
        sharding = {
            "chunk_shape": list(chunks),
            "codecs": codecs,
            "index_codecs": [little, {"name": "crc32c"}],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return {
        "driver": "zarr3",
        "metadata": {
            "shape": list(shape),
            "data_type": dtype.name,
            "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shards or chunks)}},
            "codecs": codecs,
            "dimension_names": list(axes),
        },
    }


def create_array(folder: Folder, spec: Mapping[str, Any]) -> None:
    with one_line(f"cannot create {folder.location}"):
        ts.open({**spec, "kvstore": folder.spec}, create=True, open=False, context=context()).result()


def exists(location: str) -> bool:
    """Whether something is stored at a folder or address."""
    if not is_remote(location):
        return os.path.exists(location)
    folder = Folder(location, write=True)
    return any(folder.bytes(mark) is not None for marks in _MARKS.values() for mark in marks)


def clear_for(location: str, overwrite: bool) -> None:
    """Refuse to write over something, or remove it when asked to.

    Raises:
        UserError: something is there and ``overwrite`` is off, or it is not a volume.
    """
    if not exists(location):
        return
    if not is_remote(location) and os.path.isdir(location) and not os.listdir(location):
        return
    if not overwrite:
        raise UserError(f"{location} exists; remove it, choose another output, or pass --overwrite")
    folder = Folder(location, write=True)
    if not any(folder.bytes(mark) is not None for marks in _MARKS.values() for mark in marks):
        raise UserError(f"{location} exists and is not a volume: it will not be overwritten")
    folder.remove()


def create_zarr(
    location: str,
    dataset: str | None,
    version: int,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    voxel_size: Triple,
    offset: Triple,
    chunks: Sequence[int],
    shards: Sequence[int] | None,
    attributes: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Create an OME-Zarr image of one level "0" (version 3: OME-Zarr 0.5, version 2: 0.4), marked unfinished."""
    node_location = join(location, dataset) if dataset else location
    clear_for(node_location, overwrite)
    if version == 2 and shards is not None:
        raise UserError(f"{location}: Zarr 2 has no shards; leave them out or write Zarr 3")
    fresh = not exists(node_location)
    axes = "czyx" if len(shape) == 4 else "zyx"
    try:
        _create_groups(location, dataset, version)
        node = Folder(node_location, write=True)
        name = re.sub(r"\.zarr$", "", node_location.rpartition("/")[2])
        image = ome.build_multiscales(name, axes, [("0", voxel_size, offset)], "0.5" if version == 3 else "0.4")
        write_group(node, version, {**attributes, MARKER: {"complete": False, "axes": axes}}, image)
        create_array(node.child("0"), zarr_array_spec(version, shape, dtype, axes, chunks, shards))
    except UserError:
        if fresh and not is_remote(node_location):
            shutil.rmtree(node_location, ignore_errors=True)
        raise


def write_group(
    node: Folder, version: int, attributes: Mapping[str, Any], image: Sequence[Mapping[str, Any]] | None
) -> None:
    """Write the metadata of a group, with its multiscale image if it has one."""
    if version == 3:
        omero = {"ome": {**dict(attributes.get("ome", {})), "version": "0.5", "multiscales": image}} if image else {}
        document = {"zarr_format": 3, "node_type": "group", "attributes": {**attributes, **omero}}
        node.write_json("zarr.json", document)
    else:
        node.write_json(".zgroup", {"zarr_format": 2})
        node.write_json(".zattrs", {**attributes, "multiscales": image} if image else attributes)


def _create_groups(location: str, dataset: str | None, version: int) -> None:
    """Groups from the root of the container down to the parent of ``dataset``; lists images under ``labels/``."""
    parts = [part for part in (dataset or "").split("/") if part]
    for depth in range(len(parts)):
        folder = Folder(join(location, *parts[:depth]), write=True)
        kind, attributes, metadata = _zarr_node(folder)
        if kind == "array":
            raise UserError(f"{folder.location} is an array: nothing can be created inside it")
        if kind and (version == 3) != (metadata.get("zarr_format") == 3):
            raise UserError(f"{folder.location} is a Zarr {2 if version == 3 else 3} group; write the same version")
        if depth and parts[depth - 1] == "labels":
            name = "/".join(parts[depth:])
            upper = dict(attributes.get("ome", {})) if version == 3 else attributes
            listed = sorted({*upper.get("labels", []), name})
            attributes = (
                {**attributes, "ome": {**upper, "version": "0.5", "labels": listed}}
                if version == 3
                else {**attributes, "labels": listed}
            )
        elif kind:
            continue
        write_group(folder, version, attributes, None)


def create_n5(
    location: str,
    dataset: str | None,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    voxel_size: Triple,
    offset: Triple,
    chunks: Sequence[int],
    attributes: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Create an N5 dataset (x, y, z on disk; attributes x, y, z), marked unfinished."""
    node_location = join(location, dataset) if dataset else location
    clear_for(node_location, overwrite)
    fresh = not exists(node_location)
    axes = "xyzc"[: len(shape)]
    try:
        if dataset:
            root = Folder(location, write=True)
            if root.json("attributes.json") is None:
                root.write_json("attributes.json", {"n5": "2.5.0"})
        node = Folder(node_location, write=True)
        metadata = {
            "dimensions": list(shape[::-1]),
            "blockSize": list(chunks[::-1]),
            "dataType": dtype.name,
            "compression": {"type": "gzip", "level": 5},
            "axes": list(axes),
        }
        create_array(node, {"driver": "n5", "metadata": metadata})
        written = node.json("attributes.json") or {}
        channel = len(shape) - 3
        written.update(
            resolution=[*voxel_size[::-1], *[1.0] * channel],
            offset=list(offset[::-1]),
            units=["nm"] * 3 + [""] * channel,
            pixelResolution={"dimensions": list(voxel_size[::-1]), "unit": "nm"},
        )
        written[MARKER] = {"complete": False, "axes": "czyx"[4 - len(shape) :], "attributes": dict(attributes)}
        node.write_json("attributes.json", written)
    except UserError:
        if fresh and not is_remote(node_location):
            shutil.rmtree(node_location, ignore_errors=True)
        raise


def _precomputed_scale(
    shape: Sequence[int], corner: Sequence[int], voxel_size: Triple, chunks: Sequence[int], compressed: bool
) -> dict[str, Any]:
    scale: dict[str, Any] = {
        "size": list(shape[::-1]),
        "resolution": list(voxel_size[::-1]),
        "voxel_offset": list(corner[::-1]),
        "chunk_size": list(chunks[::-1]),
        "encoding": "compressed_segmentation" if compressed else "raw",
    }
    if compressed:
        scale["compressed_segmentation_block_size"] = [8, 8, 8]
    return scale


def create_precomputed(
    location: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    voxel_size: Triple,
    offset: Triple,
    chunks: Sequence[int],
    attributes: Mapping[str, Any],
    overwrite: bool,
    encoding: str | None,
) -> None:
    """Create a precomputed volume of one scale, marked unfinished.

    Args:
        encoding: "raw" or "compressed_segmentation"; None: the latter for uint32 and uint64 without channels.
    """
    clear_for(location, overwrite)
    labels = dtype.name in ("uint32", "uint64") and len(shape) == 3
    encoding = encoding or ("compressed_segmentation" if labels else "raw")
    if encoding == "compressed_segmentation" and dtype.name not in ("uint32", "uint64"):
        raise UserError(f"{location}: compressed_segmentation holds uint32 or uint64, not {dtype.name}")
    if encoding not in ("raw", "compressed_segmentation"):
        raise UserError(f"{location}: encoding {encoding!r} cannot be written; raw or compressed_segmentation can")
    corner = [o / s for o, s in zip(offset, voxel_size)]
    if not np.allclose(corner, np.round(corner), atol=1e-3):
        raise UserError(
            f"{location}: precomputed volumes start at a whole voxel, but the offset {offset} nm is {tuple(corner)} "
            "voxels"
        )
    fresh = not exists(location)
    scale = _precomputed_scale(
        shape[-3:], [round(c) for c in corner], voxel_size, chunks[-3:], encoding == "compressed_segmentation"
    )
    kind = "segmentation" if labels else "image"
    multiscale = {"data_type": dtype.name, "num_channels": shape[0] if len(shape) == 4 else 1, "type": kind}
    try:
        folder = Folder(location, write=True)
        create_array(
            folder,
            {"driver": "neuroglancer_precomputed", "multiscale_metadata": multiscale, "scale_metadata": scale},
        )
        info = folder.json("info") or {}
        info[MARKER] = {"complete": False, "axes": "czyx"[4 - len(shape) :], "attributes": dict(attributes)}
        folder.write_json("info", info)
    except UserError:
        if fresh and not is_remote(location):
            shutil.rmtree(location, ignore_errors=True)
        raise


# --- the marker ------------------------------------------------------------------------------------------------------


def update_marker(location: str, kind: str, dataset: str | None, **changes: Any) -> None:
    """Change entries of the marker that emjax keeps in the metadata of what it wrote (``complete``, ``attributes``)."""
    folder = Folder(join(location, dataset) if dataset and kind != "precomputed" else location, write=True)
    names = {"zarr": ("zarr.json", ".zattrs"), "n5": ("attributes.json",), "precomputed": ("info",)}[kind]
    for name in names:
        document = folder.json(name)
        if document is None:
            continue
        holder = document.setdefault("attributes", {}) if name == "zarr.json" else document
        holder[MARKER] = {**dict(holder.get(MARKER) or {}), **changes}
        folder.write_json(name, document)
        return
    raise UserError(f"{folder.location}: nothing to mark, no {' or '.join(names)} in it")

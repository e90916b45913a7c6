"""Creating chunked stores through TensorStore: OME-Zarr 0.5 and 0.4, N5 and Neuroglancer precomputed."""

import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from emjax.data import ome
from emjax.data.folder import Folder, context, is_remote, join, one_line
from emjax.data.stores import MARKER, MARKS, zarr_node
from emjax.errors import UserError

Triple = tuple[float, float, float]


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
    return any(folder.bytes(mark) is not None for marks in MARKS.values() for mark in marks)


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
    if not any(folder.bytes(mark) is not None for marks in MARKS.values() for mark in marks):
        raise UserError(f"{location} exists and is not a volume: it will not be overwritten")
    folder.remove()


def first_missing(location: str, dataset: str | None) -> str | None:
    """The outermost folder that creating ``dataset`` in the container ``location`` will make; None if all are there."""
    parts = [part for part in (dataset or "").split("/") if part]
    for depth in range(len(parts) + 1):
        if not exists(join(location, *parts[:depth])):
            return join(location, *parts[:depth])
    return None


def remove_unfinished(location: str | None) -> None:
    """Remove a local store of ours that failed, together with what writes in flight still bring."""
    if location is None or is_remote(location):
        return
    absent = 0
    for _ in range(100):
        absent = 0 if os.path.exists(location) else absent + 1
        if absent == 3:
            return
        shutil.rmtree(location, ignore_errors=True)
        time.sleep(0.05)


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
    fresh = first_missing(location, dataset)
    axes = "czyx" if len(shape) == 4 else "zyx"
    try:
        _create_groups(location, dataset, version)
        node = Folder(node_location, write=True)
        name = re.sub(r"\.zarr$", "", node_location.rpartition("/")[2])
        image = ome.build_multiscales(name, axes, [("0", voxel_size, offset)], "0.5" if version == 3 else "0.4")
        write_group(node, version, {**attributes, MARKER: {"complete": False, "axes": axes}}, image)
        create_array(node.child("0"), zarr_array_spec(version, shape, dtype, axes, chunks, shards))
    except UserError:
        remove_unfinished(fresh)
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
        kind, attributes, metadata = zarr_node(folder)
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
    fresh = first_missing(location, dataset)
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
        remove_unfinished(fresh)
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
    fresh = first_missing(location, None)
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
        remove_unfinished(fresh)
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

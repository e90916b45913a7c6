"""Volumes: one way to open, and one to create, every format; arrays are z, y, x (or channel, z, y, x), sizes in nm.

``open_volume`` never reads voxels: it returns a :class:`Volume`, which reads a block when it is indexed.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from emjax.data import files, ome, stores, stores_write
from emjax.data.folder import join, one_line
from emjax.data.location import STORES, Location, locate, output_location
from emjax.data.sources import (
    ChunkCache,
    InMemory,
    Opened,
    Source,
    View,
    box_shape,
    describe_box,
    resolve_index,
    whole,
)
from emjax.errors import UserError

Triple = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Volume:
    """A volume on disk, in the cloud or in memory, read block by block: ``volume[z0:z1, y0:y1, x0:x1]``.

    Attributes:
        spec: how it was named.
        source: where its voxels come from, already in the order of ``axes``.
        axes: "zyx", or "czyx" with channels first.
        voxel_size: nm, zyx; None if the file does not say and nobody was asked.
        offset: position of voxel (0, 0, 0) in nm, zyx.
        attributes: what else the file says, e.g. ``offsets`` and ``scale`` of affinities.
        complete: False while the command that writes it has not finished.
        output: set on volumes made by :func:`create_volume`.
    """

    spec: str
    source: Source
    axes: str
    voxel_size: Triple | None = None
    offset: Triple = (0.0, 0.0, 0.0)
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    complete: bool = True
    output: "_Output | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Length of each axis, in the order of ``axes``."""
        return tuple(self.source.shape)

    @property
    def spatial_shape(self) -> tuple[int, int, int]:
        """Lengths of z, y, x."""
        return tuple(self.source.shape[-3:])  # type: ignore[return-value]

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype

    @property
    def ndim(self) -> int:
        return len(self.source.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole volume in memory."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def chunks(self) -> tuple[int, ...] | None:
        """Smallest block that is read at once; None if any is equally cheap."""
        return self.source.chunks

    @property
    def shards(self) -> tuple[int, ...] | None:
        """Smallest block that is written at once; writers of different blocks should not share one."""
        return self.source.shards

    def __getitem__(self, index: Any) -> np.ndarray:
        """Read a block with NumPy's meaning of integers, slices and ``...``; always a new array in C order.

        Raises:
            UserError: the block cannot be read (damaged chunk, server gone, ...).
        """
        box, after = resolve_index(index, self.shape)
        if 0 in box_shape(box):
            return np.empty(box_shape(box), self.dtype)[after]
        return np.asarray(self.source.read(box)[after], order="C")

    def __setitem__(self, index: Any, array: Any) -> None:
        """Write a block (step 1). The array must have the shape of the block, or be a scalar.

        Raises:
            UserError: wrong shape, values that the stored dtype cannot hold, or the disk refuses.
        """
        box, after = resolve_index(index, self.shape)
        if any(isinstance(step, slice) and step.step not in (None, 1) for step in after):
            raise UserError(f"{self.spec}: blocks are written with step 1")
        target = tuple(n for n, step in zip(box_shape(box), after) if isinstance(step, slice))
        array = fitting(np.asarray(array), self.dtype, self.spec)
        if array.ndim and array.shape != target:
            raise UserError(f"{self.spec}: a block of shape {array.shape} was given for {describe_box(box)}")
        if 0 not in box_shape(box):
            self.source.write(box, np.broadcast_to(array, target).reshape(box_shape(box)))

    def describe(self) -> str:
        """One line: name, axes, shape, dtype, voxel size, offset. Commands print it at opening."""
        size = " x ".join(f"{v:g}" for v in self.voxel_size) + " nm" if self.voxel_size else "unknown"
        parts = [
            f"axes {self.axes}",
            f"shape {' x '.join(map(str, self.shape))}",
            self.dtype.name,
            f"voxel size {size}",
            f"offset {', '.join(f'{v:g}' for v in self.offset)} nm",
        ]
        return f"{self.spec}: {', '.join(parts)}" + ("" if self.complete else ", NOT FINISHED")

    def require_voxel_size(self) -> Triple:
        """The voxel size in nm, zyx.

        Raises:
            UserError: it is unknown; the message names ``--voxel-size``.
        """
        if self.voxel_size is None:
            bare = self.attributes.get("scale_without_unit")
            why = f" (its OME-Zarr scale {bare} has no unit)" if bare else ""
            raise UserError(f"{self.spec}: voxel size unknown{why}; give it in nm, z,y,x: --voxel-size 40,4,4")
        return self.voxel_size

    def require_axes(self, axes: str) -> "Volume":
        """This volume, if its axes are ``axes`` ("zyx" or "czyx").

        Raises:
            UserError: they are others.
        """
        if self.axes != axes:
            shape = " x ".join(map(str, self.shape))
            raise UserError(f"{self.spec}: {self.ndim} axes {self.axes} ({shape}), expected {len(axes)} axes {axes}")
        return self

    def crop(self, box: Sequence[slice]) -> "Volume":
        """A view of part of the volume: one slice per axis, or three for z, y, x; the offset moves along."""
        index = (slice(None),) * (self.ndim - len(box)) + tuple(box)
        region, after = resolve_index(index, self.shape)
        if any(not isinstance(step, slice) or step.step not in (None, 1) for step in after):
            raise UserError(f"{self.spec}: crop takes slices of step 1")
        if 0 in box_shape(region):
            raise UserError(f"{self.spec}: the region {tuple(box)} lies outside of the shape {self.shape}")
        size = self.voxel_size or (1.0, 1.0, 1.0)
        first = [part.start for part in region[-3:]]
        if self.voxel_size is None and any(first):
            raise UserError(f"{self.spec}: a crop needs the voxel size; give it in nm, z,y,x: --voxel-size 40,4,4")
        offset = tuple(o + f * s for o, f, s in zip(self.offset, first, size))
        view = View(self.source, tuple(range(self.ndim)), region)
        return dataclasses.replace(self, source=view, offset=offset, output=None)

    def channel(self, number: int) -> "Volume":
        """One channel as a volume of axes zyx."""
        self.require_axes("czyx")
        if not 0 <= number < self.shape[0]:
            raise UserError(f"{self.spec}: no channel {number}, it has {self.shape[0]} (numbered from 0)")
        region = (slice(number, number + 1), *whole(self.shape[1:]))
        return dataclasses.replace(self, source=View(self.source, (1, 2, 3), region), axes="zyx", output=None)

    def close(self) -> None:
        """Finish a volume that is being written: single files get their name now; does nothing for others."""
        if self.output is not None:
            self.output.finish()

    def __enter__(self) -> "Volume":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if self.output is None:
            return
        if kind is None:
            self.output.finish()
            mark_complete(self.spec)
        else:
            self.output.discard()


def fitting(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """``array`` as ``dtype``.

    Raises:
        UserError: a cast would change values: floats to integers, or integers that are too large or negative.
    """
    if array.dtype == dtype or array.dtype == bool or np.can_cast(array.dtype, dtype, "safe"):
        return array.astype(dtype, copy=False)
    if dtype.kind == "f":
        return array.astype(dtype)
    if array.dtype.kind not in "iu":
        raise UserError(f"{name} holds {dtype.name}: {array.dtype.name} values would be cut; convert them first")
    if array.size:
        low, high, limits = int(array.min()), int(array.max()), np.iinfo(dtype)
        if low < limits.min or high > limits.max:
            raise UserError(f"{name} holds {dtype.name}: values {low} to {high} do not fit")
    return array.astype(dtype)


def check_finite(block: np.ndarray, name: str) -> np.ndarray:
    """``block`` itself, if it holds no NaN and no infinity.

    Raises:
        UserError: it does; the message says how many and where the first is.
    """
    if block.dtype.kind == "f":
        bad = ~np.isfinite(block)
        if bad.any():
            first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
            raise UserError(f"{name}: {int(bad.sum())} of {bad.size} values are NaN or infinite, the first at {first}")
    return block


def triple(value: Any, name: str, *, positive: bool = False) -> Triple:
    """Three numbers, from a sequence or from text such as "40,4,4".

    Raises:
        UserError: not three finite numbers, or not positive where they must be.
    """
    parts = re.split(r"[,x\s]+", value.strip()) if isinstance(value, str) else value
    try:
        numbers = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not np.isfinite(numbers).all() or (positive and min(numbers) <= 0):
        kind = "positive numbers" if positive else "numbers"
        raise UserError(f"{name}: found {value!r}, expected three {kind} in nm, in the order z,y,x, e.g. 40,4,4")
    return numbers  # type: ignore[return-value]


# --- opening ---------------------------------------------------------------------------------------------------------


def open_volume(
    spec: str | os.PathLike,
    *,
    dataset: str | None = None,
    voxel_size: Any = None,
    offset: Any = None,
    axes: str | None = None,
    writable: bool = False,
    allow_incomplete: bool = False,
) -> Volume:
    """Open a volume, lazily.

    Args:
        spec: ``path.zarr`` (version 2 or 3; an OME-Zarr image opens at its finest level), ``path.zarr/level`` or
            ``path.zarr:array``, ``path.n5:dataset``, ``precomputed://folder`` (``:scale`` behind it),
            ``file.h5:dataset``, ``stack.tif``, ``slices/*.png``, a folder of PNG or TIFF sections, ``array.npy``.
            Stores may lie at ``gs://``, ``s3://`` and ``http(s)://`` addresses.
        dataset: dataset, array, level or scale, where the spec does not name it.
        voxel_size: nm, zyx; wins over what the file says.
        offset: nm, zyx; wins over what the file says.
        axes: stored order, e.g. "xyz", where the file is silent or wrong.
        writable: open for writing too (chunked stores and HDF5).
        allow_incomplete: open a volume whose writer has not finished (implied by ``writable``).

    Raises:
        UserError: missing, damaged, empty, unfinished, of the wrong dimensionality or of no numeric type.
    """
    name = os.fspath(spec)
    place = locate(name, dataset)
    if place.kind in ("zarr", "n5", "precomputed"):
        opened = stores.open_store(place.path, place.kind, place.dataset, writable=writable)
    elif place.kind == "hdf5":
        opened = files.open_hdf5_dataset(place.path, place.dataset, writable=writable)
    elif writable:
        raise UserError(f"{name}: only Zarr, N5, precomputed and HDF5 volumes can be opened for writing")
    elif place.kind == "tiff":
        opened = files.open_tiff(place.path, place.dataset)
    elif place.kind == "npy":
        opened = files.open_numpy(place.path)
    else:
        opened = files.open_sections(place.path)
    shown = name if place.dataset is None or place.dataset in name else f"{name}:{place.dataset}"
    volume = _arrange(shown, opened, axes)
    if not (volume.complete or writable or allow_incomplete):
        raise UserError(f"{shown} is not finished: run the command that writes it again to complete it")
    changes: dict[str, Any] = {}
    if voxel_size is not None:
        changes["voxel_size"] = triple(voxel_size, "voxel size", positive=True)
    if offset is not None:
        changes["offset"] = triple(offset, "offset")
    return dataclasses.replace(volume, **changes) if changes else volume


def _arrange(name: str, opened: Opened, axes: str | None) -> Volume:
    """Put the stored axes into the order zyx or czyx; axes t and c of length 1 disappear."""
    source = opened.source
    stored = (axes or opened.axes).lower()
    shape = "x".join(map(str, source.shape)) or "scalar"
    if source.dtype.kind not in "buif":
        raise UserError(f"{name} holds {source.dtype}, expected numbers")
    if len(source.shape) < 3 or len(source.shape) > 5:
        raise UserError(
            f"{name} has {len(source.shape)} dimensions ({shape}), expected 3 (z, y, x) or 4 (channel, z, y, x)"
        )
    if 0 in source.shape:
        raise UserError(f"{name} is empty (shape {shape})")
    if len(stored) != len(source.shape) or len(set(stored)) != len(stored) or not set(stored) <= set("tczyx"):
        raise UserError(
            f"{name}: axes {stored!r} do not describe its shape {shape}; give a permutation of z, y, x, c, t"
        )
    if "z" not in stored and len(stored) == 3 and set("yx") <= set(stored):
        stored = "".join(letter if letter in "yx" else "z" for letter in stored)
    if not set("zyx") <= set(stored):
        raise UserError(f"{name}: axes {stored!r} lack one of z, y, x")
    length = dict(zip(stored, source.shape))
    if length.get("t", 1) != 1:
        raise UserError(f"{name} has {length['t']} time points (axes {stored}, shape {shape}); one is expected")
    wanted = "czyx" if length.get("c", 1) > 1 or (opened.keep_channel and "c" in length) else "zyx"
    order = tuple(stored.index(letter) for letter in wanted)
    if order != tuple(range(len(source.shape))):
        source = View(source, order, whole(source.shape))
    return Volume(name, source, wanted, opened.voxel_size, opened.offset, opened.attributes, opened.complete)


# --- creating --------------------------------------------------------------------------------------------------------


class _Output:
    """What remains to be done to a volume being written: a single file gets its name only when it is whole."""

    def __init__(self, path: str, temporary: str | None = None, source: Any = None, fresh: str | None = None):
        self.path, self.temporary, self.source, self.fresh = path, temporary, source, fresh
        self._cleanup = weakref.finalize(self, _forget, temporary) if temporary else None

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(f"{self.path}: a single file is written by one process; write .zarr from several")

    def finish(self) -> None:
        if self.temporary is None or self._cleanup is None or not self._cleanup.alive:
            return
        self.source.close()
        with one_line(f"cannot write {self.path}"):
            with open(self.temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(self.temporary, self.path)
        self._cleanup.detach()

    def discard(self) -> None:
        """Leave nothing behind of an output that failed."""
        if self._cleanup is not None:
            with contextlib.suppress(UserError):
                self.source.close()
            self._cleanup()
        elif self.fresh:
            stores_write.remove_unfinished(self.fresh)


def _forget(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def create_volume(
    path: str | os.PathLike,
    shape: Sequence[int],
    dtype: Any,
    *,
    voxel_size: Any,
    offset: Any = (0.0, 0.0, 0.0),
    chunks: Sequence[int] | None = None,
    shards: Sequence[int] | None = None,
    attributes: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    format: str | None = None,
    encoding: str | None = None,
) -> Volume:
    """Create a volume of zeros to be written by ``volume[box] = array``.

    ``with create_volume(...) as out:`` finishes the volume at the end and leaves nothing behind after an error. Without
    ``with``, stores are written block by block, in any order and by any number of processes, and the one who knows
    that all blocks are there calls :func:`mark_complete`; single files appear under their name at ``close()``.

    Args:
        path: ``out.zarr`` (OME-Zarr 0.5, sharded), ``out.zarr:labels/neurons`` (an image inside), ``out.n5:dataset``,
            ``precomputed://folder``, ``out.h5:dataset`` ("main" if none is named) or ``out.tif``.
        shape: (z, y, x) or (channel, z, y, x).
        dtype: numeric type; bool is stored as uint8.
        voxel_size: nm, zyx.
        offset: nm, zyx.
        chunks: block read at once, in the axes of ``shape``; by default about 64^3, flatter for thick sections.
        shards: block written at once (Zarr 3): whole multiples of ``chunks``; by default up to four along each axis.
            The same as ``chunks`` means none.
        attributes: JSON-able metadata, e.g. ``offsets`` of affinities.
        overwrite: replace a volume that is there (never anything else).
        format: one of :data:`FORMATS` where the suffix does not say it; "zarr2" writes OME-Zarr 0.4.
        encoding: of precomputed volumes: "raw" or "compressed_segmentation".

    Raises:
        UserError: something is there already, the metadata does not fit, or the place cannot be written.
    """
    name = os.fspath(path)
    place = output_location(name, format)
    lengths = tuple(int(n) for n in shape)
    if len(lengths) not in (3, 4) or min(lengths) < 1:
        raise UserError(f"{name}: shape {lengths} is not (z, y, x) or (channel, z, y, x) of positive lengths")
    kind = np.dtype(np.uint8) if np.dtype(dtype) == bool else np.dtype(dtype).newbyteorder("=")
    if kind.kind not in "uif":
        raise UserError(f"{name}: a volume of {np.dtype(dtype)} cannot be written, only numbers")
    size, origin = triple(voxel_size, "voxel size", positive=True), triple(offset, "offset")
    pieces = tuple(int(c) for c in chunks) if chunks is not None else stores_write.default_chunks(lengths, size)
    stores_write.check_chunks(name, lengths, pieces, shards)
    notes = ome.plain(dict(attributes or {}))
    if encoding is not None and place.kind != "precomputed":
        raise UserError(f"{name}: encoding {encoding!r} is for precomputed volumes")
    geometry: dict[str, Any] = {"voxel_size": size, "offset": origin, "attributes": notes}

    if place.kind in ("hdf5", "tiff"):
        source, output = _create_file(name, place, lengths, kind, pieces, overwrite, geometry)
        return Volume(name, source, "czyx" if len(lengths) == 4 else "zyx", size, origin, notes, False, output)
    if shards is not None and place.kind != "zarr" and tuple(shards) != pieces:
        raise UserError(f"{name}: shards are a matter of Zarr 3; leave them out")
    node = join(place.path, place.dataset) if place.dataset else place.path
    fresh = stores_write.first_missing(place.path, place.dataset) or (node if overwrite else None)
    shared: dict[str, Any] = {**geometry, "chunks": pieces, "overwrite": overwrite}
    if place.kind == "precomputed":
        stores_write.create_precomputed(place.path, lengths, kind, encoding=encoding, **shared)
    elif place.kind == "n5":
        stores_write.create_n5(place.path, place.dataset, lengths, kind, **shared)
    else:
        version = 2 if place.kind == "zarr2" else 3
        whole_shards = None
        if version == 3:
            whole_shards = (
                tuple(int(s) for s in shards) if shards is not None else stores_write.default_shards(lengths, pieces)
            )
        if whole_shards == pieces:
            whole_shards = None
        stores_write.create_zarr(place.path, place.dataset, version, lengths, kind, shards=whole_shards, **shared)
    opened = open_volume(name if place.kind != "precomputed" else f"precomputed://{place.path}", writable=True)
    return dataclasses.replace(opened, spec=name, output=_Output(node, fresh=fresh))


def _create_file(
    name: str,
    place: Location,
    shape: tuple[int, ...],
    dtype: np.dtype,
    chunks: tuple[int, ...],
    overwrite: bool,
    geometry: dict[str, Any],
) -> tuple[Any, _Output]:
    """A single file under a temporary name beside the final one."""
    path = place.path
    there = os.path.exists(path)
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; a file is to be written")
    folder, base = os.path.split(os.path.abspath(path))
    stem, suffix = os.path.splitext(base)
    temporary = os.path.join(folder, f".{stem}.{os.getpid()}.partial{suffix}")
    adding = place.kind == "hdf5" and there and place.dataset is not None
    if adding:
        with files.open_hdf5(path) as file:
            taken = place.dataset in file
        if taken and not overwrite:
            raise UserError(f"{name} exists; choose another dataset, or pass --overwrite")
    elif there and not overwrite:
        raise UserError(f"{path} exists; remove it, choose another output, or pass --overwrite")
    try:
        with one_line(f"cannot create {path}"):
            os.makedirs(folder, exist_ok=True)
            if adding:
                shutil.copyfile(path, temporary)
        if place.kind == "hdf5":
            source: Any = files.create_hdf5(temporary, place.dataset or "main", shape, dtype, chunks=chunks, **geometry)
            source.where = name
        else:
            source = files.create_tiff(temporary, shape, dtype, **geometry)
    except UserError as error:
        _forget(temporary)
        raise UserError(str(error).replace(temporary, path)) from None
    except BaseException:
        _forget(temporary)
        raise
    return source, _Output(path, temporary, source)


def save_volume(path: str | os.PathLike, array: np.ndarray, *, voxel_size: Any, **options: Any) -> None:
    """Write a whole array as a finished volume; the other options are those of :func:`create_volume`."""
    with create_volume(path, array.shape, array.dtype, voxel_size=voxel_size, **options) as out:
        out[...] = array


# --- finished or not -------------------------------------------------------------------------------------------------


def mark_complete(spec: str | os.PathLike, complete: bool = True) -> None:
    """Record in the metadata of a store that everything has been written (single files need no mark)."""
    place = locate(spec)
    if place.kind in STORES:
        stores_write.update_marker(place.path, place.kind, place.dataset, complete=complete)


def is_complete(spec: str | os.PathLike) -> bool:
    """Whether a volume is there and finished; volumes that emjax did not write count as finished."""
    try:
        return open_volume(spec, allow_incomplete=True).complete
    except UserError:
        return False


def set_attributes(spec: str | os.PathLike, attributes: Mapping[str, Any]) -> None:
    """Add to the attributes of a store that exists.

    Raises:
        UserError: it is not a Zarr, N5 or precomputed volume, or cannot be written.
    """
    place = locate(spec)
    if place.kind not in STORES:
        raise UserError(f"{os.fspath(spec)}: attributes can be added to Zarr, N5 and precomputed volumes only")
    volume = open_volume(spec, allow_incomplete=True)
    merged = {**volume.attributes, **ome.plain(dict(attributes))}
    stores_write.update_marker(place.path, place.kind, place.dataset, attributes=merged)


# --- reading faster --------------------------------------------------------------------------------------------------


def read_cached(volume: Volume, budget_bytes: int) -> Volume:
    """The same volume, held in RAM if it fits into ``budget_bytes``, else with its recently used chunks held there.

    The cache is filled on first use, is shared by the threads of a process, and is not sent to other processes.
    """
    fits = volume.nbytes <= budget_bytes
    source = InMemory(volume.source) if fits else ChunkCache(volume.source, budget_bytes)
    return dataclasses.replace(volume, source=source, output=None)


# --- two volumes of one place ----------------------------------------------------------------------------------------


def require_same_grid(first: Volume, second: Volume) -> None:
    """Refuse an image and labels (or two segmentations) that do not lie voxel on voxel.

    Raises:
        UserError: their shapes, voxel sizes or offsets differ.
    """
    if first.spatial_shape != second.spatial_shape:
        raise UserError(
            f"{first.spec} has the shape {first.spatial_shape}, {second.spec} {second.spatial_shape} (z, y, x); "
            "they must be the same"
        )
    if first.voxel_size and second.voxel_size and not np.allclose(first.voxel_size, second.voxel_size, rtol=1e-3):
        raise UserError(
            f"{first.spec} has voxels of {first.voxel_size} nm, {second.spec} of {second.voxel_size} nm (z, y, x)"
        )
    if first.voxel_size and not np.allclose(first.offset, second.offset, atol=0.5 * min(first.voxel_size)):
        raise UserError(
            f"{first.spec} starts at {first.offset} nm, {second.spec} at {second.offset} nm; crop them to their common "
            "region"
        )


def common_region(first: Volume, second: Volume) -> tuple[Volume, Volume]:
    """Views of the region that two volumes share, by offset and voxel size (padded CREMI volumes and their labels).

    Raises:
        UserError: other voxel sizes, offsets that differ by a fraction of a voxel, or no overlap.
    """
    size = first.require_voxel_size()
    if not np.allclose(size, second.require_voxel_size(), rtol=1e-3):
        raise UserError(f"{first.spec} has voxels of {size} nm, {second.spec} of {second.voxel_size} nm (z, y, x)")
    shift = (np.asarray(second.offset) - first.offset) / size
    if not np.allclose(shift, np.round(shift), atol=0.1):
        raise UserError(f"{first.spec} and {second.spec} are {tuple(shift)} voxels apart, not a whole number")
    steps = [round(float(s)) for s in shift]
    low = [max(0, s) for s in steps]
    high = [min(n, s + m) for n, m, s in zip(first.spatial_shape, second.spatial_shape, steps)]
    if any(h <= l for l, h in zip(low, high)):
        raise UserError(f"{first.spec} and {second.spec} do not overlap")
    return (
        first.crop([slice(l, h) for l, h in zip(low, high)]),
        second.crop([slice(l - s, h - s) for l, h, s in zip(low, high, steps)]),
    )


def blocks(shape: Sequence[int], block: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most ``block`` that tile ``shape`` in raster order."""
    for index in np.ndindex(*(-(-n // b) for n, b in zip(shape, block))):
        yield tuple(slice(i * b, min((i + 1) * b, n)) for i, b, n in zip(index, block, shape))

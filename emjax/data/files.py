"""Volumes in single files and in folders of sections: HDF5, TIFF, PNG and NumPy."""

import contextlib
import errno
import functools
import glob
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import h5py
import imagecodecs
import numpy as np
import tifffile

from emjax.data import ome
from emjax.data.folder import one_line, sibling
from emjax.data.sources import Box, Opened, describe_box
from emjax.data.stores import choose_one
from emjax.errors import UserError, nearest

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5", ".h5py")
TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
SECTION_SUFFIXES = (".png", *TIFF_SUFFIXES)
Triple = tuple[float, float, float]


def must_exist(path: str) -> None:
    if os.path.isfile(path):
        return
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; a file is expected")
    raise UserError(f"{path} does not exist{sibling(path)}")


# --- HDF5 ------------------------------------------------------------------------------------------------------------


class HDF5Source:
    """A dataset of an HDF5 file, opened on first use in each process."""

    def __init__(self, path: str, dataset: str, *, writable: bool = False):
        self.path, self.dataset, self.writable = path, dataset, writable
        self.where = f"{path}:{dataset}"
        self._lock = threading.Lock()
        self._file: h5py.File | None = None
        self._node: h5py.Dataset | None = None
        self._opened_by = -1
        array = self._array()
        self.shape = tuple(int(n) for n in array.shape)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        self.chunks = array.chunks
        self.shards = array.chunks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_node": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _array(self) -> h5py.Dataset:
        # A handle inherited through fork is not usable.
        if self._file is None or self._opened_by != os.getpid():
            self._file = open_hdf5(self.path, "r+" if self.writable else "r")
            self._opened_by = os.getpid()
            self._node = None
        if self._node is None:
            self._node = self._file[self.dataset]
        return self._node

    def read(self, box: Box) -> np.ndarray:
        with self._lock, one_line(f"cannot read {self.where} at {describe_box(box)}"):
            block = self._array()[box]
        return block.astype(self.dtype, copy=False)

    def write(self, box: Box, array: np.ndarray) -> None:
        with self._lock, one_line(f"cannot write {self.where} at {describe_box(box)}"):
            # After a write that finds no room HDF5 loses data silently and may crash; it must never come to that.
            free = shutil.disk_usage(os.path.dirname(os.path.abspath(self.path))).free
            if free < array.nbytes + (1 << 20):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            node = self._array()
            node[box] = array
            node.file.flush()

    def close(self) -> None:
        """Write everything to disk and close the file."""
        with self._lock:
            if self._file is not None and self._opened_by == os.getpid():
                with one_line(f"cannot write {self.where}"):
                    self._file.flush()
                    self._node = None
                    self._file.close()
            self._file = self._node = None


def open_hdf5(path: str, mode: str = "r") -> h5py.File:
    """Open an HDF5 file; a missing, foreign or truncated one is a one-line error."""
    must_exist(path)
    try:
        return h5py.File(path, mode)
    except OSError as error:
        text = str(error)
        if "truncated" in text:
            found = re.search(r"eof = (\d+).*stored_eof = (\d+)", text)
            sizes = f" ({found[1]} of {found[2]} bytes are there)" if found else ""
            raise UserError(f"{path} is truncated{sizes}; copy or download it again") from None
        if "signature not found" in text:
            raise UserError(f"{path} is not an HDF5 file, or its beginning is damaged") from None
        raise UserError(f"cannot open {path}: {' '.join(text.split())[:300]}") from None


def hdf5_keys(file: h5py.File) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of all datasets of a file."""
    found: dict[str, tuple[int, ...]] = {}
    file.visititems(lambda name, node: found.update({name: node.shape}) if isinstance(node, h5py.Dataset) else None)
    return found


def open_hdf5_dataset(path: str, dataset: str | None, *, writable: bool = False) -> Opened:
    """Open a dataset of an HDF5 file (CREMI, SNEMI, FFN, PlantSeg, ilastik and emjax attributes are understood).

    Raises:
        UserError: no such file or dataset (the message lists those found), or the file is damaged.
    """
    with open_hdf5(path) as file:
        with one_line(f"{path} is damaged"):
            keys = hdf5_keys(file)
        if dataset is None:
            volumes = [key for key, shape in keys.items() if len(shape or ()) >= 3]
            if len(volumes) != 1:
                raise UserError(choose_one(path, volumes or list(keys)))
            dataset = volumes[0]
        dataset = dataset.strip("/")
        if dataset not in keys:
            listed = ", ".join(f"{key} {'x'.join(map(str, shape or ()))}" for key, shape in keys.items()) or "none"
            raise UserError(f"{path} has no dataset {dataset!r}: found {listed}{nearest(dataset, keys)}")
        node = file[dataset]
        with one_line(f"{path}:{dataset} has unreadable attributes"):
            own, above = ome.plain(dict(node.attrs)), ome.plain(dict(file.attrs))
        labels = [dimension.label for dimension in node.dims]
    source = HDF5Source(path, dataset, writable=writable)
    stored = {} if not all(labels) else {"axes": labels}
    dimensions = len(source.shape)
    named = [ome.axes_of(attributes) for attributes in (own, stored, above)]
    axes = next((found for found in named if found and len(found) == dimensions), "tczyx"[-dimensions:])
    size = ome.voxel_size_of(own) or ome.voxel_size_of(above)
    offset = ome.offset_of(own) or ome.offset_of(above) or (0.0, 0.0, 0.0)
    return Opened(source, axes, size, offset, _unpack({**above, **own}), keep_channel="emjax" in own and axes == "czyx")


def _unpack(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes that we packed as JSON, unpacked; those of the geometry left out."""
    packed = attributes.pop("emjax", None)
    with contextlib.suppress(TypeError, ValueError):
        attributes.update(json.loads(packed).get("attributes", {}))  # type: ignore[arg-type]
    return {key: value for key, value in attributes.items() if key not in ome.GEOMETRY}


def create_hdf5(
    path: str,
    dataset: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    voxel_size: Triple,
    offset: Triple,
    chunks: Sequence[int],
    attributes: Mapping[str, Any],
) -> HDF5Source:
    """Create or extend the HDF5 file ``path`` with a dataset; ``resolution`` and ``offset`` are as in CREMI."""
    with one_line(f"cannot create {path}"), h5py.File(path, "a") as file:
        if dataset in file:
            del file[dataset]
        made = file.create_dataset(
            dataset,
            shape,
            dtype,
            chunks=tuple(min(c, n) for c, n in zip(chunks, shape)),
            compression="gzip",
            shuffle=True,
        )
        made.attrs["axes"] = "czyx" if len(shape) == 4 else "zyx"
        made.attrs["resolution"] = voxel_size
        made.attrs["offset"] = offset
        made.attrs["units"] = "nm"
        made.attrs["emjax"] = json.dumps({"attributes": ome.plain(attributes)})
    return HDF5Source(path, dataset, writable=True)


# --- TIFF ------------------------------------------------------------------------------------------------------------


class TiffSource:
    """A series of a TIFF file: memory-mapped where it is stored plainly, else read page by page."""

    def __init__(self, path: str, series: int, shape: tuple[int, ...], dtype: np.dtype, *, writable: bool = False):
        self.path, self.series, self.shape = path, series, shape
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self.writable = writable
        self.chunks: tuple[int, ...] | None = (1,) * (len(shape) - 2) + tuple(shape[-2:])
        self.shards = self.chunks
        self._mapped: np.ndarray | None = None
        self._tried = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None, "_tried": False}

    def _map(self) -> np.ndarray | None:
        if not self._tried:
            with contextlib.suppress(ValueError):
                mapped = tifffile.memmap(self.path, series=self.series, mode="r+" if self.writable else "r")
                self._mapped = mapped.reshape(self.shape)
            self._tried = True
        return self._mapped

    def read(self, box: Box) -> np.ndarray:
        with one_line(f"cannot read {self.path} at {describe_box(box)}"), tiff_errors():
            mapped = self._map()
            if mapped is not None:
                return np.array(mapped[box]).astype(self.dtype, copy=False)
            return self._read_pages(box)

    def _read_pages(self, box: Box) -> np.ndarray:
        stack = tuple(range(part.start, part.stop) for part in box[:-2])
        pages = [int(page) for page in np.ravel_multi_index(np.ix_(*stack), self.shape[:-2]).ravel()] if stack else [0]
        out = np.empty((len(pages), *(part.stop - part.start for part in box[-2:])), self.dtype)
        with tifffile.TiffFile(self.path) as file:
            series = file.series[self.series]
            paged = len(series.pages) == int(np.prod(self.shape[:-2], dtype=np.int64))
            planes = None if paged else series.asarray().reshape((-1, *self.shape[-2:]))
            for place, page in enumerate(pages):
                plane = series.asarray(key=page) if planes is None else planes[page]
                out[place] = plane.reshape(self.shape[-2:])[box[-2:]]
        return out.reshape(tuple(part.stop - part.start for part in box))

    def write(self, box: Box, array: np.ndarray) -> None:
        mapped = self._map()
        if mapped is None or not self.writable:
            raise UserError(f"{self.path} cannot be written in place")
        mapped[box] = array

    def close(self) -> None:
        """Write everything to disk."""
        if isinstance(self._mapped, np.ndarray) and self.writable:
            with one_line(f"cannot write {self.path}"):
                base: Any = self._mapped
                while base is not None and not isinstance(base, np.memmap):
                    base = base.base
                if base is not None:
                    base.flush()
        self._mapped, self._tried = None, False


class _Complaints(logging.Filter):
    """Takes from the log what tifffile only logs about damage, in the thread that made this filter."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = threading.get_ident()
        self.found: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        ours = record.thread == self.thread
        if ours and re.search(r"invalid|failed to reshape|corrupt|truncated", record.getMessage()):
            self.found.append(record.getMessage())
        return not ours


@contextlib.contextmanager
def tiff_errors() -> Iterator[None]:
    """Turn what tifffile and its codecs raise or log about damage into errors that :func:`one_line` understands."""
    logger, complaints = logging.getLogger("tifffile"), _Complaints()
    logger.addFilter(complaints)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Codecs raise classes of their own, e.g. ZlibError.
        raise RuntimeError(f"damaged TIFF: {' '.join(str(error).split())[:200]}") from None
    finally:
        logger.removeFilter(complaints)
    if complaints.found:
        raise RuntimeError(f"damaged TIFF: {' '.join(complaints.found[0].split())[:200]}")


def open_tiff(path: str, dataset: str | None) -> Opened:
    """Open a multi-page TIFF (plain, BigTIFF, ImageJ or OME).

    Args:
        dataset: number of the series, 0 unless given.
    """
    must_exist(path)
    number = int(dataset) if dataset and dataset.isdigit() else 0 if not dataset else -1
    with one_line(f"cannot open {path}"), tiff_errors(), tifffile.TiffFile(path) as file:
        if not 0 <= number < len(file.series):
            raise UserError(f"{path} has no series {dataset!r}: it holds {len(file.series)}, numbered from 0")
        series = file.series[number]
        shape, dtype, axes = tuple(series.shape), series.dtype, series.axes
        size, offset, attributes = tiff_geometry(file)
        if dtype is None:
            raise UserError(f"{path} holds samples of a type that NumPy has not")
        end = max(
            (o + n for page in series.pages if page for o, n in zip(page.dataoffsets, page.databytecounts)), default=0
        )
    if end > os.path.getsize(path):
        raise UserError(f"{path} is truncated: {os.path.getsize(path)} of {end} bytes are there")
    names = tiff_axes(axes)
    written = attributes.pop("shape", None)
    if written and np.prod(written) == np.prod(shape):
        # TIFF drops axes of length 1; a volume of ours says which it had.
        shape, names = tuple(written), "czyx"[4 - len(written) :]
    elif len(shape) == 2:
        shape, names = (1, *shape), "zyx"
    source = TiffSource(path, number, shape, dtype)
    return Opened(source, names, size, offset, attributes, keep_channel=written is not None)


def tiff_axes(axes: str) -> str:
    """Letters t, c, z, y, x for the axes of a TIFF series.

    S (samples) is the channel axis; in a stack without Z, the unnamed, T, C or other leading axis is z.
    """
    letters = list(axes.lower().replace("s", "c"))
    leading = [i for i, letter in enumerate(letters) if letter not in "yx"]
    if "z" not in letters and leading and axes[leading[0]] != "S":
        letters[leading[0]] = "z"
    for i, letter in enumerate(letters):
        if letter not in "tczyx" or letters.count(letter) > 1:
            letters[i] = next((free for free in "ct" if free not in letters), "?")
    return "".join(letters)


def tiff_geometry(file: tifffile.TiffFile) -> tuple[Triple | None, Triple, dict[str, Any]]:
    """Voxel size and offset (nm, zyx) and our attributes, from OME or ImageJ metadata and the resolution tags."""
    nothing = (0.0, 0.0, 0.0)
    if file.is_ome and file.ome_metadata:
        return _ome_tiff_geometry(file.ome_metadata)
    if file.is_imagej and file.imagej_metadata:
        notes = file.imagej_metadata
        unit = str(notes.get("unit", "")).encode("latin-1", "ignore").decode("unicode_escape", "ignore")
        tags = file.pages[0].tags  # type: ignore[union-attr]
        sizes = []
        for name in ("YResolution", "XResolution"):
            numerator, denominator = tags[name].value if name in tags else (0, 1)
            sizes.append(denominator / numerator if numerator else 0.0)
        sizes.insert(0, float(notes.get("spacing", 0.0)))
        found = [ome.in_nanometres(size, unit) if size else None for size in sizes]
        # Without its own spacing a stack says nothing about z.
        return (None if None in found else tuple(found)), nothing, {}  # type: ignore[return-value]
    return None, nothing, {}


def _ome_tiff_geometry(text: str) -> tuple[Triple | None, Triple, dict[str, Any]]:
    described = tifffile.xml2dict(text).get("OME", {})
    image = described.get("Image", {})
    image = image[0] if isinstance(image, list) else image
    pixels = image.get("Pixels", {})
    pixels = pixels[0] if isinstance(pixels, list) else pixels
    found = []
    for axis in "ZYX":
        # Micrometre is the default of the OME schema.
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        found.append(None if value is None else ome.in_nanometres(float(value), str(unit)))
    notes: dict[str, Any] = {}
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        notes = dict(json.loads(image.get("Description", "")).get("emjax", {}))
    offset = tuple(notes.get("offset_nm", (0.0, 0.0, 0.0)))
    exact = notes.get("voxel_size_nm")
    size = tuple(exact) if exact else None if None in found else tuple(found)
    attributes = {**notes.get("attributes", {}), **({"shape": notes["shape"]} if "shape" in notes else {})}
    return size, offset, attributes  # type: ignore[return-value]


def create_tiff(
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    *,
    voxel_size: Triple,
    offset: Triple,
    attributes: Mapping[str, Any],
) -> TiffSource:
    """Create an uncompressed OME-TIFF that is written in place, all of its disk space claimed at once."""
    if dtype.name in ("uint64", "int64", "float16"):
        raise UserError(f"{path}: OME-TIFF has no {dtype.name}; write another type, .zarr or .h5")
    axes = "czyx"[4 - len(shape) :]
    known = {"shape": shape, "voxel_size_nm": voxel_size, "offset_nm": offset, "attributes": ome.plain(attributes)}
    notes = {"emjax": known}
    metadata: dict[str, Any] = {
        "axes": axes.upper(),
        "Description": json.dumps(notes),
    }
    for axis, size in zip("ZYX", voxel_size):
        metadata[f"PhysicalSize{axis}"] = size
        metadata[f"PhysicalSize{axis}Unit"] = "nm"
    with one_line(f"cannot create {path}"):
        need = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        mapped = tifffile.memmap(
            path, shape=shape, dtype=dtype, ome=True, photometric="minisblack", metadata=metadata, bigtiff=need > 2**31
        )
        del mapped
        # A hole in a mapped file on a full disk is a bus error later; claim the space now.
        with open(path, "r+b") as file, contextlib.suppress(AttributeError):
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    return TiffSource(path, 0, shape, dtype, writable=True)


# --- sections --------------------------------------------------------------------------------------------------------


class SectionSource:
    """A stack of images, one file per z; reads only the files that a box touches."""

    def __init__(self, paths: Sequence[str]):
        self.paths = list(paths)
        first = read_section(self.paths[0])
        if first.ndim not in (2, 3):
            raise UserError(f"{self.paths[0]} has {first.ndim} axes; a section has two, or three with colours")
        self.shape = (len(self.paths), *first.shape)
        self.dtype = first.dtype.newbyteorder("=")
        self.chunks: tuple[int, ...] | None = (1, *first.shape)
        self.shards = self.chunks

    def read(self, box: Box) -> np.ndarray:
        out = np.empty(tuple(part.stop - part.start for part in box), self.dtype)
        for place, number in enumerate(range(box[0].start, box[0].stop)):
            image = read_section(self.paths[number])
            if image.shape != self.shape[1:] or image.dtype.newbyteorder("=") != self.dtype:
                raise UserError(
                    f"{self.paths[number]} is {'x'.join(map(str, image.shape))} {image.dtype}, but the first section "
                    f"{self.paths[0]} is {'x'.join(map(str, self.shape[1:]))} {self.dtype}; all must be alike"
                )
            out[place] = image[box[1:]]
        return out

    def write(self, box: Box, array: np.ndarray) -> None:
        raise UserError(f"{os.path.dirname(self.paths[0])} is a stack of images: it can only be read")


def read_section(path: str) -> np.ndarray:
    """One image file as (y, x) or (y, x, channel)."""
    must_exist(path)
    with one_line(f"cannot read {path}"):
        if path.lower().endswith(TIFF_SUFFIXES):
            with tiff_errors():
                return np.squeeze(tifffile.imread(path))
        with open(path, "rb") as file:
            return imagecodecs.png_decode(file.read())


def natural_key(path: str) -> list[tuple[int, int | str]]:
    """Sort key under which ``im2.png`` comes before ``im10.png``."""
    parts = re.split(r"(\d+)", os.path.basename(path))
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]


def section_paths(pattern: str) -> list[str]:
    """Files of a pattern (``slices/*.png``) or the images of a folder, in natural order."""
    if os.path.isdir(pattern):
        names = [name for name in os.listdir(pattern) if not name.startswith(".")]
        found = [os.path.join(pattern, name) for name in names if name.lower().endswith(SECTION_SUFFIXES)]
    else:
        found = [path for path in glob.glob(pattern) if os.path.isfile(path)]
    suffixes = {os.path.splitext(path)[1].lower() for path in found}
    if len(suffixes) > 1:
        kinds = ", ".join(sorted(suffixes))
        raise UserError(f"{pattern} mixes files of several kinds ({kinds}); name one, e.g. {pattern}/*{min(suffixes)}")
    return sorted(found, key=natural_key)


def open_sections(pattern: str) -> Opened:
    """Open a folder of PNG or TIFF images, or a pattern, as one volume (colour images: channels come first)."""
    paths = section_paths(pattern)
    if not paths:
        what = "holds no PNG or TIFF images" if os.path.isdir(pattern) else "matches no files"
        raise UserError(f"{pattern} {what}")
    if len(paths) == 1 and paths[0].lower().endswith(TIFF_SUFFIXES):
        return open_tiff(paths[0], None)
    source = SectionSource(paths)
    return Opened(source, "zyxc" if len(source.shape) == 4 else "zyx", None, (0.0, 0.0, 0.0), {})


# --- NumPy -----------------------------------------------------------------------------------------------------------


class NumpySource:
    """An array in a ``.npy`` file, memory-mapped."""

    chunks: tuple[int, ...] | None = None
    shards: tuple[int, ...] | None = None

    def __init__(self, path: str):
        self.path = path
        self.shape = tuple(self._array.shape)
        self.dtype = self._array.dtype.newbyteorder("=")

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_array"}

    @functools.cached_property
    def _array(self) -> np.ndarray:
        must_exist(self.path)
        with one_line(f"cannot open {self.path}"):
            return np.load(self.path, mmap_mode="r", allow_pickle=False)

    def read(self, box: Box) -> np.ndarray:
        return np.array(self._array[box]).astype(self.dtype, copy=False)

    def write(self, box: Box, array: np.ndarray) -> None:
        raise UserError(f"{self.path}: .npy files are only read; write .zarr, .h5 or .tif")


def open_numpy(path: str) -> Opened:
    """Open a ``.npy`` file; it carries no voxel size."""
    source = NumpySource(path)
    return Opened(source, "tczyx"[-len(source.shape) :] if source.shape else "")

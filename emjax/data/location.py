"""Names of volumes taken apart: format, path or address, and the dataset inside."""

import dataclasses
import os
import re

from emjax.data import files, stores
from emjax.data.folder import is_remote, sibling
from emjax.errors import UserError

STORES = ("zarr", "zarr2", "n5", "precomputed")
FORMATS = ("zarr", "zarr2", "n5", "precomputed", "hdf5", "tiff")

_SINGLE = "|".join(re.escape(s.lstrip(".")) for s in (*files.HDF5_SUFFIXES, *files.TIFF_SUFFIXES, ".npy"))
_PREFIXES = {"precomputed": "precomputed", "zarr": "zarr", "zarr2": "zarr", "zarr3": "zarr", "n5": "n5"}


@dataclasses.dataclass(frozen=True)
class Location:
    """A name taken apart: format ("zarr", "n5", "precomputed", "hdf5", "tiff", "npy", "sections"), path, dataset."""

    kind: str
    path: str
    dataset: str | None


def _kind_of_file(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in files.HDF5_SUFFIXES:
        return "hdf5"
    if suffix in files.TIFF_SUFFIXES:
        return "tiff"
    return "npy" if suffix == ".npy" else None


def _split(path: str) -> tuple[str, str | None]:
    """``path:dataset`` apart; the colons of a scheme and of a port are no separators."""
    scheme = re.match(r"\w+://[^/]*", path)
    head = scheme[0] if scheme else ""
    front, colon, inner = path[len(head) :].partition(":")
    return (head + front, inner.strip("/") or None) if colon else (path, None)


def _by_name(path: str) -> Location | None:
    """The location that a name's suffix tells, ``path.zarr/inner`` and ``path.h5/inner`` included."""
    single = re.match(rf"(.+\.(?:{_SINGLE}))(?:[:/](.*))?$", path, re.IGNORECASE)
    if single and not _is_pattern(single[1]):
        return Location(_kind_of_file(single[1]) or "", single[1], single[2] or None)
    chunked = re.match(r"(.+?\.(zarr[23]?|n5|precomputed))(?:[:/](.*))?$", path)
    if chunked:
        kind = "zarr" if chunked[2].startswith("zarr") else chunked[2]
        return Location(kind, chunked[1], (chunked[3] or "").strip("/") or None)
    return None


def _is_pattern(path: str) -> bool:
    return any(letter in path for letter in "*?[")


def locate(spec: str | os.PathLike, dataset: str | None = None) -> Location:
    """Take a volume's name apart.

    Raises:
        UserError: the format cannot be told, nothing is there, or two different datasets are named.
    """
    text = os.fspath(spec).removeprefix("file://")
    if not text:
        raise UserError("a volume has an empty name")
    place = _locate(text)
    if is_remote(place.path) and place.kind not in STORES:
        raise UserError(f"{place.path}: only Zarr, N5 and precomputed are read over the network; download it first")
    asked = dataset.strip("/") if dataset is not None else None
    if asked and place.dataset and asked != place.dataset:
        raise UserError(f"{text}: the name says {place.dataset!r}, the dataset argument {dataset!r}; give one of them")
    return dataclasses.replace(place, dataset=place.dataset or asked or None)


def _locate(text: str) -> Location:
    prefix, mark, rest = text.partition("://")
    if mark and prefix in _PREFIXES:
        rest = rest.removeprefix("file://")
        return Location(_PREFIXES[prefix], *((rest, None) if os.path.isdir(rest) else _split(rest)))
    remote = is_remote(text)
    if not remote and os.path.isfile(text):
        kind = _kind_of_file(text) or ("sections" if text.lower().endswith(".png") else None)
        if kind:
            return Location(kind, text, None)
    elif (named := _by_name(text)) is not None:
        return named
    elif not remote and (_is_pattern(text) or text.lower().endswith(".png")):
        return Location("sections", text, None)
    else:
        for path, inner in dict.fromkeys([(text, None), _split(text)]):
            if (remote or os.path.isdir(path)) and (kind := stores.detect(path)):
                return Location(kind, path, inner)
        if os.path.isdir(text):
            return Location("sections", text, None)
        if not remote and not os.path.exists(_split(text)[0]):
            raise UserError(f"{text} does not exist{sibling(text)}")
    raise UserError(
        f"{text}: format unknown; expected .zarr, .n5, .h5:DATASET, .tif, .npy, a folder or pattern of PNG or TIFF "
        "sections, or precomputed://"
    )


def output_location(name: str, format: str | None) -> Location:
    """Take the name of a volume to be written apart.

    Raises:
        UserError: the format cannot be told, or cannot be written there.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"{name}: unknown format {format!r}, expected one of {', '.join(FORMATS)}")
    text = name.removeprefix("file://")
    prefix, mark, rest = text.partition("://")
    if mark and prefix in _PREFIXES:
        place = Location("zarr2" if prefix == "zarr2" else _PREFIXES[prefix], *_split(rest.removeprefix("file://")))
    else:
        named = None if _is_pattern(text) else _by_name(text)
        if named is None and format is None:
            raise UserError(
                f"{name}: the format to write is unknown; end the name in .zarr, .n5, .h5, .tif, or write precomputed://"
            )
        place = named or Location("", *_split(text))
    kind = format or place.kind
    if kind == "npy":
        raise UserError(f"{name}: .npy cannot hold a voxel size; write .zarr, .h5 or .tif")
    if kind == "precomputed" and place.dataset:
        raise UserError(f"{name}: a new precomputed volume has one scale; leave {place.dataset!r} out")
    if is_remote(place.path) and kind not in STORES:
        raise UserError(f"{name}: only Zarr, N5 and precomputed are written over the network")
    if place.path.startswith(("http://", "https://")):
        raise UserError(f"{name}: nothing can be written to an http address")
    return dataclasses.replace(place, kind=kind)

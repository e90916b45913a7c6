"""EMNeuron, the data of SegNeuron, as it is downloaded: a table of its sets, and a manifest of what lies in a folder.

The manifest is a JSON file with one entry per volume (paths relative to it). Other data can be given in the same form.
"""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tifffile

from emjax.data.pipeline import Source
from emjax.errors import UserError, nearest

LABELS = "_MaskIns"
UNLABELLED = 10000
"""Label of regions that nobody has annotated."""
LARGEST_LABEL = 65535
"""The published loader turns labels into 16 bits."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One set of EMNeuron.

    Attributes:
        folder: its folder in the labelled archive.
        name: what the paper calls it.
        volumes: number of labelled volumes, ``0.tif`` and so on.
        voxel_size: nm (z, y, x).
        z_steps: every how many sections are taken in training, drawn uniformly.
        ignored: label values that do not count in the loss.
        ignored_in_first: more such values of volume 0.
    """

    folder: str
    name: str
    volumes: int
    voxel_size: tuple[float, float, float]
    z_steps: tuple[int, ...] = (1,)
    ignored: tuple[int, ...] = ()
    ignored_in_first: tuple[int, ...] = ()

    def ignored_by(self, volume: int) -> tuple[int, ...]:
        """Labels of a volume that do not count in the loss."""
        return self.ignored + (self.ignored_in_first if volume == 0 else ())


LABELLED = (
    DataSet("J0126-sbem", "ZFinch", 33, (20.0, 9.0, 9.0), (1, 2), (UNLABELLED,)),
    DataSet("Kasthuri-atum", "Kasthuri", 2, (30.0, 6.0, 6.0), ignored_in_first=(121, 122)),
    DataSet("Hemi-brain-fib", "HBrain", 6, (8.0, 8.0, 8.0), (1, 2, 3)),
    DataSet("CREMI-sstem", "FAFB", 3, (40.0, 8.0, 8.0)),
    DataSet("AxonEM[M]-sstem", "Pinky", 9, (40.0, 8.0, 8.0)),
    DataSet("AxonEM[H]-atum", "H01", 9, (30.0, 8.0, 8.0)),
    DataSet("Mira-adwt", "vEM1", 3, (50.0, 8.0, 8.0)),
    DataSet("Fib-25-fib", "FIB25", 2, (8.0, 8.0, 8.0), (1, 2, 3)),
    DataSet("Mira-scn", "vEM3", 5, (40.0, 8.0, 8.0), ignored=(UNLABELLED,)),
    DataSet("Mira-fish", "vEM2", 4, (30.0, 8.0, 8.0)),
)
"""The sets of fine-tuning, in the order of the published code."""

UNLABELLED_SETS = (
    DataSet("MitoEM-atum", "MitoEM", 0, (30.0, 8.0, 8.0)),
    DataSet("Minnie-sstem", "Minnie", 0, (40.0, 8.0, 8.0)),
    DataSet("Zfish-sbfsem", "ZFish", 0, (20.0, 9.0, 9.0)),
)
"""Sets that only pretraining uses; their number of volumes is not published."""

OUT_OF_DISTRIBUTION = (
    DataSet("Mira-ionsem", "vEM4", 1, (20.0, 8.0, 8.0)),
    DataSet("Microns[B]", "Basil", 1, (40.0, 8.0, 8.0)),
    DataSet("Harris", "Harris", 1, (50.0, 6.0, 6.0)),
)
"""Sets that neither stage has seen, the targets of the published tables; one whole volume each."""


def data_set_of_volume(number: int, sets: Sequence[DataSet] = LABELLED) -> tuple[int, int]:
    """(number of the set, volume within it) of the published code's running volume number."""
    for index, one in enumerate(sets):
        if number < one.volumes:
            return index, number
        number -= one.volumes
    raise ValueError(f"volume {number} is beyond the last of {sum(one.volumes for one in sets)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One volume of a manifest.

    Attributes:
        set: name of its data set; volumes of one set are not mixed with each other.
        raw, labels: files, relative to the manifest; ``labels`` is None for raw data alone.
        shape: voxels (z, y, x).
        voxel_size: nm (z, y, x).
        z_steps, ignored: as of :class:`DataSet`.
        largest_label: of the labels; 0 without.
    """

    set: str
    raw: str
    labels: str | None
    shape: tuple[int, int, int]
    voxel_size: tuple[float, float, float]
    z_steps: tuple[int, ...] = (1,)
    ignored: tuple[int, ...] = ()
    largest_label: int = 0


def _stack_shape(path: pathlib.Path) -> tuple[tuple[int, int, int], np.dtype]:
    try:
        with tifffile.TiffFile(path) as file:
            series = file.series[0]
            shape, dtype = tuple(int(n) for n in series.shape), series.dtype
    except (tifffile.TiffFileError, OSError, IndexError, ValueError) as error:
        raise UserError(f"{path}: not a readable TIFF stack ({str(error)[:100]})") from None
    if len(shape) != 3 or dtype is None:
        raise UserError(f"{path}: shape {shape}, expected a stack (z, y, x)")
    return shape, dtype  # type: ignore[return-value]


def numbered_files(folder: pathlib.Path) -> tuple[dict[int, pathlib.Path], dict[int, pathlib.Path]]:
    """``<i>.tif`` and ``<i>_MaskIns.tif`` of a folder by number; other files are left alone."""
    raws: dict[int, pathlib.Path] = {}
    labels: dict[int, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        match = re.fullmatch(rf"(\d+)({LABELS})?\.tiff?", path.name)
        if match:
            (labels if match[2] else raws)[int(match[1])] = path
    return raws, labels


def scan_labelled(root: pathlib.Path, sets: Sequence[DataSet] = LABELLED) -> tuple[list[Entry], list[str]]:
    """Volumes of the unpacked labelled archive, and one line for each thing worth knowing.

    Raises:
        UserError: no set at all, a raw file without labels or the other way round (an odd number of files), a file that
            is no stack, a pair of different shapes, an image that is not uint8, or labels that are not integers.
    """
    entries, remarks = [], []
    folders = {one: root / one.folder for one in sets if (root / one.folder).is_dir()}
    if not folders:
        names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
        hint = nearest(sets[0].folder, names)
        raise UserError(f"{root}: none of the folders {', '.join(one.folder for one in sets)} is there{hint}")
    missing = [one.folder for one in sets if one not in folders]
    if missing:
        remarks.append(f"{root}: not there, left out: {', '.join(missing)}")
    for one, folder in folders.items():
        raws, labels = numbered_files(folder)
        lonely = sorted(set(raws) ^ set(labels))
        if lonely:
            number = lonely[0]
            lacking = f"{number}{LABELS}.tif" if number in raws else f"{number}.tif"
            raise UserError(
                f"{folder}: {len(raws) + len(labels)} files, expected pairs <i>.tif and <i>{LABELS}.tif; {lacking} is "
                "missing" + (f" (and {len(lonely) - 1} more)" if len(lonely) > 1 else "")
            )
        if len(raws) != one.volumes:
            remarks.append(f"{folder}: {len(raws)} volumes, the published set has {one.volumes}")
        for number in sorted(raws):
            entry = _entry(root, one, number, raws[number], labels[number])
            if entry.largest_label > LARGEST_LABEL:
                remarks.append(
                    f"{labels[number]}: labels up to {entry.largest_label}; SegNeuron's own loader would wrap them at "
                    f"{LARGEST_LABEL}, emjax keeps them"
                )
            entries.append(entry)
    return entries, remarks


def _entry(root: pathlib.Path, one: DataSet, number: int, raw: pathlib.Path, labels: pathlib.Path) -> Entry:
    (shape, raw_dtype), (label_shape, label_dtype) = _stack_shape(raw), _stack_shape(labels)
    if shape != label_shape:
        raise UserError(f"{raw} has shape {shape}, {labels.name} {label_shape} (z, y, x); expected the same")
    if raw_dtype != np.uint8:
        raise UserError(f"{raw}: {raw_dtype}, expected uint8 grey values")
    if label_dtype.kind not in "iu":
        raise UserError(f"{labels}: {label_dtype}, expected integer labels")
    largest = 0
    if label_dtype.itemsize > 2:
        largest = int(tifffile.imread(labels).max())
    return Entry(
        set=one.folder,
        raw=str(raw.relative_to(root)),
        labels=str(labels.relative_to(root)),
        shape=shape,
        voxel_size=one.voxel_size,
        z_steps=one.z_steps,
        ignored=one.ignored_by(number),
        largest_label=largest,
    )


def scan_unlabelled(root: pathlib.Path) -> list[Entry]:
    """Raw volumes for pretraining: all ``<i>.tif`` of all known sets under ``root``.

    Raises:
        UserError: a file that is no stack, or not uint8.
    """
    entries = []
    for one in LABELLED + UNLABELLED_SETS:
        if not (root / one.folder).is_dir():
            continue
        for raw in numbered_files(root / one.folder)[0].values():
            shape, dtype = _stack_shape(raw)
            if dtype != np.uint8:
                raise UserError(f"{raw}: {dtype}, expected uint8 grey values")
            path = str(raw.relative_to(root))
            entries.append(Entry(set=one.folder, raw=path, labels=None, shape=shape, voxel_size=one.voxel_size))
    return entries


def scan_validation(root: pathlib.Path) -> list[Entry]:
    """Test volumes ``<set>/raw.tif`` with ``label_0.tif`` or ``label.tif`` under both parts of the validation archive.

    ``InDistribution/InDistribution``, a copy in the archive, is left out.

    Raises:
        UserError: a raw file without labels, or a pair of different shapes.
    """
    known = {one.folder: one for one in LABELLED + OUT_OF_DISTRIBUTION}
    entries = []
    for part in ("InDistribution", "OutofDistribution"):
        for raw in sorted((root / part).glob("*/raw.tif")):
            labels = [raw.with_name(name) for name in ("label_0.tif", "label.tif") if raw.with_name(name).is_file()]
            if not labels:
                raise UserError(f"{raw}: expected label_0.tif or label.tif beside it")
            (shape, _), (label_shape, _) = _stack_shape(raw), _stack_shape(labels[0])
            if shape != label_shape:
                raise UserError(f"{raw} has shape {shape}, {labels[0].name} {label_shape} (z, y, x); expected the same")
            name = raw.parent.name
            of_paper = known.get(name) or (known["Fib-25-fib"] if name.startswith("FIB25") else None)
            entries.append(
                Entry(
                    set=f"{part}/{name}",
                    raw=str(raw.relative_to(root)),
                    labels=str(labels[0].relative_to(root)),
                    shape=shape,
                    voxel_size=of_paper.voxel_size if of_paper else (30.0, 8.0, 8.0),
                )
            )
    return entries


def write_manifest(path: pathlib.Path, entries: Sequence[Entry]) -> None:
    """Writes a manifest; the file appears when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"volumes": [dataclasses.asdict(entry) for entry in entries]}, indent=1) + "\n")
    os.replace(partial, path)


def read_manifest(path: str | pathlib.Path) -> list[Entry]:
    """The volumes of a manifest.

    Raises:
        UserError: no such file, no JSON, or an entry with unknown or missing fields.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no manifest there; python -m emjax.prepare emneuron --source DIR writes one")
    try:
        listed = json.loads(path.read_text())["volumes"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f'{path}: not a manifest, expected JSON with a list "volumes"') from None
    known = [field.name for field in dataclasses.fields(Entry)]
    entries = []
    for number, fields in enumerate(listed):
        for name in fields:
            if name not in known:
                raise UserError(f"{path}: volume {number} has the unknown field {name!r}{nearest(name, known)}")
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
        }
        try:
            entries.append(Entry(**plain))
        except TypeError as error:
            raise UserError(f"{path}: volume {number}: {str(error).split('__init__() ')[-1]}") from None
    return entries


def sources(path: str | pathlib.Path) -> tuple[Source, ...]:
    """Training sources of a manifest: sets equally often, and volumes equally often within a set.

    Their names are ``set/number``, by which domain mixing knows what belongs together.
    """
    entries = read_manifest(path)
    root = pathlib.Path(path).parent
    sizes: dict[str, int] = {}
    made = []
    numbers = []
    for entry in entries:
        numbers.append(sizes.get(entry.set, 0))
        sizes[entry.set] = numbers[-1] + 1
    for entry, number in zip(entries, numbers):
        made.append(
            Source(
                raw=str(root / entry.raw),
                labels=None if entry.labels is None else str(root / entry.labels),
                ignore_labels=entry.ignored,
                weight=1 / sizes[entry.set],
                name=f"{entry.set}/{number}",
                voxel_size=entry.voxel_size,
                z_steps=entry.z_steps,
            )
        )
    return tuple(made)


def prepare(source: pathlib.Path) -> list[str]:
    """Checks an EMNeuron folder as downloaded and unpacked, and writes its manifests; returns lines to print.

    ``source`` holds ``labeled/`` and perhaps ``valid/`` (or is the labelled folder itself) and perhaps folders of raw
    volumes alone. Writes ``labelled.json`` (fine-tuning), ``unlabelled.json`` (pretraining: all raw volumes) and
    ``validation.json`` (tests) into ``source``; nothing is copied.

    Raises:
        UserError: what :func:`scan_labelled` and :func:`scan_validation` raise.
    """
    if not source.is_dir():
        raise UserError(f"--source {source}: no such folder")
    labelled = next((source / name for name in ("labeled", "labelled") if (source / name).is_dir()), source)
    entries, lines = scan_labelled(labelled)
    found = {"labelled": _below(entries, labelled, source)}
    raw_alone = [] if labelled == source else _below(scan_unlabelled(source), source, source)
    raws = [dataclasses.replace(entry, labels=None, ignored=(), z_steps=(1,)) for entry in found["labelled"]]
    # Pretraining draws every volume of every set equally often, from all sections.
    found["unlabelled"] = [
        dataclasses.replace(entry, set=f"{entry.set}/{number}") for number, entry in enumerate(raws + raw_alone)
    ]
    valid = next((source / name for name in ("valid", "validation") if (source / name).is_dir()), None)
    if valid is not None:
        found["validation"] = _below(scan_validation(valid), valid, source)
    else:
        lines.append(f"{source}: no folder valid/, so no test volumes")
    for name, volumes in found.items():
        write_manifest(source / f"{name}.json", volumes)
        voxels = sum(int(np.prod(entry.shape)) for entry in volumes)
        sets = len({entry.set.split("/")[0] if name == "unlabelled" else entry.set for entry in volumes})
        lines.append(f"{source / name}.json: {len(volumes)} volumes of {sets} sets, {voxels / 1e6:.0f} M voxels")
    return lines


def _below(entries: Sequence[Entry], folder: pathlib.Path, root: pathlib.Path) -> list[Entry]:
    """Entries with paths relative to ``root`` instead of ``folder``."""
    if folder == root:
        return list(entries)
    prefix = folder.relative_to(root)
    moved = []
    for entry in entries:
        labels = None if entry.labels is None else str(prefix / entry.labels)
        moved.append(dataclasses.replace(entry, raw=str(prefix / entry.raw), labels=labels))
    return moved

"""Class labels: put together from several volumes, checked, and found in the folder layout of slice-by-slice benchmarks."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from emjax.data.files import section_paths
from emjax.data.sources import Box, Source
from emjax.data.volume import Volume, open_volume, require_same_grid
from emjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassVolume:
    """Where a class is annotated.

    Attributes:
        volume: spec of ``open_volume``.
        value: the class, 1 or more.
        where: values of ``volume`` that are of the class; () for all but 0 (object ids, masks of 0 and 255).
    """

    volume: str
    value: int
    where: tuple[int, ...] = ()

    def __post_init__(self):
        if not 1 <= self.value <= 255:
            raise UserError(f"class {self.value} of {self.volume}: expected a whole number from 1 to 255")

    def chosen(self, labels: np.ndarray) -> np.ndarray:
        """Where the class is, bool."""
        return np.isin(labels, self.where) if self.where else labels != 0


@dataclasses.dataclass(frozen=True)
class _Merged:
    """Class labels, uint8, read from the volumes of the classes; the later one wins where two overlap."""

    parts: tuple[tuple[ClassVolume, Volume], ...]
    dtype: np.dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.parts[0][1].shape

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return self.parts[0][1].chunks

    @property
    def shards(self) -> tuple[int, ...] | None:
        return None

    def read(self, box: Box) -> np.ndarray:
        made: np.ndarray | None = None
        for one, volume in self.parts:
            found = one.chosen(volume[box])
            made = np.zeros(found.shape, np.uint8) if made is None else made
            made[found] = one.value
        assert made is not None
        return made

    def write(self, box: Box, array: np.ndarray) -> None:
        raise UserError("labels that are put together from several volumes cannot be written")


def open_classes(classes: Sequence[ClassVolume], voxel_size: Any = None) -> Volume:
    """One volume of class labels (uint8), put together when it is read; the later class wins where two overlap.

    Raises:
        UserError: no class, a volume that cannot be opened, is not made of integers, or is not of the others' shape.
    """
    if not classes:
        raise UserError("labels: an empty list of classes; expected at least one, or None for a volume without labels")
    parts: list[tuple[ClassVolume, Volume]] = []
    for one in classes:
        volume = open_volume(one.volume, voxel_size=voxel_size).require_axes("zyx")
        if volume.dtype.kind not in "iub":
            raise UserError(f"{one.volume} has dtype {volume.dtype}, expected integers")
        if parts:
            require_same_grid(parts[0][1], volume)
        parts.append((one, volume))
    spec = ", ".join(f"{one.volume} = {one.value}" for one in classes)
    source: Source = _Merged(tuple(parts))
    return dataclasses.replace(parts[0][1], spec=spec, source=source, attributes={})


def check_values(labels: np.ndarray, known: Sequence[int], name: str) -> np.ndarray:
    """``labels``; raises ``UserError`` for a value other than 0 and ``known``."""
    found = np.unique(labels)
    unknown = found[~np.isin(found, [0, *known])]
    if len(unknown):
        shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
        raise UserError(
            f"{name}: found label {shown}, expected 0 or {', '.join(map(str, known))}; name all classes, or all values "
            "that may be there"
        )
    return labels


def slice_folders(
    root: str,
    names: Sequence[str] = (),
    images: str = "images",
    labels: str = "labels",
) -> list[tuple[str, str, str]]:
    """Volumes of the layout ``root/NAME/images/*.png`` and ``root/NAME/labels/*.png``, in natural order of names.

    Args:
        root: the benchmark's folder.
        names: its sub-folders to take; all that hold an ``images`` folder if ().
        images, labels: what the folders of slices are called.

    Returns:
        (name, spec of the image, spec of the labels) for ``emjax.data.pipeline.Source``. Slices are paired in natural
        order (``im2`` before ``im10``), whatever they are called.

    Raises:
        UserError: a folder is missing or empty, or holds another number of labels than of images.
    """
    if not os.path.isdir(root):
        raise UserError(f"{root} is not a folder; expected ROOT/NAME/{images}/*.png and ROOT/NAME/{labels}/*.png")
    chosen = list(names) or sorted(name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name, images)))
    if not chosen:
        raise UserError(f"{root} holds no NAME/{images} folder; expected ROOT/NAME/{images}/*.png")
    found = []
    for name in chosen:
        folders = [os.path.join(root, name, part) for part in (images, labels)]
        counts = []
        for folder in folders:
            if not os.path.isdir(folder):
                raise UserError(f"{folder} is missing; expected ROOT/NAME/{images}/*.png and ROOT/NAME/{labels}/*.png")
            counts.append(len(section_paths(folder)))
            if not counts[-1]:
                raise UserError(f"{folder} holds no PNG or TIFF images")
        if counts[0] != counts[1]:
            raise UserError(f"{root}/{name}: {counts[0]} slices in {images}, {counts[1]} in {labels}; expected as many")
        found.append((name, *folders))
    return found  # type: ignore[return-value]

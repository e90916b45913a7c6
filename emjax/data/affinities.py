"""Affinity volumes: always with their offsets, stored as uint8, read as float32; and the conventions of others.

Here an affinity of offset ``o`` (zyx, negative) is stored at voxel ``v`` and speaks of the edge between ``v`` and
``v + o``; 1 means the same object.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from emjax.data.volume import Volume, create_volume, open_volume
from emjax.errors import UserError

NEAREST = ((-1, 0, 0), (0, -1, 0), (0, 0, -1))
CONVENTIONS = ("banis", "seung", "elf-boundary")

Offsets = tuple[tuple[int, int, int], ...]


def check_offsets(value: Any, channels: int | None = None, where: str = "affinities") -> Offsets:
    """Offsets as a tuple of integer triples.

    Raises:
        UserError: not integer triples, an offset without a negative entry, or another number of them than ``channels``.
    """
    try:
        numbers = np.asarray(value)
        wrong = numbers.ndim != 2 or numbers.shape[1] != 3 or not np.array_equal(numbers, np.round(numbers))
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        raise UserError(f"{where}: offsets {value!r} are not a list of integer triples z,y,x, e.g. [[-1,0,0],[0,-1,0]]")
    offsets: Offsets = tuple(tuple(int(n) for n in triple) for triple in numbers)  # type: ignore[misc]
    for offset in offsets:
        if min(offset) >= 0:
            raise UserError(
                f"{where}: the offset {offset} has no negative entry; an affinity is stored at the later voxel of its "
                "edge (python -m emjax.prepare affinities --convention ... converts those of others)"
            )
    if channels is not None and len(offsets) != channels:
        raise UserError(f"{where}: {len(offsets)} offsets for {channels} channels")
    return offsets


@dataclasses.dataclass(frozen=True, eq=False)
class Affinities:
    """Affinities on disk: ``affinities[:, z0:z1, y0:y1, x0:x1]`` is float32 in [0, 1].

    Attributes:
        volume: the stored volume, axes czyx.
        offsets: one triple zyx per channel.
        scale: what a stored number is multiplied by; 1/255 for uint8.
    """

    volume: Volume
    offsets: Offsets
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.volume.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        block = self.volume[index]
        if self.scale == 1.0:
            return block.astype(np.float32, copy=False)
        return block.astype(np.float32) * np.float32(self.scale)

    def describe(self) -> str:
        """One line, as that of the volume, with the offsets."""
        return f"{self.volume.describe()}, offsets {' '.join(f'({z},{y},{x})' for z, y, x in self.offsets)}"


def open_affinities(spec: str, **options: Any) -> Affinities:
    """Open affinities; the options are those of :func:`emjax.data.volume.open_volume`.

    Raises:
        UserError: no ``offsets`` attribute, offsets that do not fit the channels, or integers without ``scale``.
    """
    return as_affinities(open_volume(spec, **options))


def as_affinities(volume: Volume) -> Affinities:
    """An opened volume understood as affinities; see :func:`open_affinities`."""
    if "offsets" not in volume.attributes:
        raise UserError(
            f"{volume.spec} has no offsets attribute: which voxels its affinities join is unknown; write it with "
            "emjax, or convert it: python -m emjax.prepare affinities --convention ..."
        )
    if volume.axes == "zyx":
        volume = dataclasses.replace(volume, source=_OneChannel(volume.source), axes="czyx")
    offsets = check_offsets(volume.attributes["offsets"], volume.shape[0], volume.spec)
    scale = volume.attributes.get("scale")
    if volume.dtype.kind == "f":
        scale = 1.0 if scale is None else scale
    elif scale is None and volume.dtype == np.uint8:
        scale = 1.0 / 255.0
    elif scale is None:
        raise UserError(
            f"{volume.spec}: affinities of {volume.dtype.name} need a scale attribute, e.g. 1/255 for uint8"
        )
    if not isinstance(scale, int | float) or not scale > 0:
        raise UserError(f"{volume.spec}: the scale {scale!r} is not a positive number")
    return Affinities(volume, offsets, float(scale))


@dataclasses.dataclass(frozen=True)
class _OneChannel:
    """A source of three axes with a channel axis of length 1 in front."""

    inner: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.inner.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.inner.dtype

    @property
    def chunks(self) -> tuple[int, ...] | None:
        return self.inner.chunks and (1, *self.inner.chunks)

    @property
    def shards(self) -> tuple[int, ...] | None:
        return self.inner.shards and (1, *self.inner.shards)

    def read(self, box: tuple[slice, ...]) -> np.ndarray:
        return self.inner.read(box[1:])[None]

    def write(self, box: tuple[slice, ...], array: np.ndarray) -> None:
        self.inner.write(box[1:], array[0])


def create_affinities(
    path: str,
    spatial_shape: Sequence[int],
    offsets: Sequence[Sequence[int]],
    *,
    dtype: Any = np.uint8,
    attributes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Volume:
    """Create a volume for affinities: uint8 with ``scale`` 1/255, or a float type; see ``create_volume``.

    Blocks for a uint8 volume are made by :func:`quantise`.
    """
    checked = check_offsets(offsets, where=str(path))
    kind = np.dtype(dtype)
    if kind.kind != "f" and kind != np.uint8:
        raise UserError(f"{path}: affinities are stored as uint8 or a float type, not {kind.name}")
    notes = {**(attributes or {}), "offsets": checked, "scale": 1.0 / 255.0 if kind == np.uint8 else 1.0}
    return create_volume(path, (len(checked), *spatial_shape), kind, attributes=notes, **options)


def quantise(affinities: np.ndarray) -> np.ndarray:
    """Affinities in [0, 1] as uint8, round(255 a)."""
    return np.rint(np.clip(affinities, 0.0, 1.0) * np.float32(255.0)).astype(np.uint8)


# --- conventions of others -------------------------------------------------------------------------------------------


def convention_offsets(name: str, channels: int, offsets: Sequence[Sequence[int]] | None, long_range: int) -> Offsets:
    """Offsets, in our convention, of the channels that :func:`from_convention` returns."""
    if name not in CONVENTIONS:
        raise UserError(f"unknown affinity convention {name!r}, expected one of {', '.join(CONVENTIONS)}")
    if offsets is not None:
        return check_offsets(offsets, channels, f"convention {name}")
    far: Offsets = tuple((z * long_range, y * long_range, x * long_range) for z, y, x in NEAREST)
    known: dict[int, Offsets] = {3: NEAREST, 6: NEAREST + far}
    if channels not in (known if name == "banis" else {3: NEAREST}):
        raise UserError(f"convention {name}: {channels} channels need their offsets (z,y,x) to be given")
    return known[channels]


def from_convention(
    affinities: np.ndarray,
    name: str,
    *,
    offsets: Sequence[Sequence[int]] | None = None,
    long_range: int = 10,
) -> tuple[np.ndarray, Offsets]:
    """Affinities of another world in ours: zyx, offsets that point backwards, stored at the later voxel, 1 = same.

    Args:
        affinities: four axes.
            "banis": (c, x, y, z), channels x, y, z (then the long ones x, y, z), stored at the *lower* voxel of the
            edge, that is for a partner at ``v + d``; the same layout as what PyTorch Connectomics' decoder reads.
            "seung": (x, y, z, c), channels x, y, z, stored at the later voxel (waterz of the Seung lab, ABISS).
            "elf-boundary": (c, z, y, x), 1 = cut, stored at the later voxel (elf, torch-em, PlantSeg).
        offsets: one triple zyx per channel, in our convention (negative), where the channels are others than the three
            nearest (and, for "banis", the three at ``long_range``); channels then keep their order.
        long_range: distance of the long affinities of "banis", in voxels.

    Returns:
        (c, z, y, x) array of the same dtype (uint8 is taken as 0 to 255) and its offsets. Edges that leave the volume
        are 0.
    """
    if affinities.ndim != 4:
        raise UserError(f"convention {name}: affinities of {affinities.ndim} axes, expected 4")
    channels = affinities.shape[-1 if name == "seung" else 0]
    found = convention_offsets(name, channels, offsets, long_range)
    if name == "elf-boundary":
        top = affinities.dtype.type(255 if affinities.dtype == np.uint8 else 1)
        return np.ascontiguousarray(top - affinities), found
    if name == "seung":
        moved = affinities.transpose(3, 2, 1, 0)
        return np.ascontiguousarray(_zyx_order(moved, offsets is None)), found
    moved = _zyx_order(affinities.transpose(0, 3, 2, 1), offsets is None)
    shifted = np.zeros_like(moved, order="C")
    for channel, offset in enumerate(found):
        here = tuple(slice(max(0, -o), n - max(0, o)) for o, n in zip(offset, moved.shape[1:]))
        lower = tuple(slice(max(0, o), n - max(0, -o)) for o, n in zip(offset, moved.shape[1:]))
        if all(part.stop > part.start for part in here):
            shifted[channel][here] = moved[channel][lower]
    return shifted, found


def _zyx_order(affinities: np.ndarray, reverse: bool) -> np.ndarray:
    """Channels x, y, z (, x, y, z) as z, y, x (, z, y, x)."""
    if not reverse:
        return affinities
    groups = [range(start, min(start + 3, len(affinities))) for start in range(0, len(affinities), 3)]
    return affinities[[channel for group in groups for channel in reversed(group)]]

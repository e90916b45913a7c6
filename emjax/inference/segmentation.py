"""From stored affinities to fragments, a merge history and labels at any threshold.

Beside the labels ``NAME.zarr`` lie ``NAME.fragments.zarr`` (watershed fragments) and ``NAME.merges.npz`` (in which
order and at which score they merge): labels at another threshold are a look-up in these two.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from emjax import __version__
from emjax.data.affinities import NEAREST, check_offsets, open_affinities
from emjax.data.volume import Volume, blocks, check_finite, create_volume, mark_complete
from emjax.errors import UserError
from emjax.inference.ledger import content_hash
from emjax.postprocess import (
    MergeTree,
    agglomerate,
    apply,
    mutex_watershed,
    parse_score,
    region_graph,
    regrow,
    watershed,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Watershed and agglomeration.

    Attributes:
        fragments: ``"watershed"`` of the nearest affinities, or ``"mutex"`` watershed of all channels, of which those
            beyond the nearest repel.
        low, high: watershed limits; affinities at or below ``low`` never join, those of at least ``high`` always do.
        regrow: fragments of fewer voxels give way to the others (``emjax.postprocess.regrow``); 0 leaves them.
        score: agglomeration score (``emjax.postprocess.parse_score``).
        history: the merge history reaches to this threshold, and so do labels cut from it.
    """

    fragments: Literal["watershed", "mutex"] = "watershed"
    low: float = 0.0001
    high: float = 0.9999
    regrow: int = 0
    score: str = "mean"
    history: float = 1.0

    def validate(self) -> None:
        """Raises ``UserError`` for settings that cannot work."""
        if self.fragments not in ("watershed", "mutex"):
            raise UserError(f"--fragments {self.fragments}: expected watershed or mutex")
        if not 0 <= self.low < self.high:
            raise UserError(f"--low {self.low:g}, --high {self.high:g}: expected 0 <= low < high")
        if self.regrow < 0:
            raise UserError(f"--regrow {self.regrow}: expected a number of voxels, or 0")
        if not 0 < self.history <= 1:
            raise UserError(f"--history {self.history:g}: expected a threshold above 0, up to 1")
        try:
            parse_score(self.score)
        except ValueError as error:
            raise UserError(f"--score: {error}") from None


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a segmentation and what it was cut from are stored."""

    labels: str

    @property
    def _stem(self) -> str:
        for suffix in (".zarr", ".n5", ".h5", ".hdf5", ".hdf", ".tif", ".tiff", ".precomputed"):
            if self.labels.rstrip("/").endswith(suffix):
                return self.labels.rstrip("/").removesuffix(suffix)
        return self.labels.rstrip("/").replace(":", ".")

    @property
    def fragments(self) -> str:
        return f"{self._stem}.fragments.zarr"

    @property
    def merges(self) -> str:
        return f"{self._stem}.merges.npz"

    @property
    def work(self) -> str:
        return f"{self._stem}.work"

    @property
    def prediction(self) -> str:
        return f"{self._stem}.prediction.zarr"

    @property
    def overlays(self) -> str:
        return f"{self._stem}.overlays"

    def for_threshold(self, threshold: float) -> str:
        """Name of one of several segmentations."""
        if "." in pathlib.PurePath(self.labels).name and self.labels.endswith(".zarr"):
            return f"{self.labels}:{threshold:g}"
        raise UserError(
            f"--output {self.labels}: several thresholds are written to one .zarr, as NAME.zarr:0.3 and so on"
        )


def nearest_affinities(spec: str, **options: Any) -> tuple[Volume, tuple[int, int, int]]:
    """An affinity volume (channel, z, y, x) and the numbers of its nearest-neighbour channels z, y, x.

    Raises:
        UserError: not affinities, no or unfit ``offsets``, or an unknown scale.
    """
    affinities = open_affinities(spec, **options)
    volume = affinities.volume
    missing = [offset for offset in NEAREST if offset not in affinities.offsets]
    if missing:
        raise UserError(
            f"{volume.spec}: offsets {[list(o) for o in affinities.offsets]} lack {list(missing[0])}; expected the "
            "three nearest neighbours, each stored at the voxel whose partner is at v + offset"
        )
    if volume.dtype != np.uint8 and volume.dtype.kind != "f":
        raise UserError(f"{volume.spec}: affinities of {volume.dtype}; expected uint8 (scale 1/255) or floats in 0..1")
    if not np.isclose(affinities.scale, 1 / 255 if volume.dtype == np.uint8 else 1):
        raise UserError(
            f"{volume.spec}: affinities of {volume.dtype} with scale {affinities.scale:g}; expected "
            + ("1/255" if volume.dtype == np.uint8 else "1")
        )
    z, y, x = (affinities.offsets.index(offset) for offset in NEAREST)
    return volume, (z, y, x)


def read_affinities(volume: Volume, channels: Sequence[int], box: Sequence[slice], mask: Volume | None) -> np.ndarray:
    """Affinities (3, z, y, x) of the nearest neighbours in ``box``, uint8 or float32; 0 where the mask is."""
    values = np.stack([volume[(channel, *box)] for channel in channels])
    if values.dtype.kind == "f":
        values = check_finite(values.astype(np.float32, copy=False), volume.spec)
    if mask is not None:
        # The pair of v and its partner counts only if both are inside, so the mask is read one voxel further down.
        lead = [int(part.start > 0) for part in box]
        inside = mask[tuple(slice(part.start - more, part.stop) for part, more in zip(box, lead))] != 0
        own = inside[tuple(slice(more, None) for more in lead)]
        for axis, value in enumerate(values):
            value[~own] = 0
            here = tuple(slice(None) if a == axis else slice(more, None) for a, more in enumerate(lead))
            below = np.moveaxis(inside[here], axis, 0)[:-1]
            np.moveaxis(value, axis, 0)[1 - lead[axis] :][~below] = 0
    return values


def bytes_needed(volume: Volume, settings: Settings) -> int:
    """Memory to segment a volume at once: affinities, flags, fragments, graph and labels."""
    voxels = int(np.prod(volume.spatial_shape, dtype=np.int64))
    each = 1 if volume.dtype == np.uint8 else 4
    # The mutex watershed sorts the edges of all channels.
    edges = volume.shape[0] * (each + 16) if settings.fragments == "mutex" else 0
    return voxels * (3 * each + 24 + edges)


def plan_of(volume: Volume, mask: Volume | None, settings: Settings, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What decides fragments and merges; a change of any of it makes another plan."""
    source = volume.spec if "://" in volume.spec else os.path.abspath(volume.spec)
    return {
        "emjax": __version__,
        "affinities": source,
        "prediction": volume.attributes.get("plan"),
        "shape": list(volume.shape),
        "mask": None if mask is None else mask.spec,
        **dataclasses.asdict(settings),
        **extra,
    }


def segment_whole(
    volume: Volume,
    channels: Sequence[int],
    settings: Settings,
    mask: Volume | None = None,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> tuple[np.ndarray, MergeTree]:
    """Fragments uint32 (z, y, x) and merge history of a volume that fits into memory."""
    inside = None if mask is None else mask[...]
    if settings.fragments == "mutex":
        fragments = _mutex_fragments(volume, channels, inside)
    affinities = read_affinities(volume, channels, [slice(0, n) for n in volume.spatial_shape], mask)
    if settings.fragments == "watershed":
        fragments = watershed(affinities, settings.low, settings.high, threads=threads)
    say(f"{int(fragments.max())} fragments")
    if settings.regrow:
        fragments = regrow(fragments, affinities, settings.regrow, inside)
        say(f"{int(fragments.max())} after those below {settings.regrow} voxels gave way")
    statistics = parse_score(settings.score).statistics()
    graph = region_graph(affinities, fragments, statistics, threads=threads)
    del affinities
    tree = agglomerate(graph, settings.history, score=settings.score)
    say(f"{len(graph.uv)} edges, {tree.merges()} merges up to {settings.history:g}")
    return fragments, tree


def _mutex_fragments(volume: Volume, nearest: Sequence[int], inside: np.ndarray | None) -> np.ndarray:
    offsets = check_offsets(volume.attributes["offsets"])
    order = [*nearest, *(channel for channel in range(len(offsets)) if channel not in nearest)]
    values = np.stack([volume[channel] for channel in order])
    if values.dtype.kind == "f":
        values = check_finite(values.astype(np.float32, copy=False), volume.spec)
    return mutex_watershed(values, [offsets[channel] for channel in order], mask=inside)


def save_merges(path: str, tree: MergeTree, sizes: np.ndarray, plan: Mapping[str, Any]) -> None:
    """Writes a merge history; the file appears under its name only when it is whole.

    Arrays: ``a``, ``b`` (segments joined, the result is ``a``), ``score``, ``level``, ``nodes``, ``threshold`` (of
    :class:`emjax.postprocess.MergeTree`), ``sizes`` (voxels of each fragment), ``plan`` (JSON).
    """
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz.tmp", delete=False) as file:
            try:
                np.savez_compressed(
                    file, a=tree.a, b=tree.b, score=tree.score, level=tree.level, nodes=tree.nodes,
                    threshold=tree.threshold, sizes=sizes, plan=json.dumps(plan),
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


@dataclasses.dataclass(frozen=True)
class Merges:
    """A stored merge history: the tree, voxels of each fragment, and the plan that made them."""

    tree: MergeTree
    sizes: np.ndarray
    plan: dict[str, Any]

    @property
    def hash(self) -> str:
        return content_hash(self.plan)


def load_merges(path: str) -> Merges:
    """Reads a merge history; ``UserError`` if there is none or it is damaged."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no merge history there; emjax.segment writes one beside its output")
    try:
        with np.load(path) as stored:
            tree = MergeTree(
                int(stored["nodes"]),
                stored["a"],
                stored["b"],
                stored["score"],
                stored["level"],
                float(stored["threshold"]),
            )
            return Merges(tree, stored["sizes"], json.loads(str(stored["plan"])))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a merge history ({' '.join(str(error).split())[:100]})") from None


def lookup_at(merges: Merges, threshold: float, dust: int = 0) -> np.ndarray:
    """Segment of each fragment at a threshold, uint32; segments of fewer than ``dust`` voxels become 0."""
    try:
        lut = merges.tree.cut(threshold)
    except ValueError as error:
        raise UserError(f"--threshold: {error}") from None
    if dust > 1:
        voxels = np.bincount(lut, weights=merges.sizes, minlength=len(lut))
        lut = np.where(voxels[lut] < dust, 0, lut).astype(lut.dtype)
    return lut


def write_labels(
    fragments: Volume,
    lut: np.ndarray,
    output: str,
    attributes: Mapping[str, Any],
    overwrite: bool,
    threads: int = 1,
    finish: Callable[[tuple[slice, ...], np.ndarray], np.ndarray] = lambda box, labels: labels,
) -> int:
    """Writes ``lut[fragments]`` block by block; an old volume is replaced only by a whole new one. Returns segments.

    ``finish`` has the last word on the labels (z, y, x) of each box.
    """
    size, origin = fragments.require_voxel_size(), fragments.offset
    local_store = output.rstrip("/").endswith((".zarr", ".n5")) and "://" not in output
    replaced = overwrite and local_store and os.path.isdir(output)
    target = _beside(output) if replaced else output
    shards = fragments.shards or fragments.chunks or (64, 64, 64)
    step = [max(s, 64) for s in shards]
    with create_volume(
        target,
        fragments.spatial_shape,
        np.uint32,
        voxel_size=size,
        offset=origin,
        attributes=attributes,
        overwrite=overwrite,
        chunks=fragments.chunks if local_store else None,
        shards=fragments.shards if output.rstrip("/").endswith(".zarr") else None,
    ) as labels:
        for box in blocks(fragments.spatial_shape, step):
            labels[box] = finish(box, apply(lut, fragments[box], threads=threads))
    if replaced:
        _swap(target, output)
    return int(np.count_nonzero(np.bincount(lut)[1:])) if len(lut) > 1 else 0


def _beside(path: str) -> str:
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(folder, f".{os.getpid()}.{name}")


def _swap(new: str, old: str) -> None:
    aside = _beside(old) + ".old"
    os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def write_fragments(volume: Volume, fragments: np.ndarray, path: str, attributes: Mapping[str, Any]) -> None:
    """Stores fragments as an image of the affinities' voxel size; replaces what is there."""
    with create_volume(
        path,
        fragments.shape,
        np.uint32,
        voxel_size=volume.require_voxel_size(),
        offset=volume.offset,
        attributes=attributes,
        overwrite=True,
    ) as out:
        for box in blocks(fragments.shape, out.shards or out.chunks or fragments.shape):
            out[box] = fragments[box]
    mark_complete(path)

"""Segmentation of volumes that do not fit into memory: the stages of ``emjax.postprocess.blockwise`` with a ledger.

``fragments`` (watershed of each block) -> join (once) -> ``rename`` -> ``edges`` (of each block) -> agglomerate (once).
The partition is that of the whole volume at once. What passes between stages lies in ``NAME.work``; each block is done
once, by anyone, and a killed run goes on where it was.
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emjax.data.volume import Volume, create_volume, mark_complete, open_volume
from emjax.inference import ledger
from emjax.inference.blocks import chunk_near
from emjax.inference.executor import Executor, Stripes, stopping
from emjax.inference.segmentation import Places, Settings, nearest_affinities, read_affinities, save_merges
from emjax.inference.stages import Place, Stages, Stop, begin, load_arrays, name_of, save_arrays, side_path
from emjax.postprocess import MergeTree, agglomerate, apply, parse_score
from emjax.postprocess.blockwise import (
    Block,
    BlockFragments,
    Pending,
    block_fragments,
    block_graph,
    face_links,
    grid,
    join_fragments,
)
from emjax.postprocess.region_graph import Graph, Histograms

BYTES_PER_VOXEL = 40
"""Of one block in work: affinities, flags, fragments, faces and their copies."""


def block_shape(shape: Sequence[int], memory: int, chunk: int = 64, bytes_per_voxel: int = BYTES_PER_VOXEL) -> Place:
    """A block of whole chunks, as near to a cube as the volume allows, that ``memory`` bytes can work on."""
    most = max(memory // bytes_per_voxel, chunk**3)
    block = [min(chunk, length) for length in shape]
    while True:
        grown = [axis for axis in range(3) if block[axis] < shape[axis]]
        grown = [axis for axis in grown if math.prod(block) // block[axis] * (block[axis] + chunk) <= most]
        if not grown:
            return block[0], block[1], block[2]
        axis = min(grown, key=lambda candidate: block[candidate])
        block[axis] = min(block[axis] + chunk, shape[axis])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a block's functions need; travels to other processes by pickle.

    Attributes:
        affinities: arguments of ``nearest_affinities``: spec and keyword arguments.
        mask: spec of a mask, or None.
        settings: of the watershed and the score.
        places: of the results.
        shape, block: of the volume and of a block, voxels (z, y, x).
        plan: hash of the plan.
    """

    affinities: tuple[str, Mapping[str, Any]]
    mask: str | None
    settings: Settings
    places: Places
    shape: Place
    block: Place
    plan: str

    @property
    def folder(self) -> str:
        """Where what passes between stages is kept."""
        return self.places.work

    def side(self, stage: str, place: Place | None = None) -> str:
        """Path of the arrays that a stage keeps for a block, or once."""
        return side_path(self.folder, self.plan, stage, place)

    def read(self, block: Block) -> np.ndarray:
        """Affinities (3, z, y, x) of a block."""
        volume, channels = _opened(self.affinities[0], tuple(sorted(self.affinities[1].items())))
        mask = open_volume(self.mask) if self.mask else None
        return read_affinities(volume, channels, block.slices, mask)

    def image(self, name: str) -> Volume:
        """The local ("local") or final ("fragments") fragments."""
        return open_volume(self.places.fragments if name == "fragments" else self.local, writable=True)

    @property
    def local(self) -> str:
        return os.path.join(self.folder, "local.zarr")


@functools.lru_cache(maxsize=2)
def _opened(spec: str, options: tuple) -> tuple[Volume, Sequence[int]]:
    return nearest_affinities(spec, **dict(options))


def _pack_fragments(found: BlockFragments) -> dict[str, np.ndarray]:
    packed = {"first": found.first}
    for (axis, side), (labels, drains) in found.planes.items():
        packed[f"labels_{axis}_{side}"], packed[f"drains_{axis}_{side}"] = labels, drains
    for field in dataclasses.fields(Pending):
        packed[f"pending_{field.name}"] = getattr(found.pending, field.name)
    return packed


def _plane(packed: Mapping[str, np.ndarray], axis: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    return packed[f"labels_{axis}_{side}"], packed[f"drains_{axis}_{side}"]


def _pending(packed: Mapping[str, np.ndarray]) -> Pending:
    return Pending(**{field.name: packed[f"pending_{field.name}"] for field in dataclasses.fields(Pending)})


def pack_graph(graph: Graph) -> dict[str, np.ndarray]:
    """Arrays from which :func:`unpack_graph` makes the graph again, without running means and sizes."""
    packed: dict[str, Any] = {"nodes": graph.nodes, "scale": graph.scale, "uv": graph.uv, "count": graph.count}
    for name in ("sum", "max"):
        if getattr(graph, name) is not None:
            packed[name] = getattr(graph, name)
    if graph.histograms is not None:
        for field in dataclasses.fields(Histograms):
            packed[f"histograms_{field.name}"] = getattr(graph.histograms, field.name)
    return packed


def unpack_graph(packed: Mapping[str, np.ndarray]) -> Graph:
    """The graph of :func:`pack_graph`."""
    names = [field.name for field in dataclasses.fields(Histograms)]
    histograms = None
    if f"histograms_{names[0]}" in packed:
        histograms = Histograms(**{name: packed[f"histograms_{name}"] for name in names})
    return Graph(
        nodes=int(packed["nodes"]),
        uv=packed["uv"],
        count=packed["count"],
        sum=packed.get("sum"),
        scale=int(packed["scale"]),
        max=packed.get("max"),
        histograms=histograms,
    )


@dataclasses.dataclass(frozen=True)
class BlockStage:
    """One stage's function of one block; a pure function of what the stages before it stored."""

    work: Work
    stage: str
    stop: Stop

    def __call__(self, place: Place) -> dict[str, Any]:
        self.stop.check()
        block = grid(self.work.shape, self.work.block)[place]
        {"fragments": self._fragments, "rename": self._rename, "edges": self._edges}[self.stage](place, block)
        return {"voxels": math.prod(block.shape)}

    def _fragments(self, place: Place, block: Block) -> None:
        settings = self.work.settings
        found = block_fragments(self.work.read(block.with_halo()), block, settings.low, settings.high)
        self.work.image("local")[block.slices] = found.labels
        save_arrays(self.work.side("fragments", place), _pack_fragments(found))

    def _rename(self, place: Place, block: Block) -> None:
        with np.load(self.work.side("tables")) as tables:
            table = tables[name_of(place)]
        labels = apply(table, self.work.image("local")[block.slices])
        self.work.image("fragments")[block.slices] = labels
        ids, counts = np.unique(labels, return_counts=True)
        save_arrays(self.work.side("sizes", place), {"ids": ids, "counts": counts})

    def _edges(self, place: Place, block: Block) -> None:
        box = block.with_halo(1, 0)
        lead = [int(a < b) for a, b in zip(box.start, block.start)]
        fragments = self.work.image("fragments")[box.slices]
        statistics = parse_score(self.work.settings.score).statistics()
        save_arrays(
            self.work.side("edges", place), pack_graph(block_graph(self.work.read(box), fragments, lead, statistics))
        )


def _join(work: Work) -> int:
    """Joins the fragments of all blocks; writes a table for each block and returns the number of fragments."""
    places = grid(work.shape, work.block)
    numbers = {place: number for number, place in enumerate(places)}
    first, pending, links = [], [], []
    # Planes of one side are needed until the next block along that axis has been seen.
    for place, block in places.items():
        packed = load_arrays(work.side("fragments", place))
        first.append(packed["first"])
        pending.append(_pending(packed))
        for axis in range(3):
            below = tuple(p - (a == axis) for a, p in enumerate(place))
            if below not in numbers:
                continue
            with np.load(work.side("fragments", below)) as other:
                lower = other[f"labels_{axis}_1"], other[f"drains_{axis}_1"]
            upper = _plane(packed, axis, 0)
            links.append((numbers[below], numbers[place], face_links(lower, upper, axis, (places[below], block))))
    tables, count = join_fragments(work.shape, first, pending, links)
    save_arrays(work.side("tables"), {name_of(place): table for place, table in zip(places, tables)})
    return count


def _merge(work: Work, say: Callable[[str], None]) -> tuple[MergeTree, np.ndarray]:
    """The merge history and fragment sizes of the whole volume, from the blocks' edges."""
    places = grid(work.shape, work.block)
    # Summed as soon as they outgrow the sum: memory stays at about two graphs.
    graph: Graph | None = None
    waiting: list[Graph] = []
    for place in places:
        waiting.append(unpack_graph(load_arrays(work.side("edges", place))))
        if sum(len(part.uv) for part in waiting) > max(1 << 22, len(graph.uv) if graph else 0):
            graph = waiting[0].merge(*waiting[1:]) if graph is None else graph.merge(*waiting)
            waiting = []
    parts = ([graph] if graph is not None else []) + waiting
    graph = parts[0].merge(*parts[1:])
    tree = agglomerate(graph, work.settings.history, score=work.settings.score)
    say(f"{len(graph.uv)} edges, {tree.merges()} merges up to {work.settings.history:g}")
    sizes = np.zeros(graph.nodes + 1, np.int64)
    for place in places:
        stored = load_arrays(work.side("sizes", place))
        if stored["ids"].size and int(stored["ids"].max()) >= sizes.size:
            sizes = np.pad(sizes, (0, int(stored["ids"].max()) + 1 - sizes.size))
        sizes[stored["ids"]] += stored["counts"]
    return _with_nodes(tree, sizes.size - 1), sizes


def _with_nodes(tree: MergeTree, nodes: int) -> MergeTree:
    # A fragment without neighbours has no edge, so the graph may not know it.
    return dataclasses.replace(tree, nodes=max(tree.nodes, nodes))


def segment_blockwise(
    volume: Volume,
    affinities: tuple[str, Mapping[str, Any]],
    mask: Volume | None,
    settings: Settings,
    places: Places,
    plan: Mapping[str, Any],
    block: Place,
    executor: Executor,
    say: Callable[[str], None] = print,
) -> None:
    """Writes fragments and merge history of a volume of any size; goes on where an earlier run of this plan stopped.

    Raises:
        UserError: wrong input, or the work folder belongs to another plan.
        RuntimeError: blocks that failed three times.
    """
    shape = volume.spatial_shape
    content = {**plan, "block": list(block)}
    work = Work(
        affinities=affinities,
        mask=None if mask is None else mask.spec,
        settings=settings,
        places=places,
        shape=shape,
        block=block,
        plan=ledger.content_hash(content),
    )
    blocks = grid(shape, block)
    work_stages = {"fragments": True, "join": False, "rename": True, "edges": True, "agglomerate": False}
    begin(work.folder, content, blocks, work_stages, executor, lambda: _create(work, volume))
    say(f"{len(blocks)} blocks of {' x '.join(map(str, block))} voxels, {executor.describe()}")
    stop = Stop()
    stages = Stages(work.folder, work.plan, blocks, executor)

    def join() -> None:
        say(f"{_join(work)} fragments")

    def merge() -> None:
        tree, sizes = _merge(work, say)
        mark_complete(places.fragments)
        save_merges(places.merges, tree, sizes, plan)

    with stopping(stop.event):
        stages.each("fragments", BlockStage(work, "fragments", stop))
        stages.once("join", join)
        stages.each("rename", BlockStage(work, "rename", stop))
        stages.each("edges", BlockStage(work, "edges", stop))
        stages.once("agglomerate", merge)
    if not isinstance(executor, Stripes):
        shutil.rmtree(work.folder, ignore_errors=True)


def _create(work: Work, volume: Volume) -> None:
    for path in (work.local, work.places.fragments):
        create_labels(path, volume, work.block, {"plan": work.plan})


def create_labels(path: str, like: Volume, block: Place, attributes: Mapping[str, Any]) -> None:
    """An empty uint32 volume with the voxel size of ``like``, of which each block of ``block`` writes whole shards."""
    shape = like.spatial_shape
    chunks = tuple(chunk_near(b, 64) if b < n else min(64, b) for b, n in zip(block, shape))
    create_volume(
        path,
        shape,
        np.uint32,
        voxel_size=like.require_voxel_size(),
        offset=like.offset,
        chunks=chunks,
        shards=tuple(math.ceil(extent / chunk) * chunk for extent, chunk in zip(block, chunks)),
        overwrite=True,
        attributes=attributes,
    )

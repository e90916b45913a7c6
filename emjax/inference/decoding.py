"""A system's own decoding of predictions that do not fit into memory, by its ``block_decoder``, with a ledger.

``fragments`` (of each block) -> ``faces`` (which of them continue in other blocks) -> join (once) -> ``rename`` ->
``edges`` (of each block) -> partition (once) -> labels. What passes between stages lies in ``NAME.work``; a killed run
goes on where it was. Memory is that of one block in work for each worker, and the region graph.
"""

import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from emjax import __version__
from emjax.data.volume import Volume, mark_complete, open_volume
from emjax.inference import ledger
from emjax.inference.blockwise import create_labels, pack_graph, unpack_graph
from emjax.inference.executor import Executor, Stripes, stopping
from emjax.inference.segmentation import Places, write_labels
from emjax.inference.stages import Place, Stages, Stop, begin, load_arrays, name_of, save_arrays, side_path
from emjax.postprocess import apply
from emjax.postprocess.blockwise import Block, block_components, grid, id_bases, join_components, touching_pairs
from emjax.postprocess.region_graph import Graph
from emjax.systems.protocol import BlockDecoder

STAGES = {"fragments": True, "faces": True, "join": False, "rename": True, "edges": True, "partition": False}


@functools.lru_cache(maxsize=8)
def _opened(spec: str, plan: str) -> Volume:
    # By plan too: another one cuts the volumes of the work folder into other chunks.
    return open_volume(spec, allow_incomplete=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a block's functions need; travels to other processes by pickle.

    Attributes:
        decoder: of the system.
        outputs: specs of the predicted volumes, by name.
        folder: of the work.
        shape, block: of the volume and of a block, voxels (z, y, x).
        plan: hash of the plan.
    """

    decoder: BlockDecoder
    outputs: Mapping[str, str]
    folder: str
    shape: Place
    block: Place
    plan: str

    def volume(self, name: str) -> str:
        """Where the local ("local") or final ("fragments") fragments lie."""
        return os.path.join(self.folder, f"{name}.zarr")

    def side(self, stage: str, place: Place | None = None) -> str:
        """Path of the arrays that a stage keeps for a block, or once."""
        return side_path(self.folder, self.plan, stage, place)

    def read(self, box: Block, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
        """Outputs (channel, z, y, x) in a box; all, or some."""
        found = {}
        for name in names or tuple(self.outputs):
            volume = _opened(self.outputs[name], self.plan)
            part = volume[(slice(None), *box.slices)] if volume.ndim == 4 else volume[box.slices][None]
            found[name] = part
        return found


def _lead(box: Block, block: Block) -> Place:
    z, y, x = (int(a < b) for a, b in zip(box.start, block.start))
    return z, y, x


@dataclasses.dataclass(frozen=True)
class BlockStage:
    """One stage's function of one block; a pure function of what the stages before it stored."""

    work: Work
    stage: str
    stop: Stop

    def __call__(self, place: Place) -> dict[str, Any]:
        self.stop.check()
        block = grid(self.work.shape, self.work.block)[place]
        {"fragments": self._fragments, "faces": self._faces, "rename": self._rename, "edges": self._edges}[self.stage](
            place, block
        )
        return {"voxels": math.prod(block.shape)}

    def _fragments(self, place: Place, block: Block) -> None:
        work, decoder = self.work, self.work.decoder
        outputs = work.read(block)
        first = np.zeros(0, np.int64)
        if decoder.pieces is None:
            found = decoder.fragments(outputs)
        else:
            found, first = block_components(outputs[decoder.pieces][0], block)
        open_volume(work.volume("local"), writable=True, allow_incomplete=True)[block.slices] = found
        notes = {f"note_{name}": value for name, value in decoder.notes(outputs).items()}
        save_arrays(work.side("fragments", place), {"count": np.asarray(found.max()), "first": first, **notes})

    def _faces(self, place: Place, block: Block) -> None:
        work = self.work
        assert work.decoder.pieces is not None
        base = load_arrays(work.side("bases"))
        box = block.with_halo(1, 1)
        labels = work.read(box, (work.decoder.pieces,))[work.decoder.pieces][0]
        ids = _opened(work.volume("local"), work.plan)[box.slices].astype(np.int64)
        # The rim belongs to other blocks, each with its own numbers.
        for other, neighbour in _around(place, work).items():
            part = tuple(
                slice(max(a, c) - a, min(b, d) - a)
                for a, b, c, d in zip(box.start, box.stop, neighbour.start, neighbour.stop)
            )
            ids[part] += np.where(ids[part] > 0, base[name_of(other)], 0)
        save_arrays(work.side("faces", place), {"pairs": touching_pairs(labels, ids, box, block)})

    def _rename(self, place: Place, block: Block) -> None:
        work = self.work
        with np.load(work.side("tables")) as tables:
            table = tables[name_of(place)]
        labels = apply(table, _opened(work.volume("local"), work.plan)[block.slices])
        open_volume(work.volume("fragments"), writable=True, allow_incomplete=True)[block.slices] = labels

    def _edges(self, place: Place, block: Block) -> None:
        box = block.with_halo(1, 0)
        fragments = _opened(self.work.volume("fragments"), self.work.plan)[box.slices]
        graph = self.work.decoder.edges(self.work.read(box), fragments, _lead(box, block))
        save_arrays(self.work.side("edges", place), pack_graph(graph))


def _around(place: Place, work: Work) -> dict[Place, Block]:
    """The blocks that touch one, and itself."""
    blocks = grid(work.shape, work.block)
    near = {}
    for step in np.ndindex(3, 3, 3):
        z, y, x = (p + s - 1 for p, s in zip(place, step))
        if (z, y, x) in blocks:
            near[z, y, x] = blocks[z, y, x]
    return near


def _counts(work: Work, places: Mapping[Place, Block]) -> list[int]:
    return [int(load_arrays(work.side("fragments", place))["count"]) for place in places]


def _bases(work: Work, places: Mapping[Place, Block]) -> None:
    base = id_bases(_counts(work, places))
    save_arrays(work.side("bases"), {name_of(place): np.asarray(value) for place, value in zip(places, base)})


def _join(work: Work, places: Mapping[Place, Block]) -> int:
    """Writes a table for each block, from its fragments to those of the volume; returns how many these are."""
    counts = _counts(work, places)
    base = id_bases(counts)
    if work.decoder.pieces is None:
        table, total = np.arange(base[-1] + 1, dtype=np.uint32), int(base[-1])
    else:
        firsts = [load_arrays(work.side("fragments", place))["first"] for place in places]
        pairs = (load_arrays(work.side("faces", place))["pairs"] for place in places)
        table, total = join_components(firsts, pairs)
    tables = {
        name_of(place): np.concatenate([np.zeros(1, np.uint32), table[start + 1 : start + count + 1]])
        for place, start, count in zip(places, base, counts)
    }
    save_arrays(work.side("tables"), tables)
    save_arrays(work.side("total"), {"total": np.asarray(total)})
    return total


def _partition(work: Work, places: Mapping[Place, Block]) -> int:
    """Writes the segment of each fragment; returns how many edges there were."""
    graph: Graph | None = None
    waiting: list[Graph] = []
    # Summed as soon as they outgrow the sum: memory stays at about two graphs.
    for place in places:
        waiting.append(unpack_graph(load_arrays(work.side("edges", place))))
        if graph is None or sum(len(part.uv) for part in waiting) > max(1 << 22, len(graph.uv)):
            graph = waiting[0].merge(*waiting[1:]) if graph is None else graph.merge(*waiting)
            waiting = []
    assert graph is not None
    graph = graph.merge(*waiting) if waiting else graph
    notes = []
    for place in places:
        stored = load_arrays(work.side("fragments", place))
        notes.append({name[5:]: value for name, value in stored.items() if name.startswith("note_")})
    total = int(load_arrays(work.side("total"))["total"])
    save_arrays(work.side("segments"), {"lut": work.decoder.partition(graph, total, notes)})
    return len(graph.uv)


def decode_blockwise(
    decoder: BlockDecoder,
    outputs: Mapping[str, Volume],
    places: Places,
    plan: Mapping[str, Any],
    block: Place,
    executor: Executor,
    *,
    attributes: Mapping[str, Any],
    overwrite: bool = False,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> int | None:
    """Writes the labels of a prediction of any size; goes on where an earlier run of this plan stopped.

    Args:
        decoder: of the system.
        outputs: the predicted volumes, by name, on one grid of voxels.
        places: of the labels and of the work.
        plan: what decides the labels, JSON-able.
        block: in voxels (z, y, x); whole sections for a decoder that asks for them.
        executor: who runs the blocks.
        attributes: stored with the labels.
        overwrite: replace labels that are there.
        threads: of the last pass over the labels.

    Returns:
        The number of segments; None in a stripe that leaves the writing to the first.

    Raises:
        UserError: outputs that the system refuses, or a place that cannot be written.
        RuntimeError: blocks that failed three times.
    """
    first = next(iter(outputs.values()))
    shape = first.spatial_shape
    specs = {name: volume.spec for name, volume in outputs.items()}
    content = {"emjax": __version__, "outputs": specs, "block": list(block), "decoder": repr(decoder), **plan}
    work = Work(
        decoder=decoder,
        outputs=specs,
        folder=places.work,
        shape=shape,
        block=block,
        plan=ledger.content_hash(content),
    )
    blocks = grid(shape, block)

    def create() -> None:
        for name in ("local", "fragments"):
            create_labels(work.volume(name), first, block, {"plan": work.plan})

    kept = {name: each for name, each in STAGES.items() if name != "faces" or decoder.pieces is not None}
    begin(work.folder, content, blocks, kept, executor, create)
    say(f"{len(blocks)} blocks of {' x '.join(map(str, block))} voxels, {executor.describe()}")
    stop, stages = Stop(), Stages(work.folder, work.plan, blocks, executor)
    with stopping(stop.event):
        stages.each("fragments", BlockStage(work, "fragments", stop))
        if decoder.pieces is not None:
            stages.once("bases", lambda: _bases(work, blocks))
            stages.each("faces", BlockStage(work, "faces", stop))
        stages.once("join", lambda: say(f"{_join(work, blocks)} fragments"))
        stages.each("rename", BlockStage(work, "rename", stop))
        stages.each("edges", BlockStage(work, "edges", stop))
        stages.once("partition", lambda: say(f"{_partition(work, blocks)} edges"))
    if isinstance(executor, Stripes) and executor.index > 0:
        return None
    mark_complete(work.volume("fragments"))
    lut = load_arrays(work.side("segments"))["lut"]

    def finish(box: tuple[slice, ...], labels: np.ndarray) -> np.ndarray:
        z, y, x = box
        inside = Block((z.start, y.start, x.start), (z.stop, y.stop, x.stop), shape)
        return decoder.finish(work.read(inside), labels)

    fragments = open_volume(work.volume("fragments"))
    count = write_labels(fragments, lut, places.labels, attributes, overwrite, threads, finish)
    if not isinstance(executor, Stripes):
        shutil.rmtree(work.folder, ignore_errors=True)
    return count

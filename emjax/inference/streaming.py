"""Segments a whole image slab by slab, with the ``segment_volume`` of a system; a killed run goes on where it was.

While a run lasts, ``NAME.work`` lies beside the labels ``NAME.zarr``: the ledger, the state that was kept last, and
layers that are read back but no part of the result. A state is kept only when all that was given before it is on
disk, in one atomic write, so that slabs after it are computed and written again with the same values.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import serialization
from PIL import Image

from emjax.data.folder import Folder, is_remote
from emjax.data.intensity import Shown
from emjax.data.location import STORES, output_location
from emjax.data.pyramid import write_pyramid
from emjax.data.stores_write import default_shards
from emjax.data.volume import Volume, check_finite, create_volume, is_complete, mark_complete, open_volume
from emjax.errors import UserError
from emjax.inference import ledger
from emjax.inference.executor import stopping
from emjax.inference.prediction import input_generation
from emjax.inference.predictor import Window
from emjax.inference.progress import ProgressLine
from emjax.inference.segmentation import Places
from emjax.systems.protocol import Layer, Streaming
from emjax.view.overlay import labels_over

STAGE = "segment"
_STATE = "state.msgpack"


def windowed(volume: Volume, window: Window | None) -> Volume:
    """The volume as systems take it: uint8 as it is without a window, else float32 in 0..1; NaN is refused."""
    if window is None:
        return volume

    def through(block: np.ndarray) -> np.ndarray:
        return window(check_finite(block, volume.spec))

    return dataclasses.replace(volume, source=Shown(volume.source, through, np.dtype(np.float32)))


def generation(source: str) -> list[list[Any]]:
    """By what a changed file, folder or volume is recognised."""
    inside = [entry.path for entry in os.scandir(source)] if os.path.isdir(source) else []
    return input_generation(source) + ledger.file_generation(sorted(inside))


def work_folder(places: Places) -> str:
    """Where a run keeps what is no part of its result."""
    return re.sub(r"^(precomputed|zarr[23]?|n5|file)://", "", places.work)


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: what is streamed, from where to where.

    Attributes:
        streaming: of the system.
        image: what the system reads.
        places: of the labels and what lies beside them.
        content: the plan, JSON-able: all that decides the result.
        overwrite: replace an output that is there.
        keep_every: seconds after which the state is kept.
    """

    streaming: Streaming
    image: Volume
    places: Places
    content: Mapping[str, Any]
    overwrite: bool = False
    keep_every: float = 30.0

    @property
    def work(self) -> str:
        return work_folder(self.places)

    @property
    def plan(self) -> str:
        return ledger.content_hash(self.content)

    @property
    def in_file(self) -> bool:
        """Whether the labels become a single file, which cannot be written piece by piece by several runs."""
        return output_location(self.places.labels, None).kind not in STORES

    def location(self, name: str) -> str:
        """Where a layer is written."""
        if name == "labels" and not self.in_file:
            return self.places.labels
        others = [other for other, layer in self.streaming.layers.items() if layer.kept and other != "labels"]
        if name in others:
            return self.places.prediction if len(others) == 1 else f"{self.places.prediction}:{name}"
        return f"{self.work}/{name}.zarr"


def stream(run: Run, *, pyramid: bool = False, overlays: int = 0, say: Callable[[str], None] = print) -> None:
    """Writes the layers of a run, or completes what an earlier run with the same plan has written.

    ``pyramid``: coarser levels of the labels as well; ``overlays``: pictures of so many slices in ``NAME.overlays``.

    Raises:
        UserError: an output is there or was begun with another plan; nothing half-written is left.
    """
    work, labels = run.work, run.places.labels
    stored = ledger.read_plan(work)
    if stored is None and not run.overwrite and _made_by(labels, run.plan) and is_complete(labels):
        say(f"{labels}: already finished, nothing to do (--overwrite begins anew)")
        return
    if stored is not None and run.overwrite:
        Folder(work, write=True).remove()
        stored = None
    created: list[Volume] = []
    if stored is None:
        created = _create(run)
    else:
        ledger.check_same_plan(labels, stored, run.content)
    try:
        _write_slabs(run, say)
    except UserError:
        if created and Folder(work).bytes(_STATE) is None:
            _discard(created, work)
        raise
    _finish(run, pyramid, overlays, say)


def _made_by(labels: str, plan: str) -> bool:
    try:
        return open_volume(labels, allow_incomplete=True).attributes.get("plan") == plan
    except UserError:
        return False


def _create(run: Run) -> list[Volume]:
    """Creates all layers, empty and marked unfinished, then the plan."""
    labels, image = run.places.labels, run.image
    begun = _made_by(labels, run.plan) and not is_complete(labels)
    if not run.overwrite and not begun and (os.path.exists(labels) or is_complete(labels)):
        raise UserError(f"{labels} exists; choose another output, or pass --overwrite")
    made: list[Volume] = []
    try:
        for name, layer in run.streaming.layers.items():
            location = run.location(name)
            chunks, shards = _pieces(layer, image.spatial_shape, run.streaming.slab)
            made.append(
                create_volume(
                    location,
                    (*[layer.channels] * bool(layer.channels), *image.spatial_shape),
                    layer.dtype,
                    voxel_size=image.require_voxel_size(),
                    offset=image.offset,
                    chunks=chunks,
                    shards=shards if output_location(location, None).kind == "zarr" else None,
                    attributes={**layer.attributes, "source": image.spec, "method": "system", "plan": run.plan},
                    overwrite=run.overwrite or begun or not layer.kept or location.startswith(run.work),
                )
            )
        stage = {"hash": run.plan, "blocks": run.streaming.steps, "voxels": math.prod(image.spatial_shape)}
        ledger.write_plan(run.work, {"content": dict(run.content), "stages": {STAGE: stage}, "begun": time.time()})
    except BaseException:
        _discard(made, run.work)
        raise
    return made


def _discard(volumes: Sequence[Volume], work: str) -> None:
    """Leaves nothing of a run that has given nothing."""
    for volume in volumes:
        if volume.output is not None:
            volume.output.discard()
    with contextlib.suppress(UserError, OSError):
        Folder(work, write=True).remove()


def _pieces(layer: Layer, shape: Sequence[int], slab: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks and shards of a layer: a slab is some whole shards."""
    lead = (1,) * bool(layer.channels)
    chunks = (min(slab, shape[0]), min(256, shape[1]), min(256, shape[2]))
    return (*lead, *chunks), (*lead, chunks[0], *default_shards(shape, chunks)[-2:])


def _write_slabs(run: Run, say: Callable[[str], None]) -> None:
    """Goes through the slabs from the last kept state on."""
    streaming, folder = run.streaming, Folder(run.work, write=True)
    book = ledger.Ledger(run.work, STAGE, run.plan)
    kept = folder.bytes(_STATE)
    restored: dict[str, Any] = {} if kept is None else serialization.msgpack_restore(kept)
    before = int(restored.get("steps", 0))
    if before >= streaming.steps:
        return
    if before:
        say(f"{run.places.labels}: {before} of {streaming.steps} slabs were done before")
    voxels = math.prod(run.image.spatial_shape) / streaming.steps
    line = ProgressLine(STAGE, voxels * (streaming.steps - before), voxels * before)
    written = {name: open_volume(run.location(name), writable=True) for name in streaming.layers}
    stop = threading.Event()
    unmarked: list[str] = []
    begun = last = time.monotonic()

    def keep(steps: int, state: Any) -> None:
        folder.write_bytes(_STATE, serialization.msgpack_serialize({"steps": steps, "state": _plain(state)}))
        seconds = (time.monotonic() - last) / len(unmarked)
        for name in unmarked:
            book.mark_done(name, voxels=round(voxels), seconds=round(seconds, 3))
        unmarked.clear()

    with stopping(stop):
        steps = before
        for steps, slab in enumerate(streaming.run(written, restored.get("state")), before + 1):
            for name, first, values in slab.arrays:
                written[name][..., first : first + values.shape[-3], :, :] = values
            unmarked.append(f"{steps:08d}")
            line.add(voxels)
            if time.monotonic() - last >= run.keep_every and steps < streaming.steps:
                keep(steps, slab.state)
                last = time.monotonic()
        if steps != streaming.steps:
            raise RuntimeError(f"the system gave {steps} slabs, {streaming.steps} were announced")
        keep(steps, None)
    line.finish(f" ({(time.monotonic() - begun) / max(steps - before, 1):.2f} s per slab)")


def _plain(state: Any) -> Any:
    """A state with NumPy's arrays, as it is kept."""
    return jax.tree.map(lambda leaf: np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf, state)


def _finish(run: Run, pyramid: bool, overlays: int, say: Callable[[str], None]) -> None:
    """What is done with whole layers; safe to be done again."""
    # Writable, for its small cache: every label is read once.
    labels = open_volume(run.location("labels"), writable=True)
    found: set[int] = set()
    for z in range(0, labels.shape[0], run.streaming.slab):
        found.update(np.unique(labels[z : z + run.streaming.slab]).tolist())
    if overlays:
        draw_overlays(run.image, labels, overlays, run.places.overlays)
        say(f"{run.places.overlays}: pictures of {min(overlays, labels.shape[0])} slices")
    if run.in_file:
        _copy(labels, run.places.labels, run.streaming.slab, run.overwrite)
    for name, layer in run.streaming.layers.items():
        if layer.kept and not (name == "labels" and run.in_file):
            mark_complete(run.location(name))
    if pyramid:
        write_pyramid(run.places.labels)
    Folder(run.work, write=True).remove()
    say(f"{run.places.labels}: {len(found - {0})} segments")


def _copy(volume: Volume, path: str, slab: int, overwrite: bool) -> None:
    with create_volume(
        path,
        volume.shape,
        volume.dtype,
        voxel_size=volume.voxel_size,
        offset=volume.offset,
        attributes=volume.attributes,
        overwrite=overwrite,
    ) as out:
        for z in range(0, volume.shape[0], slab):
            out[z : z + slab] = volume[z : z + slab]


def draw_overlays(image: Volume, labels: Volume, count: int, folder: str) -> None:
    """Pictures of ``count`` slices, evenly spread: labels in colours over grey values."""
    if is_remote(folder):
        raise UserError(f"{folder}: pictures are written to local folders only; pass --overlays 0")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    for z in sorted(set(np.linspace(0, labels.shape[0] - 1, count).astype(int).tolist())):
        picture = Image.fromarray(labels_over(image[z], labels[z]))
        picture.save(pathlib.Path(folder) / f"slice_{z:05d}.png")

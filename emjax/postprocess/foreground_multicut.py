"""Foreground-restricted multicut: SegNeuron's way from affinities and foreground to neurons (MICCAI 2024).

Affinities are limited by the foreground, every section is cut into fragments by a distance-transform watershed, and the
region graph of all fragments is partitioned by a multicut with signed costs.

Large volumes are read a few sections at a time. Fragments never reach over a section, sums and counts of edges are
whole numbers, and the multicut sees the graph of the whole volume, so slabs of any thickness give the very same labels.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from emjax.postprocess.blockwise import block_graph
from emjax.postprocess.multicut import BoundaryEdges, boundary_edge_features, multicut, multicut_costs
from emjax.postprocess.region_graph import Graph
from emjax.postprocess.relabel import apply
from emjax.postprocess.seeded_watershed import distance_transform_watershed
from emjax.postprocess.threads import check_threads

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Numbers of the published pipeline.

    Attributes:
        mode: ``"3d"``, or ``"2d"``: every section is segmented by itself (no edges along z, costs scaled by section).
        restrict: limit affinities by the foreground; without, the foreground is not used at all.
        threshold: boundary (1 - affinity) above which distances start.
        sigma_seeds, sigma_weights: Gaussians on distance and boundary, pixels.
        min_size: smaller fragments are given to their neighbours.
        alpha: weight of the boundary against the distance in the flooded surface.
        beta: above 0.5 favours cuts, below 0.5 merging.
        refine: Kernighan-Lin after greedy contraction.
        background: voxels with less foreground than this become 0; ``None`` (published) leaves all in segments.
        slab_voxels: how much is read at once, rounded down to whole sections.
        threads: for watershed and graph; labels do not depend on it.
    """

    mode: Literal["2d", "3d"] = "3d"
    restrict: bool = True
    threshold: float = 0.25
    sigma_seeds: float = 2.0
    sigma_weights: float = 2.0
    min_size: int = 100
    alpha: float = 0.9
    beta: float = 0.25
    refine: bool = True
    background: float | None = None
    slab_voxels: int = 2**25
    threads: int = 1

    def validate(self) -> None:
        """Raises ``ValueError`` for settings that cannot work."""
        if self.mode not in ("2d", "3d"):
            raise ValueError(f"mode is {self.mode!r}; expected '2d' or '3d'")
        if not 0 < self.beta < 1:
            raise ValueError(f"beta is {self.beta}; expected a number between 0 and 1")
        if not 0 <= self.alpha <= 1 or self.min_size < 0 or min(self.sigma_seeds, self.sigma_weights) < 0:
            raise ValueError(
                f"alpha is {self.alpha}, min_size {self.min_size}, sigmas {self.sigma_seeds} and {self.sigma_weights}; "
                "expected alpha in 0 to 1 and the others from 0 up"
            )
        if self.background is not None and not 0 <= self.background <= 1:
            raise ValueError(f"background is {self.background}; expected None or 0 to 1")
        if self.slab_voxels < 1:
            raise ValueError(f"slab_voxels is {self.slab_voxels}; expected at least 1")


def restricted(affinities: np.ndarray, foreground: np.ndarray) -> np.ndarray:
    """Affinities (3, z, y, x) not above the foreground (z, y, x), of one dtype."""
    return np.minimum(affinities, foreground[None])


def boundary(affinities: np.ndarray) -> np.ndarray:
    """Probability (z, y, x) float32 of an in-plane boundary: the larger of 1 - a_y and 1 - a_x."""
    joined = np.minimum(affinities[1], affinities[2])
    return np.float32(1) - (joined.astype(np.float32) / np.float32(255) if joined.dtype == np.uint8 else joined)


def fragments(affinities: np.ndarray, settings: Settings = Settings()) -> np.ndarray:
    """Fragments uint32 (z, y, x) of every section, ids running on, with gaps. A section that is all boundary is one."""
    return distance_transform_watershed(
        boundary(affinities),
        settings.threshold,
        settings.sigma_seeds,
        settings.sigma_weights,
        min_size=settings.min_size,
        alpha=settings.alpha,
        threads=settings.threads,
    )


def slab_graph(affinities: np.ndarray, labels: np.ndarray, before: int, threads: int = 1) -> Graph:
    """Sums of boundary probabilities on the faces whose upper voxel is in a slab, without ``before`` sections.

    ``affinities`` (3, z, y, x), restricted already; ``labels`` (z, y, x), fragments.
    """
    split = np.uint8(255) - affinities if affinities.dtype == np.uint8 else np.float32(1) - affinities
    return block_graph(split, labels, (before, 0, 0), threads=threads)


def partition(edges: BoundaryEdges, nodes: int, settings: Settings = Settings()) -> np.ndarray:
    """Segment of each fragment 0..nodes as uint32 numbers from 1 in the order of the fragments; 0 stays 0."""
    costs = multicut_costs(edges.probability, edges.size, settings.beta)
    found = multicut(nodes + 1, edges.uv, costs, refine=settings.refine)
    _, first, inverse = np.unique(found[1:], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.uint32)
    rank[np.argsort(first)] = np.arange(1, len(first) + 1)
    return np.concatenate([np.zeros(1, np.uint32), rank[inverse]])


def _slabs(shape: tuple[int, int, int], settings: Settings) -> Iterator[tuple[int, int]]:
    thickness = max(1, settings.slab_voxels // (shape[1] * shape[2]))
    for start in range(0, shape[0], thickness):
        yield start, min(start + thickness, shape[0])


def slab_affinities(affinities: np.ndarray, foreground: np.ndarray | None, settings: Settings) -> np.ndarray:
    """Affinities (3, z, y, x) as the pipeline uses them: limited by the foreground (z, y, x) if so set; uint8 or
    float32."""
    chosen = np.asarray(affinities)
    if chosen.dtype != np.uint8:
        chosen = chosen.astype(np.float32, copy=False)
    if not settings.restrict or foreground is None:
        return chosen
    inside = np.asarray(foreground)
    if inside.dtype != chosen.dtype:
        chosen, inside = (
            part.astype(np.float32) / np.float32(255) if part.dtype == np.uint8 else part.astype(np.float32)
            for part in (chosen, inside)
        )
    return restricted(chosen, inside)


def _read(affinities: Any, foreground: Any, z: slice, settings: Settings) -> np.ndarray:
    return slab_affinities(affinities[:, z], foreground[z] if settings.restrict else None, settings)


def _check(affinities: Any, foreground: Any, settings: Settings) -> tuple[int, int, int]:
    if len(affinities.shape) != 4 or affinities.shape[0] != 3:
        raise ValueError(f"affinities has shape {tuple(affinities.shape)}; expected (3, z, y, x), nearest neighbours")
    shape = tuple(int(n) for n in affinities.shape[1:])
    if foreground is None:
        if settings.restrict or settings.background is not None:
            raise ValueError("foreground is missing; it limits the affinities (restrict) and marks background")
    elif tuple(foreground.shape) != shape:
        raise ValueError(f"foreground has shape {tuple(foreground.shape)}, affinities {shape}; expected the same")
    if 0 in shape:
        raise ValueError(f"affinities has shape {tuple(affinities.shape)}; expected at least one voxel along each axis")
    return shape  # type: ignore[return-value]


def foreground_multicut(
    affinities: Any, foreground: Any, settings: Settings = Settings(), out: np.ndarray | None = None
) -> np.ndarray:
    """Segments a volume.

    Args:
        affinities: (3, z, y, x) of the nearest neighbours z, y, x, stored at the higher voxel; float32, or uint8 that
            stands for value / 255. An array, or anything sliced like one.
        foreground: (z, y, x), likewise; ``None`` if it is not used.
        settings: see :class:`Settings`.
        out: uint32 (z, y, x) to write into (a memory map, say); the only thing as large as the volume.

    Returns:
        uint32 labels 1..n, numbered by first fragment; 0 only where ``settings.background`` says so.

    Raises:
        ValueError: unfit shapes or settings, or a foreground that is nowhere above one half.
    """
    settings.validate()
    check_threads(settings.threads)
    shape = _check(affinities, foreground, settings)
    labels = np.empty(shape, np.uint32) if out is None else out
    nodes, brightest = 0, 0.0
    empty: list[int] = []
    graph: Graph | None = None
    for start, stop in _slabs(shape, settings):
        # One section more, for the edges along z.
        before = int(start > 0)
        values = _read(affinities, foreground, slice(start - before, stop), settings)
        if settings.restrict:
            brightest = max(brightest, brightest_of(foreground[start:stop]))
        made = fragments(values[:, before:], settings)
        empty += [start + z for z, section in enumerate(made) if section.min() == section.max()]
        made += np.uint32(nodes)
        labels[start:stop] = made
        if settings.mode == "2d":
            labels[start:stop], nodes = segment_sections(values[:, before:], made, settings, nodes)
            continue
        nodes = int(made.max())
        part = slab_graph(values, labels[start - before : stop], before, settings.threads)
        graph = part if graph is None else graph.merge(part)
    if settings.restrict:
        check_foreground(brightest)
    if empty:
        shown = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        logger.warning("sections without a boundary between fragments (all or nothing is boundary): %s", shown)
    if graph is not None:
        lut = _occurring_first(labels, BoundaryEdges(graph.uv, graph.mean, graph.count.astype(float)), nodes, settings)
        for start, stop in _slabs(shape, settings):
            labels[start:stop] = apply(lut, labels[start:stop], threads=settings.threads)
    if settings.background is not None:
        for start, stop in _slabs(shape, settings):
            labels[start:stop][is_background(foreground[start:stop], settings.background)] = 0
    return labels


def brightest_of(foreground: np.ndarray) -> float:
    """The largest foreground probability, of uint8 (value / 255) or floats."""
    inside = np.asarray(foreground)
    return float(inside.max()) / (255 if inside.dtype == np.uint8 else 1)


def is_background(foreground: np.ndarray, threshold: float) -> np.ndarray:
    """Where the foreground, uint8 (value / 255) or float, is below a probability."""
    inside = np.asarray(foreground)
    return inside < threshold * (255 if inside.dtype == np.uint8 else 1)


def check_foreground(brightest: float) -> None:
    """Raises ``ValueError`` if the largest foreground probability of a volume says that there is no neuron."""
    if brightest <= 0.5:
        raise ValueError(
            f"foreground is at most {brightest:.3g} in the whole volume; expected neurons (above 0.5): look at the "
            "image's grey values and voxel size, or segment without restriction"
        )


def _occurring_first(labels: np.ndarray, edges: BoundaryEdges, nodes: int, settings: Settings) -> np.ndarray:
    """Look-up table from fragments to segments 1..n without numbers that only gaps in the fragments' ids would use."""
    occurs = np.zeros(nodes + 1, bool)
    for start, stop in _slabs(labels.shape, settings):
        occurs[labels[start:stop].ravel()] = True
    occurs[0] = False
    compact = np.cumsum(occurs).astype(np.uint32)
    inner = BoundaryEdges(compact[edges.uv], edges.probability, edges.size)
    return np.where(occurs, partition(inner, int(compact[-1]), settings)[compact], 0).astype(np.uint32)


def segment_sections(
    affinities: np.ndarray, labels: np.ndarray, settings: Settings, segments: int = 0
) -> tuple[np.ndarray, int]:
    """Segments of each section by itself, and how many there are then.

    ``affinities`` (3, z, y, x), restricted already; ``labels`` (z, y, x), fragments. Numbers run on from ``segments``.
    """
    found = np.empty(labels.shape, np.uint32)
    for z, section in enumerate(labels):
        used, compact = np.unique(section, return_inverse=True)
        ids = (compact.reshape(section.shape) + 1).astype(np.uint32)[None]
        edges = boundary_edge_features(affinities[:, z : z + 1], ids, threads=settings.threads)
        lut = partition(edges, len(used), settings)
        found[z] = apply(lut, ids)[0] + np.uint32(segments)
        segments += int(lut.max())
    return found, segments

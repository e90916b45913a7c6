"""Oracles of post-processing that need no waterz fragments: seeded and mutex watershed, multicut, metrics."""

import math
import pathlib
import re
from collections.abc import Callable, Iterator

import numpy as np

from checks import Case, Row, bound, close, exact, load, load_json
from emjax.metrics import (
    Contingency,
    adapted_rand_cremi,
    adapted_rand_skimage,
    border_mask,
    contingency,
    expected_run_length,
    node_numbers,
    normalised_information,
    rand_split_merge,
    variation_of_information,
)
from emjax.postprocess.agglomerate import agglomerate
from emjax.postprocess.multicut import boundary_edge_features, multicut, multicut_costs, multicut_energy
from emjax.postprocess.mutex_watershed import mutex_watershed
from emjax.postprocess.region_graph import region_graph
from emjax.postprocess.relabel import apply
from emjax.postprocess.seeded_watershed import distance_transform_watershed, lsd_fragments, superhuman_fragments


def _voi(segmentation: np.ndarray, reference: np.ndarray) -> float:
    """Variation of information over all voxels, in bits; 0 is an ordinary segment here."""
    return variation_of_information(contingency(segmentation, reference), ()).sum


def _same_partition(array: str, segmentation: np.ndarray, reference: np.ndarray) -> Row:
    return bound(f"{array}, VOI", _voi(segmentation, reference), 1e-12, "bit")


def _affinities_beside(path: pathlib.Path) -> np.ndarray:
    """The affinities of ``waterz_float.npz`` in the same folder, which the README names as input."""
    return load(path.with_name("waterz_float.npz"))["affinities"]


def _scoring(name: str) -> tuple[str, int]:
    """(score, bins of the queue) of a name such as ``mean`` or ``hist50max_bq256``."""
    match = re.fullmatch(r"(?:mean|hist(\d+)(max)?)(?:_bq(\d+))?", name)
    if match is None:
        raise ValueError(f"no scoring function {name!r}")
    score = f"hist_quant_{match[1]}" + ("_initmax" if match[2] else "") if match[1] else "mean"
    return score, int(match[3] or 0)


def _seeded_watershed(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    affinities = _affinities_beside(path)
    for recipe in sorted({array.removesuffix("__fragments") for array in arrays if array.endswith("__fragments")}):
        lsd = re.fullmatch(r"lsd_(xy|3d)_(\d+)", recipe)
        for threads in (1, 2):
            if lsd:
                fragments, seeds = lsd_fragments(
                    affinities, min_seed_distance=int(lsd[2]), per_section=lsd[1] == "xy", threads=threads
                )
            elif recipe.startswith("superhuman_maxdist"):
                fragments, seeds = superhuman_fragments(affinities, reference_ids=True, threads=threads)
            else:
                raise ValueError(f"no recipe {recipe!r}")
            yield exact(f"{recipe}__seeds ({threads} threads)", seeds, arrays[f"{recipe}__seeds"])
            yield exact(f"{recipe}__fragments ({threads} threads)", fragments, arrays[f"{recipe}__fragments"])
    for array in sorted(arrays):
        match = re.fullmatch(r"(.+)_waterz_(.+)__([\d.e+-]+)", array)
        if match is None:
            continue
        source = next(name for name in sorted(arrays) if name.startswith(match[1]) and name.endswith("__fragments"))
        score, queue = _scoring(match[2])
        fragments, threshold = arrays[source].astype(np.uint32), float(match[3])
        statistics = ("running_mean",) if score == "mean" else ("histogram", "max")
        graph = region_graph(affinities, fragments, statistics)
        tree = agglomerate(graph, threshold, score=score, ties="waterz", discretize_queue=queue)
        yield exact(array, apply(tree.cut(threshold), fragments), arrays[array])


def _mutex_watershed(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    affinities, offsets = arrays["affinities"], arrays["offsets"].astype(np.int64)
    nearest = np.abs(offsets).sum(1) == 1
    attractive = len(offsets) if nearest.all() else int(np.argmin(nearest))
    for array in sorted(arrays):
        match = re.fullmatch(r"(mws|signed_half)__(no_stride|stride)(_mask)?", array)
        if match is None:
            continue
        signed = match[1] == "signed_half"
        segmentation = mutex_watershed(
            affinities,
            offsets,
            attractive=attractive,
            strides=arrays["stride"] if match[2] == "stride" else (1, 1, 1),
            mask=arrays["mask"] if match[3] else None,
            convention="signed" if signed else "affogato",
            bias=0.5,
            drop_isolated=signed,
        )
        if signed and arrays[array][0, 0, 0] == 0:
            # mwatershed numbers a segment by the place of its root: the one rooted at the first voxel is 0 as well.
            segmentation = np.where(segmentation == segmentation[0, 0, 0], 0, segmentation)
        yield _same_partition(array, segmentation, arrays[array])
        if match[3]:
            yield exact(f"{array}, background", segmentation == 0, arrays[array] == 0)


def _multicut(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    affinities, fragments = _affinities_beside(path), arrays["fragments"]
    made = distance_transform_watershed(np.maximum(1 - affinities[1], 1 - affinities[2]))
    yield bound("fragments, VOI", _voi(made, fragments), 0.05, "bit")
    edges = boundary_edge_features(affinities, fragments)
    yield exact("uv", edges.uv, arrays["uv"])
    yield exact("edge_sizes", edges.size, arrays["edge_sizes"])
    yield close("mean_boundary_probability", edges.probability, arrays["mean_boundary_probability"], atol=1e-6)
    costs = multicut_costs(edges.probability, edges.size, float(arrays["beta"]))
    yield close("costs", costs, arrays["costs"], atol=1e-6)
    uv, costs, nodes = arrays["uv"], arrays["costs"], len(arrays["kl_node_labels"])
    for name, options in (("gaec", {"refine": False}), ("kl", {}), ("kl", {"proposals": 20})):
        labels = multicut(nodes, uv, costs, **options)
        excess = multicut_energy(uv, costs, labels) - float(arrays[f"{name}_energy"])
        fused = " with fusion moves" if "proposals" in options else ""
        yield bound(f"{name}_energy{fused}, excess", excess, 1e-6, "energy")
        if name == "kl" and not fused:
            yield _same_partition("kl_node_labels", labels, arrays["kl_node_labels"])
            yield _same_partition("kl_segmentation", labels[fragments], arrays["kl_segmentation"])


def _border_masks(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    for array in sorted(arrays):
        match = re.fullmatch(r"(.+)__gt_border([\d.]+)", array)
        if match:
            labels = arrays[f"{match[1]}__gt"]
            yield exact(array, np.where(border_mask(labels, float(match[2])), 0, labels), arrays[array])
        elif array.endswith("__seg"):
            pair = contingency(arrays[array], arrays[array.removesuffix("seg") + "gt"])
            yield exact(f"{array}, voxels counted", pair.total, arrays[array].size)


def _cremi(table: Contingency) -> dict[str, float]:
    voi, rand = variation_of_information(table), adapted_rand_cremi(table)
    return {
        "voi_split": voi.split,
        "voi_merge": voi.merge,
        "adapted_rand": rand.error,
        "adapted_rand_precision": rand.precision,
        "adapted_rand_recall": rand.recall,
    }


def _skimage(table: Contingency, ignore: tuple[int, ...]) -> dict[str, float]:
    voi, rand = variation_of_information(table, ignore), adapted_rand_skimage(table, ignore)
    return {
        "voi_split": voi.split,
        "voi_merge": voi.merge,
        "adapted_rand": rand.error,
        "precision": rand.precision,
        "recall": rand.recall,
    }


def _waterz(table: Contingency) -> dict[str, float]:
    voi, rand = variation_of_information(table), rand_split_merge(table)
    return {"voi_split": voi.split, "voi_merge": voi.merge, "rand_split": rand.split, "rand_merge": rand.merge}


def _funlib(table: Contingency) -> dict[str, float]:
    information = normalised_information(table)
    return {
        **_waterz(table),
        "nvi_split": information.nvi_split,
        "nvi_merge": information.nvi_merge,
        "nid": information.nid,
    }


DEFINITIONS: dict[str, Callable[[Contingency], dict[str, float]]] = {
    "cremi": _cremi,
    "skimage_ignore0": lambda table: _skimage(table, (0,)),
    "skimage_all": lambda table: _skimage(table, ()),
    "funlib": _funlib,
    "waterz": _waterz,
}


def _blockwise(segmentation: np.ndarray, labels: np.ndarray) -> Contingency:
    """The table as the sum of those of eight blocks."""
    halves = [(slice(0, side // 2), slice(side // 2, side)) for side in labels.shape]
    blocks = [(z, y, x) for z in halves[0] for y in halves[1] for x in halves[2]]
    tables = [
        contingency(segmentation[block], labels[block], offset=tuple(part.start for part in block)) for block in blocks
    ]
    return sum(tables[1:], tables[0])


def _compared(name: str, got: dict[str, float], want: dict[str, float | None], **tolerance: float) -> Iterator[Row]:
    for key, value in want.items():
        if key not in got:
            yield Row(f"{name} {key}: no such score", math.nan, math.nan, "a score", False)
        else:
            yield close(f"{name} {key}", float(got[key]), math.nan if value is None else float(value), **tolerance)


def _metrics(path: pathlib.Path) -> Iterator[Row]:
    wanted, arrays = load_json(path), load(path.with_suffix(".npz"))
    for pair, definitions in wanted.items():
        if pair == "erl":
            continue
        labels, segmentation = arrays[f"{pair}__gt"], arrays[f"{pair}__seg"]
        table = _blockwise(segmentation, labels)
        for definition, values in definitions.items():
            border = re.fullmatch(r"cremi_border([\d.]+)px", definition)
            if border:
                kept = np.where(border_mask(labels, float(border[1])), 0, labels)
                got = _cremi(contingency(segmentation, kept))
            else:
                got = DEFINITIONS[definition](table)
            yield from _compared(f"{pair} {definition}", got, values, atol=1e-9)
    if "erl" in wanted:
        yield from _run_lengths(wanted["erl"], arrays)


def _run_lengths(wanted: dict[str, dict], arrays: dict[str, np.ndarray]) -> Iterator[Row]:
    nodes = arrays["erl__nodes"]
    positions, skeletons = nodes[:, 2:] * arrays["erl__voxel_size_nm"], nodes[:, 1]
    edges = node_numbers(nodes[:, 0], arrays["erl__edges"])
    for name, values in wanted.items():
        segments = arrays.get(f"erl__segment_of_node__{name}", skeletons)
        result = expected_run_length(positions, edges, skeletons, segments)
        # The original counts background as a merging segment too.
        in_background = len(np.unique(skeletons[segments == 0])) > 1
        lengths = {
            "erl_nm": result.perfect_erl if name == "perfect" else result.erl,
            "total_length_nm": result.total_length,
        }
        counts = {
            "edges_omitted": result.omitted,
            "edges_split": result.split,
            "edges_merged": result.merged,
            "edges_correct": result.correct,
            "n_merging_segments": len(result.merging_segments) + in_background,
            "n_split_edges": result.split,
            "n_skeletons": len(np.unique(skeletons)),
        }
        measured = {key: value for key, value in values.items() if key not in counts}
        yield from _compared(f"erl {name}", lengths, measured, rtol=1e-5)
        yield from _compared(f"erl {name}", counts, {key: values[key] for key in values if key in counts})


CASES = {
    "seeded_watershed*.npz": Case(_seeded_watershed),
    "mutex_watershed*.npz": Case(_mutex_watershed),
    "multicut*.npz": Case(_multicut),
    "metrics*.npz": Case(_border_masks),
    "metrics*.json": Case(_metrics),
}

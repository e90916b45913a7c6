"""Oracles of post-processing: waterz, zwatershed's size merge, AGQ's block merge; the rest is in postprocess_others."""

import importlib.util
import pathlib
import re
from collections.abc import Iterator

import numpy as np

from checks import Case, Row, bound, exact, load
from emjax.metrics import contingency, variation_of_information
from emjax.postprocess import (
    agglomerate,
    apply,
    connected_components,
    label_components,
    merge_blocks,
    region_graph,
    size_merge,
    watershed,
)

STATISTICS = ("mean", "max", "histogram", "running_mean", "size")


def _affinities(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return arrays["affinities"] if "affinities" in arrays else arrays["affinities_uint8"]


def _scoring(name: str) -> tuple[str, int]:
    """(score, bins of the queue) of a name such as ``mean``, ``mean_bq256``, ``hist50max_bq256``, ``hist25``."""
    match = re.fullmatch(r"(mean|max|hist(\d+)(max)?)(?:_bq(\d+))?", name)
    if match is None:
        raise ValueError(f"no scoring function {name!r}")
    score = f"hist_quant_{match[2]}" + ("_initmax" if match[3] else "") if match[2] else match[1]
    return score, int(match[4] or 0)


def _voi(segmentation: np.ndarray, reference: np.ndarray) -> float:
    """Variation of information over all voxels, in bits; 0 is an ordinary segment here."""
    return variation_of_information(contingency(segmentation, reference), ignore=()).sum


def _relative_number(segmentation: np.ndarray, reference: np.ndarray) -> float:
    """By how much the number of segments differs, relative to the reference."""
    expected = np.unique(reference).size
    return abs(np.unique(segmentation).size - expected) / expected


def _waterz(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    affinities = _affinities(arrays)
    for array in sorted(arrays):
        if array.startswith("fragments__"):
            low, high = arrays["ws_params__" + array.removeprefix("fragments__")]
            for threads in (1, 2):
                yield exact(
                    f"{array} ({threads} threads)", watershed(affinities, low, high, threads=threads), arrays[array]
                )
        elif array.startswith("cc__"):
            threshold = float(array.removeprefix("cc__"))
            yield exact(array, connected_components(affinities, threshold), arrays[array])
    fragments = arrays["fragments__default"]
    graph = region_graph(affinities, fragments, STATISTICS)
    yield exact("rag__uv", graph.uv, arrays["rag__uv"])
    yield exact("rag__count", graph.count, arrays["rag__count"])
    yield exact("rag__mean_affinity", graph.running_mean, arrays["rag__mean_affinity"])
    # The exact mean: what differs is the running one's rounding, three times at each face, of which n / (n + 1) is kept.
    largest = 1.0 if affinities.dtype == np.uint8 else max(1.0, float(np.abs(affinities).max()))
    rounding = 2.0**-24 * 1.5 * (graph.count + 1.0) * largest
    errors = np.abs(graph.mean - arrays["rag__mean_affinity"]) / rounding
    yield bound("rag__mean_affinity, exact sums", errors.max(initial=0), 1, "rounding")
    tie_free = affinities.dtype == np.float32
    for array in sorted(arrays):
        if not array.startswith("seg__"):
            continue
        _, function, threshold = array.split("__")
        score, queue = _scoring(function)
        tree = agglomerate(graph, float(threshold), score=score, ties="waterz", discretize_queue=queue)
        yield exact(array, apply(tree.cut(float(threshold)), fragments), arrays[array])
        if queue and score == "mean":
            continue  # The bins alone change this partition; it is waterz's and reproduced above.
        options = {} if score == "mean" else {"discretize_queue": queue}
        segmentation = apply(agglomerate(graph, score=score, **options).cut(float(threshold)), fragments)
        bits = 1e-12 if tie_free and score == "mean" else 0.01
        yield bound(f"{array} canonical, VOI", _voi(segmentation, arrays[array]), bits, "bit")
        number = _relative_number(segmentation, arrays[array])
        yield bound(f"{array} canonical, segments", number, 0.005, "relative")
    if "history__abc" in arrays:
        last = max(float(name.split("__")[2]) for name in arrays if name.startswith("seg__mean__"))
        tree = agglomerate(graph, last, ties="waterz", remaining=True)
        yield exact("history__abc", np.stack([tree.a, tree.b, tree.a], axis=1), arrays["history__abc"])
        yield exact("history__score", tree.score, arrays["history__score"])
        yield exact("rag_after__uv", tree.uv, arrays["rag_after__uv"])
        yield exact("rag_after__score", tree.uv_score, arrays["rag_after__score"])


def _edge_cases(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    for array in sorted(arrays):
        if array.endswith("__fragments"):
            name = array.removesuffix("__fragments")
            low, high = arrays[f"{name}__params"]
            affinities = arrays.get(f"{name}__affinities", arrays.get(f"{name}__affinities_uint8"))
            yield exact(array, watershed(affinities, low, high), arrays[array])


def _size_merge(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    sources = {name: load(path.with_name(f"waterz_{name}.npz")) for name in {array.split("__")[0] for array in arrays}}
    graphs = {
        name: region_graph(_affinities(source), source["fragments__default"], STATISTICS)
        for name, source in sources.items()
    }
    for array in sorted(arrays):
        parts = array.split("__")
        if parts[1] == "max_affinity":
            yield exact(array, graphs[parts[0]].max, arrays[array])
            continue
        size, weight, dust = re.fullmatch(r"size(\d+)_weight([\d.e+-]+)_dust(\d+)", parts[2]).groups()
        weights = {"mean": "running_mean", "max": "max"}[parts[1]]
        lut = size_merge(graphs[parts[0]], int(size), float(weight), int(dust), weights=weights)
        yield exact(array, apply(lut, sources[parts[0]]["fragments__default"]), arrays[array])


def _block_merge(path: pathlib.Path) -> Iterator[Row]:
    arrays = load(path)
    affinities = _affinities(load(path.with_name("waterz_uint8.npz")))
    shape = tuple(int(n) for n in arrays["border_shape"])
    border = np.unpackbits(arrays["border_mask"], count=int(np.prod(shape))).astype(bool).reshape(shape)
    labels = arrays["block_segmentation"]
    yield exact("fragments_after_label", label_components(labels, 26), arrays["fragments_after_label"])
    for array in sorted(arrays):
        if array.startswith("merged__"):
            on_border, elsewhere = re.fullmatch(r"merged__border([\d.e+-]+)_other([\d.e+-]+)", array).groups()
            merged = merge_blocks(affinities, labels, border, on_border=float(on_border), elsewhere=float(elsewhere))
            yield exact(array, merged, arrays[array])


def _others() -> dict[str, Case]:
    if importlib.util.find_spec("cases.postprocess_others") is None:
        return {}
    return importlib.import_module("cases.postprocess_others").CASES


CASES = {
    "waterz_*.npz": Case(_waterz),
    "watershed_edge_cases*.npz": Case(_edge_cases),
    "size_merge*.npz": Case(_size_merge),
    "agq_block_merge*.npz": Case(_block_merge),
    **_others(),
}

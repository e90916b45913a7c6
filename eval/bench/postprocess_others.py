"""Seeded and mutex watershed, multicut and contingency tables against the libraries that users have.

python eval/bench/postprocess_others.py [--sections 12] [--repeat 3]

CPU time of one thread, the best of some calls after a first that compiles; each ratio is of two times from this run
(above 1: emjax is faster). mahotas, bioimage-cpp and scikit-image are needed: pip install emjax[bench].
"""

import argparse
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import bioimage_cpp
import mahotas
import numpy as np
import skimage.metrics
import skimage.segmentation
from postprocess_volumes import affinity_volume
from scipy import ndimage

from emjax.metrics import contingency as contingency_table
from emjax.metrics import score, variation_of_information
from emjax.postprocess.multicut import boundary_edge_features, multicut, multicut_costs, multicut_energy
from emjax.postprocess.mutex_watershed import mutex_watershed
from emjax.postprocess.seeded_watershed import (
    distance_transform_watershed,
    lsd_fragments,
    seeded_watershed,
    superhuman_fragments,
)

OFFSETS = [
    (-1, 0, 0), (0, -1, 0), (0, 0, -1), (-2, 0, 0), (0, -3, 0), (0, 0, -3),
    (-3, 0, 0), (0, -9, 0), (0, 0, -9), (0, -9, -9), (0, -9, 9), (-1, -4, 0),
]  # fmt: skip

FIRST_CALLS = """
import time, numpy as np
from emjax.postprocess.multicut import multicut
from emjax.postprocess.mutex_watershed import mutex_watershed
from emjax.postprocess.seeded_watershed import lsd_fragments, seeded_watershed
from emjax.metrics import score
a = np.random.default_rng(0).random((3, 4, 16, 16), dtype=np.float32)
ids = np.arange(1024).reshape(4, 16, 16) // 50
uv = np.stack([np.arange(9), np.arange(1, 10)], 1)
for name, call in (
    ("seeded_watershed", lambda: seeded_watershed(a[0], ids)),
    ("lsd_fragments", lambda: lsd_fragments(a)),
    ("mutex_watershed", lambda: mutex_watershed(a, [(-1, 0, 0), (0, -1, 0), (0, 0, -1)], attractive=2)),
    ("multicut", lambda: multicut(10, uv, np.linspace(-1, 1, 9))),
    ("score", lambda: score(ids, ids)),
):
    start = time.perf_counter()
    call()
    print(f"  {name:18} {time.perf_counter() - start:6.1f}")
"""


def cpu_seconds(call: Callable, repeat: int) -> float:
    best = np.inf
    for _ in range(repeat):
        start = time.thread_time()
        call()
        best = min(best, time.thread_time() - start)
    return best


def compare(title: str, size: float, unit: str, calls: dict[str, Callable], repeat: int) -> None:
    """Prints the rate of each call and the ratio of the first (emjax) to it."""
    first = next(iter(calls.values()))
    first()
    own = cpu_seconds(first, repeat)
    print(f"{title}: emjax {size / own:.3g} {unit}/s", end="")
    for name, call in list(calls.items())[1:]:
        taken = cpu_seconds(call, max(1, repeat - 1))
        print(f"; {name} {size / taken:.3g}, ratio {taken / own:.1f}", end="")
    print(flush=True)


def floods(title: str, surface: np.ndarray, seeds: np.ndarray, sections: bool, repeat: int) -> None:
    parts = list(zip(surface, seeds)) if sections else [(surface, seeds)]
    as_float = [(a.astype(np.float32), b.astype(np.uint32)) for a, b in parts]
    as_int = [(a, b.astype(np.int64)) for a, b in parts]
    others = {
        "scikit-image": lambda: [skimage.segmentation.watershed(a, b) for a, b in parts],
        "mahotas": lambda: [mahotas.cwatershed(a, b) for a, b in as_int],
        "bioimage-cpp": lambda: [bioimage_cpp.segmentation.watershed(a, b) for a, b in as_float],
    }
    want = np.stack(others["mahotas"]())
    got = seeded_watershed(surface, seeds, per_section=sections)
    equal = np.array_equal(got, want if sections else want[0])
    title = f"{title} (equal to mahotas: {'yes' if equal else 'NO'})"
    million = surface.size / 1e6
    own = {"emjax": lambda: seeded_watershed(surface, seeds, per_section=sections)}
    compare(title, million, "MVox", own | others, repeat)
    if surface.dtype.kind == "f":
        own = {"emjax": lambda: seeded_watershed(surface, seeds, per_section=sections, levels=65536)}
        compare("  65,536 levels", million, "MVox", own | others, repeat)


def long_range(nearest: np.ndarray) -> np.ndarray:
    """Twelve channels of which the long ones are the smallest in-between affinity."""
    lowest = nearest.min(0)
    channels = []
    for offset in OFFSETS:
        half = [step // 2 for step in offset]
        ends = [np.roll(lowest, [-step for step in shift], (0, 1, 2)) for shift in ((0, 0, 0), half, offset)]
        channels.append(np.minimum.reduce(ends))
    channels[:3] = nearest
    return np.stack(channels)


def mutex(affinities: np.ndarray, repeat: int) -> None:
    repulsive = affinities.copy()
    repulsive[3:] = 1 - repulsive[3:]
    for strides, kept in (((1, 4, 4), slice(None)), ((1, 1, 1), slice(0, 160))):
        whole, weights = (np.ascontiguousarray(array[..., kept, kept]) for array in (affinities, repulsive))
        calls = {
            "emjax": lambda strides=strides, whole=whole: mutex_watershed(whole, OFFSETS, strides=strides),
            "bioimage-cpp": lambda strides=strides, weights=weights: bioimage_cpp.segmentation.mutex_watershed(
                weights, OFFSETS, 3, strides=strides
            ),
        }
        table = contingency_table(calls["emjax"](), calls["bioimage-cpp"]())
        voi = variation_of_information(table, ()).sum
        title = f"mutex watershed, 12 offsets, stride {strides} (VOI to bioimage-cpp {voi:.1g})"
        compare(title, whole[0].size / 1e6, "MVox", calls, repeat)


def partition(affinities: np.ndarray, repeat: int) -> None:
    fragments = distance_transform_watershed(1 - affinities[1:].min(0), min_size=20)
    edges = boundary_edge_features(affinities, fragments)
    costs, nodes = multicut_costs(edges.probability, edges.size, 0.4), int(fragments.max()) + 1
    graph = bioimage_cpp.graph.UndirectedGraph.from_edges(nodes, edges.uv.astype(np.uint64))
    solvers = bioimage_cpp.graph.multicut
    greedy = solvers.GreedyAdditiveMulticut()
    chained = solvers.ChainedMulticutSolvers([greedy, solvers.KernighanLinMulticut()])
    for title, options, solver in (("greedy", {"refine": False}, greedy), ("Kernighan-Lin", {}, chained)):
        calls = {
            "emjax": lambda options=options: multicut(nodes, edges.uv, costs, **options),
            "bioimage-cpp": lambda solver=solver: solver.optimize(solvers.MulticutObjective(graph, costs)),
        }
        energies = [multicut_energy(edges.uv, costs, np.asarray(call())) for call in calls.values()]
        title = f"multicut, {title}, {len(costs)} edges (energy {energies[0]:.6f}, theirs {energies[1]:.6f})"
        compare(title, len(costs) / 1e6, "million edges", calls, repeat)
    start = time.thread_time()
    fused = multicut(nodes, edges.uv, costs, proposals=20)
    taken = time.thread_time() - start
    print(f"  with 20 fusion moves: energy {multicut_energy(edges.uv, costs, fused):.6f}, {taken:.2f} s")


def recipes(affinities: np.ndarray, repeat: int) -> None:
    boundary = np.float32(1) - np.float32(0.5) * (affinities[1] + affinities[2])

    def lsd() -> None:
        for section in boundary:
            distance = ndimage.distance_transform_edt(section < 0.5)
            seeds, _ = mahotas.label(ndimage.maximum_filter(distance, 10) == distance)
            mahotas.cwatershed(distance.max() - distance, seeds)

    def superhuman() -> None:
        for section in boundary:
            seeds, _ = mahotas.label(mahotas.regmax(mahotas.distance(section < 0.5)))
            mahotas.cwatershed(section, seeds)

    million = boundary.size / 1e6
    compare("LSD recipe", million, "MVox", {"": lambda: lsd_fragments(affinities), "original": lsd}, repeat)
    pair = {"": lambda: superhuman_fragments(affinities), "original": superhuman}
    compare("SuperHuman recipe", million, "MVox", pair, repeat)
    own = {"": lambda: distance_transform_watershed(boundary)}
    compare("elf recipe", million, "MVox", own, repeat)
    walls = {}
    for threads in (1, 2):
        start = time.perf_counter()
        superhuman_fragments(affinities, threads=threads)
        walls[threads] = time.perf_counter() - start
    print(f"SuperHuman recipe, wall time with 2 threads: {walls[1] / walls[2]:.2f} times faster than with 1")


def tables(affinities: np.ndarray, repeat: int) -> None:
    segmentation, _ = superhuman_fragments(affinities)
    labels, _ = lsd_fragments(affinities)
    calls = {
        "emjax": lambda: score(segmentation, labels),
        "scikit-image, VOI alone": lambda: skimage.metrics.variation_of_information(labels, segmentation),
    }
    compare("scores", labels.size / 1e6, "MVox", calls, repeat)


def machine() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines() if os.path.exists("/proc/cpuinfo") else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}, Python {platform.python_version()}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=6, help="sections of 512 x 512 pixels")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args(arguments)
    print(machine())
    print("first call with an empty cache (compilation), seconds:", flush=True)
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"NUMBA_CACHE_DIR": cache}
        subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, env=environment)
    stack = affinity_volume((options.sections, 512, 512), (5.0, 1.0, 1.0))
    boundary = np.float32(1) - np.float32(0.5) * (stack[1] + stack[2])
    _, seeds = superhuman_fragments(stack)
    floods("flood of sections, float32", boundary, seeds, True, options.repeat)
    floods("flood of sections, uint8", np.rint(boundary * 255).astype(np.uint8), seeds, True, options.repeat)
    cube = affinity_volume((112, 112, 112), (1.0, 1.0, 1.0))
    boundary = np.float32(1) - cube.mean(0)
    _, seeds = lsd_fragments(cube, per_section=False)
    floods("flood in 3D, float32", boundary, seeds, False, options.repeat)
    floods("flood in 3D, uint8", np.rint(boundary * 255).astype(np.uint8), seeds, False, options.repeat)
    recipes(stack, options.repeat)
    mutex(long_range(stack[:, :4]), options.repeat)
    partition(stack, options.repeat)
    tables(stack, options.repeat)


if __name__ == "__main__":
    main()

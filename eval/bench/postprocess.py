"""Watershed, region graph and agglomeration against waterz; then everything else of post-processing.

    python eval/bench/postprocess.py [--only volumes,memory,threads,compile,others] [--kinds b128,snemiq] [--cache DIR]

volumes: fragments, the chain with the mean score and the chain with the 50 % quantile, each against waterz with equal
    results checked, on the five kinds of volume of ``postprocess_volumes.py``; components against cc3d. CPU time of one
    thread, the best of ``--repeat`` calls or of a second's worth, on either side; each ratio is of two times from this
    run (above 1: emjax is faster).
memory: peak resident memory beyond the affinities, in a process of its own.
threads: wall time and equality of the results with 1 and 2 threads.
compile: the first call with an empty cache.
others: seeded and mutex watershed, multicut, scores (``postprocess_others.py``).

waterz, connected-components-3d, mahotas, scikit-image and bioimage-cpp are needed: pip install emjax[bench].
``--cache`` keeps the volumes, which take longer to make than to segment.
"""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from postprocess_others import compare, machine
from postprocess_others import main as others
from postprocess_volumes import KINDS, volume

from emjax.metrics import contingency, variation_of_information
from emjax.postprocess import agglomerate, apply, label_components, region_graph, watershed

PARTS = ("volumes", "memory", "threads", "compile", "others")
HIST = "OneMinus<HistogramQuantileAffinity<RegionGraphType, 50, ScoreValue, 256, false>>"
MEAN = "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"
THRESHOLD = 0.5
AIMS = {"fragments": 3.0, "chain, mean": 2.5, "chain, 50 % quantile": 3.0}

FIRST_CALLS = """
import time, numpy as np
from emjax.metrics import contingency, variation_of_information
from emjax.postprocess import agglomerate, connected_components, label_components, region_graph, size_merge, watershed
a = np.random.default_rng(0).random((3, 4, 16, 16), dtype=np.float32)
def timed(name, call):
    start = time.perf_counter()
    result = call()
    print(f"  {name:30} {time.perf_counter() - start:6.1f}", flush=True)
    return result
fragments = timed("watershed, float32", lambda: watershed(a))
timed("watershed, uint8 too", lambda: watershed((a * 255).astype(np.uint8)))
graph = timed("region_graph, mean", lambda: region_graph(a, fragments, ("mean", "size")))
full = timed("region_graph, histogram", lambda: region_graph(a, fragments, ("histogram",)))
timed("agglomerate, mean", lambda: agglomerate(graph, 0.5))
timed("agglomerate, quantile", lambda: agglomerate(full, 0.5, score="hist_quant_50"))
timed("size_merge", lambda: size_merge(graph, 10, 0.3))
timed("connected_components", lambda: connected_components(a))
timed("label_components", lambda: label_components(fragments))
"""

PEAK = """
import sys, numpy as np
from emjax.metrics import contingency, variation_of_information
from emjax.postprocess import agglomerate, apply, region_graph, watershed
def status(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return 1024 * int(line.split()[1])
def run(affinities, stage):
    fragments = watershed(affinities)
    if stage == "fragments":
        return fragments, 0
    quantile = stage == "chain, 50 % quantile"
    graph = region_graph(affinities, fragments, ("histogram",) if quantile else ("mean",))
    tree = agglomerate(graph, 0.5, score="hist_quant_50" if quantile else "mean")
    return apply(tree.cut(), fragments, out=fragments), len(graph.uv)
path, stage = sys.argv[1:]
run(np.load(path)[:, :6, :40, :40].copy(), stage)
affinities = np.load(path)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
_, edges = run(affinities, stage)
print(status("VmHWM") - before, edges)
"""


@contextlib.contextmanager
def silent():
    """waterz prints."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def waterz_run(affinities: np.ndarray, threshold: float, **options) -> np.ndarray:
    import waterz

    with silent():
        return next(iter(waterz.agglomerate(affinities, [threshold], **options))).copy()


def best(call: Callable, repeat: int) -> tuple[float, np.ndarray]:
    """The shortest of at least ``repeat`` calls, and of as many as a second holds: a call of 20 ms needs many."""
    seconds, result, total, calls = np.inf, None, 0.0, 0
    while calls < repeat or (repeat > 1 and total < 1.0):
        start = time.thread_time()
        result = call()
        taken = time.thread_time() - start
        seconds, total, calls = min(seconds, taken), total + taken, calls + 1
    return seconds, result


def chain(affinities: np.ndarray, score: str, threads: int = 1) -> np.ndarray:
    """Fragments, graph and agglomeration; what waterz's one call does."""
    fragments = watershed(affinities, threads=threads)
    statistics = ("histogram",) if score != "mean" else ("mean",)
    tree = agglomerate(region_graph(affinities, fragments, statistics, threads=threads), THRESHOLD, score=score)
    return apply(tree.cut(), fragments, out=fragments, threads=threads)


def volumes(kinds: list[str], loaded: Callable, repeat: int) -> None:
    import cc3d

    warm = np.random.default_rng(0).random((3, 4, 16, 16), dtype=np.float32)
    for values in (warm, np.round(warm * 255).astype(np.uint8)):
        chain(values, "mean"), chain(values, "hist_quant_50"), label_components(watershed(values), 6)
    missed = []
    for kind in kinds:
        affinities = loaded(kind)
        as_float = affinities.astype(np.float32) / np.float32(255) if affinities.dtype == np.uint8 else affinities
        million = as_float[0].size / 1e6
        seconds, fragments = best(lambda: watershed(affinities), repeat)
        largest = int(fragments.max())
        print(f"{kind}: {affinities.shape[1:]}, {affinities.dtype}, {largest} fragments", flush=True)
        given = fragments.astype(np.uint64)
        # Its watershed cannot be called alone: the difference of its call without and with fragments.
        both, theirs = best(lambda: waterz_run(as_float, -1.0), repeat)
        graph_only, _ = best(lambda: waterz_run(as_float, -1.0, fragments=given), repeat)
        rows = [("fragments", seconds, both - graph_only, np.array_equal(fragments, theirs))]
        del given
        for title, score, function in (
            ("chain, mean", "mean", MEAN),
            ("chain, 50 % quantile", "hist_quant_50", HIST),
        ):
            options = {"scoring_function": function, "discretize_queue": 0 if score == "mean" else 256}
            seconds, got = best(lambda score=score: chain(affinities, score), repeat)
            taken, theirs = best(lambda options=options: waterz_run(as_float, THRESHOLD, **options), repeat)
            voi = variation_of_information(contingency(got, theirs), ignore=()).sum
            rows.append((title, seconds, taken, np.array_equal(got, theirs) or f"{voi:.4f} bit apart (ties)"))
        for title, own, other, same in rows:
            verdict = "equal" if same is True else same or "DIFFERENT"
            print(
                f"  {title:22} emjax {million / own:6.1f} MVox/s; waterz {million / other:5.1f}; "
                f"ratio {other / own:4.1f} (aim {AIMS[title]:g}); {verdict}",
                flush=True,
            )
            if other / own < AIMS[title]:
                missed.append(f"{kind} {title}")
        labels = fragments
        calls = {
            "emjax": lambda labels=labels: label_components(labels, 6),
            "cc3d": lambda labels=labels: cc3d.connected_components(labels, connectivity=6),
        }
        compare("  components of labels", million, "MVox", calls, repeat)
    print("below the aim: " + (", ".join(missed) or "none"))


def memory(kinds: list[str], path_of: Callable) -> None:
    for kind in kinds:
        path = path_of(kind)
        voxels = np.load(path, mmap_mode="r")[0].size
        for stage in AIMS:
            command = [sys.executable, "-c", PEAK, str(path), stage]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peak, edges = map(int, output.split())
            allowed = 12 * voxels + 40 * edges
            print(
                f"{kind} {stage:22} {peak / 1e6:7.0f} MB beyond the affinities = {peak / voxels:5.1f} B/voxel, "
                f"{edges / voxels:.3f} edges per voxel; {peak / allowed:.2f} of 12 B/voxel + 40 B/edge",
                flush=True,
            )


def threads(kinds: list[str], loaded: Callable) -> None:
    for kind in kinds:
        affinities = loaded(kind)
        steps = {
            "watershed": lambda affinities, fragments, n: watershed(affinities, threads=n),
            "region_graph": lambda affinities, fragments, n: region_graph(affinities, fragments, threads=n).sum,
            "label_components": lambda affinities, fragments, n: label_components(fragments, 6, threads=n),
        }
        fragments = watershed(affinities)
        for name, step in steps.items():
            walls, results = {}, {}
            for n in (1, 2):
                step(affinities[:, :4, :16, :16].copy(), fragments[:4, :16, :16].copy(), n)
                walls[n] = np.inf
                for _ in range(3):
                    start = time.perf_counter()
                    results[n] = step(affinities, fragments, n)
                    walls[n] = min(walls[n], time.perf_counter() - start)
            same = "equal" if np.array_equal(results[1], results[2]) else "DIFFERENT"
            print(
                f"{kind} {name}: wall time with 2 threads {walls[1] / walls[2]:.2f} times shorter; {same}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="volumes, separated by commas")
    parser.add_argument("--cache", type=pathlib.Path, help="folder that keeps the volumes")
    parser.add_argument("--repeat", type=int, default=2)
    options, rest = parser.parse_known_args()
    parts, kinds = options.only.split(","), options.kinds.split(",")
    for name, known in ((parts, PARTS), (kinds, tuple(KINDS))):
        if unknown := sorted(set(name) - set(known)):
            parser.error(f"unknown {unknown[0]!r}; expected any of {', '.join(known)}")
    if rest and "others" not in parts:
        parser.error(f"unknown arguments {' '.join(rest)}")
    if set(parts) - {"others"}:
        print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.cache or pathlib.Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)

        def path_of(kind: str) -> pathlib.Path:
            path = folder / f"{kind}.npy"
            if not path.exists():
                np.save(path, volume(kind))
            return path

        def loaded(kind: str) -> np.ndarray:
            return np.load(path_of(kind))

        if "volumes" in parts:
            volumes(kinds, loaded, options.repeat)
        if "memory" in parts:
            memory(kinds, path_of)
        if "threads" in parts:
            threads([kind for kind in kinds if kind in ("b128", "snemiq")] or kinds[:1], loaded)
        if "compile" in parts:
            print("first call with an empty cache (compilation), seconds:", flush=True)
            environment = os.environ | {"NUMBA_CACHE_DIR": str(pathlib.Path(scratch) / "numba")}
            subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, env=environment)
    if "others" in parts:
        others(rest + ["--repeat", str(options.repeat)])


if __name__ == "__main__":
    main()

"""How much waterz's own result depends on the ids of the fragments, next to what the two kinds of ties give.

    python eval/bench/postprocess_ties.py --oracles ../shared/oracles [--runs 20]

waterz agglomerates the recorded fragments as they are numbered (the oracle), and ``--runs`` times with ids drawn anew: only
the order among equal scores changes. Prints the variation of information to the oracle (bits) and the relative difference
in the number of segments of these runs, and of ``ties="canonical"`` with its default queue.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from cases.postprocess import STATISTICS, _affinities, _relative_number, _scoring, _voi
from checks import load
from emjax.postprocess import agglomerate, apply, region_graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--oracles", type=pathlib.Path, required=True)
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args()
    print("array; segments; waterz renumbered: VOI median, largest, segments; canonical: VOI, segments")
    for path in sorted((options.oracles / "postprocess").glob("waterz_*.npz")):
        arrays = load(path)
        affinities, fragments = _affinities(arrays), arrays["fragments__default"]
        rng = np.random.default_rng(0)
        drawn = []
        for _ in range(options.runs):
            ids = np.concatenate([[0], 1 + rng.permutation(int(fragments.max()))]).astype(np.uint32)
            drawn.append((ids[fragments], region_graph(affinities, ids[fragments], STATISTICS)))
        own = region_graph(affinities, fragments, STATISTICS)
        for array in sorted(name for name in arrays if name.startswith("seg__")):
            score, queue = _scoring(array.split("__")[1])
            if queue and score == "mean":
                continue
            threshold, oracle = float(array.split("__")[2]), arrays[array]
            results = [
                apply(agglomerate(graph, threshold, score=score, ties="waterz", discretize_queue=queue).cut(), renamed)
                for renamed, graph in drawn
            ]
            voi = [_voi(result, oracle) for result in results]
            number = max(_relative_number(result, oracle) for result in results)
            canonical = apply(agglomerate(own, threshold, score=score).cut(), fragments)
            print(
                f"{path.stem} {array}; {np.unique(oracle).size}; {np.median(voi):.4f}, {max(voi):.4f}, {number:.2%}; "
                f"{_voi(canonical, oracle):.4f}, {_relative_number(canonical, oracle):.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""From affinities to segments: watershed, region graph, agglomeration and their kin, in Numba, usable without the rest."""

from emjax.postprocess.agglomerate import MergeTree, Score, agglomerate, parse_score
from emjax.postprocess.region_graph import Graph, Histograms, region_graph, region_sizes
from emjax.postprocess.relabel import apply
from emjax.postprocess.watershed import watershed

__all__ = [
    "Graph",
    "Histograms",
    "MergeTree",
    "Score",
    "agglomerate",
    "apply",
    "parse_score",
    "region_graph",
    "region_sizes",
    "watershed",
]

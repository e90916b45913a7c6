"""From affinities to segments: watershed, region graph, agglomeration and their kin, in Numba, usable without the rest."""

from emjax.postprocess.agglomerate import MergeTree, Score, agglomerate, parse_score
from emjax.postprocess.block_merge import border_affinities, block_border, merge_blocks
from emjax.postprocess.components import connected_components, label_components
from emjax.postprocess.region_graph import Graph, Histograms, region_graph, region_sizes
from emjax.postprocess.relabel import apply
from emjax.postprocess.size_merge import size_merge
from emjax.postprocess.watershed import watershed

__all__ = [
    "Graph",
    "Histograms",
    "MergeTree",
    "Score",
    "agglomerate",
    "apply",
    "border_affinities",
    "block_border",
    "connected_components",
    "label_components",
    "merge_blocks",
    "parse_score",
    "region_graph",
    "region_sizes",
    "size_merge",
    "watershed",
]

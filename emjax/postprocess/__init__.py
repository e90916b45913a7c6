"""From affinities to segments: watershed, region graph, agglomeration. NumPy, SciPy and Numba are all it needs."""

from emjax.postprocess.agglomerate import MergeTree, Score, agglomerate, parse_score
from emjax.postprocess.block_merge import block_border, border_affinities, merge_blocks, merge_blocks_blockwise
from emjax.postprocess.blockwise import (
    Block,
    BlockFragments,
    FaceLinks,
    Pending,
    block_fragments,
    block_graph,
    face_links,
    grid,
    join_fragments,
    label_components_blockwise,
    segment_blockwise,
    touching_pairs,
    unique_ids,
)
from emjax.postprocess.components import connected_components, label_components
from emjax.postprocess.foreground_multicut import foreground_multicut
from emjax.postprocess.multicut import (
    BoundaryEdges,
    boundary_edge_features,
    multicut,
    multicut_costs,
    multicut_energy,
)
from emjax.postprocess.mutex_watershed import mutex_watershed
from emjax.postprocess.region_graph import Graph, Histograms, region_graph, region_sizes
from emjax.postprocess.regrow import regrow
from emjax.postprocess.relabel import apply, renumber
from emjax.postprocess.seeded_watershed import (
    distance_transform_watershed,
    lsd_fragments,
    seeded_watershed,
    superhuman_fragments,
)
from emjax.postprocess.size_merge import size_merge
from emjax.postprocess.watershed import watershed

__all__ = [
    "Block",
    "BlockFragments",
    "BoundaryEdges",
    "FaceLinks",
    "Graph",
    "Histograms",
    "MergeTree",
    "Pending",
    "Score",
    "agglomerate",
    "apply",
    "block_border",
    "block_fragments",
    "block_graph",
    "border_affinities",
    "boundary_edge_features",
    "connected_components",
    "distance_transform_watershed",
    "face_links",
    "foreground_multicut",
    "grid",
    "join_fragments",
    "label_components",
    "label_components_blockwise",
    "lsd_fragments",
    "merge_blocks",
    "merge_blocks_blockwise",
    "multicut",
    "multicut_costs",
    "multicut_energy",
    "mutex_watershed",
    "parse_score",
    "region_graph",
    "region_sizes",
    "regrow",
    "renumber",
    "seeded_watershed",
    "segment_blockwise",
    "size_merge",
    "superhuman_fragments",
    "touching_pairs",
    "unique_ids",
    "watershed",
]

"""Random affinity volumes, and waterz without its printing; for the tests of post-processing."""

import contextlib
import os
import sys
import tempfile

import numpy as np
from hypothesis import strategies as st

MEAN = "OneMinus<MeanAffinity<RegionGraphType, ScoreValue>>"
QUANTILE = "OneMinus<HistogramQuantileAffinity<RegionGraphType, {}, ScoreValue, 256, {}>>"


@st.composite
def affinity_volumes(draw, longest=7, uint8=False):
    """Odd shapes with one-voxel axes, noise, plateaus of few levels, and constants; float32 (and uint8)."""
    shape = tuple(draw(st.integers(1, longest)) for _ in range(3))
    levels = draw(st.sampled_from([0, 1, 2, 3, 5, 17]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    if levels == 0:
        values = rng.random((3, *shape), dtype=np.float32)
    elif levels == 1:
        values = np.full((3, *shape), draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])), np.float32)
    else:
        values = rng.integers(0, levels, (3, *shape)).astype(np.float32) / np.float32(levels - 1)
    if uint8 and draw(st.booleans()):
        return np.round(values * 255).astype(np.uint8)
    return values


@contextlib.contextmanager
def _quiet():
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def as_float(affinities):
    return affinities.astype(np.float32) / np.float32(255) if affinities.dtype == np.uint8 else affinities


def waterz_agglomerate(affinities, thresholds, **options):
    """Copies of what waterz yields for each threshold."""
    import waterz

    fragments = options.pop("fragments", None)
    if fragments is not None:
        options["fragments"] = fragments.astype(np.uint64)
    with _quiet():
        return [
            tuple(np.copy(part) if isinstance(part, np.ndarray) else part for part in item)
            if isinstance(item, tuple)
            else item.copy()
            for item in waterz.agglomerate(as_float(affinities), list(thresholds), **options)
        ]


def waterz_fragments(affinities, low=0.0001, high=0.9999):
    return waterz_agglomerate(affinities, [-1.0], aff_threshold_low=low, aff_threshold_high=high)[0]

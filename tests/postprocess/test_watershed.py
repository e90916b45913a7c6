"""Fragments equal waterz's, id for id, on odd shapes, plateaus and constants; nothing depends on threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from volumes_for_tests import affinity_volumes, waterz_fragments

from emjax.postprocess import watershed

LIMITS = st.sampled_from([(0.0001, 0.9999), (0.1, 0.9), (0.3, 0.5), (0.0, 1.0), (-0.5, 2.0), (0.25, 0.75)])


@settings(max_examples=60, deadline=None)
@given(affinity_volumes(), LIMITS, st.integers(1, 4))
def test_equal_to_waterz(affinities, limits, threads):
    np.testing.assert_array_equal(
        watershed(affinities, *limits, threads=threads), waterz_fragments(affinities, *limits)
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 9), (7, 1, 1), (1, 8, 1), (2, 1, 5), (1, 6, 7)])
def test_one_voxel_axes(shape):
    affinities = np.random.default_rng(1).random((3, *shape), dtype=np.float32)
    np.testing.assert_array_equal(watershed(affinities), waterz_fragments(affinities))


def test_larger_volumes():
    rng = np.random.default_rng(2)
    for levels in (0, 3, 12, 256):
        affinities = rng.random((3, 17, 40, 33), dtype=np.float32)
        if levels:
            affinities = np.floor(affinities * levels) / np.float32(levels)
        np.testing.assert_array_equal(watershed(affinities, threads=3), waterz_fragments(affinities))


def test_uint8_is_value_over_255():
    values = np.random.default_rng(3).integers(0, 256, (3, 6, 9, 8), dtype=np.uint8)
    as_float = values.astype(np.float32) / np.float32(255)
    for limits in ((0.0001, 0.9999), (0.2, 0.6), (-1.0, 3.0), (1.5, 2.0)):
        np.testing.assert_array_equal(watershed(values, *limits), watershed(as_float, *limits))


def test_other_orders_and_longer_offsets():
    affinities = np.random.default_rng(4).random((3, 5, 6, 7), dtype=np.float32)
    offsets = ((0, 0, -1), (-3, 0, 0), (-1, 0, 0), (0, -1, 0))
    mixed = affinities[[2, 0, 0, 1]].copy()
    mixed[1] = np.nan  # Not one of the three nearest: never read.
    np.testing.assert_array_equal(watershed(mixed, offsets=offsets), watershed(affinities))


def test_first_planes_are_never_read():
    affinities = np.random.default_rng(5).random((3, 5, 6, 7), dtype=np.float32)
    expected = watershed(affinities)
    affinities[0, 0], affinities[1, :, 0], affinities[2, :, :, 0] = np.nan, np.inf, -np.inf
    affinities[1, :, 0], affinities[2, :, :, 0] = 0.5, 7.0
    affinities[0, 0] = 0
    np.testing.assert_array_equal(watershed(affinities), expected)


def test_input_is_left_alone():
    affinities = np.random.default_rng(6).random((3, 4, 5, 6), dtype=np.float32)
    kept = affinities.copy()
    affinities.flags.writeable = False
    watershed(affinities)
    np.testing.assert_array_equal(affinities, kept)

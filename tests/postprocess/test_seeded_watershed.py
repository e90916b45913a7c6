import heapq

import mahotas
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from emjax.postprocess.seeded_watershed import (
    distance_transform_watershed,
    lsd_fragments,
    regional_maxima,
    seeded_watershed,
    squared_distance,
    superhuman_fragments,
)

SHAPES = st.lists(st.integers(1, 14), min_size=2, max_size=3).map(tuple)


def _surface(generator, shape, kind):
    if kind == "plateaus":
        return generator.integers(0, 4, shape).astype(np.uint8)
    if kind == "far apart":
        return generator.integers(-(2**60), 2**60, shape)
    if kind == "negative":
        return (generator.integers(-3, 3, shape) / 2).astype(np.float64)
    return generator.random(shape).astype(np.float32 if kind == "float32" else np.float64)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(["plateaus", "far apart", "negative", "float32", "float64"]), st.integers(0, 2**31))
def test_equals_mahotas(shape, kind, seed):
    generator = np.random.default_rng(seed)
    surface = _surface(generator, shape, kind)
    seeds = (generator.random(shape) < 0.08) * generator.integers(1, 6, shape)
    seeds.flat[generator.integers(seeds.size)] = 9
    assert np.array_equal(seeded_watershed(surface, seeds), mahotas.cwatershed(surface, seeds))
    touching = np.ones((3,) * len(shape), surface.dtype)
    got = seeded_watershed(surface, seeds, connectivity=len(shape))
    assert np.array_equal(got, mahotas.cwatershed(surface, seeds, Bc=touching))


def test_many_levels_below_the_current_one():
    generator = np.random.default_rng(3)
    surface = ndimage.gaussian_filter(generator.random((40, 60, 60)), 2).astype(np.float32)
    seeds = np.zeros(surface.shape, np.int64)
    seeds[::13, ::17, ::19] = np.arange(1, 1 + seeds[::13, ::17, ::19].size).reshape(seeds[::13, ::17, ::19].shape)
    assert np.array_equal(seeded_watershed(surface, seeds), mahotas.cwatershed(surface, seeds))


def test_sections_are_flooded_apart_and_threads_do_not_matter():
    generator = np.random.default_rng(0)
    surface, seeds = generator.random((5, 20, 20)), generator.integers(0, 400, (5, 20, 20)) // 390
    want = np.stack([seeded_watershed(a, b) for a, b in zip(surface, seeds)])
    for threads in (1, 3):
        assert np.array_equal(seeded_watershed(surface, seeds, per_section=True, threads=threads), want)


def test_mask_is_a_wall():
    mask = np.array([[1, 1, 0, 1, 1]])
    seeds = np.array([[3, 0, 4, 0, 0]])
    assert seeded_watershed(np.zeros((1, 5)), seeds, mask).tolist() == [[3, 3, 0, 0, 0]]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 3, 50, 10000]), st.integers(0, 2**31))
def test_equals_a_heap_of_level_and_time_within_a_mask(values, seed):
    generator = np.random.default_rng(seed)
    surface = (generator.integers(0, values, (9, 11)) / 7).astype(np.float32)
    mask = generator.random(surface.shape) < 0.8
    seeds = generator.integers(0, 80, surface.shape) // 70
    want = seeds * mask
    heap = [(surface[place], time, place) for time, place in enumerate(zip(*np.nonzero(want)))]
    heapq.heapify(heap)
    time = len(heap)
    while heap:
        _, _, (y, x) = heapq.heappop(heap)
        for a, b in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if 0 <= a < 9 and 0 <= b < 11 and mask[a, b] and not want[a, b]:
                want[a, b] = want[y, x]
                heapq.heappush(heap, (surface[a, b], time, (a, b)))
                time += 1
    assert np.array_equal(seeded_watershed(surface, seeds, mask), want)


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.uint64])
def test_ids_of_any_size_and_type(kind):
    high = np.iinfo(kind).max
    seeds = np.array([[high, 0, 0, 1]], kind)
    labels = seeded_watershed(np.array([[0, 1, 2, 0]]), seeds)
    assert labels.dtype == kind
    assert labels.tolist() == [[high, high, 1, 1]]


def test_quantised_levels_follow_the_surface():
    surface = np.arange(100, dtype=np.float32).reshape(10, 10)
    seeds = np.zeros((10, 10), int)
    seeds[0, 0], seeds[9, 9] = 1, 2
    assert np.array_equal(seeded_watershed(surface, seeds, levels=100), seeded_watershed(surface, seeds))
    assert set(np.unique(seeded_watershed(surface, seeds, flooding="bioimage"))) == {1, 2}


def test_without_seeds_nothing_is_labelled():
    assert not seeded_watershed(np.random.default_rng(0).random((4, 4)), np.zeros((4, 4), int)).any()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from([0.5, 0.9, 0.99]), st.integers(0, 2**31))
def test_squared_distance_is_exact(shape, density, seed):
    foreground = np.random.default_rng(seed).random(shape) < density
    foreground.flat[0] = False
    want = np.rint(ndimage.distance_transform_edt(foreground) ** 2)
    assert np.array_equal(squared_distance(foreground), want)


def test_distance_without_background_is_one_plateau():
    assert len(np.unique(squared_distance(np.ones((4, 5, 6), bool)))) == 1


def test_regional_maxima_equal_mahotas():
    values = np.random.default_rng(0).integers(0, 4, (30, 31))
    labels, count = regional_maxima(values)
    want, number = mahotas.label(mahotas.regmax(values))
    assert count == number
    assert np.array_equal(labels, want)


def _affinities(seed=0, shape=(4, 40, 44)):
    noise = np.random.default_rng(seed).standard_normal((3, *shape))
    return (1 / (1 + np.exp(-6 * ndimage.gaussian_filter(noise, (0, 0.5, 2, 2)) * 4))).astype(np.float32)


def test_recipes_number_their_fragments_on():
    affinities = _affinities()
    for fragments, seeds in (lsd_fragments(affinities, min_seed_distance=8), superhuman_fragments(affinities)):
        assert np.array_equal(np.unique(fragments), np.arange(1, fragments.max() + 1))
        assert np.array_equal(fragments[seeds > 0], seeds[seeds > 0])
        assert all(fragments[z].max() < fragments[z + 1].min() for z in range(3))
    reference, _ = superhuman_fragments(affinities, reference_ids=True)
    assert np.array_equal(reference, superhuman_fragments(affinities, threads=2)[0] + 1)
    bytes_ = np.rint(affinities * 255).astype(np.uint8)
    assert np.array_equal(lsd_fragments(bytes_)[0], lsd_fragments(bytes_.astype(np.float32) / np.float32(255))[0])


def test_distance_transform_watershed_of_sections_without_boundary_or_inside():
    boundary = np.stack([np.zeros((20, 20)), np.ones((20, 20)), _affinities()[1, 0, :20, :20]]).astype(np.float32)
    fragments = distance_transform_watershed(boundary, min_size=10)
    assert (fragments[0] == 1).all()
    assert (fragments[1] == 2).all()
    assert fragments[2].min() > 2
    assert np.array_equal(fragments, distance_transform_watershed(boundary, min_size=10, threads=2))


def test_small_fragments_are_given_away():
    boundary = 1 - _affinities(shape=(2, 60, 60))[1]
    fragments = distance_transform_watershed(boundary, min_size=100)
    sizes = np.bincount(fragments.ravel())
    assert sizes[sizes > 0].min() >= 100
    assert (fragments > 0).all()
    mask = np.ones(boundary.shape, bool)
    mask[:, :10] = False
    masked = distance_transform_watershed(boundary, mask=mask)
    assert np.array_equal(masked == 0, ~mask)


def test_equals_segneuron_oracle(oracles):
    with np.load(oracles / "segneuron" / "postprocess.npz") as file:
        affinities = file["affinity"].astype(np.float32) / np.float32(255)
        want = file["fragments_plain"]
    assert np.array_equal(distance_transform_watershed(np.maximum(1 - affinities[1], 1 - affinities[2])), want)


@pytest.mark.parametrize(
    ("surface", "seeds", "options", "message"),
    [
        (np.zeros((3, 3)), np.zeros((3, 2), int), {}, "seeds has shape"),
        (np.array([[np.nan, 1.0]]), np.zeros((1, 2), int), {}, "surface holds values that are not finite"),
        (np.zeros((3, 3)), np.full((3, 3), -1), {}, "seeds holds the negative id"),
        (np.zeros((3, 3)), np.zeros((3, 3)), {}, "seeds is float64"),
        (np.zeros((0, 3)), np.zeros((0, 3), int), {}, "surface has shape"),
        (np.zeros((3, 3)), np.zeros((3, 3), int), {"connectivity": 3}, "connectivity is 3"),
        (np.zeros((3, 3)), np.zeros((3, 3), int), {"flooding": "vigra"}, "flooding is 'vigra'"),
        (np.zeros((3, 3)), np.zeros((3, 3), int), {"levels": 1}, "levels is 1"),
        (np.zeros((3, 3)), np.zeros((3, 3), int), {"mask": np.ones((2, 2))}, "mask has shape"),
        (np.zeros(3), np.zeros(3, int), {}, "surface has shape"),
    ],
)
def test_bad_input_is_named(surface, seeds, options, message):
    with pytest.raises(ValueError, match=message):
        seeded_watershed(surface, seeds, **options)


def test_bad_recipes_are_named():
    with pytest.raises(ValueError, match="min_seed_distance is 0"):
        lsd_fragments(_affinities(), min_seed_distance=0)
    with pytest.raises(ValueError, match="alpha is 2"):
        distance_transform_watershed(np.zeros((3, 3)), alpha=2)
    with pytest.raises(ValueError, match="channels for 3 offsets"):
        superhuman_fragments(_affinities()[:2])

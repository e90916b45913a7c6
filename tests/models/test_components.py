import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.measure import label

from emjax.models.layers.components import component_roots, connected_components

ROUNDS = 12
SHAPES = ((1, 1, 1), (1, 1, 9), (2, 3, 4), (5, 7, 3), (6, 9, 10), (17, 17, 9))
components = jax.jit(connected_components)
roots = jax.jit(component_roots)


def check(volume: np.ndarray):
    np.testing.assert_array_equal(components(volume), label(volume, connectivity=3))
    _, rounds = roots(volume)
    assert rounds <= ROUNDS


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(SHAPES).flatmap(lambda shape: arrays(bool, shape)))
def test_masks_equal_skimage(mask):
    check(mask)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.floats(0.02, 0.98),
    st.integers(0, 2**32 - 1),
    st.sampled_from([(1, 1, 1), (1, 2, 2), (2, 1, 3)]),
)
def test_random_masks_equal_skimage(shape, density, seed, grain):
    coarse = np.random.default_rng(seed).random([-(-n // g) for n, g in zip(shape, grain)]) < density
    check(np.kron(coarse, np.ones(grain, bool))[tuple(slice(n) for n in shape)])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES).flatmap(lambda shape: arrays(np.int32, shape, elements=st.integers(0, 3))))
def test_ids_are_split_into_their_parts(ids):
    check(ids)


def snake(shape: tuple[int, int, int]) -> np.ndarray:
    """One path through the whole volume: the longest object there is."""
    mask = np.zeros(shape, bool)
    mask[::2, ::2] = True
    mask[::2, 1::4, -1] = True
    mask[::2, 3::4, 0] = True
    mask[1::4, -1 if shape[1] % 2 else -2, -1 if shape[1] % 4 == 3 else 0] = True
    mask[3::4, 0, 0] = True
    return mask


def spiral(size: int) -> np.ndarray:
    mask = np.zeros((1, size, size), bool)
    low, high = 0, size - 1
    while low <= high:
        mask[0, low, max(low - 2, 0) : high + 1] = True
        mask[0, low : high + 1, high] = True
        mask[0, high, low : high + 1] = True
        mask[0, low + 2 : high + 1, low] = True
        low, high = low + 2, high - 2
    return mask


@pytest.mark.parametrize("turn", [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("mirror", [1, -1])
def test_long_objects_in_few_rounds(turn, mirror):
    check(np.ascontiguousarray(snake((5, 33, 33)).transpose(turn)[::mirror, ::mirror]))
    check(np.ascontiguousarray(spiral(41).transpose(turn)[::mirror]))


def test_noise_at_full_size():
    rng = np.random.default_rng(0)
    for density in (0.08, 0.12, 0.5):
        check(rng.random((17, 129, 129)) < density)


def test_batches():
    masks = np.random.default_rng(1).random((3, 4, 9, 9)) < 0.15
    masks[1] = False
    got = jax.jit(jax.vmap(connected_components))(masks)
    for part, mask in zip(got, masks):
        np.testing.assert_array_equal(part, label(mask, connectivity=3))

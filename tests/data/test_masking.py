import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.data.masking import draw, hidden_patch, kept, kept_of_list, visible

SHAPE = (8, 16, 16)
BLOCKS = ((2, 4, 4), (4, 8, 8))


def test_blocks_are_numbered_row_major_and_a_rest_stays_visible():
    mask = np.asarray(kept_of_list((4, 8, 9), (2, 4, 4), jnp.asarray([1, 6])))
    assert not mask[:2, :4, 4:8].any()
    assert not mask[2:, 4:, :4].any()
    assert mask.sum() == mask.size - 2 * 32
    assert mask[..., 8].all()


@pytest.mark.parametrize("seed", range(4))
def test_the_drawn_share_of_distinct_blocks_is_hidden(seed):
    draws = draw(jax.random.key(seed), SHAPE, BLOCKS, (0.5, 0.7))
    block = BLOCKS[int(draws.scale)]
    count = np.prod([n // b for n, b in zip(SHAPE, block)])
    hidden = SHAPE[0] * 256 - int(np.asarray(visible(draws, SHAPE, BLOCKS)).sum())
    assert hidden == int(count * np.float32(draws.ratio)) * np.prod(block)
    assert 0.5 <= float(draws.ratio) <= 0.7


@pytest.mark.parametrize("fill", ["gaussian", "mean", "zero"])
def test_hidden_voxels_hold_the_fill_and_others_the_image(fill):
    clean = jnp.asarray(np.random.default_rng(0).random(SHAPE), jnp.float32)
    draws = draw(jax.random.key(1), SHAPE, BLOCKS, (0.5, 0.7))
    mask = np.asarray(visible(draws, SHAPE, BLOCKS))
    patch = np.asarray(jax.jit(lambda clean: hidden_patch(clean, draws, BLOCKS, fill))(clean))
    np.testing.assert_array_equal(patch[mask], np.asarray(clean)[mask])
    hidden = patch[~mask]
    if fill == "gaussian":
        assert abs(hidden.mean() - clean.mean()) < 0.05
        assert abs(hidden.std() - clean.std()) < 0.05
    else:
        np.testing.assert_allclose(hidden, clean.mean() if fill == "mean" else 0, atol=1e-6)


def test_nothing_hidden_is_everything_visible():
    assert np.asarray(kept(SHAPE, (2, 4, 4), jnp.zeros(64, bool))).all()

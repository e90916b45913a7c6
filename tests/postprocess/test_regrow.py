import numpy as np
import pytest

from emjax.postprocess import regrow


def two_and_crumbs():
    """Two halves, and between them a wall of crumbs that leans to the left half."""
    fragments = np.zeros((2, 3, 7), np.uint32)
    fragments[..., :3], fragments[..., 4:] = 5, 9
    fragments[..., 3] = 10 + np.arange(6).reshape(2, 3)
    affinities = np.full((3, 2, 3, 7), 250, np.uint8)
    affinities[..., 3] = 60
    return fragments, affinities


@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_crumbs_go_to_their_neighbours_and_ids_stay_in_order(kind):
    fragments, affinities = two_and_crumbs()
    if kind is np.float32:
        affinities = affinities.astype(np.float32) / 255
    grown = regrow(fragments, affinities, 2)
    np.testing.assert_array_equal(np.unique(grown), [1, 2])
    np.testing.assert_array_equal(grown == 1, fragments != 9)
    np.testing.assert_array_equal(grown[..., 4:], 2)


def test_background_grows_over_and_the_lowest_pass_is_taken_first():
    fragments = np.zeros((1, 1, 7), np.uint32)
    fragments[..., 0], fragments[..., 6] = 3, 4
    affinities = np.array([255, 200, 190, 20, 180, 210, 255], np.uint8) * np.ones((3, 1, 1, 1), np.uint8)
    np.testing.assert_array_equal(regrow(fragments, affinities, 1)[0, 0, [0, 1, 2, 4, 5, 6]], [1, 1, 1, 2, 2, 2])


def test_mask_and_nothing_large_enough():
    fragments, affinities = two_and_crumbs()
    mask = np.ones(fragments.shape, np.uint8)
    mask[:, 0] = 0
    grown = regrow(fragments, affinities, 2, mask)
    np.testing.assert_array_equal(grown > 0, mask > 0)
    np.testing.assert_array_equal(regrow(fragments, affinities, 1000), fragments)


def test_bad_arguments():
    fragments, affinities = two_and_crumbs()
    with pytest.raises(ValueError, match="min_size"):
        regrow(fragments, affinities, 0)
    with pytest.raises(ValueError, match="shape"):
        regrow(fragments, affinities[:2], 5)
    with pytest.raises(ValueError, match="shape"):
        regrow(fragments[:1], affinities, 5)

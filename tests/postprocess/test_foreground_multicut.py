import dataclasses

import numpy as np
import pytest

from emjax.postprocess.foreground_multicut import Settings, boundary, foreground_multicut, restricted
from emjax.postprocess.multicut import boundary_edge_features, multicut_costs


def _volume(depth=5):
    """Four columns that run through all sections, dark walls between them, and a patch without foreground."""
    walls = np.zeros((48, 48), bool)
    walls[23:25] = walls[:, 23:25] = True
    affinities = np.where(walls, 0.05, 0.97).astype(np.float32)
    affinities = np.broadcast_to(affinities, (3, depth, 48, 48)).copy()
    affinities += np.random.default_rng(0).uniform(-0.02, 0.02, affinities.shape).astype(np.float32)
    foreground = np.broadcast_to(np.where(walls, 0.1, 0.99).astype(np.float32), (depth, 48, 48)).copy()
    return affinities, foreground


def test_columns_are_found_in_3d_and_apart_in_2d():
    affinities, foreground = _volume()
    labels = foreground_multicut(affinities, foreground, Settings(min_size=10))
    assert labels.dtype == np.uint32
    assert labels.min() == 1
    corners = [labels[:, y, x] for y in (5, 40) for x in (5, 40)]
    assert all(len(set(column.tolist())) == 1 for column in corners)
    assert len({int(column[0]) for column in corners}) == 4
    flat = foreground_multicut(affinities, foreground, Settings(mode="2d", min_size=10))
    assert len(np.unique(flat[:, 5, 5])) == len(flat)
    assert sorted(np.unique(flat)) == list(range(1, int(flat.max()) + 1))


@pytest.mark.parametrize("mode", ["2d", "3d"])
@pytest.mark.parametrize("kind", ["float32", "uint8"])
def test_slabs_of_any_thickness_give_the_same_labels(mode, kind):
    rng = np.random.default_rng(1)
    affinities, foreground = _volume(7)
    affinities = np.clip(affinities - 0.3 * rng.random(affinities.shape), 0, 1).astype(np.float32)
    if kind == "uint8":
        affinities, foreground = (np.rint(part * 255).astype(np.uint8) for part in (affinities, foreground))
    settings = Settings(mode=mode, min_size=10)
    whole = foreground_multicut(affinities, foreground, settings)
    for sections in (1, 2, 3):
        slabs = dataclasses.replace(settings, slab_voxels=sections * 48 * 48)
        np.testing.assert_array_equal(foreground_multicut(affinities, foreground, slabs), whole)
    threads = dataclasses.replace(settings, threads=2)
    np.testing.assert_array_equal(foreground_multicut(affinities, foreground, threads), whole)


def test_foreground_limits_affinities():
    affinities, foreground = _volume(1)
    values = restricted(affinities, foreground)
    assert (values <= foreground[None]).all()
    np.testing.assert_allclose(boundary(values), 1 - values[1:].min(0), atol=1e-7)
    assert boundary(np.full((3, 1, 2, 2), 51, np.uint8)).max() == np.float32(1) - np.float32(51) / np.float32(255)


def test_graph_by_slabs_is_the_published_one():
    affinities, foreground = _volume(3)
    values = restricted(affinities, foreground)
    ids = np.arange(1, 3 * 4 + 1).reshape(3, 4)
    labels = np.repeat(np.repeat(ids.reshape(3, 2, 2), 24, 1), 24, 2).astype(np.uint32)
    edges = boundary_edge_features(values, labels)
    assert len(edges.uv) == 3 * 4 + 2 * 4
    costs = multicut_costs(edges.probability, edges.size, 0.25)
    assert costs[edges.size == 24 * 24].min() > 0


def test_sections_that_are_all_boundary_become_one_segment(caplog):
    affinities, foreground = _volume(3)
    affinities[:, 1] = 0
    labels = foreground_multicut(affinities, foreground, Settings(mode="2d", min_size=10))
    assert len(np.unique(labels[1])) == 1
    assert "all or nothing is boundary): 1" in caplog.text


def test_background_is_off_by_default():
    affinities, foreground = _volume(2)
    assert foreground_multicut(affinities, foreground, Settings(min_size=10)).min() > 0
    masked = foreground_multicut(affinities, foreground, Settings(min_size=10, background=0.5))
    np.testing.assert_array_equal(masked == 0, foreground < 0.5)


def test_bad_input_is_one_clear_line():
    affinities, foreground = _volume(2)
    with pytest.raises(ValueError, match=r"foreground is at most 0\.1 in the whole volume"):
        foreground_multicut(affinities, np.full_like(foreground, 0.1))
    with pytest.raises(ValueError, match="foreground has shape"):
        foreground_multicut(affinities, foreground[:1])
    with pytest.raises(ValueError, match=r"expected \(3, z, y, x\)"):
        foreground_multicut(affinities[:2], foreground)
    with pytest.raises(ValueError, match="mode is '4d'"):
        foreground_multicut(affinities, foreground, Settings(mode="4d"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="foreground is missing"):
        foreground_multicut(affinities, None)
    assert foreground_multicut(affinities, None, Settings(restrict=False, min_size=10)).min() == 1

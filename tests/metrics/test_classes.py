import math

import numpy as np
import pytest

from emjax.metrics import class_shapes, components, per_slice_overlap, score_class, surface_distances


def stacks():
    """Truth of two objects and a prediction of one of them, moved; slice 4 is rightly empty, slice 5 wrongly not."""
    true, predicted = np.zeros((6, 24, 24), bool), np.zeros((6, 24, 24), bool)
    true[0:4, 2:10, 2:10] = True
    true[0:2, 15:20, 15:20] = True
    predicted[0:4, 3:11, 2:10] = True
    predicted[5, 0:3, 0:3] = True
    return predicted, true


def test_numbers_of_one_class():
    predicted, true = stacks()
    scores = score_class(predicted, true, voxel_size=(40, 4, 4))
    both, either = (predicted & true).sum(), (predicted | true).sum()
    assert scores.iou == pytest.approx(both / either)
    assert scores.dice == pytest.approx(2 * both / (predicted.sum() + true.sum()))
    slices = per_slice_overlap(predicted, true)
    assert slices[4].dice == 1
    assert slices[5].dice == 0
    assert scores.slice_dice == pytest.approx(np.mean([one.dice for one in slices]))
    assert scores.reference_slice_dice == pytest.approx(scores.slice_dice - 1 / 6)
    distances = surface_distances(predicted, true, (40, 4, 4))
    assert (scores.hd95, scores.assd) == (distances.hd95, distances.assd)
    assert (scores.true_objects, scores.predicted_objects) == (2, 2)
    # One of two objects is found, at an IoU of 7/9, before the surplus one.
    assert scores.ap50 == scores.ap75 == pytest.approx(51 / 101)
    assert scores.ap < scores.ap50


def test_what_is_outside_of_the_mask_is_background():
    predicted, true = stacks()
    mask = np.zeros(true.shape, np.uint8)
    mask[:, :12, :12] = 1
    masked = score_class(predicted, true, mask)
    assert masked == score_class(predicted * mask, true * mask)
    assert masked.true_objects == 1


def test_empty_classes():
    predicted, true = stacks()
    nothing = np.zeros_like(true)
    both = score_class(nothing, nothing)
    assert (both.dice, both.slice_iou, both.hd95) == (1, 1, 0)
    assert math.isnan(both.ap)
    assert score_class(predicted, nothing).assd == math.inf
    assert score_class(nothing, true).dice == 0


def test_components_touch_at_corners():
    volume = np.zeros((2, 3, 5), np.uint8)
    volume[0, 0, 0] = volume[1, 1, 1] = 7
    volume[0, 0, 4] = 1
    assert components(volume).max() == 2
    assert class_shapes(volume, volume).predicted_objects == 2

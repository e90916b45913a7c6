import math

import numpy as np
import pytest

from emjax.metrics import (
    average_precision,
    class_overlaps,
    contingency,
    expected_run_length,
    match_instances,
    node_numbers,
    overlap,
    per_slice_overlap,
    reference_sam4em_evaluation,
    segments_at,
    soft_dice,
    surface_distances,
)


def _boxes():
    labels, found = np.zeros((4, 20, 20), int), np.zeros((4, 20, 20), int)
    labels[:, 0:8, 0:8], found[:, 0:8, 0:8] = 1, 11
    labels[:, 12:20, 0:8], found[:, 12:18, 0:8] = 2, 12
    labels[:, 0:8, 12:20], found[:, 4:12, 12:20] = 3, 13
    found[:, 16:20, 16:20] = 14
    return labels, found


def test_matching_at_thresholds():
    labels, found = _boxes()
    table = contingency(found, labels)
    at_half = match_instances(table, 0.5)
    assert (at_half.true_positives, at_half.false_positives, at_half.false_negatives) == (2, 2, 1)
    assert at_half.pairs == ((1, 11, 1.0), (2, 12, 0.75))
    assert at_half.f1 == pytest.approx(4 / 7)
    assert at_half.accuracy == pytest.approx(2 / 5)
    assert at_half.panoptic_quality == pytest.approx(4 / 7 * 0.875)
    assert match_instances(table, 0.8).true_positives == 1
    assert match_instances(table, 0.3).true_positives == 3
    with pytest.raises(ValueError, match="threshold is 0"):
        match_instances(table, 0)


def test_average_precision():
    labels, found = _boxes()
    table = contingency(found, labels)
    result = average_precision(table, (0.5, 0.75, 0.8))
    # By size: 11 and 13 (tie, smaller id first), 12, 14. At 0.5: hit, miss, hit, miss.
    # Recall 1/3 at precision 1, 2/3 at 2/3.
    assert result.at(0.5) == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert result.at(0.75) == result.at(0.5)
    assert result.at(0.8) == pytest.approx(34 / 101)
    ranked = average_precision(table, (0.5,), confidence={11: 0.9, 12: 0.8, 13: 0.1, 14: 0.2})
    assert ranked.mean == pytest.approx(67 / 101)
    assert average_precision(contingency(labels, labels)).mean == 1
    assert math.isnan(average_precision(contingency(found, np.zeros_like(found))).mean)
    with pytest.raises(ValueError, match="confidence lacks predicted instance 12"):
        average_precision(table, confidence={11: 1.0})


def test_overlap_adds_over_blocks():
    generator = np.random.default_rng(0)
    prediction, labels = generator.random((2, 6, 9, 9)) > 0.6
    whole = overlap(prediction, labels)
    assert overlap(prediction[:2], labels[:2]) + overlap(prediction[2:], labels[2:]) == whole
    both = (prediction & labels).sum()
    assert whole.dice == pytest.approx(2 * both / (prediction.sum() + labels.sum()))
    assert whole.iou == pytest.approx(both / (prediction | labels).sum())
    assert overlap(prediction, labels, np.zeros_like(labels)).dice == 1
    assert class_overlaps(prediction * 2, labels * 2, (2,))[2] == whole
    assert soft_dice(prediction, labels) == pytest.approx(whole.dice)
    with pytest.raises(ValueError, match="prediction has shape"):
        overlap(prediction[1:], labels)


def test_empty_slices_count_as_agreement_but_not_in_the_reference():
    empty, full = np.zeros((2, 3, 3)), np.ones((2, 3, 3))
    assert [part.dice for part in per_slice_overlap(empty, empty)] == [1, 1]
    assert reference_sam4em_evaluation(empty, empty).dice == 0
    assert reference_sam4em_evaluation(full, full, (1, 1)).accuracy == 1
    with pytest.raises(ValueError, match="do not add up"):
        reference_sam4em_evaluation(full, full, (1, 2))


def test_sam4em_oracle(oracles):
    with np.load(oracles / "sam4em" / "metrics.npz") as file:
        arrays = dict(file)
    got = reference_sam4em_evaluation(arrays["pred"], arrays["gt"], arrays["batches"])
    np.testing.assert_allclose(
        (got.iou, got.dice, got.accuracy),
        [arrays[f"evaluator_{name}"] for name in ("miou", "dice", "accuracy")],
        rtol=1e-12,
    )
    for section in range(3):
        distances = surface_distances(arrays["pred"][section], arrays["gt"][section])
        want = [arrays[name][section] for name in ("hd", "hd95", "assd")]
        np.testing.assert_allclose((distances.hd, distances.hd95, distances.assd), want, rtol=1e-12)
    distances = surface_distances(arrays["pred"][:3], arrays["gt"][:3], (3, 1, 1))
    np.testing.assert_allclose(distances.hd95, arrays["hd95_volume_spacing"], rtol=1e-12)
    np.testing.assert_allclose(distances.assd, arrays["assd_volume_spacing"], rtol=1e-12)


def test_surface_distances_in_nm():
    labels, prediction = np.zeros((2, 9, 12, 12), bool)
    labels[2:5, 2:8, 2:8] = True
    prediction[3:6, 2:8, 2:8] = True
    assert surface_distances(prediction, labels, (40, 4, 4)).hd == 40
    assert surface_distances(labels, labels).assd == 0
    assert surface_distances(labels & False, labels & False).hd95 == 0
    assert surface_distances(labels & False, labels).hd95 == math.inf
    with pytest.raises(ValueError, match="voxel_size"):
        surface_distances(prediction, labels, (1, 1))


def test_run_length_of_simple_skeletons():
    # Two straight skeletons of three nodes, 10 nm apart.
    positions = np.array([[0, 0, x] for x in (0, 10, 20)] + [[50, 0, x] for x in (0, 10, 20)], float)
    edges, skeletons = [[0, 1], [1, 2], [3, 4], [4, 5]], [1, 1, 1, 2, 2, 2]
    perfect = expected_run_length(positions, edges, skeletons, [5, 5, 5, 6, 6, 6])
    assert perfect.erl == perfect.perfect_erl == 20
    split = expected_run_length(positions, edges, skeletons, [5, 5, 7, 6, 6, 6])
    assert split.erl == pytest.approx((10**2 + 20**2) / 40)
    assert (split.split, split.correct) == (1, 3)
    merged = expected_run_length(positions, edges, skeletons, [5, 5, 5, 5, 6, 6])
    assert merged.merging_segments == (5,)
    assert (merged.merged, merged.split, merged.correct) == (2, 1, 1)
    assert merged.normalised_erl == pytest.approx(merged.erl / 20)
    omitted = expected_run_length(positions, edges, skeletons, [0, 5, 5, 6, 6, 6])
    assert omitted.omitted == 1
    assert math.isnan(expected_run_length(positions, [], skeletons, [1] * 6).erl)
    with pytest.raises(ValueError, match="joins two skeletons"):
        expected_run_length(positions, [[2, 3]], skeletons, [1] * 6)
    with pytest.raises(ValueError, match="edges names node 6"):
        expected_run_length(positions, [[0, 6]], skeletons, [1] * 6)


def test_nodes_are_looked_up_block_by_block():
    segmentation = np.random.default_rng(0).integers(1, 99, (4, 6, 8))
    positions = np.random.default_rng(1).random((50, 3)) * [4 * 30, 6 * 6, 8 * 6]
    ids, inside = segments_at(segmentation, positions, (30, 6, 6))
    assert inside.all()
    halves = [
        segments_at(segmentation[:2], positions, (30, 6, 6)),
        segments_at(segmentation[2:], positions, (30, 6, 6), (2, 0, 0)),
    ]
    assert np.array_equal(halves[0][0] + halves[1][0], ids)
    assert not (halves[0][1] & halves[1][1]).any()


def test_node_ids_become_numbers():
    assert node_numbers([7, 3, 5], [[3, 7], [5, 3]]).tolist() == [[1, 0], [2, 1]]
    with pytest.raises(ValueError, match="names node 4"):
        node_numbers([7, 3], [[3, 4]])
    with pytest.raises(ValueError, match="holds 3 twice"):
        node_numbers([3, 3], [[3, 3]])

import numpy as np
import pytest

from emjax.metrics import (
    Contingency,
    contingency,
    empty_contingency,
    merge_contingency,
    merge_list,
    split_list,
    variation_of_information,
)


def _volumes(seed=0, shape=(5, 17, 23), kind=np.uint32):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 9, shape).astype(kind), generator.integers(0, 7, shape).astype(kind)


def _same(table: Contingency, other: Contingency) -> bool:
    return all(np.array_equal(value, getattr(other, name)) for name, value in table.as_arrays().items())


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.uint64, np.int64])
def test_counts_equal_numpy(kind):
    segmentation, labels = _volumes(kind=kind)
    table = contingency(segmentation, labels)
    pairs, first, counts = np.unique(
        np.stack([labels.ravel(), segmentation.ravel()]).astype(np.int64), axis=1, return_index=True, return_counts=True
    )
    assert np.array_equal(table.labels, pairs[0])
    assert np.array_equal(table.segments, pairs[1])
    assert np.array_equal(table.counts, counts)
    assert np.array_equal(table.first, np.stack(np.unravel_index(first, labels.shape), 1))
    where = np.argwhere((labels == 3) & (segmentation == 2))
    row = np.flatnonzero((table.labels == 3) & (table.segments == 2))[0]
    np.testing.assert_allclose(table.centroids()[row], where.mean(0))


def test_blocks_and_threads_add_up_exactly():
    segmentation, labels = _volumes(1)
    mask = np.random.default_rng(2).random(labels.shape) > 0.3
    whole = contingency(segmentation, labels, mask)
    for cut in ((2, 9, 11), (1, 1, 1), (5, 3, 22)):
        tables = [empty_contingency()]
        for z in (slice(0, cut[0]), slice(cut[0], None)):
            for y in (slice(0, cut[1]), slice(cut[1], None)):
                for x in (slice(0, cut[2]), slice(cut[2], None)):
                    block = (z, y, x)
                    tables.append(
                        contingency(
                            segmentation[block], labels[block], mask[block], offset=[part.start or 0 for part in block]
                        )
                    )
        assert _same(merge_contingency(reversed(tables)), whole)
    assert _same(contingency(segmentation, labels, mask, threads=4), whole)
    assert whole.total == mask.sum()


def test_table_grows_beyond_its_first_size():
    labels = np.arange(60_000).reshape(3, 100, 200)
    table = contingency(labels[:, ::-1].copy(), labels)
    assert len(table) == 60_000
    assert table.total == 60_000


def test_ids_near_the_limit_and_few_axes():
    row = np.array([2**64 - 1, 2**64 - 1, 5], np.uint64)
    table = contingency(row, np.array([1, 1, 2], np.uint8))
    assert table.segments.tolist() == [2**64 - 1, 5]
    assert table.first.tolist() == [[0, 0, 0], [0, 0, 2]]


def test_relabelled_table_is_the_table_of_the_relabelled_volume():
    segmentation, labels = _volumes(3)
    lut = np.array([0, 1, 1, 2, 2, 2, 3, 3, 8])
    table = contingency(segmentation, labels)
    assert _same(table.relabelled(np.arange(9), lut), contingency(lut[segmentation], labels))
    assert _same(table.transposed(), contingency(labels, segmentation))
    with pytest.raises(ValueError, match="ids holds 1 twice"):
        table.relabelled([1, 1], [2, 3])


def test_split_and_merge_lists():
    labels = np.array([[[1, 1, 1, 1], [2, 2, 2, 0], [3, 3, 3, 3]]])
    segmentation = np.array([[[7, 7, 7, 8], [8, 8, 8, 8], [9, 9, 9, 9]]])
    table = contingency(segmentation, labels)
    (split,) = split_list(table)
    assert (split.id, split.size, split.lost) == (1, 4, 1)
    assert [(piece.id, piece.size, piece.position) for piece in split.pieces] == [(7, 3, (0, 0, 0)), (8, 1, (0, 0, 3))]
    (merge,) = merge_list(table)
    assert (merge.id, merge.size) == (8, 4)
    assert [piece.id for piece in merge.pieces] == [2, 1]
    assert split_list(table, min_piece=2) == []
    voi = variation_of_information(table)
    assert sum(error.bits for error in split_list(table)) == pytest.approx(voi.split)
    assert sum(error.bits for error in merge_list(table)) == pytest.approx(voi.merge)
    assert split_list(table, limit=0) == []


@pytest.mark.parametrize(
    ("segmentation", "labels", "options", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), {}, "segmentation has shape"),
        (np.zeros((2, 3)), np.zeros((2, 3), int), {}, "segmentation has type float64"),
        (np.zeros((2, 3), int), np.full((2, 3), -1), {}, "labels holds the negative id -1"),
        (np.zeros((2, 3), int), np.zeros((2, 3), int), {"mask": np.ones((2, 2))}, "mask has shape"),
        (np.zeros((2, 3), int), np.zeros((2, 3), int), {"threads": 0}, "threads is 0"),
        (np.zeros((1, 2, 2, 3), int), np.zeros((1, 2, 2, 3), int), {}, "segmentation has 4 axes"),
    ],
)
def test_bad_input_is_named(segmentation, labels, options, message):
    with pytest.raises(ValueError, match=message):
        contingency(segmentation, labels, **options)


def test_empty_volume_gives_an_empty_table():
    assert len(contingency(np.zeros((0, 3, 3), int), np.zeros((0, 3, 3), int))) == 0
    assert len(contingency(np.zeros((3, 0, 3), int), np.zeros((3, 0, 3), int))) == 0

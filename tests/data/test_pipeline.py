"""The loader: a pure function of the step, whatever the number of processes, and clear words for wrong input."""

import dataclasses

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.data.augment import Elastic, FlipTranspose, GaussianNoise, MissingSection, needed_shape
from emjax.data.crops import shape_of
from emjax.data.pipeline import Loader, Source
from emjax.data.targets import widen_borders
from emjax.data.volume import save_volume
from emjax.errors import UserError

CROP = (6, 16, 16)
CHAIN = (FlipTranspose(), MissingSection(p=0.5, count=1), Elastic(p=0.5), GaussianNoise(p=0.5))


def write(path, shape=(20, 40, 44), seed=0, **more):
    rng = np.random.default_rng(seed)
    arrays = {
        "raw": rng.integers(0, 256, shape, dtype=np.uint8),
        "labels": rng.integers(0, 9, shape, dtype=np.uint32),
        **more,
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file.attrs["voxel_size_nm"] = (40.0, 4.0, 4.0)
    return path


@pytest.fixture
def source(tmp_path):
    path = write(tmp_path / "a.h5")
    return Source(raw=f"{path}:raw", labels=f"{path}:labels", name="a")


def equal(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        np.testing.assert_array_equal(first[key], second[key])


def test_a_batch_is_what_it_should_be(source):
    batch = Loader([source], CROP, 3, CHAIN).batch(0)
    assert {key: (array.shape, array.dtype) for key, array in batch.items()} == {
        "image": ((3, *CROP), np.uint8),
        "labels": ((3, *CROP), np.int32),
    }
    assert Loader([source], CROP, 3, transport="float32").batch(0)["image"].dtype == np.float32


def test_batches_depend_on_seed_and_step_alone(source):
    loader, again = (Loader([source], CROP, 2, CHAIN, seed=7) for _ in range(2))
    late = again.batch(11)
    equal(loader.batch(3), again.batch(3))
    equal(loader.batch(11), late)
    other = Loader([source], CROP, 2, CHAIN, seed=8).batch(3)
    assert not np.array_equal(other["image"], loader.batch(3)["image"])
    assert not np.array_equal(loader.batch(4)["image"], loader.batch(3)["image"])


@pytest.mark.parametrize("threads", [1, 4])
def test_iteration_from_any_step_equals_random_access(source, threads):
    loader = Loader([source], CROP, 2, CHAIN, seed=1, threads=threads)
    iterator = loader.iterate(5)
    for step in range(5, 11):
        equal(next(iterator), loader.batch(step))


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_any_number_of_processes_makes_the_same_global_batch(source, processes):
    whole = Loader([source], CROP, 6, CHAIN, seed=2)
    parts = [
        Loader([source], CROP, 6, CHAIN, seed=2, process_index=index, process_count=processes)
        for index in range(processes)
    ]
    for step in (0, 9):
        rows = [part.batch(step) for part in parts]
        equal({key: np.concatenate([row[key] for row in rows]) for key in rows[0]}, whole.batch(step))


def test_block_by_block_reading_gives_the_same_crops(source):
    whole = Loader([source], CROP, 4, CHAIN, seed=2)
    by_blocks = Loader([source], CROP, 4, CHAIN, seed=2, cache_bytes=50_000)
    assert "in memory" in whole.sampler.describe()[0]
    assert "by blocks" in by_blocks.sampler.describe()[0]
    for step in range(3):
        equal(by_blocks.batch(step), whole.batch(step))


def test_crops_are_registered_and_lie_anywhere(tmp_path):
    shape = (5, 9, 8)
    ids = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    path = write(tmp_path / "ids.h5", shape, raw=(ids % 251).astype(np.uint8), labels=ids)
    loader = Loader([Source(raw=f"{path}:raw", labels=f"{path}:labels")], (4, 4, 4), 200)
    batch = loader.batch(0)
    np.testing.assert_array_equal(batch["labels"] % 251, batch["image"])
    corners = batch["labels"][:, 0, 0, 0]
    z, y, x = np.unravel_index(corners, shape)
    assert (set(z), set(y), set(x)) == (set(range(2)), set(range(6)), set(range(5)))


def test_weights_set_the_shares(tmp_path):
    sources = []
    for number, weight in enumerate((1.0, 3.0)):
        path = write(
            tmp_path / f"{number}.h5", raw=np.full((8, 16, 16), number, np.uint8), labels=np.ones((8, 16, 16), int)
        )
        sources.append(Source(raw=f"{path}:raw", labels=f"{path}:labels", weight=weight))
    loader = Loader(sources, (4, 8, 8), 400)
    share = np.mean(loader.batch(0)["image"][:, 0, 0, 0])
    assert abs(share - 0.75) < 0.08


def test_touching_objects_get_a_membrane(source):
    plain = Loader([source], CROP, 2).batch(3)
    batch = Loader([dataclasses.replace(source, membrane=(1, 3, 3))], CROP, 2).batch(3)
    for labels, wanted in zip(batch["labels"], plain["labels"]):
        np.testing.assert_array_equal(labels, widen_borders(jnp.asarray(wanted), (1, 3, 3)))
    with pytest.raises(UserError, match=r"source a: found membrane \(1, 2, 3\), expected three odd sizes"):
        dataclasses.replace(source, membrane=(1, 2, 3))


def test_masks_and_ignored_labels(tmp_path):
    rng = np.random.default_rng(0)
    mask, ignore = (rng.integers(0, 3, (20, 40, 44), dtype=np.uint8) for _ in range(2))
    path = write(tmp_path / "m.h5", mask=mask, ignore=ignore)
    source = Source(
        raw=f"{path}:raw", labels=f"{path}:labels", mask=f"{path}:mask", ignore=f"{path}:ignore", ignore_labels=(3, 5)
    )
    loader = Loader([source], CROP, 1)
    draws = loader.sampler.draw(np.random.default_rng(3))
    sample = loader.sampler.make(draws)
    window = tuple(slice(a, a + n) for a, n in zip(draws.crop.begin, CROP))
    want = (mask[window] > 0) & (ignore[window] == 0) & ~np.isin(sample["labels"], (3, 5))
    np.testing.assert_array_equal(sample["mask"], want)
    assert loader.batch(0)["mask"].dtype == np.uint8


def test_part_of_a_volume_reflection_and_sections_skipped(tmp_path):
    ids = np.arange(20 * 40 * 44, dtype=np.uint32).reshape(20, 40, 44)
    path = write(tmp_path / "p.h5", labels=ids)
    source = Source(
        raw=f"{path}:raw",
        labels=f"{path}:labels",
        begin=(2, 5, 6),
        end=(15, 30, 31),
        pad=(4, 6, 7),
        z_steps=(1, 3),
    )
    padded = np.pad(ids[2:15, 5:30, 6:31], ((4, 4), (6, 6), (7, 7)), mode="reflect")
    for cache_bytes in (1 << 30, 50_000):
        sampler = Loader([source], CROP, 1, cache_bytes=cache_bytes).sampler
        seen = set()
        for seed in range(40):
            draws = sampler.draw_crop(np.random.default_rng(seed))
            z, y, x = draws.begin
            want = padded[:: draws.z_step][z : z + 6, y : y + 16, x : x + 16]
            np.testing.assert_array_equal(sampler.read(draws)["labels"], want)
            seen.add(draws.z_step)
        assert seen == {1, 3}


def test_crops_with_too_few_labels_are_drawn_again(tmp_path):
    labels = np.zeros((20, 40, 44), np.uint32)
    labels[:, :, 30:] = 1
    path = write(tmp_path / "r.h5", labels=labels)
    source = Source(raw=f"{path}:raw", labels=f"{path}:labels")
    loader = Loader([source], CROP, 32, CHAIN, min_labelled=0.4, max_tries=60)
    batch = loader.batch(0)
    assert (batch["labels"] > 0).mean((1, 2, 3)).min() > 0.3
    equal(batch, Loader([source], CROP, 32, CHAIN, min_labelled=0.4, max_tries=60).batch(0))
    assert (Loader([source], CROP, 32).batch(0)["labels"] > 0).mean((1, 2, 3)).min() == 0


def test_connected_parts_become_objects(tmp_path):
    labels = np.zeros((20, 40, 44), np.uint32)
    labels[:, :, ::4] = 7
    path = write(tmp_path / "s.h5", labels=labels)
    loader = Loader([Source(raw=f"{path}:raw", labels=f"{path}:labels")], CROP, 1, split_components=True)
    assert set(np.unique(loader.batch(0)["labels"])) == {0, 1, 2, 3, 4}


def test_labels_of_a_padded_image_lie_where_their_offset_says(tmp_path):
    ids = np.arange(20 * 40 * 44, dtype=np.uint32).reshape(20, 40, 44)
    voxel_size = (40.0, 4.0, 4.0)
    save_volume(tmp_path / "raw.zarr", (ids % 251).astype(np.uint8), voxel_size=voxel_size)
    inner = ids[5:17, 3:37, 7:40]
    offset = tuple(n * size for n, size in zip((5, 3, 7), voxel_size))
    save_volume(tmp_path / "labels.zarr", inner, voxel_size=voxel_size, offset=offset)
    batch = Loader([Source(raw=f"{tmp_path}/raw.zarr", labels=f"{tmp_path}/labels.zarr")], CROP, 4).batch(0)
    np.testing.assert_array_equal(batch["labels"] % 251, batch["image"])


def test_raw_data_alone(tmp_path):
    path = write(tmp_path / "u.h5")
    batch = Loader([Source(raw=f"{path}:raw")], CROP, 2, CHAIN, split_components=True).batch(0)
    assert set(batch) == {"image"}


def test_other_dtypes_of_grey_values(tmp_path):
    raw = np.linspace(0, 65535, 20 * 40 * 44).reshape(20, 40, 44)
    arrays = {"u16": raw.astype(np.uint16), "f32": (raw / 65535).astype(np.float32), "wide": raw.astype(np.float32)}
    path = write(tmp_path / "d.h5", **arrays)
    sources = [
        Source(raw=f"{path}:u16", labels=f"{path}:labels"),
        Source(raw=f"{path}:f32", labels=f"{path}:labels"),
        Source(raw=f"{path}:wide", labels=f"{path}:labels", intensity_range=(0.0, 65535.0)),
    ]
    images = [Loader([source], CROP, 2, transport="float32").batch(0)["image"] for source in sources]
    np.testing.assert_allclose(images[0], images[1], atol=3e-5)
    np.testing.assert_allclose(images[2], images[1], atol=1e-5)
    with pytest.raises(UserError, match="intensity_range"):
        Loader([Source(raw=f"{path}:wide", labels=f"{path}:labels")], CROP, 2).batch(0)


def test_samples_can_be_composed_of_several_crops(source):
    def two_crops(sampler, rng):
        first, second = sampler.make(sampler.draw(rng)), sampler.make(sampler.draw(rng))
        return {**first, "partner": second["image"]}

    batch = Loader([source], CROP, 2, compose=two_crops).batch(0)
    assert batch["partner"].shape == batch["image"].shape


def test_memory_of_a_batch_is_used_again_only_when_nobody_holds_it(source):
    loader = Loader([source], CROP, 2, CHAIN)
    held = [loader.batch(step) for step in range(4)]
    on_device = jax.device_put(loader.batch(4)["image"])
    part = loader.batch(5)["labels"][1, 2:]
    for step in range(6, 12):
        loader.batch(step)
    fresh = Loader([source], CROP, 2, CHAIN)
    for step in range(4):
        equal(held[step], fresh.batch(step))
    np.testing.assert_array_equal(on_device, fresh.batch(4)["image"])
    np.testing.assert_array_equal(part, fresh.batch(5)["labels"][1, 2:])
    addresses = {loader.batch(step)["image"].ctypes.data for step in range(20, 30)}
    assert len(addresses) == 1


def test_the_needed_shape_is_read(source):
    loader = Loader([source], CROP, 1, CHAIN)
    sample = loader.sampler.read(loader.sampler.draw_crop(np.random.default_rng(0)))
    assert shape_of(sample) == needed_shape(CHAIN, CROP) == (7, 16, 16)


def bad_float(where):
    raw = np.zeros((20, 40, 44), np.float32)
    raw[where] = np.nan
    return raw


@pytest.mark.parametrize(
    ("arrays", "source", "words"),
    [
        ({}, {"raw": "raw", "labels": "missing"}, "missing"),
        ({"labels": np.ones((20, 40, 43), np.uint32)}, {}, r"\(20, 40, 44\).*\(20, 40, 43\)"),
        ({"raw": np.zeros((40, 44), np.uint8)}, {}, "2 dimensions"),
        ({"raw": bad_float((3, 4, 5))}, {}, "NaN"),
        ({"labels": np.ones((20, 40, 44), np.float32)}, {}, "expected integers"),
        ({"raw": np.zeros((0, 40, 44), np.uint8), "labels": np.zeros((0, 40, 44), np.uint8)}, {}, "empty"),
        ({}, {"end": (5, 40, 44)}, r"smaller than the \(7, 16, 16\)"),
        ({}, {"begin": (0, 0, 50)}, "begin"),
        ({}, {"weight": 0.0}, "weight"),
        ({}, {"z_steps": (0,)}, "z_steps"),
        ({}, {"z_steps": (4,)}, "every 4th section"),
        ({}, {"pad": (0, 40, 0)}, "pad"),
    ],
)
def test_wrong_sources_are_named_before_work_starts(tmp_path, arrays, source, words):
    path = write(tmp_path / "bad.h5", **arrays)
    specs = {"raw": "raw", "labels": "labels", **source}
    specs.update({key: f"{path}:{specs[key]}" for key in ("raw", "labels")})
    with pytest.raises(UserError, match=words) as error:
        Loader([Source(**specs)], CROP, 2, CHAIN)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.h5"):
        Loader([Source(raw=f"{tmp_path}/nowhere.h5:raw")], CROP, 1)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size"),
        ({"process_index": 1}, "process_index"),
        ({"transport": "int8"}, "transport"),
        ({"crop": (4, 4)}, "crop"),
        ({"seed": -1}, "seed"),
        ({"min_labelled": 2.0}, "min_labelled"),
        ({"sources": []}, "sources"),
    ],
)
def test_wrong_loader_arguments(source, keywords, words):
    with pytest.raises(UserError, match=words):
        Loader(**{"sources": [source], "crop": CROP, "batch_size": 2, **keywords})


def test_sources_are_all_labelled_or_none(source):
    with pytest.raises(UserError, match="no labels"):
        Loader([source, Source(raw=source.raw, name="b")], CROP, 1)

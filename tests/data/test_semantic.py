"""Class labels from several volumes, the folder layout of slices, and SAM4EM's augmentation."""

import imagecodecs
import numpy as np
import pytest

from emjax.data.augment_sam4em import Sam4emSlices, elastic_coordinates, motion_kernel
from emjax.data.pipeline import Loader, Source
from emjax.data.semantic import ClassVolume, open_classes, slice_folders
from emjax.data.volume import save_volume
from emjax.errors import UserError

SIZE = (50.0, 4.0, 4.0)


@pytest.fixture
def volumes(tmp_path):
    """An image, mitochondria as ids, synapses as classes 3 and 4, that overlap."""
    rng = np.random.default_rng(0)
    shape = (6, 40, 48)
    mito = np.zeros(shape, np.uint32)
    mito[:, 5:20, 5:20], mito[2:, 25:35, 30:40] = 7, 9
    classes = np.zeros(shape, np.uint8)
    classes[:, 15:25, 15:25], classes[:, 30:, 0:5] = 3, 4
    made = {"raw": rng.integers(0, 256, shape, np.uint8), "mito": mito, "classes": classes}
    for name, values in made.items():
        save_volume(tmp_path / f"{name}.zarr", values, voxel_size=SIZE)
    return {name: str(tmp_path / f"{name}.zarr") for name in made}, made


def test_classes_of_several_volumes(volumes):
    specs, made = volumes
    chosen = (
        ClassVolume(volume=specs["mito"], value=1),
        ClassVolume(volume=specs["classes"], value=2, where=(3,)),
    )
    wanted = np.where(made["classes"] == 3, 2, (made["mito"] > 0).astype(np.uint8))
    volume = open_classes(chosen)
    np.testing.assert_array_equal(volume[...], wanted)
    np.testing.assert_array_equal(volume[1:3, 4:30, 7], wanted[1:3, 4:30, 7])
    source = Source(raw=specs["raw"], labels=chosen, voxel_size=SIZE)
    for cache in (1 << 30, 0):
        batch = Loader([source], (6, 40, 48), 1, cache_bytes=cache).batch(0)
        np.testing.assert_array_equal(batch["labels"][0], wanted)


def test_labels_that_are_no_known_class(volumes):
    specs, _ = volumes
    source = Source(raw=specs["raw"], labels=specs["classes"], label_values=(3,), voxel_size=SIZE)
    with pytest.raises(UserError, match="found label 4, expected 0 or 3"):
        Loader([source], (6, 40, 48), 1)
    with pytest.raises(UserError, match="found label 4"):
        Loader([source], (6, 40, 48), 1, cache_bytes=0).batch(0)
    with pytest.raises(UserError, match="empty list of classes"):
        open_classes(())
    with pytest.raises(UserError, match="from 1 to 255"):
        ClassVolume(volume="a", value=0)


def write_slices(folder, stack):
    folder.mkdir(parents=True)
    for z, plane in enumerate(stack):
        (folder / f"im{8 + z}.png").write_bytes(imagecodecs.png_encode(np.ascontiguousarray(plane)))


def test_folders_of_slices(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 32, 40), np.uint8)
    labels = (image > 200).astype(np.uint8) * 255
    for name in ("b", "a"):
        write_slices(tmp_path / name / "images", image)
        write_slices(tmp_path / name / "labels", labels)
    found = slice_folders(str(tmp_path))
    assert [name for name, _, _ in found] == ["a", "b"]
    sources = [Source(raw=raw, labels=truth, name=name, voxel_size=SIZE) for name, raw, truth in found]
    batch = Loader(sources, (4, 32, 40), 1).batch(0)
    # im8, im9, im10, im11: in natural order.
    np.testing.assert_array_equal(batch["image"][0], image)
    np.testing.assert_array_equal(batch["labels"][0], labels)


def test_folders_that_do_not_fit(tmp_path):
    image = np.zeros((3, 32, 40), np.uint8)
    write_slices(tmp_path / "a" / "images", image)
    with pytest.raises(UserError, match="a/labels is missing"):
        slice_folders(str(tmp_path))
    write_slices(tmp_path / "a" / "labels", image[:2])
    with pytest.raises(UserError, match="3 slices in images, 2 in labels"):
        slice_folders(str(tmp_path))
    with pytest.raises(UserError, match="holds no NAME/raw folder"):
        slice_folders(str(tmp_path), images="raw")
    (tmp_path / "a" / "labels" / "im10.png").write_bytes(imagecodecs.png_encode(np.zeros((32, 41), np.uint8)))
    (_, raw, truth) = slice_folders(str(tmp_path))[0]
    source = Source(raw=raw, labels=truth, voxel_size=SIZE)
    with pytest.raises(UserError, match="32x41 uint8, but the first section"):
        Loader([source], (3, 32, 40), 1)


def chunk(seed=0):
    rng = np.random.default_rng(seed)
    one = np.kron(rng.integers(0, 256, (6, 8)), np.ones((8, 8))).astype(np.uint8)
    image = np.repeat(one[None], 5, 0)
    return {"image": image, "labels": (image > 128).astype(np.int32)}


@pytest.mark.parametrize("kind", ["elastic_p", "jitter_p", "blur_p"])
def test_one_draw_for_the_chunk_or_one_for_each_slice(kind):
    only = {name: float(name == kind) for name in ("elastic_p", "jitter_p", "blur_p")}
    for independent in (False, True):
        augmentation = Sam4emSlices(**only, independent=independent)
        sample = chunk()
        draws = augmentation.draw(np.random.default_rng(3), (5, 48, 64))
        made = augmentation.apply(sample, draws)
        assert made["image"].shape == made["labels"].shape == (5, 48, 64)
        assert set(np.unique(made["labels"])) <= {0, 1}
        alike = [np.array_equal(made["image"][0], made["image"][z]) for z in range(1, 5)]
        assert not any(alike) if independent else all(alike)
        moved = not np.array_equal(made["labels"], sample["labels"])
        assert moved == (kind == "elastic_p")
        np.testing.assert_array_equal(augmentation.apply(sample, draws)["image"], made["image"])
        np.testing.assert_array_equal(sample["image"], chunk()["image"])


def test_kinds_exclude_each_other():
    augmentation = Sam4emSlices()
    rng = np.random.default_rng(0)
    drawn = [augmentation.draw(rng, (2, 8, 8)) for _ in range(600)]
    kinds = [one["slices"][0]["kind"] if one else "none" for one in drawn]
    shares = {kind: kinds.count(kind) / 600 for kind in set(kinds)}
    assert shares["elastic"] == pytest.approx(0.65, abs=0.06)
    assert shares["jitter"] == pytest.approx(0.35 * 0.45, abs=0.05)
    assert shares["blur"] == pytest.approx(0.35 * 0.55 * 0.35, abs=0.04)


def test_elastic_and_blur_in_numbers():
    still = np.zeros((2, 30, 40), np.float32)
    ys, xs = elastic_coordinates((30, 40), np.full((3, 2), 2.0), still)
    # All anchors move by (2, 2), so the image does: the source of a pixel lies two behind.
    np.testing.assert_allclose(ys[:, 0], np.arange(30) - 2.0, atol=1e-9)
    np.testing.assert_allclose(xs[0], np.arange(40) - 2.0, atol=1e-9)
    kernel = motion_kernel(11, 0.0)
    assert kernel.sum() == pytest.approx(1)
    np.testing.assert_allclose(kernel[5], 1 / 11)

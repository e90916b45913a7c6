"""Augmentations: image and ids stay registered, only the draws are random, margins suffice, recorded reference."""

import dataclasses

import numpy as np
import pytest

from emjax.data import augment as aug
from emjax.data.crops import as_float, centre_crop, shape_of
from emjax.errors import UserError

CROP = (8, 24, 28)

GEOMETRIC = [
    aug.FlipTranspose(),
    aug.FlipTranspose(transpose="all"),
    aug.FlipTranspose(axes=(1,), transpose="none"),
    aug.Rotate90(),
    aug.Rotate90(planes="all"),
    aug.Rotate(p=1),
    aug.Rotate(p=1, margin=False, degrees=20),
    aug.Rescale(p=1),
    aug.Rescale(p=1, low=1.1, high=1.3, same=True),
    aug.Elastic(p=1),
    aug.Elastic(p=1, margin=3, border="zero"),
    aug.ElasticGrid(p=1, spacing=(4, 12, 12), pad=6),
    aug.ElasticGrid(p=1, spacing=(4, 12, 12), pad=0, image_nearest=True),
    aug.MissingSection(p=1),
    aug.Misalignment(p=1, displacement=6, rotate=0),
    aug.Misalignment(p=1, displacement=6, rotate=1),
]
INTENSITY = [
    aug.Grayscale(p=1),
    aug.Grayscale(p=1, sections=1, invert=0.5),
    aug.GaussianNoise(p=1),
    aug.Blur(p=1),
    aug.MotionBlur(p=1),
    aug.Cutout(p=1, size_z=(2, 4), size_xy=(5, 9), value=0.5),
    aug.CutNoise(p=1),
    aug.CutBlur(p=1),
    aug.MissingSection(p=1, mode="blank"),
    aug.MissingParts(p=1, width=3),
]


def sample_of(shape, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    # Smooth enough that interpolation between equal neighbours is meaningful, with sharp object borders.
    labels = np.kron(rng.integers(0, 40, [n // 4 + 1 for n in shape]), np.ones((4, 4, 4), int))
    labels = labels[tuple(slice(n) for n in shape)].astype(np.int32)
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    return {
        "image": image if dtype == np.uint8 else as_float(image),
        "labels": labels,
        "mask": (rng.random(shape) < 0.9).astype(np.uint8),
    }


def run(augmentation, sample, seed):
    rng = np.random.default_rng(seed)
    return augmentation.apply(sample, augmentation.draw(rng, shape_of(sample)))


def name(value):
    return type(value).__name__


@pytest.mark.parametrize("augmentation", GEOMETRIC, ids=name)
@pytest.mark.parametrize("seed", range(4))
def test_image_and_labels_stay_registered(augmentation, seed):
    """Ids take part twice, as labels and as the grey values, and must agree wherever no interpolation mixed two ids."""
    sample = sample_of(aug.needed_shape((augmentation,), CROP), seed)
    sample["image"] = sample["labels"].astype(np.float32)
    before = {key: array.copy() for key, array in sample.items()}
    out = run(augmentation, sample, seed)
    assert out["image"].shape == out["labels"].shape == out["mask"].shape
    assert all(have >= want for have, want in zip(out["image"].shape, CROP))
    wrong = np.abs(out["image"] - out["labels"]) > 1e-3
    image, labels = out["image"], out["labels"]
    # A voxel with neighbours of one id only, in plane, is no mixture of ids (but where a field stretches beyond 2).
    plain = np.ones(labels.shape, bool)
    for axis in (1, 2):
        for step in (1, -1):
            plain &= np.roll(labels, step, axis) == labels
    plain[:, [0, -1]] = False
    plain[:, :, [0, -1]] = False
    assert plain.any()
    assert np.mean(wrong[plain]) < 2e-3, np.argwhere(wrong & plain)[:3]
    # Interpolation error of half a voxel at borders is all there may be.
    assert np.mean(wrong) < 0.6
    assert np.corrcoef(image.ravel(), labels.ravel())[0, 1] > 0.9
    for key, array in before.items():
        np.testing.assert_array_equal(sample[key], array, err_msg="the input was written to")


@pytest.mark.parametrize("augmentation", INTENSITY, ids=name)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_grey_values_change_and_ids_do_not(augmentation, dtype):
    sample = sample_of(CROP, 1, dtype)
    before = sample["image"].copy()
    out = run(augmentation, sample, 3)
    np.testing.assert_array_equal(sample["image"], before, err_msg="the input was written to")
    np.testing.assert_array_equal(out["labels"], sample["labels"])
    np.testing.assert_array_equal(out["mask"], sample["mask"])
    assert out["image"].shape == CROP
    image = as_float(out["image"])
    assert not np.array_equal(image, as_float(before))
    assert image.min() >= 0
    assert image.max() <= 1


@pytest.mark.parametrize("augmentation", [a for a in INTENSITY if not isinstance(a, aug.MissingParts)], ids=name)
def test_uint8_and_float_images_agree(augmentation):
    results = [as_float(run(augmentation, sample_of(CROP, 1, dtype), 3)["image"]) for dtype in (np.uint8, np.float32)]
    np.testing.assert_allclose(results[0], results[1], atol=0.5 / 255)


@pytest.mark.parametrize("augmentation", GEOMETRIC + INTENSITY, ids=name)
def test_draws_replay_and_depend_on_the_seed_alone(augmentation):
    sample = sample_of(aug.needed_shape((augmentation,), CROP), 2)
    draws = augmentation.draw(np.random.default_rng(5), shape_of(sample))
    first, second = augmentation.apply(sample, draws), augmentation.apply(sample, draws)
    third = run(augmentation, sample, 5)
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
        np.testing.assert_array_equal(first[key], third[key])


@pytest.mark.parametrize("augmentation", GEOMETRIC + INTENSITY, ids=name)
def test_probability_zero_never_acts(augmentation):
    never = dataclasses.replace(augmentation, p=0.0)
    assert all(never.draw(np.random.default_rng(seed), (10, 40, 40)) is None for seed in range(20))


@pytest.mark.parametrize(
    "augmentation",
    [aug.Rotate(p=1), aug.Rotate(p=1, degrees=30), aug.Rescale(p=1), aug.Rescale(p=1, low=0.5, high=0.6)],
    ids=name,
)
@pytest.mark.parametrize("crop", [(1, 17, 40), (2, 31, 31)])
def test_margins_keep_the_outside_out(augmentation, crop):
    """With everything beyond the sample made visible, none of it may reach the crop."""
    needed = aug.needed_shape((augmentation,), crop)
    inner = {"image": np.ones(needed, np.float32), "labels": np.ones(needed, np.int32)}
    for seed in range(30):
        draws = augmentation.draw(np.random.default_rng(seed), needed)
        if isinstance(augmentation, aug.Rotate):
            out = dataclasses.replace(augmentation, border="zero").apply(inner, draws)
            assert centre_crop(out, crop)["image"].min() > 0.999
            assert centre_crop(out, crop)["labels"].min() == 1
        else:
            ramp = np.broadcast_to(np.arange(needed[1], dtype=np.float32)[None, :, None], needed)
            out = augmentation.apply({"image": ramp, "labels": ramp.astype(np.int32)}, draws)
            line = centre_crop(out, crop)["image"][0, :, 0]
            np.testing.assert_allclose(np.diff(line), 1 / draws["factors"][0], atol=1e-3)


def test_a_chain_yields_its_crop_from_the_shape_that_it_asks_for():
    chain = (*GEOMETRIC, *INTENSITY)
    needed = aug.needed_shape(chain, CROP)
    assert all(n >= c for n, c in zip(needed, CROP))
    sample = sample_of(needed)
    for seed in range(3):
        out = aug.augment(chain, CROP, sample, np.random.default_rng(seed))
        assert shape_of(out) == CROP
        draws = aug.draw_chain(chain, CROP, np.random.default_rng(seed))
        again = aug.apply_draws(chain, CROP, sample, draws)
        np.testing.assert_array_equal(out["image"], again["image"])
        np.testing.assert_array_equal(out["labels"], again["labels"])


@pytest.mark.parametrize("anisotropic", [True, False])
@pytest.mark.parametrize("crop", [(16, 16, 16), (8, 24, 24), (8, 16, 24)])
def test_standard_chains(anisotropic, crop):
    chain = aug.standard_chain(crop, anisotropic)
    needed = aug.needed_shape(chain, crop)
    assert needed[0] <= crop[0] + 1
    assert shape_of(aug.augment(chain, crop, sample_of(needed), np.random.default_rng(0))) == crop


def test_deleted_sections_are_inner_ones():
    sample = sample_of((7, 4, 4))
    sample["labels"] = np.broadcast_to(np.arange(1, 8, dtype=np.int32)[:, None, None], (7, 4, 4))
    for seed in range(20):
        out = run(aug.MissingSection(p=1, count=3), sample, seed)
        kept = out["labels"][:, 0, 0].tolist()
        assert kept[0] == 1
        assert kept[-1] == 7
        assert kept == sorted(set(kept))
        assert len(kept) == 4


def test_a_slip_moves_one_section_and_a_translation_the_rest():
    sample = sample_of((9, 20, 20))
    sample["labels"] = np.broadcast_to(np.arange(400, dtype=np.int32).reshape(1, 20, 20), (9, 20, 20))
    for slip in (True, False):
        augmentation = aug.Misalignment(p=1, displacement=5, rotate=0, slip=float(slip))
        draws = augmentation.draw(np.random.default_rng(3), (9, 20, 20))
        out = augmentation.apply(sample, draws)["labels"]
        (y0, x0), (y1, x1) = draws["starts"]
        for z in range(9):
            moved = z == draws["section"] if slip else z >= draws["section"]
            assert out[z, 0, 0] == (20 * y1 + x1 if moved else 20 * y0 + x0)


def test_missing_parts_leave_the_section_after_alone():
    augmentation = aug.MissingParts(p=1, section_p=1, width=2)
    draws = augmentation.draw(np.random.default_rng(0), (7, 20, 20))
    assert [z for z, _ in draws["bands"]] == [0, 2, 4, 6]
    sample = sample_of((7, 20, 20))
    out = augmentation.apply(sample, draws)
    changed = (out["image"] != sample["image"]).any((1, 2))
    assert changed.tolist() == [True, False] * 3 + [True]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: aug.Elastic(p=1.5), "Elastic.p"),
        (lambda: aug.Elastic(sigma=0), "sigma"),
        (lambda: aug.Blur(sigma=(3, 1)), r"Blur.sigma"),
        (lambda: aug.Rescale(low=1.2, high=1.1), "Rescale"),
        (lambda: aug.FlipTranspose(transpose="xy"), "transpose"),
        (lambda: aug.FlipTranspose(axes=(3,)), "axes"),
        (lambda: aug.Cutout(count=(5,)), "count"),
        (lambda: aug.MissingSection(mode="cut"), "mode"),
        (lambda: aug.MissingSection(mode="blank").draw(np.random.default_rng(0), (3, 4, 4)), "inner sections"),
        (lambda: aug.Misalignment(displacement=0), "displacement"),
        (lambda: aug.Rotate(border="wrap"), "border"),
        (lambda: aug.CutNoise(ratio=0), "ratio"),
    ],
)
def test_wrong_parameters_are_named(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.fixture(scope="module")
def reference(oracles):
    with np.load(oracles / "segneuron" / "augmentations.npz") as file:
        return {key: file[key] for key in file.files}


def grey(reference):
    return {"image": as_float(reference["image"]), "labels": reference["labels"].astype(np.int32)}


def test_reference_flips(reference):
    for i, rule in enumerate(reference["flip_rules"].astype(bool)):
        draws = {"flips": (rule[0], rule[2], rule[1]), "order": (0, 2, 1) if rule[3] else (0, 1, 2)}
        out = aug.FlipTranspose().apply(grey(reference), draws)
        np.testing.assert_array_equal(out["labels"][:3], reference[f"flip_{i}"])


@pytest.mark.parametrize("mode", ["2d", "3d"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_reference_intensity(reference, mode, dtype):
    uniforms = reference[f"intensity_{mode}_draws"][1:].reshape(-1, 3)
    sample = grey(reference) if dtype == np.float32 else {"image": reference["image"]}
    out = aug.Grayscale(contrast=0.1, brightness=0.1).apply(sample, {"uniforms": uniforms, "invert": False})
    np.testing.assert_allclose(out["image"][[0, 2, -1]], reference[f"intensity_{mode}"], atol=1e-6)


def test_reference_noise(reference):
    noise = np.random.RandomState(int(reference["noise_seed"])).standard_normal(reference["image"].shape)
    draws = {"sigma": float(reference["noise_std"]), "noise": noise.astype(np.float32)}
    out = aug.GaussianNoise().apply(grey(reference), draws)
    np.testing.assert_allclose(out["image"][[0, 3]], reference["noise"], atol=1e-6)


def test_reference_blur(reference):
    for i in range(sum(key.endswith("_params") and key.startswith("blur") for key in reference)):
        size, sigma = reference[f"blur_{i}_params"]
        out = aug.Blur().apply(grey(reference), {"radius": int(size) // 2, "sigma": float(sigma)})
        np.testing.assert_allclose(out["image"][:2], reference[f"blur_{i}"], atol=1e-6)


def test_reference_cutout(reference):
    shape = tuple(reference["cutout_shape"])
    size = tuple(int(reference[f"cutout_size_{axis}"]) for axis in ("z", "xy", "xy"))
    out = aug.Cutout().apply(
        {"image": np.ones(shape, np.float32)}, {"size": size, "corners": reference["cutout_corners"]}
    )
    np.testing.assert_array_equal(np.packbits(out["image"] > 0), reference["cutout_mask_bits"])


def test_reference_elastic(reference):
    offsets = reference["elastic_control_offsets"][1:]
    augmentation = aug.ElasticGrid(pad=20, image_nearest=True)
    out = augmentation.apply(
        {"image": reference["image"], "labels": reference["labels"].astype(np.int32)}, {"offsets": offsets}
    )
    np.testing.assert_array_equal(out["labels"], reference["elastic_labels"])
    np.testing.assert_array_equal(out["image"], reference["elastic_image"])

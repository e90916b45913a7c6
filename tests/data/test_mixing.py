import functools

import numpy as np
import pytest

from emjax.data.augment import FlipTranspose, GaussianNoise
from emjax.data.mixing import (
    AFFINITY_BITS,
    Mixing,
    affinity_bits,
    draw_mix,
    ignored_by,
    make_mix,
    mix_frequencies,
    mixed_sample,
    partners,
)
from emjax.data.pipeline import Loader, Sampler, Source
from emjax.data.volume import save_volume
from emjax.errors import UserError

ALWAYS = Mixing(frequency_p=1.0, spatial_p=1.0, square=6)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("mixing"), []
    rng = np.random.default_rng(0)
    for name in ("a/0", "a/1", "b/0"):
        file = f"{folder}/{name.replace('/', '_')}"
        labels = rng.integers(0, 4, (10, 24, 24)).astype(np.uint32)
        save_volume(f"{file}_raw.zarr", rng.integers(0, 255, (10, 24, 24)).astype(np.uint8), voxel_size=(8, 8, 8))
        save_volume(f"{file}_labels.zarr", labels, voxel_size=(8, 8, 8))
        made.append(
            Source(
                raw=f"{file}_raw.zarr", labels=f"{file}_labels.zarr", name=name, z_steps=(2,) if name == "b/0" else (1,)
            )
        )
    return tuple(made)


def _reference(source, partner, share):
    """Whole Fourier transforms, as published."""
    mixed = []
    for ours, theirs in zip(source, partner):
        a, b = np.fft.fftshift(np.fft.fft2(ours)), np.fft.fftshift(np.fft.fft2(theirs))
        amplitude = np.abs(a)
        (h, w), width = ours.shape, int(np.floor(min(ours.shape) * share))
        y, x = h // 2, w // 2
        window = np.s_[max(y - width, 0) : y + width + 1, max(x - width, 0) : x + width + 1]
        amplitude[window] = np.abs(b)[window]
        mixed.append(np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(a)))).real)
    return np.stack(mixed)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 11, 18)])
def test_frequency_mixing_equals_whole_transforms(share, shape):
    source, partner = np.random.default_rng(1).random((2, *shape))
    np.testing.assert_allclose(mix_frequencies(source, partner, share), _reference(source, partner, share), atol=1e-5)


def test_published_share_moves_only_the_mean():
    source, partner = np.random.default_rng(2).random((2, 3, 20, 20)).astype(np.float32)
    mixed = mix_frequencies(source, partner, 0.001)
    np.testing.assert_allclose(mixed.mean((1, 2)), partner.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(
        mixed - mixed.mean((1, 2), keepdims=True), source - source.mean((1, 2), keepdims=True), atol=1e-6
    )


def test_partners_come_from_other_sets():
    names = ["a/0", "a/1", "b/0", "c/0"]
    assert partners(names, 0) == [[2], [3]]
    assert partners(names, 0, reference=True) == [[2]]
    assert partners(["alone"], 0) == []


def test_ignored_labels_are_the_union():
    assert ignored_by([(10000,), (121, 122)]) == (121, 122, 10000)
    assert ignored_by([(10000,), (121, 122)], reference=True) == (10000,)


def test_mixing_is_a_pure_function_of_its_draws(sources):
    sampler = Sampler(sources, (4, 16, 16), (FlipTranspose(), GaussianNoise(p=1.0)))
    draws = draw_mix(sampler, ALWAYS, np.random.default_rng(3))
    assert draws.frequency is not None
    assert draws.second is not None
    assert draws.frequency.z_step == 1
    one, other = (make_mix(sampler, ALWAYS, draws) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert one["image"].dtype == np.float32
    assert one["image"].shape == (4, 16, 16)


def test_seam_keeps_what_each_crop_said(sources):
    sampler = Sampler(sources, (4, 16, 16))
    draws = draw_mix(sampler, ALWAYS, np.random.default_rng(4))
    stale = make_mix(sampler, ALWAYS, draws)
    y, x = draws.corner
    inside = np.s_[:, y : y + 6, x : x + 6]
    second = sampler.read(draws.second.crop)
    np.testing.assert_array_equal(stale[AFFINITY_BITS][inside], affinity_bits(second["labels"])[inside])
    np.testing.assert_array_equal(stale["labels"][inside], second["labels"][inside])
    fresh = make_mix(sampler, Mixing(frequency_p=1, spatial_p=1, square=6, recompute_seam=True), draws)
    assert AFFINITY_BITS not in fresh


def test_loader_takes_mixed_samples(sources):
    loader = Loader(
        sources, (4, 16, 16), 2, transport="float32", compose=functools.partial(mixed_sample, ALWAYS), threads=1
    )
    batch = loader.batch(0)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
        ("image", "labels", "mask", AFFINITY_BITS), (2, 4, 16, 16)
    )


def test_bad_settings_are_named():
    with pytest.raises(UserError, match=r"mixing\.frequency_share"):
        Mixing(frequency_share=0.7).validate()
    with pytest.raises(ValueError, match="share is"):
        mix_frequencies(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), 0.9)
    with pytest.raises(ValueError, match="expected the same"):
        mix_frequencies(np.zeros((1, 4, 4)), np.zeros((1, 4, 5)), 0.1)

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from emjax.errors import UserError
from emjax.models.fgnet import MODES, CrossAttention, FGNet, FGNetConfig, mean_pool, pad_block
from emjax.models.functional import define, join, partition, paths
from emjax.models.layers.lora import LoRA, is_adapter
from emjax.models.sam2.config import HieraConfig, SAM2Config
from emjax.models.unet import UNetConfig

# Three levels at strides 4, 8, 16: what the modes share, at the least compilation.
FINE = UNetConfig(widths=(4, 4, 8), pools=((1, 2, 2),) * 2, kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)), patch=(1, 4, 4))
TINY = FGNetConfig(fine=FINE, guided=(4, 8, 16), context=8)
HIERA = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2))
SAM2 = SAM2Config(HIERA, features=16)


@functools.cache
def network(config: FGNetConfig, sam2: SAM2Config = SAM2, frozen: bool = True, weights: str = "float32"):
    """Its forward pass, compiled once for a shape, and variables drawn by NumPy by their paths, so that nested networks
    share their values."""
    sam2_or_none = sam2 if config.uses_sam2 else None
    definition = define(lambda rngs: FGNet(config, sam2_or_none, 3, frozen=frozen, weights=weights, rngs=rngs))

    def draw(tree, prefix):
        if not isinstance(tree, dict):
            seed = np.random.default_rng(list(prefix.encode()))
            return jnp.asarray(0.3 * seed.standard_normal(tree.shape), tree.dtype)
        return {name: draw(value, f"{prefix}.{name}") for name, value in tree.items()}

    forward = jax.jit(lambda variables, image: definition.bind(variables)(image))
    return definition, draw(definition.shapes, ""), forward


def filled(variables: dict, wanted: Callable[[str], bool], value: float) -> dict:
    """``value`` in the parameters whose dotted path is ``wanted``."""
    chosen, rest = partition(variables["params"], wanted)
    assert chosen
    return {**variables, "params": join(jax.tree.map(lambda leaf: jnp.full_like(leaf, value), chosen), rest)}


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


def test_gate_without_weight_is_the_plain_network_exactly():
    block = image(1, 2, 32, 32)
    alone = dataclasses.replace(TINY, coarse=False)
    _, variables, gate = network(alone)
    gated = gate(filled(variables, lambda path: path.endswith(".gamma"), 0.0), block)
    _, variables, none = network(dataclasses.replace(alone, mode="none"))
    plain = none(variables, block)
    np.testing.assert_array_equal(gated.refined, plain.refined)
    assert plain.coarse is None
    assert plain.guidance == {}
    assert sorted(gated.guidance) == [4, 8, 16]


def test_the_coarse_branch_does_not_see_the_fine_encoder():
    _, variables, forward = network(TINY)
    block = image(1, 2, 32, 32)
    before = forward(variables, block)
    after = forward(filled(variables, lambda path: path.startswith("fine."), 0.1), block)
    np.testing.assert_array_equal(before.coarse, after.coarse)
    assert not np.allclose(before.refined, after.refined)


def test_any_size_depends_on_the_block_alone():
    # Whatever surrounds a block of 30 x 27 in a larger array, and whoever pads it by its mirror image, the result is one.
    whole = image(1, 3, 40, 40)
    block = whole[:, :2, :30, :27]
    _, variables, forward = network(TINY)
    found = forward(variables, block)
    assert found.refined.shape == found.coarse.shape == (1, 2, 30, 27, 3)
    padded = forward(variables, pad_block(block, TINY.multiple()))
    np.testing.assert_allclose(found.refined, padded.refined[:, :2, :30, :27], atol=1e-6)
    np.testing.assert_allclose(found.coarse, padded.coarse[:, :2, :30, :27], atol=1e-6)
    assert found.guidance[8].shape == (1, 2, 4, 4)


def test_padding_is_the_mirror_image_however_far():
    padded = np.asarray(pad_block(jnp.arange(3.0).reshape(1, 1, 1, 3), (1, 2, 8)))
    np.testing.assert_array_equal(padded[0, 0, 1], [0, 1, 2, 2, 1, 0, 0, 1])


def test_frozen_sam2_gets_no_gradient_and_adapters_start_as_nothing():
    block = image(1, 2, 32, 32)
    adapted = dataclasses.replace(SAM2, hiera=dataclasses.replace(HIERA, lora=LoRA(rank=2)))
    _, variables, forward = network(TINY, adapted, frozen=False)
    plain, frozen, forward_frozen = network(TINY)
    started = forward(filled(variables, lambda path: ".lora." in path and ".b." in path, 0.0), block)
    np.testing.assert_allclose(started.refined, forward_frozen(frozen, block).refined, atol=1e-5)

    def loss(params, definition):
        found = definition.bind({"params": params, "batch_stats": {}, "constants": {}})(block)
        return jnp.square(found.refined).mean() + jnp.square(found.coarse).mean()

    gradient = jax.jit(jax.grad(lambda params: loss(params, plain)))(frozen["params"])
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradient["sam2"]))
    assert any(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(gradient["project"]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "gate"])
def test_every_mode_runs(mode):
    _, variables, forward = network(dataclasses.replace(TINY, mode=mode, guided=(8, 16)))
    found = forward(variables, image(1, 2, 32, 32))
    assert np.isfinite(found.refined).all()
    assert found.guidance == {}


def test_attention_does_not_see_beyond_the_map():
    # The last window of a map of 4 x 4 holds 48 empty places, and the first slice has none before it.
    attention = define(lambda rngs: CrossAttention(FINE, 8, 1.0, rngs))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), attention.shapes)
    x, s = (jnp.asarray(rng.standard_normal((1, 3, 4, 4, 8)), jnp.float32) for _ in range(2))
    found = attention.bind(variables)(x, s)[0]
    changed = attention.bind(variables)(x, s.at[:, 2].add(1.0))[0]
    np.testing.assert_allclose(found[:, 0], changed[:, 0], atol=1e-6)
    assert not np.allclose(found[:, 1], changed[:, 1])
    # With values that are all alike, softmax weights that leaked to empty places would make the result smaller.
    variables["params"]["value"]["kernel"] = jnp.zeros((8, 8))
    same = attention.bind(variables)(x, s)[0] - x
    np.testing.assert_allclose(same, jnp.broadcast_to(same[:, :1, :1, :1], same.shape), atol=1e-5)


@pytest.mark.slow
def test_isotropic_levels_thick_slices_trunk_features_and_scale():
    fine = UNetConfig(
        widths=(4, 4, 4, 8), pools=((1, 2, 2), (2, 2, 2), (2, 2, 2)), kernels=((3, 3, 3),) * 4, patch=(2, 2, 2)
    )
    config = FGNetConfig(fine=fine, context=8, thickness=4, features="trunk", sam_scale=2, guided=(2, 4, 8, 16))
    assert config.multiple() == (8, 32, 32)
    _, variables, forward = network(config, weights="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"]["sam2"])} == {jnp.dtype("bfloat16")}
    found = forward(variables, image(1, 6, 32, 32))
    assert found.refined.shape == (1, 6, 32, 32, 3)
    assert {stride: seen.shape for stride, seen in found.guidance.items()} == {
        2: (1, 3, 16, 16),
        4: (1, 3, 8, 8),
        8: (1, 2, 4, 4),
        16: (1, 1, 2, 2),
    }


@pytest.mark.slow
def test_residual_refinement_adds_to_the_coarse_map():
    block = image(1, 2, 32, 32)
    config = dataclasses.replace(TINY, refine_residual=True, share_coarse=False)
    _, variables, forward = network(config)
    found = forward(filled(variables, lambda path: path.startswith("fine.head."), 0.0), block)
    np.testing.assert_array_equal(found.refined, found.coarse)


def test_default_shape_is_that_of_the_literature():
    config = FGNetConfig(mode="none", coarse=False)
    assert config.multiple() == (1, 16, 16)
    definition = define(lambda rngs: FGNet(config, None, 3, rngs=rngs))
    count = sum(leaf.size for leaf in jax.tree.leaves(definition.shapes["params"]))
    # SuperHuman's network has 1.48 million.
    assert 1.2e6 < count < 1.8e6
    assert not any(path.startswith("sam2") for path in paths(definition.shapes["params"]))
    assert FGNetConfig().multiple() == (1, 32, 32)
    assert [FGNetConfig().width(level) for level in FGNetConfig().coarse_levels] == [48, 64, 80, 96]


def test_means_over_cells():
    np.testing.assert_allclose(mean_pool(jnp.arange(8.0).reshape(1, 2, 2, 2, 1), (2, 2, 2))[0, 0, 0, 0], [3.5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coarse": False, "refined": False}, "neither coarse nor refined"),
        ({"mode": "film"}, "mode 'film'"),
        ({"guided": (2,)}, "stride 2 has no guidance"),
        ({"guided": (4,), "mode": "xattn"}, r"expected some of \(8, 16\)"),
        ({"refine_residual": True, "coarse": False}, "refine_residual needs"),
        ({"fine": dataclasses.replace(FINE, pools=((1, 2, 2), (1, 3, 3)))}, "meet SAM 2's strides"),
        ({"fine": dataclasses.replace(FINE, patch=(3, 4, 4)), "thickness": 2}, "one must divide the other"),
        ({"sam_scale": 3}, "sam_scale 3"),
    ],
)
def test_shapes_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TINY, **changes).validate()


def test_adapters_are_told_by_their_paths():
    adapted = dataclasses.replace(SAM2, hiera=dataclasses.replace(HIERA, lora=LoRA(rank=2)))
    definition = network(TINY, adapted)[0]
    found = [path for path in paths(definition.shapes["params"]) if is_adapter(path)]
    assert found
    assert all(path.startswith("sam2.trunk.blocks.") for path in found)

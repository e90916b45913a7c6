import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from emjax.errors import UserError
from emjax.models.functional import define, paths
from emjax.models.mnet import Config, MNet, Node, decoder_wiring, encoder_wiring, is_encoder, pretraining

TINY = Config(widths=(2, 3, 4, 5, 6))


@functools.cache
def _network(config):
    definition = define(lambda rngs: MNet(config, rngs))
    rng = np.random.default_rng(0)
    return definition, jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), definition.shapes)


def test_mesh_has_the_published_nodes():
    assert len(encoder_wiring()) == 15
    assert len(decoder_wiring()) == 10
    assert encoder_wiring()["down22"][:2] == ("down21.2d", "down12.3d")
    assert encoder_wiring()["bottleneck4"][:2] == ("down41.2d", "down32.3d")
    assert decoder_wiring("_")["up23_"][:3] == ("up22_.2d", "up32_.3d", "down21")
    assert decoder_wiring()["up41"][:3] == ("bottleneck4.2d", "bottleneck5.3d", "down41")


@pytest.mark.parametrize(
    ("config", "millions"), [(Config(), 40_372_736 - 2304), (pretraining(Config()), 35_136_832 - 2304 + 1152)]
)
def test_published_number_of_parameters(config, millions):
    # 2304 and 1152 are the parameters of the heads that the published networks carry without using them.
    shapes = define(lambda rngs: MNet(config, rngs)).shapes["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == millions


@pytest.mark.parametrize("size", [(5, 16, 16), (13, 18, 33)])
def test_any_size_keeps_its_shape(size):
    definition, collections = _network(TINY)
    first, second = jax.eval_shape(lambda x: definition.bind(collections)(x), jnp.zeros((1, *size, 1)))
    assert first.shape == (1, *size, 3)
    assert second.shape == (1, *size, 1)


def test_pretraining_shares_the_encoder():
    encoders = []
    for config in (TINY, pretraining(TINY)):
        shapes = _network(config)[0].shapes["params"]
        assert {path for path in paths(shapes) if is_encoder(path)} == {
            path for path in paths(shapes) if path.startswith("encoder")
        }
        encoders.append(jax.tree.map(lambda leaf: leaf.shape, shapes["encoder"]))
    assert encoders[0] == encoders[1]


def test_initial_weights_are_those_of_pytorch():
    node = Node(16, 24, encoder_wiring()["down22"], "float32", nnx.Rngs(0))
    kernel = np.asarray(node.volumetric.conv1.conv.kernel[...])
    bound = (16 * 27) ** -0.5
    assert 0.97 * bound < np.abs(kernel).max() <= bound
    assert abs(kernel.std() - bound / 3**0.5) < 0.02 * bound


def test_given_features_replace_computed_ones():
    definition, collections = _network(TINY)
    x = jnp.asarray(np.random.default_rng(0).random((1, 4, 16, 16, 1)), jnp.float32)

    @jax.jit
    def run(x, given):
        return definition.bind(collections).features(x, given)

    plain = run(x, {})
    replaced = run(jnp.zeros_like(x), {name: plain[name] for name in ("down11.2d", "down11.3d")})
    for name in ("bottleneck5.3d", "up14_.2d"):
        np.testing.assert_allclose(replaced[name], plain[name], atol=1e-6)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    x = jnp.asarray(np.random.default_rng(1).random((1, 2, 16, 16, 1)), jnp.float32)
    gradients = []
    for remat in (False, True):
        config = Config(widths=(1, 1, 1, 1, 2), merge="sum", remat=remat)
        definition, collections = _network(config)

        def loss(params, definition=definition):
            first, second = definition.bind({"params": params})(x)
            return first.sum() + 2 * second.sum()

        gradients.append(jax.jit(jax.grad(loss))(collections["params"]))
    for one, other in zip(*map(jax.tree.leaves, gradients)):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_bad_input_is_one_clear_line():
    model = MNet(TINY, nnx.Rngs(0))
    with pytest.raises(UserError, match=r"patch of \(20, 15, 64\) .* at least 16"):
        model(jnp.zeros((1, 20, 15, 64, 1)))
    with pytest.raises(UserError, match="expected \\(batch, z, y, x, 1\\)"):
        model(jnp.zeros((20, 64, 64)))
    with pytest.raises(UserError, match="merge 'mean'"):
        Config(merge="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="widths"):
        Config(widths=(1, 2))  # type: ignore[arg-type]

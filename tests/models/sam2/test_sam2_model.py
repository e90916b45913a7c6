"""The network's contract: sizes, precision, absent objects, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.sam2.small_sam2 import config, network, variables

from emjax.models.functional import define
from emjax.models.sam2.config import sam2_config
from emjax.models.sam2.mask_decoder import DecodedMasks, single_mask, stability
from emjax.models.sam2.model import NO_OBJECT, SAM2, disjoint

rng = np.random.default_rng(0)
IMAGE = rng.random((1, 64, 96), np.float32)


def test_rectangular_input_gives_all_strides():
    net = network()
    stages, levels = net.compiled(lambda model, x: tuple(model.image_encoder(x)))(
        jnp.asarray(rng.random((2, 64, 96, 3)))
    )
    assert [x.shape[1:3] for x in stages] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [x.shape for x in levels] == [(2, 16, 24, 64), (2, 8, 12, 64), (2, 4, 6, 64), (2, 2, 3, 64)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 64, 90, 3), "64 x 90 pixels.*64 x 96"),
        ((1, 16, 32, 3), "32 x 32"),
        ((1, 64, 64, 1), "1 channels; expected 3"),
    ],
)
def test_wrong_input_is_told(shape, message):
    with pytest.raises(ValueError, match=message):
        network().compiled(lambda model, x: model.encode(x))(jnp.zeros(shape))


@pytest.mark.parametrize(("size", "version", "message"), [("huge", "2.1", "size"), ("tiny", "3", "version")])
def test_unknown_network(size, version, message):
    with pytest.raises(ValueError, match=message):
        sam2_config(size, version)


@pytest.mark.parametrize(
    ("size", "count"),
    [("tiny", 38_962_498), ("small", 46_060_354), ("base_plus", 80_850_178), ("large", 224_446_642)],
)
def test_published_parameter_counts(size, count):
    for version, fewer in (("2.1", 0), ("2.0", 16_512)):
        made = sam2_config(size, version)
        shapes = define(lambda rngs, made=made: SAM2(made, rngs)).shapes
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == count - fewer


@pytest.mark.slow
def test_half_precision_stays_near():
    points = jnp.asarray([[[30.0, 40.0]]]), jnp.ones((1, 1), jnp.int32)

    def run(model, grey, points, labels):
        features = model.encode(jnp.repeat(grey[..., None], 3, -1))
        return model.predict_masks(model.without_memory(features), features, (points, labels), hide_absent=False)

    full = network().compiled(run)(IMAGE, *points)
    half = network(dtype="bfloat16").compiled(run)(IMAGE, *points)
    assert half.candidates.dtype == jnp.float32
    spread = float(full.candidates.std())
    assert np.abs(np.asarray(half.candidates - full.candidates)).mean() < 0.1 * spread
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables()["params"]))


def test_empty_mask_means_absent():
    masks = np.zeros((2, 64, 96), bool)
    masks[0, 10:30, 20:50] = True

    def run(model, grey, masks):
        return model.take_mask(model.encode(jnp.repeat(grey[..., None], 3, -1)), masks)

    heads, high = network().compiled(run)(IMAGE, masks)
    assert heads.score.tolist() == [10, -10]
    assert np.array_equal(np.asarray(high) > 0, masks)
    assert np.array_equal(heads.pointer[1], variables()["params"]["no_obj_ptr"][0])


def test_absent_objects_are_hidden_everywhere():
    features_of = network().compiled(lambda model, grey: model.encode(jnp.repeat(grey[..., None], 3, -1)))(IMAGE)

    def run(model, features, points, labels):
        head = model.sam_mask_decoder.pred_obj_score_head
        head.layers[-1].bias[...] = jnp.full((1,), -100.0)
        return model.predict_masks(model.without_memory(features), features, (points, labels))

    heads = network().compiled(run)(features_of, jnp.ones((1, 1, 2)), jnp.ones((1, 1), jnp.int32))
    assert (np.asarray(heads.low) == NO_OBJECT).all()


def test_disjoint_keeps_the_largest():
    logits = jnp.asarray([[[3.0, -20.0]], [[5.0, 1.0]]])
    assert disjoint(logits).tolist() == [[[-10.0, -20.0]], [[5.0, 1.0]]]
    assert disjoint(logits[:1]).tolist() == logits[:1].tolist()


def test_unstable_mask_falls_back():
    masks = np.full((1, 4, 4, 4), 0.01, np.float32)
    masks[0, 2] = 7
    decoded = DecodedMasks(
        jnp.asarray(masks), jnp.asarray([[0.9, 0.1, 0.8, 0.2]]), jnp.zeros((1, 4, 8)), jnp.ones((1, 1))
    )
    assert stability(decoded.masks).tolist() == [[0, 0, 1, 0]]
    mask, iou = single_mask(decoded, 0.98)
    assert float(mask.max()) == 7
    assert np.isclose(float(iou[0, 0]), 0.8)
    assert float(single_mask(decoded)[1][0, 0]) == np.float32(0.9)
    assert stability(jnp.full((1, 1, 2, 2), -5.0)).tolist() == [[1.0]]


def test_image_only_network_predicts():
    made = config(image_only=True)
    definition = define(lambda rngs: SAM2(made, rngs))
    assert "memory_attention" not in definition.shapes["params"]
    model = definition.bind(variables(True))
    features = model.encode(jnp.ones((1, 64, 64, 3)))
    heads = model.predict_masks(
        model.without_memory(features), features, (jnp.ones((1, 1, 2)), jnp.ones((1, 1), jnp.int32))
    )
    assert heads.low.shape == (1, 16, 16)

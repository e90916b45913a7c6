"""SAM4EM as a system: targets, stages, sizes, start-up from SAM 2, and learning on the phantom."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.small_sam4em import drawn

from emjax.config import Data, Experiment
from emjax.data.phantom import PhantomConfig, make_phantom
from emjax.errors import UserError
from emjax.models import sam4em as network
from emjax.models.functional import define, join, partition, paths, variables
from emjax.models.layers.lora import LoRA
from emjax.models.sam2.config import HieraConfig, SAM2Config
from emjax.models.sam2.model import SAM2
from emjax.systems import hiera_pretraining, sam4em
from emjax.systems.protocol import Block
from emjax.training import state
from emjax.weights.rules import leaves
from emjax.weights.sam4em import RULES, export, started_from_sam2

HIERA = HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2))
MODEL = network.Config(
    hiera=HIERA,
    lora=LoRA(rank=2),
    features=16,
    heads=2,
    inner=16,
    classes=2,
    memory=network.MemoryConfig(slots=2, dropout=0.0),
)
CLASSES = (sam4em.Class(name="a", labels=(1, 5)), sam4em.Class(name="b", labels=(2,)))
CONFIG = sam4em.Config(
    model=MODEL, classes=CLASSES, plan=Block(size=(2, 64, 64), stride=(2, 48, 48), blending="gaussian")
)


@functools.cache
def definition(model):
    return define(lambda rngs: network.SAM4EM(model, rngs))


def shapes(config):
    return definition(config.model).shapes


def test_targets_are_one_mask_per_class():
    labels = jnp.asarray(np.int32([[[[0, 1, 2], [5, 4, 3]]]]))
    found = sam4em.targets(CONFIG, {"labels": labels, "mask": jnp.asarray(np.uint8([[[[1, 1, 0], [1, 1, 1]]]]))})
    assert found["masks"][0, 0, ..., 0].tolist() == [[0, 1, 0], [1, 0, 0]]
    assert found["masks"][0, 0, ..., 1].tolist() == [[0, 0, 1], [0, 0, 0]]
    assert found["weights"][0, 0, ..., 0].tolist() == [[1, 1, 0], [1, 1, 1]]
    everything = dataclasses.replace(CONFIG, classes=(sam4em.Class(name="any"),))
    assert sam4em.targets(everything, {"labels": labels})["masks"].sum() == 5


def test_a_class_that_is_nowhere_has_a_finite_loss_and_scores_one_where_none_is_found():
    wanted = {"masks": jnp.zeros((1, 2, 8, 8, 2)), "weights": jnp.ones((1, 2, 8, 8, 1))}
    logits = jnp.full((1, 2, 8, 8, 2), -20.0)
    found = sam4em.terms(CONFIG, network.Masks(logits, logits), wanted)
    assert all(np.isfinite(float(value)) for value in found.values())
    assert float(found["total"]) < 1e-3
    scores = sam4em.class_overlaps(CONFIG, jax.nn.sigmoid(logits), wanted)
    assert float(scores["iou_a"]) == 1
    gradient = jax.grad(lambda x: sam4em.terms(CONFIG, network.Masks(x, x), wanted)["total"])(logits + 20)
    assert bool(jnp.isfinite(gradient).all())
    assert float(gradient.min()) > 0


def test_decode_takes_the_most_probable_class_above_the_threshold():
    probabilities = np.float32([[[[0.2, 0.6, 0.7]]], [[[0.1, 0.7, 0.5]]]])
    assert sam4em.decode(CONFIG, {"probabilities": probabilities}).tolist() == [[[0, 2, 1]]]
    as_bytes = np.rint(probabilities * 255).astype(np.uint8)
    assert sam4em.decode(CONFIG, {"probabilities": as_bytes}).tolist() == [[[0, 2, 1]]]


def trained_parts(config):
    chosen, _ = partition(shapes(config)["params"], lambda path: sam4em.trainable(config, path))
    return {path.split(".")[0] for path in paths(chosen)}, paths(chosen)


def test_what_trains_in_each_stage():
    every = {"image_encoder", "fpn", "mem", "prompt_encoder", "mask_decoder", "prompt_encoder2", "mask_decoder2"}
    parts, names = trained_parts(CONFIG)
    assert parts == every
    assert all(".lora." in name for name in names if name.startswith("image_encoder"))
    second = sam4em.second_stage(CONFIG, LoRA(rank=2))
    sam4em.validate(second)
    parts, names = trained_parts(second)
    assert parts == {"fpn", "mem", "mask_decoder", "mask_decoder2"}
    assert all(".lora." in name for name in names if name.startswith("mask_decoder"))
    assert trained_parts(sam4em.ablation(CONFIG, "frozen"))[0] == every - {"image_encoder"}
    full = sam4em.ablation(CONFIG, "full")
    assert len(trained_parts(full)[1]) == len(paths(shapes(full)["params"]))


@pytest.mark.parametrize("row", sam4em.ABLATIONS)
def test_every_ablation_is_a_configuration(row):
    sam4em.validate(sam4em.ablation(CONFIG, row))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": CLASSES[:1]}, "model.classes 2, but 1"),
        ({"classes": (CLASSES[0], dataclasses.replace(CLASSES[1], labels=(1,)))}, "different label values"),
        ({"finetune": "stage2"}, "decoder_lora is None"),
        ({"finetune": "full"}, "to be none and none"),
        ({"dice_share": 1.5}, "dice_share 1.5"),
        ({"shrink": 0}, "shrink 0"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        sam4em.validate(dataclasses.replace(CONFIG, **changes))


def test_stages_are_told_apart():
    second = sam4em.second_stage(CONFIG, LoRA(rank=2))
    with pytest.raises(UserError, match="the checkpoint is of stage 1"):
        sam4em.check_variables(second, shapes(CONFIG))
    with pytest.raises(UserError, match="the checkpoint is of stage 2"):
        sam4em.check_variables(CONFIG, shapes(second))
    with pytest.raises(UserError, match="another SAM4EM"):
        sam4em.check_variables(sam4em.ablation(CONFIG, "nomemory"), shapes(CONFIG))
    sam4em.check_variables(second, shapes(second))
    with pytest.raises(UserError, match="init_from=DIR"):
        sam4em.pretrained(second)


def test_what_a_run_inherits():
    second = sam4em.second_stage(CONFIG, LoRA(rank=2))
    taken = sam4em.inherits(second, CONFIG)
    assert callable(taken)
    kept = [path for path in paths(shapes(second)["params"]) if taken(path)]
    assert kept == paths(shapes(CONFIG)["params"])
    assert sam4em.inherits(second, second) is None
    prior = hiera_pretraining.Config(encoder=SAM2Config(HIERA, features=16, image_only=True))
    assert sam4em.inherits(CONFIG, prior) == {
        "image_encoder.trunk": "image_encoder.trunk",
        "image_encoder.neck": "image_encoder.neck",
    }
    for other in (prior, sam4em.ablation(CONFIG, "nomemory")):
        with pytest.raises(UserError, match="stage 2 starts from a run of stage 1"):
            sam4em.inherits(second, other)


def test_sizes_are_padded_and_cropped_and_it_is_said(caplog):
    seen = {}

    class Mirror:
        def encode(self, images, train):
            seen["shape"] = images.shape
            return images[:, ::4, ::4]

    halved = dataclasses.replace(CONFIG, shrink=2)
    with caplog.at_level(logging.WARNING):
        sam4em.encode(halved, Mirror(), jnp.zeros((3, 70, 64), jnp.uint8))
    assert seen["shape"] == (3, 64, 32, 3)
    assert "70 x 64 pixels are padded to 128 x 64" in caplog.text
    assert sam4em.full_size(halved, jnp.zeros((3, 64, 32, 2)), (70, 64)).shape == (3, 70, 64, 2)


def test_normalisations():
    grey = jnp.asarray(np.random.default_rng(0).random((2, 8, 8), np.float32))
    for kind, low, high in (("simple", 0, 1), ("minmax", 0, 1), ("balanced", -2.2, 2.3), ("imagenet", -2.2, 2.7)):
        found = sam4em.normalised(grey, kind)
        assert found.shape == (2, 8, 8, 3)
        assert low <= float(found.min()) <= float(found.max()) <= high
    standard = sam4em.normalised(grey, "standard")
    np.testing.assert_allclose(standard.mean((1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(standard.std((1, 2)), 1, atol=1e-5)


def sam2_shapes(features=16):
    config = SAM2Config(HIERA, features=features, image_only=True)
    return define(lambda rngs: SAM2(config, rngs)).shapes


def filled(tree, value):
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, np.float32), tree)


@pytest.mark.parametrize("first_decoder", [True, False])
def test_start_from_sam2(first_decoder):
    # Both decoders have as many attention heads and as wide an MLP as SAM 2's.
    model = dataclasses.replace(MODEL, heads=8, features=32, inner=2048)
    own = shapes(dataclasses.replace(CONFIG, model=model))
    taken = leaves(started_from_sam2(own, filled(sam2_shapes(32), 3.0), first_decoder))
    assert "mask_decoder2.transformer.layers.0.self_attn.q_proj.kernel" in taken
    assert "prompt_encoder2.pe_layer.positional_encoding_gaussian_matrix" in taken
    assert ("mask_decoder.iou_token.embedding" in taken) == first_decoder
    assert not [path for path in taken if "lora" in path or "hypernetworks" in path or path.startswith(("fpn", "mem"))]
    # One channel of SAM 2's mask prompt, shared out over two classes.
    first = taken["prompt_encoder2.mask_downscaling.conv1.kernel"]
    assert first.shape[2] == 2
    assert float(first.max()) == 1.5
    with pytest.raises(UserError, match="another size"):
        started_from_sam2(shapes(CONFIG), filled(sam2_shapes(32), 3.0))


def test_a_fresh_run_takes_parameters_and_constants(monkeypatch):
    monkeypatch.setattr(state, "initialise", lambda build, key: drawn(define(build).shapes))
    model = dataclasses.replace(MODEL, heads=8, features=32, inner=2048)
    config = dataclasses.replace(CONFIG, model=model)
    given = started_from_sam2(shapes(config), filled(sam2_shapes(32), 3.0))
    begun = state.with_given(Experiment(system=config, data=Data(train=())), given)
    assert {path for tree in begun.values() for path in leaves(tree)} == {
        path for tree in shapes(config).values() for path in leaves(tree)
    }
    matrix = begun["constants"]["prompt_encoder2"]["pe_layer"]["positional_encoding_gaussian_matrix"]
    assert float(matrix.min()) == 3
    assert float(begun["params"]["mask_decoder2"]["iou_token"]["embedding"].min()) == 3
    assert float(jnp.abs(begun["params"]["fpn"]["projection"]["kernel"]).max()) != 3


def test_export_scales_adapters_and_merges_the_decoders():
    model = dataclasses.replace(MODEL, classes=1, lora=LoRA(rank=2, alpha=8.0, faithful_halves=True))
    model = dataclasses.replace(model, decoder_lora=LoRA(rank=2))
    config = sam4em.Config(model=model, finetune="stage2")
    collections = filled(shapes(config), 1.0)
    written = export(collections, model, grid=(8, 8))
    block = "sam.image_encoder.trunk.blocks.0.attn.qkv."
    assert float(written[f"{block}linear_b_q.weight"].max()) == 4
    assert float(written[f"{block}linear_a_q.weight"].max()) == 1
    assert float(written["sam.mask_decoder.transformer.layers.0.self_attn.q_proj.weight"].max()) == 3
    assert written["sam.mem.memory"].shape == (8, 8, 8, 8)
    assert not [name for name in written if "lora" in name]
    with pytest.raises(UserError, match="adapters of q and v"):
        export(collections, dataclasses.replace(model, lora=None))


def test_names_are_reversible():
    flat = [path for tree in shapes(CONFIG).values() for path in leaves(tree)]
    assert len({RULES.name(path) for path in flat}) == len(flat)


def phantom_batch():
    phantom = make_phantom(PhantomConfig(shape=(8, 64, 64), mitochondria=400.0))
    labels = (phantom.mitochondria[2:5] > 0).astype(np.int32)
    assert 0.02 < labels.mean() < 0.8
    return {"image": jnp.asarray(phantom.raw[None, 2:5]), "labels": jnp.asarray(labels[None])}


def test_first_prompt():
    model = definition(CONFIG.model).bind(drawn(shapes(CONFIG)))
    features = jnp.zeros((1, 8, 16, 16))
    truth = jnp.zeros((1, 64, 128, 2)).at[:, :32].set(1.0)
    halved = dataclasses.replace(CONFIG, shrink=2, first_mask="truth")
    given = sam4em.initial_state(halved, model, features, truth).prompt
    assert given.shape == (1, 32, 64, 2)
    assert given[0, :16].min() == 1
    assert given[0, 16:].max() == 0
    assert sam4em.initial_state(halved, model, features).prompt.max() == 0
    empty = dataclasses.replace(halved, first_mask="empty")
    assert sam4em.initial_state(empty, model, features, truth).prompt.max() == 0


@pytest.mark.slow
def test_a_few_steps_lower_the_loss():
    model = dataclasses.replace(MODEL, classes=1)
    config = dataclasses.replace(
        CONFIG, model=model, classes=(sam4em.Class(name="mitochondria"),), first_mask="predicted"
    )
    sam4em.validate(config)
    batch = phantom_batch()
    collections = drawn(shapes(config))
    chosen, frozen = partition(collections["params"], lambda path: sam4em.trainable(config, path))

    @jax.jit
    def step(chosen, statistics):
        def total(chosen):
            params = join(chosen, frozen)
            bound = definition(model).bind(
                {"params": params, "batch_stats": statistics, "constants": collections["constants"]}
            )
            value, scalars = sam4em.loss(config, bound, batch, jax.random.key(1), True)
            return value, (scalars, variables(bound)["batch_stats"])

        (value, (scalars, statistics)), gradient = jax.value_and_grad(total, has_aux=True)(chosen)
        # Steps of equal length in all parameters, which compile faster than Adam's.
        chosen = jax.tree.map(lambda value, slope: value - 2e-3 * jnp.sign(slope), chosen, gradient)
        return chosen, statistics, value, scalars

    statistics, values = collections["batch_stats"], []
    for _ in range(12):
        chosen, statistics, value, scalars = step(chosen, statistics)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0], values
    assert set(scalars) >= {"bce1", "dice2", "iou_mitochondria", "error"}

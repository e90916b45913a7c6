import dataclasses
import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import write_volume

from emjax.config import Data, Experiment, Optimizer, Train, from_json, load, to_json
from emjax.data.pipeline import Source
from emjax.errors import UserError
from emjax.models.fgnet import FGNetConfig
from emjax.models.functional import paths
from emjax.models.sam2 import config as sam2_sizes
from emjax.models.sam2.config import HieraConfig
from emjax.models.unet import UNetConfig
from emjax.systems import affinity_unet, fgnet, hiera_pretraining
from emjax.systems.protocol import Block, system_of
from emjax.training import loop
from emjax.training.checkpoints import restore_for_inference
from emjax.training.state import definition, fresh, make_train_step, split_trainable, with_given, with_parameters
from emjax.weights.family import Checkpoint
from emjax.weights.sam2 import FAMILY

BLOCK = (2, 32, 32)
MODEL = FGNetConfig(
    fine=UNetConfig(widths=(4, 4, 8), pools=((1, 2, 2),) * 2, kernels=((1, 3, 3),) * 3, patch=(1, 4, 4)),
    guided=(4, 8, 16),
    context=8,
)


@pytest.fixture(autouse=True)
def tiny_trunk(monkeypatch):
    """A size that compiles in seconds takes the place of nano."""
    monkeypatch.setitem(sam2_sizes.HIERA, "nano", HieraConfig(8, 1, (1, 1, 1, 1), (2,), windows=(4, 4, 2, 2)))


def system(mode="frozen", **changes) -> fgnet.Config:
    encoder = fgnet.Encoder(size="nano", features=16, mode=mode, lora=fgnet.LoRA(rank=2), remat=False)
    plan = Block(size=BLOCK, stride=BLOCK)
    return dataclasses.replace(
        fgnet.Config(model=MODEL, encoder=encoder, encoder_checkpoint="random", plan=plan), **changes
    )


def experiment(config: fgnet.Config, **optimizer) -> Experiment:
    return Experiment(
        system=config,
        data=Data(train=(Source(raw="none", labels="none"),), crop=BLOCK, batch_size=1),
        optimizer=Optimizer(lr=1e-2, warmup_steps=0, **optimizer),
        train=Train(steps=10),
    )


def batch(seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.repeat(rng.integers(1, 9, (1, 2, 8, 8), np.int32), 4, 2), 4, 3)
    return {"image": rng.integers(0, 255, (1, *BLOCK)).astype(np.uint8), "labels": labels}


def variables(config: Experiment):
    """Drawn by NumPy: initialising by JAX is what takes the time here."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, definition(config).shapes)


def moved(config: Experiment, steps: int = 1):
    """Parameters that ``steps`` training steps changed, by path, and the state."""
    state = with_parameters(config, variables(config))
    before = state["params"]
    step = jax.jit(make_train_step(config, definition(config)))
    for _ in range(steps):
        state, scalars = step(state, batch(), jax.random.key(0))
    assert np.isfinite(float(scalars["loss"]))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, state["params"])
    leaves = jax.tree.leaves(changed)
    return dict(zip(paths(changed), leaves)), state


def test_it_is_a_system_and_survives_storage():
    config = system("lora", offsets=fgnet.LONG_RANGE)
    assert from_json(to_json(config)) == config
    assert len(fgnet.LONG_RANGE) == 12
    assert fgnet.LONG_RANGE[3:6] == ((-2, 0, 0), (0, -3, 0), (0, 0, -3))
    assert system_of(config) is fgnet


@pytest.mark.slow
def test_frozen_sam2_stands_still_and_has_no_optimiser_state():
    config = experiment(system())
    changed, state = moved(config)
    assert not any(moved for path, moved in changed.items() if path.startswith("sam2."))
    # Its biases get gradients from the first step on; the z convolutions, too.
    assert all(moved for path, moved in changed.items() if path.startswith(("project.", "coarse.", "fine.")))
    stored = {key for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"]) for key in map(str, path)}
    assert "['fine']" in stored
    assert "['sam2']" not in stored


@pytest.mark.slow
def test_adapters_train_alone():
    config = experiment(system("lora"))
    chosen, _ = split_trainable(config, definition(config).shapes["params"])
    assert all(".lora." in path for path in paths(chosen) if path.startswith("sam2."))
    changed, _ = moved(config)
    adapters = {path: value for path, value in changed.items() if ".lora." in path}
    assert adapters
    assert all(adapters.values())
    assert not any(value for path, value in changed.items() if path.startswith("sam2.") and path not in adapters)


@pytest.mark.slow
def test_fine_tuning_waits_and_then_moves_in_small_steps():
    tuned = system("finetune")
    holds = ((r"^sam2\.", 2),)
    rates = fgnet.layer_rates(tuned.encoder)
    config = experiment(tuned, multipliers=rates, holds=holds)
    changed, _ = moved(config, 2)
    assert not any(value for path, value in changed.items() if path.startswith("sam2."))
    changed, _ = moved(config, 3)
    still = [path for path, value in changed.items() if path.startswith("sam2.") and not value]
    assert not still, still
    found = dict(rates)
    assert found[r"^sam2\.neck\."] == 0.1
    assert found[r"^sam2\.trunk\.blocks\.3\."] == pytest.approx(0.085)
    assert found[r"^sam2\.trunk\."] == pytest.approx(0.1 * 0.85**5)


@pytest.mark.slow
def test_bfloat16_weights_and_all_losses_run():
    config = system(
        loss="wmse",
        hard_weight=0.1,
        shuffle_slices=True,
        offsets=fgnet.LONG_RANGE,
        encoder=dataclasses.replace(system().encoder, weights="bfloat16"),
    )
    fgnet.validate(config)
    _, state = moved(experiment(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"]["sam2"])} == {jnp.dtype("bfloat16")}


def test_loss_of_the_right_answer_is_small_and_masks_count():
    config = system(class_balance=False)
    given = {name: jnp.asarray(value) for name, value in batch().items()}
    wanted = fgnet.targets(config, given)
    right = 40 * (wanted["affinities"] - 0.5)

    class Perfect:
        def __call__(self, image, order):
            return fgnet.FGNetOutput(right, -right, {})

    value, scalars = fgnet.loss(config, Perfect(), given, jax.random.key(0), True)
    assert float(scalars["refined_loss"]) < 1e-3
    assert float(scalars["refined_recall"]) == float(scalars["refined_specificity"]) == 1
    assert float(scalars["coarse_recall"]) == 0
    np.testing.assert_allclose(value, scalars["refined_loss"] + 0.5 * scalars["coarse_loss"], rtol=1e-6)
    hidden = {**given, "mask": jnp.zeros(given["labels"].shape, jnp.uint8)}
    assert float(fgnet.targets(config, hidden)["weights"].sum()) == 0


def test_shuffled_slices_come_from_elsewhere():
    config = system(shuffle_slices=True, plan=Block(size=(8, 32, 32), stride=(8, 32, 32)))
    image = jnp.zeros((2, 8, 32, 32))
    for key in (None, jax.random.key(1), jax.random.key(2)):
        order = np.asarray(fgnet._order(config, image, key)).reshape(2, 8)
        assert sorted(order[0]) == list(range(8))
        assert sorted(order[1]) == list(range(8, 16))
        away = (order[0] - np.arange(8)) % 8
        assert (away >= 2).all()
        assert (away <= 6).all()
    assert fgnet._order(system(), image, None) is None


@pytest.mark.slow
def test_outputs_flips_and_decoding():
    config = system(diagnostics=True)
    built = definition(experiment(config))
    given = variables(experiment(config))
    predict = jax.jit(lambda v, image: fgnet.predict(config, built.bind(v), image))
    found = predict(given, batch()["image"])
    kinds = fgnet.outputs(config)
    assert {name: value.shape[-1] for name, value in found.items()} == {name: o.channels for name, o in kinds.items()}
    assert sorted(kinds) == ["affinities", "coarse", "guidance"]
    assert all(value.shape[:4] == (1, *BLOCK) for value in found.values())
    assert sorted(fgnet.flip_back(config, found, (1, 2))) == sorted(kinds)
    assert list(fgnet.outputs(dataclasses.replace(config, model=dataclasses.replace(MODEL, refined=False)))) == [
        "affinities"
    ]
    rng = np.random.default_rng(0)
    walls = np.repeat((rng.random((3, 4, 1, 32)) > 0.1).astype(np.float32), 32, 2)
    for recipe in ("agglomerate", "multicut"):
        chosen = dataclasses.replace(config, segmentation=fgnet.Segmentation(recipe=recipe))
        labels = fgnet.decode(chosen, {"affinities": walls})
        assert labels.shape == (4, 32, 32)
        assert labels.dtype == np.uint32
        assert labels.max() >= 1


def test_an_em_prior_run_gives_trunk_and_neck():
    other = hiera_pretraining.Config(encoder=system().encoder.network())
    assert fgnet.inherits(system(), other) == {"image_encoder.trunk": "sam2.trunk", "image_encoder.neck": "sam2.neck"}
    assert fgnet.inherits(system(), affinity_unet.Config()) is None
    assert fgnet.inherits(system(model=dataclasses.replace(MODEL, mode="none", coarse=False)), other) is None


@pytest.mark.slow
def test_given_weights_replace_fresh_ones_and_nothing_else():
    config = experiment(system("lora"))
    shapes = definition(experiment(system())).shapes["params"]["sam2"]
    given = {"sam2": jax.tree.map(lambda leaf: np.full(leaf.shape, 0.25, np.float32), shapes)}
    made = with_given(config, given)["params"]
    for path, leaf in zip(paths(made), jax.tree.leaves(made)):
        same = bool((leaf == 0.25).all())
        assert same == (path.startswith("sam2.") and ".lora." not in path), path
    with pytest.raises(ValueError, match=r"sam2\.head is not one of the network's"):
        with_given(config, {"sam2": {"head": np.zeros(3)}})


def test_missing_and_unfit_weights_are_said(tmp_path):
    with pytest.raises(UserError, match="none is given; convert SAM 2 weights once"):
        fgnet.pretrained(system(encoder_checkpoint=""))
    with pytest.raises(UserError, match="does not exist; convert"):
        fgnet.pretrained(system(encoder_checkpoint=str(tmp_path / "none")))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"train\.init_from"):
        fgnet.pretrained(system(encoder_checkpoint=str(tmp_path)))
    assert fgnet.pretrained(system()) == {}
    assert (
        fgnet.pretrained(system(encoder_checkpoint="", model=dataclasses.replace(MODEL, mode="none", coarse=False)))
        == {}
    )


def test_weights_of_another_size_are_refused(tmp_path, monkeypatch):
    collections = {"params": {"image_encoder": {"trunk": 1}}}
    stored = Checkpoint(FAMILY, {"size": "large", "version": "2.1"}, collections, {})
    monkeypatch.setattr(fgnet, "read_checkpoint", lambda path, families: stored)
    path = tmp_path / "weights"
    path.mkdir()
    with pytest.raises(UserError, match="SAM 2 large with 256 features, the configuration has nano with 16"):
        fgnet.pretrained(system(encoder_checkpoint=str(path)))
    large = system(encoder_checkpoint=str(path), encoder=fgnet.Encoder(size="large"))
    assert fgnet.pretrained(large) == {"sam2": {"trunk": 1}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": ((-1, 0, 0), (0, 0, -1), (0, -1, 0))}, "the first three"),
        ({"loss": "mse"}, "expected 'bce' or 'wmse'"),
        ({"hard_weight": 0.1, "model": dataclasses.replace(MODEL, mode="add")}, "hard_weight needs"),
        ({"shuffle_slices": True, "plan": Block(size=(1, 32, 32), stride=(1, 32, 32))}, "needs two slices"),
    ],
)
def test_configurations_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        fgnet.validate(system(**changes))


def test_voxel_sizes_that_do_not_fit_the_strides(caplog):
    sections, isotropic = (40.0, 4.0, 4.0), (10.0, 10.0, 10.0)
    flat = system(voxel_size=sections)
    assert "isotropic, the network is for sections" in fgnet.domain(flat, isotropic)
    assert fgnet.domain(flat, sections) is None
    assert "trained on 40 x 4 x 4 nm" in fgnet.domain(flat, (30.0, 6.0, 6.0))
    deep = dataclasses.replace(MODEL, fine=dataclasses.replace(MODEL.fine, pools=((1, 2, 2), (2, 2, 2))))
    assert "the network is for isotropic" in fgnet.domain(system(model=deep), sections)
    with caplog.at_level(logging.WARNING):
        fgnet.validate(system(voxel_size=isotropic))
    assert "10 x 10 x 10 nm" in caplog.text


@pytest.mark.parametrize("name", ["ac3ac4", "cremi", "fib25", "isbi2012"])
def test_every_row_of_every_configuration_is_valid(name):
    file = pathlib.Path(__file__).parents[2] / "configs" / "fgnet" / f"{name}.py"
    small = ("", "cpu_") if name in ("fib25", "isbi2012") else ("",)
    for variant in ("frozen", "lora", "finetune", *(f"{size}{row}" for size in small for row in fgnet.ABLATIONS)):
        config = load(f"{file}:{variant}")
        fgnet.validate(config.system)
        tuned = config.system.encoder.mode == "finetune"
        assert tuned == bool(config.optimizer.holds) == bool(config.optimizer.multipliers)
        if config.system.encoder_checkpoint == fgnet.RANDOM:
            assert not config.train.init_from
    assert load(f"{file}:A0").system.model.uses_sam2 is False
    with pytest.raises(UserError, match="known:"):
        load(f"{file}:A9")


@pytest.mark.slow
def test_a_fresh_state_has_random_weights_for_the_control():
    state = fresh(experiment(system()), jax.random.key(0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))


@pytest.mark.slow
def test_smoke_training_saves_goes_on_and_predicts(tmp_path):
    volume = write_volume(tmp_path / "volume.h5", (12, 40, 40))
    config = experiment(system())
    source = Source(raw=f"{volume}:raw", labels=f"{volume}:labels")
    # A crop for each of the eight devices of the tests.
    data = Data(train=(source,), validation=(source,), crop=BLOCK, batch_size=8, threads=1, validation_batches=1)
    train = Train(steps=8, log_every=4, validate_every=8, save_every=4, overlays=0)
    config = dataclasses.replace(config, data=data, train=train)
    workdir = tmp_path / "run"
    first = loop.run(dataclasses.replace(config, train=dataclasses.replace(train, steps=4, validate_every=4)), workdir)
    outcome = loop.run(config, workdir)
    assert (first.step, outcome.step, outcome.finished) == (4, 8, True)
    assert np.isfinite(outcome.validation["refined_loss"])
    restored, found = restore_for_inference(workdir, "latest")
    assert restored == config
    assert sorted(found["params"]) == ["coarse", "fine", "project", "sam2"]

"""One block is learned by heart: targets, losses, optimiser, running statistics and decoding fit together."""

import jax
import numpy as np
import optax
import pytest

from emjax.config import Optimizer
from emjax.metrics import contingency, variation_of_information
from emjax.models.agq import AGQConfig
from emjax.models.functional import define, initialise, variables
from emjax.systems import agq
from emjax.systems.agq_loss import LossConfig
from emjax.systems.protocol import Block
from emjax.training import optimizers

SIZE = (3, 49, 49)
STEPS = 160


def neurites(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Slanted columns with dark membranes between them: uint8 image and int32 labels (z, y, x), membrane 0."""
    rng = np.random.default_rng(seed)
    z, y, x = np.indices(SIZE)
    centres = np.array([(12, 12), (12, 37), (37, 12), (37, 37)]) + rng.uniform(-4, 4, (4, 2))
    drift = rng.uniform(-1, 1, (4, 2))
    distance = np.stack([np.hypot(y - cy - dy * z, x - cx - dx * z) for (cy, cx), (dy, dx) in zip(centres, drift)])
    nearest, second = np.sort(distance, 0)[:2]
    labels = np.where(second - nearest > 4, distance.argmin(0) + 1, 0).astype(np.int32)
    grey = np.where(labels > 0, 170, 60) + rng.normal(0, 8, SIZE)
    return np.clip(grey, 0, 255).astype(np.uint8), labels


@pytest.mark.slow
def test_one_block_is_learned_by_heart():
    config = agq.Config(
        model=AGQConfig(
            filters=(8, 16, 16),
            isotropic=(False, False, False),
            features=16,
            groups=4,
            heads=4,
            branch_convs=2,
            guided=6,
            learned=6,
            min_area=20,
        ),
        criterion=LossConfig(instances=8, samples=256),
        plan=Block(size=SIZE, stride=(2, 48, 48), blending="linear"),
    )
    agq.validate(config)
    image, labels = neurites()
    batch = {"image": image[None], "labels": labels[None]}
    definition = define(lambda rngs: agq.build(config, rngs))
    collections = jax.jit(lambda key: initialise(lambda rngs: agq.build(config, rngs), key))(jax.random.key(0))
    chain = optimizers.make(Optimizer(name="adam", lr=3e-3, warmup_steps=20, weight_decay=1e-4, clip_norm=0.0), STEPS)

    @jax.jit
    def step(params, statistics, state, key):
        def loss(params):
            model = definition.bind(collections | {"params": params, "batch_stats": statistics})
            value, scalars = agq.loss(config, model, batch, key, True)
            return value, (scalars, variables(model)["batch_stats"])

        (value, (_, moved)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = chain.update(gradient, state, params)
        return optax.apply_updates(params, updates), moved, state, value

    params, statistics = collections["params"], collections["batch_stats"]
    state = chain.init(params)
    losses = []
    for number in range(STEPS):
        params, statistics, state, value = step(
            params, statistics, state, jax.random.fold_in(jax.random.key(1), number)
        )
        losses.append(float(value))
    assert np.isfinite(losses).all()
    assert losses[-1] < 0.3 * losses[0]
    # Running values of kernels and logits move by a hundredth each step, too slowly for so short a run: one more step
    # without learning says where they would end.
    _, moved, _, _ = step(params, statistics, state, jax.random.key(2))

    def settled(path, before, after):
        slow = any("norm_kernel" in str(part) or "norm_logits" in str(part) for part in path)
        return before + (after - before) / (0.01 if slow else 0.1)

    statistics = jax.tree_util.tree_map_with_path(settled, statistics, moved)
    learned = collections | {"params": params, "batch_stats": statistics}
    outputs = jax.jit(lambda variables, image: agq.predict(config, definition.bind(variables), image))(
        learned, batch["image"]
    )
    found = agq.decode(
        config,
        {
            "instances": np.asarray(outputs["instances"])[0].transpose(3, 0, 1, 2),
            "affinities": np.asarray(outputs["affinities"])[0].transpose(3, 0, 1, 2),
        },
    )
    truth = np.asarray(agq.targets(config, batch).labels[0])
    score = variation_of_information(contingency(found, truth))
    assert score.sum < 0.05

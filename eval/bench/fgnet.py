"""FGNet on this machine: blocks per second, memory, the share of SAM 2, and what fine-tuning costs against frozen.

    python eval/bench/fgnet.py [--config configs/fgnet/fib25.py:cpu_A4] [--repeats 3] [--modes frozen,lora,finetune]

For a configuration of ``configs/fgnet`` with random weights (times do not depend on them): the forward pass of one block, the
same without SAM 2's encoder (its maps given), and the training step with SAM 2 frozen, adapted and fine-tuned; the smallest of
``--repeats`` times each, and the compiler's account of temporary memory. One block is what the training crop says.
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from emjax.config import Experiment, load
from emjax.models.fgnet import FGNet, pad_block
from emjax.systems import fgnet
from emjax.training import distributed, flops, loop, sharding
from emjax.training.state import definition, with_parameters


def variables(config: Experiment) -> dict:
    """Small random numbers in the shapes of the network."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(0.02 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, definition(config).shapes)


def smallest(call: Callable[[], object], repeats: int) -> float:
    """Smallest wall-clock time of a call, seconds, after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times)


def forward(config: Experiment, repeats: int) -> tuple[float, float, float, float]:
    """Seconds of the whole forward pass and of SAM 2's part; GFLOP of both; for one block."""
    built, given = definition(config), variables(config)
    block = jnp.zeros((1, *config.data.crop), jnp.float32)

    def whole(given: dict, block: jax.Array) -> dict[str, jax.Array]:
        return fgnet.predict(config.system, built.bind(given), block)

    def encoder(given: dict, block: jax.Array) -> tuple[jax.Array, ...]:
        model: FGNet = built.bind(given)
        return model.slice_maps(pad_block(block, config.system.model.multiple()))

    functions = [whole, encoder] if config.system.model.uses_sam2 else [whole]
    seconds = [smallest(lambda call=jax.jit(call): call(given, block), repeats) for call in functions]
    work = [flops.count(call, given, block) / 1e9 for call in functions]
    return seconds[0], (seconds + [0.0])[1], work[0], (work + [0.0])[1]


def step(config: Experiment, repeats: int) -> tuple[float, float, float]:
    """Seconds and GFLOP of a training step, and its temporary memory in GiB."""
    shapes = loop.batch_shapes(config)
    compiled = loop.compile_step(config, shapes)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, shapes["image"].shape, np.uint8),
        "labels": rng.integers(0, 4, shapes["labels"].shape, np.int32),
        **({"mask": np.ones(shapes["mask"].shape, np.uint8)} if "mask" in shapes else {}),
    }
    on_devices = sharding.to_devices(batch, compiled.batch_shardings, config.data.batch_size)
    everywhere = jax.sharding.NamedSharding(compiled.mesh, jax.sharding.PartitionSpec())
    key = jax.device_put(jax.random.key(0), everywhere)
    begin = jax.jit(lambda given: with_parameters(config, given), out_shardings=compiled.shardings)
    state = begin(variables(config))

    def call() -> object:
        nonlocal state
        state, scalars = compiled.step(state, on_devices, key)
        return scalars

    memory = compiled.step.memory_analysis()
    return smallest(call, repeats), compiled.flops / 1e9, memory.temp_size_in_bytes / 2**30 if memory else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/fgnet/fib25.py:cpu_A4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--modes", default="frozen,lora,finetune", help="training steps that are timed; none for none")
    options = parser.parse_args()
    config = load(options.config, [])
    distributed.use_cpu_devices(config.mesh.cpu_devices, config.data.batch_size // max(config.train.accumulate, 1))
    device = jax.devices()[0].device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{options.config}: block {config.data.crop}, batch {config.data.batch_size}, {device}, {cores} cores")
    seconds, sam2, work, sam2_work = forward(config, options.repeats)
    voxels = np.prod(config.data.crop)
    print(
        f"forward, 1 block   {seconds:.3f} s, {1 / seconds:.2f} blocks/s, {voxels / seconds / 1e6:.3f} MVox/s, "
        f"{work:.1f} GFLOP; SAM 2 {sam2:.3f} s ({sam2 / seconds:.0%} of the time), {sam2_work:.1f} GFLOP"
    )
    if options.modes == "none" or not config.system.model.uses_sam2:
        return
    base = None
    for mode in options.modes.split(","):
        encoder = dataclasses.replace(config.system.encoder, mode=mode)
        changed = dataclasses.replace(config, system=dataclasses.replace(config.system, encoder=encoder))
        seconds, work, memory = step(changed, options.repeats)
        base = base or seconds
        print(
            f"step, {mode:<12} {seconds:.3f} s, {work:.1f} GFLOP, temporary memory {memory:.2f} GiB, "
            f"{seconds / base:.2f} times the first"
        )


if __name__ == "__main__":
    main()

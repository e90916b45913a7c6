"""Speed, memory and size of SAM4EM, beside the published PyTorch code where a copy of it is at hand.

    python eval/bench/sam4em.py --config configs/sam4em/vnc_semantic.py:cpu
    python eval/bench/sam4em.py --config configs/sam4em/vnc_semantic.py:cpu --config configs/semantic_unet/baseline.py:vnc_semantic_cpu
    git clone https://github.com/Uzshah/SAM4EM /tmp/SAM4EM
    python eval/bench/sam4em.py --reference /tmp/SAM4EM --slices 2      # the published network, 512 x 512, both in turns

Prints parameters (all and trainable), slices per second of a training step and of inference on one chunk of the
configuration's size, its floating-point operations, the memory that XLA plans for, and the process's peak. With
``--reference``: seconds of the forward pass of the published network with random weights, ours and theirs in turns in one
process with as many threads, smallest of ``--repeats``, wall clock and processor time of all threads.
"""

import argparse
import dataclasses
import importlib
import math
import os
import pathlib
import resource
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from emjax.config import Experiment, load
from emjax.models import sam4em as network
from emjax.models.functional import define, initialise
from emjax.systems import sam4em
from emjax.systems.protocol import system_of
from emjax.training import loop
from emjax.training.state import fresh, split_trainable

GIB = 2**30


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def best_of(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """The smallest wall and processor seconds after a warm-up."""
    jax.block_until_ready(run())
    best = (math.inf, math.inf)
    for _ in range(repeats):
        wall, processor = time.perf_counter(), time.process_time()
        jax.block_until_ready(run())
        best = min(best[0], time.perf_counter() - wall), min(best[1], time.process_time() - processor)
    return best


def time_config(spec: str, repeats: int) -> None:
    """Training step and inference of a configuration on random grey values and labels."""
    experiment: Experiment = load(spec)
    experiment = dataclasses.replace(experiment, mesh=dataclasses.replace(experiment.mesh, data=1))
    config, crop, batch = experiment.system, experiment.data.crop, experiment.data.batch_size
    system = system_of(config)
    shapes = loop.batch_shapes(experiment)
    compiled = loop.compile_step(experiment, shapes)
    state = jax.jit(lambda key: fresh(experiment, key))(jax.random.key(0))
    trainable = count(split_trainable(experiment, state["params"])[0])
    rng = np.random.default_rng(0)
    values = {
        name: jnp.asarray(rng.integers(0, 256 if name == "image" else 4, shape.shape).astype(shape.dtype))
        for name, shape in shapes.items()
    }
    slices = batch * crop[0]
    print(f"{spec}: {count(state['params']):,} parameters, {trainable:,} train; {batch} x {crop} (z, y, x)")
    collections = {name: state[name] for name in ("params", "batch_stats", "constants")}
    definition = define(lambda rngs: system.build(config, rngs))
    predict = jax.jit(lambda variables, image: system.predict(config, definition.bind(variables), image))
    lowered = predict.lower(collections, values["image"]).compile()
    wall, processor = best_of(lambda: lowered(collections, values["image"]), repeats)
    memory = lowered.memory_analysis()
    print(
        f"  inference  {slices / wall:8.2f} slices/s ({wall:.4f} s, {processor:.2f} processor seconds), "
        f"temporary {memory.temp_size_in_bytes / GIB:.2f} GiB"
    )
    held = [state]
    key = jax.random.key(1)

    def step() -> Any:
        held[0], scalars = compiled.step(held[0], values, key)
        return scalars

    wall, processor = best_of(step, repeats)
    memory = compiled.step.memory_analysis()
    print(
        f"  training   {slices / wall:8.2f} slices/s ({wall:.4f} s, {processor:.2f} processor seconds), "
        f"{compiled.flops / 1e9:,.1f} GFLOP, temporary {memory.temp_size_in_bytes / GIB:.2f} GiB"
    )
    print(f"  peak of the process so far: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


class _Anything(types.ModuleType):
    """Stands in for packages that the published code imports and a forward pass does not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *a, **k: None, "__call__": lambda self, *a, **k: None})


def published(folder: pathlib.Path, pixels: int, threads: int) -> Callable[[np.ndarray], Any]:
    """The published network with random weights, where JAX computes too: slices (n, y, x) 0..1 to its masks."""
    import torch
    from torch_beside import device, finish

    for name in ("hydra", "icecream", "torchvision", "torchvision.transforms", "iopath", "cv2", "skimage.measure"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _Anything(name)
    sys.path.insert(0, str(folder))
    built = importlib.import_module("sam2.build_sam")
    lora = importlib.import_module("LoRa_image_encoder2")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    net = built.build_sam(
        device=device(), img_size=pixels, num_classes=1, is_double_masking=True, mem_slot=8, mem_avg_parm=0.3
    )
    adapted = lora.LoRA_Sam(net, 100).sam.eval().to(device())

    def run(grey: np.ndarray) -> Any:
        image = torch.from_numpy((grey - 0.485) / 0.229).float()[:, None].repeat(1, 3, 1, 1).to(device())
        with torch.inference_mode():
            found = adapted(image, previous_mask=torch.zeros(1, pixels, pixels, device=device()))
        finish()
        return found

    return run


def compare(folder: pathlib.Path, slices: int, pixels: int, repeats: int) -> None:
    """Our published network beside theirs."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    theirs = published(folder, pixels, threads)
    config = sam4em.published(sam4em.Config(model=network.Config()))
    definition = define(lambda rngs: sam4em.build(config, rngs))
    variables = initialise(lambda rngs: sam4em.build(config, rngs), jax.random.key(0))
    ours = jax.jit(lambda variables, image: sam4em.run(config, definition.bind(variables), image))
    grey = np.random.default_rng(0).random((slices, pixels, pixels), np.float32)
    image = jnp.asarray(grey[None])
    print(f"published network, {slices} slices of {pixels} x {pixels}, {threads} threads, forward pass, float32")
    times = {"emjax": (math.inf, math.inf), "PyTorch": (math.inf, math.inf)}
    for _ in range(max(repeats, 1)):
        for name, run in (("emjax", lambda: ours(variables, image)), ("PyTorch", lambda: theirs(grey))):
            wall, processor = best_of(run, 1)
            times[name] = min(times[name][0], wall), min(times[name][1], processor)
    for name, (wall, processor) in times.items():
        print(f"  {name:<8} {slices / wall:8.3f} slices/s ({wall:.3f} s, {processor:.2f} processor seconds)")
    ratios = [times["PyTorch"][kind] / times["emjax"][kind] for kind in (0, 1)]
    print(f"  PyTorch's time over ours: {ratios[0]:.2f} (wall), {ratios[1]:.2f} (processor)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], metavar="FILE.py:VARIANT", help="may be repeated")
    parser.add_argument("--reference", type=pathlib.Path, metavar="DIR", help="a copy of Uzshah/SAM4EM")
    parser.add_argument("--slices", type=int, default=2, help="of the comparison (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=512, help="of the comparison; theirs is made for 512")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, jax {jax.__version__}")
    for spec in options.config:
        time_config(spec, options.repeats)
    if options.reference is not None:
        compare(options.reference, options.slices, options.pixels, options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())

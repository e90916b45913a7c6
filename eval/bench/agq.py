"""Times of AGQ's stages per block and for a whole volume, on this machine.

    python eval/bench/agq.py                                    # published network and blocks, AC3-sized merge (GPU)
    python eval/bench/agq.py --block 9,65,65 --volume 33,257,257 --precision float32 --repeats 3      # 2 CPU cores

Stages: host to device, network, components of the affinity (also inside the network), upsampling with soft areas and
argmax, the whole pipeline in one program, device to host (labels and affinities only), merge on the host. The network
has random weights, which does not change the time of any stage but the merge; so the merge is timed on a synthetic
neuropil volume cut into blocks, every block with ids of its own. Prints medians of one run, blocks per second, FLOP/s
(2 per multiply-add, convolutions and products), the share of each stage, bfloat16 against float32, and the device
memory that the compiler plans. The first call of every program (compilation) is left out. The reference implementation
is not part of this repository: run it on the same blocks beside, and compare with the line of the whole pipeline.
"""

import argparse
import dataclasses
import os
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from emjax.data.phantom import PhantomConfig, make_phantom
from emjax.models.agq import coarse_components
from emjax.models.functional import define, initialise
from emjax.postprocess.block_merge import merge_blocks
from emjax.systems import agq
from emjax.systems.agq_blocks import block_labels, block_positions, concatenate
from emjax.systems.protocol import Block
from emjax.training import flops


def triple(text: str) -> tuple[int, int, int]:
    z, y, x = (int(part) for part in text.split(","))
    return z, y, x


def median(function: Callable, repeats: int) -> float:
    """Median wall time of calls after a first one."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def block_stages(config: agq.Config, repeats: int) -> dict[str, float]:
    """Seconds of each stage of one block."""
    size = config.plan.size
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, *size), dtype=np.uint8)
    definition = define(lambda rngs: agq.build(config, rngs))
    variables = jax.jit(lambda key: initialise(lambda rngs: agq.build(config, rngs), key))(jax.random.key(0))

    def forward(variables, image):
        outputs = definition.bind(variables)(agq.normalise(image))
        return outputs.stages[-1].masks, outputs.affinity_logits

    network = jax.jit(forward)
    components = jax.jit(coarse_components)
    labels = jax.jit(lambda masks: block_labels(masks, size, config.soft_area)[0])
    whole = jax.jit(lambda variables, image: agq.predict(config, definition.bind(variables), image))
    placed = jax.device_put(image)
    masks, logits = network(variables, placed)
    # Smooth noise has components of all sizes, as affinities of a trained network do.
    smooth = jax.image.resize(
        jnp.asarray(rng.normal(size=(1, *(max(2, n // 4) for n in logits.shape[1:4]), 3)), jnp.float32),
        logits.shape,
        "linear",
    )
    outputs = whole(variables, placed)
    memory = whole.lower(variables, placed).compile().memory_analysis()
    operations = flops.count(forward, variables, placed)
    seconds = {
        "host to device": median(lambda: jax.device_put(image), repeats),
        "network": median(lambda: network(variables, placed), repeats),
        "of it: components": median(lambda: components(smooth), repeats),
        "upsampling and argmax": median(lambda: labels(masks[0]), repeats),
        "whole pipeline": median(lambda: whole(variables, jax.device_put(image)), repeats),
        "device to host": median(lambda: [np.array(value) for value in outputs.values()], repeats),
    }
    print(f"{config.model.dtype}, block {size}, {config.model.queries} query slots: {operations / 1e9:.0f} GFLOP")
    for name, value in seconds.items():
        print(f"  {name:<24}{1e3 * value:>12.2f} ms{100 * value / seconds['whole pipeline']:>8.1f} % of the pipeline")
    total = seconds["whole pipeline"] + seconds["device to host"]
    print(f"  blocks per second {1 / total:.3g}, network {operations / seconds['network'] / 1e12:.3g} TFLOP/s")
    if memory is not None:
        planned = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
        print(f"  device memory planned {planned / 2**30:.2f} GiB")
    return seconds | {"total": total}


def merge_seconds(config: agq.Config, shape: tuple[int, int, int], threads: int) -> tuple[float, int]:
    """Seconds of concatenation and merge of a synthetic volume, and its number of blocks."""
    phantom = make_phantom(PhantomConfig(shape=shape, seed=0))
    truth = phantom.labels.astype(np.int32)
    size, stride = config.plan.size, config.plan.stride
    rng = np.random.default_rng(0)
    positions = block_positions(truth.shape, size, stride)

    def blocks():
        for position in positions:
            inside = truth[tuple(slice(start, start + length) for start, length in zip(position, size))]
            _, local = np.unique(inside, return_inverse=True)
            local = local.reshape(inside.shape) + (0 if inside.min() == 0 else 1)
            affinity = np.clip((inside > 0) * 0.9 + rng.normal(0, 0.05, (3, *inside.shape)), 0, 1)
            yield position, local.astype(np.int32), affinity.astype(np.float32)

    ready = list(blocks())
    merge = config.merge

    def run() -> float:
        start = time.perf_counter()
        whole = concatenate(iter(ready), truth.shape)
        merge_blocks(
            whole.affinities,
            whole.labels,
            whole.border,
            on_border=merge.on_border,
            threshold=merge.threshold,
            threads=threads,
        )
        return time.perf_counter() - start

    run()
    return run(), len(positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block", type=triple, default=(17, 257, 257), help="z,y,x (default: %(default)s)")
    parser.add_argument("--volume", type=triple, default=(100, 1024, 1024), help="of the merge (default: %(default)s)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "both"), default="both")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    device = jax.devices()[0]
    print(f"{device.device_kind}, {os.cpu_count()} cores of {platform.processor() or platform.machine()}")
    stride = tuple(max(1, length - 1) for length in options.block)
    base = agq.Config(plan=Block(size=options.block, stride=stride, blending="linear"))
    totals = {}
    for dtype in ("float32", "bfloat16") if options.precision == "both" else (options.precision,):
        config = dataclasses.replace(base, model=dataclasses.replace(base.model, dtype=dtype))
        totals[dtype] = block_stages(config, options.repeats)["total"]
    if len(totals) == 2:
        print(f"bfloat16 against float32: {totals['float32'] / totals['bfloat16']:.2f} times as fast")
    seconds, blocks = merge_seconds(base, options.volume, options.threads)
    print(f"volume {options.volume}, {blocks} blocks: merge {seconds:.2f} s on {options.threads} threads", end="")
    for dtype, total in totals.items():
        print(
            f"; {dtype} network {blocks * total:.1f} s, merge {100 * seconds / (blocks * total + seconds):.1f} %",
            end="",
        )
    print()


if __name__ == "__main__":
    main()

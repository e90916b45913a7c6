"""Speed and memory of SAM 2, beside the PyTorch implementation of transformers where it is installed.

    python eval/bench/sam2.py                                        # tiny at 256 x 256, encoder, on this machine
    python eval/bench/sam2.py --sizes tiny small base_plus large --pixels 256 512 --track
    python eval/bench/sam2.py --dtype bfloat16 --pixels 1024 --batch 8      # on a GPU
    python eval/bench/sam2.py --lengths 4 4000                              # peak memory against the stack's length

Prints per size: slices per second, achieved floating-point operations per second, peak memory, and the ratio to PyTorch
(its time over ours; above 1 is faster than PyTorch). Both run in turns in one process with random weights; the smallest
of the repeats counts: wall time on an accelerator, and on a CPU the processor time of all threads, which bears a shared
machine. PyTorch then has one thread, because its waiting threads use processor time. Peak memory is that of a process
of its own.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from emjax.models.functional import define, initialise
from emjax.models.sam2.config import SIZES, HieraConfig, sam2_config
from emjax.models.sam2.model import SAM2, Features
from emjax.models.sam2.stack import (
    FORWARD,
    TrackOptions,
    condition,
    empty_memory,
    prompt_points,
    propagate,
    remembered,
)


def trunk_operations(config: HieraConfig, height: int, width: int) -> float:
    """Floating-point operations (two per multiplication and addition) of the trunk for one image."""
    rows, columns = height // 4, width // 4
    total = 2 * 49 * 3 * config.width * rows * columns
    channels, stage = config.width, 0
    firsts = [end + 1 for end in config.stage_ends[:-1]]
    for index in range(config.depth):
        window = 0 if index in config.global_blocks else config.windows[stage]
        outputs = channels
        if index in firsts:
            outputs, stage = 2 * channels, stage + 1
            total += 2 * rows * columns * channels * outputs
        padded = [-(-n // window) * window if window else n for n in (rows, columns)]
        tokens = padded[0] * padded[1]
        keys = window * window if window else tokens
        total += 2 * tokens * channels * 3 * outputs
        queries = tokens
        if index in firsts:
            rows, columns, queries = rows // 2, columns // 2, tokens // 4
        total += 4 * queries * keys * outputs + 2 * queries * outputs * outputs
        total += 2 * rows * columns * outputs * outputs * 2 * config.mlp_ratio
        channels = outputs
    return float(total)


def clock() -> float:
    """Processor seconds of all threads on a CPU, wall seconds on an accelerator."""
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def in_turns(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """The smallest time of each run, taken in turns after one warm-up each."""
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best


def ours(size: str, pixels: int, batch: int, dtype: str):
    """(compiled encoder, its variables, images) of a network with random weights."""
    config = sam2_config(size, dtype=dtype)
    definition = define(lambda rngs: SAM2(config, rngs))
    variables = initialise(lambda rngs: SAM2(config, rngs), jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch, pixels, pixels, 3), jnp.float32)
    encode = jax.jit(lambda variables, images: definition.bind(variables).image_encoder(images).levels[:3])
    return definition, variables, images, encode


def torch_encoder(size: str, pixels: int, batch: int, dtype: str) -> Callable[[], None] | None:
    """A run of transformers' vision encoder with the same sizes, or None where it is not installed."""
    try:
        import torch
        from transformers import Sam2Config, Sam2HieraDetConfig, Sam2Model, Sam2VisionConfig
    except ImportError:
        return None
    hiera = sam2_config(size).hiera
    grid = pixels // 4
    backbone = Sam2HieraDetConfig(
        hidden_size=hiera.width,
        num_attention_heads=hiera.heads,
        image_size=[pixels, pixels],
        blocks_per_stage=list(hiera.stages),
        embed_dim_per_stage=list(hiera.widths),
        num_attention_heads_per_stage=[hiera.heads << i for i in range(4)],
        window_size_per_stage=list(hiera.windows),
        global_attention_blocks=list(hiera.global_blocks),
        window_positional_embedding_background_size=list(hiera.background),
    )
    vision = Sam2VisionConfig(
        backbone_config=backbone,
        backbone_channel_list=list(reversed(hiera.widths)),
        backbone_feature_sizes=[[grid, grid], [grid // 2, grid // 2], [grid // 4, grid // 4]],
    )
    if jax.default_backend() == "cpu":
        torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    torch.manual_seed(0)
    model = Sam2Model(Sam2Config(vision_config=vision)).vision_encoder
    model = model.eval().to(device, dtype=getattr(torch, dtype))
    images = torch.randn(batch, 3, pixels, pixels, device=device, dtype=getattr(torch, dtype))

    def run() -> None:
        with torch.inference_mode():
            model(images)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def peak_memory(size: str, pixels: int, batch: int, dtype: str) -> float:
    """MiB at the peak of a fresh process that encodes once (device memory on an accelerator)."""
    if jax.default_backend() != "cpu":
        statistics = jax.local_devices()[0].memory_stats() or {}
        return statistics.get("peak_bytes_in_use", float("nan")) / 2**20
    command = [sys.executable, __file__, "--peak", size, str(pixels), str(batch), dtype]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def one_encoding(size: str, pixels: int, batch: int, dtype: str) -> None:
    _, variables, images, encode = ours(size, pixels, batch, dtype)
    jax.block_until_ready(encode(variables, images))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def tracking(size: str, pixels: int, dtype: str, objects: int, repeats: int, slices: int = 8) -> float:
    """Slices per second of propagation alone (features are given) with a click on the first slice."""
    definition, variables, images, _ = ours(size, pixels, 1, dtype)
    options = TrackOptions()

    @jax.jit
    def start(variables, images):
        model = definition.bind(variables)
        features = model.encode(images)
        points = jnp.full((objects, 1, 2), pixels / 2), jnp.ones((objects, 1), jnp.int32)
        heads = prompt_points(model, options, features, *points)
        memory = empty_memory(model, options, objects, 1, features.grid)
        memory = condition(memory, 0, 0, remembered(model, options, features, heads, prompted=True))
        return memory, Features(*(jnp.repeat(x, slices, axis=0) for x in features))

    memory, features = start(variables, images)

    @jax.jit
    def run(variables, memory, features):
        order = jnp.arange(1, slices + 1)
        model = definition.bind(variables)
        first = jnp.zeros(objects, jnp.int32)
        return propagate(model, options, memory, features, order, first, FORWARD, slices + 1)[1].low

    times = in_turns({"ours": lambda: jax.block_until_ready(run(variables, memory, features))}, repeats)
    return slices / times["ours"]


def stack_of(length: int, pixels: int = 64) -> None:
    """Tracks one object through a stack of noise, made slice by slice, and prints the peak memory in MiB."""
    from emjax.systems.sam2_prompts import Prompt
    from emjax.systems.sam2_stack import Config, Tracker, network

    config = Config(input_size=(pixels, pixels), batch=4, objects=1)

    def read(first: int, end: int) -> np.ndarray:
        return np.stack(
            [np.random.default_rng(z).integers(0, 256, (pixels, pixels), np.uint8) for z in range(first, end)]
        )

    points = np.float32([[pixels / 2, pixels / 2]]), np.int32([1])
    tracker = Tracker(config, network(config), read, (length, pixels, pixels), [Prompt(1, length // 2, *points)])
    start = time.process_time()
    tracker.labels(lambda z, labels: None)
    seconds = time.process_time() - start
    print(f"{seconds:.1f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def lengths(chosen: list[int]) -> None:
    print(f"{machine()}; tiny at 64 x 64, one object prompted in the middle, both ways")
    for length in chosen:
        command = [sys.executable, __file__, "--stack", str(length)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(f"{length:6} slices: peak {float(found[-1]):6.0f} MiB, {float(found[-2]):8.1f} CPU seconds", flush=True)


def machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{device.device_kind}, JAX {jax.__version__}"
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    found = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {found[0] if found else platform.processor()}, no GPU, JAX {jax.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--track", action="store_true", help="also time the propagation")
    parser.add_argument("--objects", type=int, default=1, help="objects tracked at once")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--peak", nargs=4, metavar=("SIZE", "PIXELS", "BATCH", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", nargs="+", type=int, help="peak memory of stacks of so many slices, nothing else")
    parser.add_argument("--stack", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stack:
        stack_of(options.stack)
        return
    if options.lengths:
        lengths(options.lengths)
        return
    if options.peak:
        size, pixels, batch, dtype = options.peak
        one_encoding(size, int(pixels), int(batch), dtype)
        return
    unit = "CPU" if jax.default_backend() == "cpu" else "wall"
    print(f"{machine()}; {options.dtype}; batch {options.batch}; {unit} seconds, best of {options.repeats}")
    print(
        f"{'size':10} {'pixels':>6} {'slices/s':>9} {'GFLOP/s':>9} {'peak MiB':>9} {'PyTorch/ours':>13} {'track/s':>8}"
    )
    rows = []
    for size in options.sizes:
        for pixels in options.pixels:
            _, variables, images, encode = ours(size, pixels, options.batch, options.dtype)
            runs = {"ours": lambda e=encode, v=variables, i=images: jax.block_until_ready(e(v, i))}
            theirs = torch_encoder(size, pixels, options.batch, options.dtype)
            times = in_turns(runs | ({"torch": theirs} if theirs else {}), options.repeats)
            seconds = times["ours"] / options.batch
            row = {
                "size": size,
                "pixels": pixels,
                "slices_per_s": 1 / seconds,
                "gflop_per_s": trunk_operations(sam2_config(size).hiera, pixels, pixels) / seconds / 1e9,
                "peak_mib": peak_memory(size, pixels, options.batch, options.dtype),
                "ratio": times["torch"] / times["ours"] if theirs else float("nan"),
                "track_per_s": float("nan"),
            }
            if options.track:
                row["track_per_s"] = tracking(size, pixels, options.dtype, options.objects, options.repeats)
            rows.append(row)
            print(
                f"{size:10} {pixels:6} {row['slices_per_s']:9.2f} {row['gflop_per_s']:9.1f} {row['peak_mib']:9.0f} "
                f"{row['ratio']:13.2f} {row['track_per_s']:8.2f}",
                flush=True,
            )
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"machine": machine(), "dtype": options.dtype, "batch": options.batch, "rows": rows}, file, indent=1
            )


if __name__ == "__main__":
    main()

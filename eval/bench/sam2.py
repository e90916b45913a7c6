"""Speed and memory of SAM 2, beside the PyTorch implementation of transformers where it is installed.

    python eval/bench/sam2.py                                        # tiny at 256 x 256, encoder, on this machine
    python eval/bench/sam2.py --threads 1                            # on one core, both
    python eval/bench/sam2.py --sizes tiny small base_plus large --pixels 256 512 --track
    python eval/bench/sam2.py --dtype bfloat16 --pixels 1024 --batch 8      # on a GPU
    python eval/bench/sam2.py --lengths 4 4000                              # peak memory against the stack's length

Prints per size: slices per second, achieved floating-point operations per second (of the trunk), peak memory, and
PyTorch's time over ours (above 1 is faster than PyTorch). Both run in turns in one process with random weights of the
same shapes, on the same cores and with as many threads as cores; the smallest of the repeats counts, of wall time and,
on a CPU, of the processor time of all threads, which bears a shared machine better. Peak memory is that of a process of
its own.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.inference.segmentation import Places
from emjax.inference.streaming import Run, stream
from emjax.models.functional import Collections, Definition, define, initialise
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
from emjax.systems import sam2_stack


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


def in_turns(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """The smallest wall and processor seconds of each run, taken in turns after one warm-up each."""
    for run in runs.values():
        run()
    best = dict.fromkeys(runs, (float("inf"), float("inf")))
    for _ in range(repeats):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            taken = time.perf_counter() - wall, time.process_time() - processor
            best[name] = min(best[name][0], taken[0]), min(best[name][1], taken[1])
    return best


def limit_cores(count: int) -> int:
    """Leaves this process ``count`` cores (0: all), before any thread pool is made; returns how many it has."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if count:
        os.sched_setaffinity(0, cores[-count:])
    return len(os.sched_getaffinity(0))


def ours(size: str, pixels: int, batch: int, dtype: str) -> tuple[Definition, Collections, jax.Array, Callable]:
    """(definition, variables, images, compiled encoder) of a network with random weights."""
    config = sam2_config(size, dtype=dtype)
    definition = define(lambda rngs: SAM2(config, rngs))
    variables = initialise(lambda rngs: SAM2(config, rngs), jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch, pixels, pixels, 3), jnp.float32)
    encode = jax.jit(lambda variables, images: definition.bind(variables).image_encoder(images).levels[:3])
    return definition, variables, images, encode


def torch_encoder(size: str, pixels: int, batch: int, dtype: str, threads: int) -> Callable[[], None] | None:
    """A run of transformers' vision encoder with the same sizes, or None where it is not installed."""
    try:
        import torch
        from torch_beside import device, finish
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
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Sam2Model(Sam2Config(vision_config=vision)).vision_encoder
    model = model.eval().to(device(), dtype=getattr(torch, dtype))
    images = torch.randn(batch, 3, pixels, pixels, device=device(), dtype=getattr(torch, dtype))

    def run() -> None:
        with torch.inference_mode():
            model(images)
        finish()

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
    return slices / times["ours"][0]


@dataclasses.dataclass(frozen=True)
class Noise:
    """A stack of noise that is made when it is read."""

    shape: tuple[int, int, int]
    dtype: np.dtype = np.dtype(np.uint8)
    chunks: None = None
    shards: None = None

    def read(self, box: tuple[slice, ...]) -> np.ndarray:
        slices = [
            np.random.default_rng(z).integers(0, 256, self.shape[1:], np.uint8)
            for z in range(*box[0].indices(self.shape[0]))
        ]
        return np.stack(slices)[:, box[1], box[2]]

    def write(self, box: tuple[slice, ...], array: np.ndarray) -> None:
        raise UserError("noise is made when it is read and cannot be written")


def stack_of(length: int, pixels: int) -> None:
    """Tracks two objects through a stack, as ``emjax.segment`` does, and prints CPU seconds and the peak in MiB."""
    image = Volume(f"noise of {length} slices", Noise((length, pixels, pixels)), "zyx", (40.0, 4.0, 4.0))
    with tempfile.TemporaryDirectory() as folder:
        prompts = pathlib.Path(folder, "prompts.json")
        middle = [[pixels // 2, pixels // 2]]
        given = [{"object": i, "z": i * length // 4, "points": middle} for i in (1, 3)]
        prompts.write_text(json.dumps({"prompts": given}))
        config = sam2_stack.Config(input_size=(pixels, pixels), objects=2, prompts=str(prompts))
        streaming = sam2_stack.segment_volume(config, None, image)
        start = time.process_time()
        run = Run(streaming, image, Places(f"{folder}/labels.zarr"), {"length": length})
        stream(run, say=lambda text: print(text, file=sys.stderr))
        seconds = time.process_time() - start
    print(f"{seconds:.1f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def lengths(chosen: list[int], pixels: int) -> None:
    print(f"{machine()}; tiny at {pixels} x {pixels}, two objects, both ways, written to Zarr")
    for length in chosen:
        command = [sys.executable, __file__, "--pixels", str(pixels), "--stack", str(length)]
        found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
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
    parser.add_argument("--threads", type=int, default=0, help="cores and threads of both (default: all)")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--peak", nargs=4, metavar=("SIZE", "PIXELS", "BATCH", "DTYPE"), help=argparse.SUPPRESS)
    parser.add_argument("--lengths", nargs="+", type=int, help="peak memory of stacks of so many slices, nothing else")
    parser.add_argument("--stack", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = limit_cores(options.threads)
    if options.stack:
        stack_of(options.stack, options.pixels[0])
        return
    if options.lengths:
        lengths(options.lengths, options.pixels[0])
        return
    if options.peak:
        size, pixels, batch, dtype = options.peak
        one_encoding(size, int(pixels), int(batch), dtype)
        return
    print(f"{machine()}; {threads} threads; {options.dtype}; batch {options.batch}; best of {options.repeats}")
    print(
        f"{'size':10} {'pixels':>6} {'slices/s':>9} {'GFLOP/s':>9} {'peak MiB':>9} {'wall ms':>8} {'CPU ms':>8} "
        f"{'PyTorch wall':>13} {'CPU':>8} {'ratio wall':>11} {'CPU':>6} {'track/s':>8}"
    )
    rows = []
    for size in options.sizes:
        for pixels in options.pixels:
            _, variables, images, encode = ours(size, pixels, options.batch, options.dtype)
            runs = {"ours": lambda e=encode, v=variables, i=images: jax.block_until_ready(e(v, i))}
            theirs = torch_encoder(size, pixels, options.batch, options.dtype, threads)
            times = in_turns(runs | ({"torch": theirs} if theirs else {}), options.repeats)
            wall, processor = times["ours"]
            their_wall, their_processor = times.get("torch", (float("nan"), float("nan")))
            operations = trunk_operations(sam2_config(size).hiera, pixels, pixels) * options.batch
            row = {
                "size": size,
                "pixels": pixels,
                "slices_per_s": options.batch / wall,
                "gflop_per_s": operations / wall / 1e9,
                "peak_mib": peak_memory(size, pixels, options.batch, options.dtype),
                "wall_ms": 1e3 * wall,
                "cpu_ms": 1e3 * processor,
                "torch_wall_ms": 1e3 * their_wall,
                "torch_cpu_ms": 1e3 * their_processor,
                "ratio_wall": their_wall / wall,
                "ratio_cpu": their_processor / processor,
                "track_per_s": float("nan"),
            }
            if options.track:
                row["track_per_s"] = tracking(size, pixels, options.dtype, options.objects, options.repeats)
            rows.append(row)
            print(
                f"{size:10} {pixels:6} {row['slices_per_s']:9.2f} {row['gflop_per_s']:9.1f} {row['peak_mib']:9.0f} "
                f"{row['wall_ms']:8.0f} {row['cpu_ms']:8.0f} {row['torch_wall_ms']:13.0f} {row['torch_cpu_ms']:8.0f} "
                f"{row['ratio_wall']:11.2f} {row['ratio_cpu']:6.2f} {row['track_per_s']:8.2f}",
                flush=True,
            )
    if options.json:
        content = {"machine": machine(), "threads": threads, "dtype": options.dtype, "batch": options.batch}
        pathlib.Path(options.json).write_text(json.dumps(content | {"rows": rows}, indent=1))


if __name__ == "__main__":
    main()

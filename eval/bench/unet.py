"""Forward pass and training step of the affinity U-Net beside the same network in PyTorch, on this machine.

    python eval/bench/unet.py [--crop 16,96,96] [--batch 2] [--repeats 5]

Prints seconds per call (wall clock, and processor time over all threads) and the ratios, from one run in which the two
take turns, on an accelerator both on it. Needs the extra ``torch``.
"""

import argparse
import os
import platform
import time

import jax
import numpy as np
import torch
from torch_beside import device, finish

from emjax.config import Data, Experiment, Mesh, Optimizer, Train
from emjax.data.pipeline import Source
from emjax.models.unet import UNetConfig
from emjax.systems import affinity_unet
from emjax.systems.protocol import Block
from emjax.training import distributed, loop, sharding
from emjax.training.state import definition, fresh, make_prediction


class TorchUNet(torch.nn.Module):
    """The network of ``emjax.models.unet.UNet`` (no patch, no deep supervision), for timing alone."""

    def __init__(self, config: UNetConfig, outputs: int):
        super().__init__()

        def norm(width):
            return torch.nn.GroupNorm(max(d for d in range(1, width // 4 + 1) if width % d == 0), width)

        def conv(before, width, kernel):
            pads = tuple(size // 2 for size in kernel)
            return torch.nn.Sequential(torch.nn.Conv3d(before, width, kernel, padding=pads, bias=False), norm(width))

        def block(before, width, kernel):
            return torch.nn.ModuleList(
                [conv(before, width, (1, *kernel[1:])), conv(width, width, kernel), conv(width, width, kernel)]
            )

        widths, kernels = config.widths, config.kernels
        self.pools = config.pools
        self.stem = conv(1, widths[0], (1, 5, 5))
        self.down = torch.nn.ModuleList(
            block(widths[max(level - 1, 0)], width, kernels[level]) for level, width in enumerate(widths)
        )
        levels = list(reversed(range(len(widths) - 1)))
        self.merge = torch.nn.ModuleList(conv(widths[level + 1], widths[level], (1, 1, 1)) for level in levels)
        self.up = torch.nn.ModuleList(block(widths[level], widths[level], kernels[level]) for level in levels)
        self.head = torch.nn.Conv3d(widths[0], outputs, 1)

    @staticmethod
    def _block(parts, x):
        act = torch.nn.functional.elu
        x = act(parts[0](x))
        return act(x + parts[2](act(parts[1](x))))

    def forward(self, x):
        act = torch.nn.functional.elu
        x = act(self.stem(x))
        skips = []
        for level, parts in enumerate(self.down):
            if level:
                skips.append(x)
                x = torch.nn.functional.max_pool3d(x, self.pools[level - 1])
            x = self._block(parts, x)
        for step, (merge, parts) in enumerate(zip(self.merge, self.up)):
            factor = self.pools[len(self.pools) - 1 - step]
            up = torch.nn.functional.interpolate(merge(x), scale_factor=factor, mode="trilinear", align_corners=False)
            x = self._block(parts, act(up + skips.pop()))
        return self.head(x)


def timed(call, repeats: int) -> tuple[float, float]:
    """Smallest wall and processor seconds of ``call``."""
    wall, cpu = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        call()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return min(wall), min(cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", default="16,96,96")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--widths", default="28,36,48,64")
    options = parser.parse_args()
    crop = tuple(int(size) for size in options.crop.split(","))
    widths = tuple(int(width) for width in options.widths.split(","))
    kernels = ((1, 3, 3), *[(3, 3, 3)] * (len(widths) - 1))
    model = UNetConfig(widths=widths, pools=((1, 2, 2),) * (len(widths) - 1), kernels=kernels)
    config = Experiment(
        system=affinity_unet.Config(
            model=model, plan=Block(size=crop, stride=crop), widen_borders=None, class_balance=False
        ),
        data=Data(train=(Source(raw="none", labels="none"),), crop=crop, batch_size=options.batch),
        optimizer=Optimizer(clip_norm=0.0),
        train=Train(),
        mesh=Mesh(),
    )
    distributed.use_cpu_devices(0, options.batch)
    shapes = loop.batch_shapes(config)
    compiled = loop.compile_step(config, shapes)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 255, shapes["image"].shape, np.uint8),
        "labels": rng.integers(0, 4, shapes["labels"].shape, np.int32),
    }
    on_devices = sharding.to_devices(batch, compiled.batch_shardings, options.batch)
    key = jax.device_put(jax.random.key(0), jax.sharding.NamedSharding(compiled.mesh, jax.sharding.PartitionSpec()))
    state = jax.jit(lambda key: fresh(config, key), out_shardings=compiled.shardings)(key)
    predict = jax.jit(make_prediction(config, definition(config)))

    def jax_forward():
        jax.block_until_ready(predict(state, on_devices["image"]))

    def jax_step():
        nonlocal state
        state, scalars = compiled.step(state, on_devices, key)
        jax.block_until_ready(scalars)

    network = TorchUNet(model, 3).to(device())
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    image = torch.from_numpy(batch["image"].astype(np.float32) / 255)[:, None].to(device())
    target = (torch.rand(options.batch, 3, *crop, device=device()) > 0.1).float()

    def torch_forward():
        with torch.no_grad():
            torch.sigmoid(network(image))
        finish()

    def torch_step():
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(network(image), target).backward()
        optimizer.step()
        finish()

    print(
        f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {len(jax.devices())} JAX devices "
        f"({jax.devices()[0].device_kind}), torch {torch.get_num_threads()} threads; batch {options.batch} x {crop}, "
        f"widths {widths}, {compiled.flops / 1e9:.0f} GFLOP a step"
    )
    for name, ours, theirs in (("forward", jax_forward, torch_forward), ("training step", jax_step, torch_step)):
        ours()
        theirs()
        times = [(timed(ours, 1), timed(theirs, 1)) for _ in range(options.repeats)]
        (wall, cpu), (torch_wall, torch_cpu) = (
            tuple(min(pair[side][index] for pair in times) for index in (0, 1)) for side in (0, 1)
        )
        print(
            f"{name:14} emjax {wall:.4f} s ({cpu:.3f} processor-s)  torch {torch_wall:.4f} s ({torch_cpu:.3f})  "
            f"ratio {wall / torch_wall:.2f} wall, {cpu / torch_cpu:.2f} processor"
        )


if __name__ == "__main__":
    main()

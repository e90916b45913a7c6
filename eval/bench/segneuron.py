"""SegNeuron's forward pass and training step beside the same network in PyTorch, and its whole pipeline.

    python eval/bench/segneuron.py                       # the published widths on one patch of 20 x 128 x 128
    python eval/bench/segneuron.py --widths 8,12,16,24,32 --patch 16,96,96 --train
    python eval/bench/segneuron.py --pipeline 64,256,256

Prints seconds per call (wall clock, and processor time over all threads), MVox/s and the ratios, from one run in which
the two take turns, on an accelerator both on it. Needs the extra ``torch``. ``--pipeline`` predicts by the published
tiling and segments; its voxels are those of the volume, most of which eight tiles see.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch_beside import device, finish

from emjax.models import mnet
from emjax.models.functional import define
from emjax.systems import segneuron
from emjax.weights.segneuron import write_segneuron


class TorchCna(torch.nn.Module):
    def __init__(self, before: int, width: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.conv = torch.nn.Conv3d(before, width, kernel, padding=tuple(n // 2 for n in kernel))
        self.norm = torch.nn.InstanceNorm3d(width, affine=True)

    def forward(self, x):
        return torch.nn.functional.leaky_relu(self.norm(self.conv(x)), 0.01)


class TorchStream(torch.nn.Module):
    def __init__(self, before: int, width: int, kernel: tuple[int, int, int]):
        super().__init__()
        self.conv1, self.conv2 = TorchCna(before, width, kernel), TorchCna(width, width, kernel)

    def forward(self, x):
        return self.conv2(self.conv1(x))


class TorchMNet(torch.nn.Module):
    """MNet with skips and |a - b|, from the wiring of ``emjax.models.mnet``; loads a checkpoint's names."""

    def __init__(self, config: mnet.Config):
        super().__init__()
        self.wiring = {**mnet.encoder_wiring(), **mnet.decoder_wiring(), **mnet.decoder_wiring("_")}
        for name, node in self.wiring.items():
            width = config.widths[node.width]
            if node.skip is not None:
                before = config.widths[node.width + 1] + width
            else:
                before = config.widths[node.width - 1] if node.width else config.in_features
            streams = {}
            if node.planar_out:
                streams["CB2d"] = TorchStream(before, width, (1, 3, 3))
            if node.volumetric_out:
                streams["CB3d"] = TorchStream(before, width, (3, 3, 3))
            self.add_module(name, torch.nn.ModuleDict(streams))
        heads = [torch.nn.Conv3d(config.widths[0], n, 1, bias=False) for n in config.outputs]
        self.outputs, self.outputs2 = (torch.nn.ModuleList([head]) for head in heads)

    @staticmethod
    def _pool(x, volumetric):
        deep = volumetric and x.shape[2] >= 8
        return torch.nn.functional.max_pool3d(x, (2, 2, 2) if deep else (1, 2, 2))

    def _input(self, node, found):
        if node.skip is None:
            if node.width == 0:
                return found["input"]
            pooled = [
                self._pool(found[source], volumetric)
                for source, volumetric in ((node.planar, False), (node.volumetric, True))
                if source is not None
            ]
            return pooled[0] if len(pooled) == 1 else (pooled[0] - pooled[1]).abs()
        planar, volumetric = found[f"{node.skip}.2d"], found[f"{node.skip}.3d"]
        up = [
            torch.nn.functional.interpolate(found[source], planar.shape[2:], mode="trilinear", align_corners=False)
            for source in (node.planar, node.volumetric)
        ]
        return torch.cat([(planar - volumetric).abs(), (up[0] - up[1]).abs()], 1)

    def forward(self, x):
        found = {"input": x}
        for name, node in self.wiring.items():
            value = self._input(node, found)
            for stream, layer in getattr(self, name).items():
                found[f"{name}.{stream[2:]}"] = layer(value)
        return tuple(
            torch.sigmoid(head[0](found[f"{last}.2d"] + found[f"{last}.3d"]))
            for head, last in ((self.outputs, "up14"), (self.outputs2, "up14_"))
        )


def clocks(call: Callable[[], object]) -> tuple[float, float]:
    """(wall, processor) seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(title: str, ours: Callable[[], object], theirs: Callable[[], object], voxels: int, repeats: int) -> None:
    """The two take turns; the fastest of each counts."""
    ours(), theirs()
    timed = [(clocks(ours), clocks(theirs)) for _ in range(repeats)]
    wall, processor = ([min(pair[side][kind] for pair in timed) for side in (0, 1)] for kind in (0, 1))
    print(
        f"{title}: emjax {wall[0]:.4f} s wall, {processor[0]:.3f} s processor, {voxels / wall[0] / 1e6:.4f} MVox/s; "
        f"PyTorch {wall[1]:.4f} s, {processor[1]:.3f} s; ratio {wall[0] / wall[1]:.2f} wall, "
        f"{processor[0] / processor[1]:.2f} processor"
    )


def triple(text: str) -> tuple[int, int, int]:
    z, y, x = (int(part) for part in text.split(","))
    return z, y, x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="32,64,96,128,256")
    parser.add_argument("--patch", type=triple, default=(20, 128, 128))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of convolutions, both")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", action="store_true", help="a training step too")
    parser.add_argument("--pipeline", type=triple, metavar="Z,Y,X", help="predict and segment a volume of this size")
    options = parser.parse_args()
    widths = tuple(int(n) for n in options.widths.split(","))
    config = segneuron.Config(model=mnet.Config(widths=widths, dtype=options.dtype))
    definition = define(lambda rngs: segneuron.build(config, rngs))
    rng = np.random.default_rng(0)
    collections = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 1 / np.sqrt(max(1, np.prod(leaf.shape[:-1]))), leaf.shape), jnp.float32),
        definition.shapes,
    )
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    print(
        f"{jax.devices()[0].device_kind}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"jax {jax.__version__}, PyTorch {torch.__version__}; widths {widths}, {options.batch} x {options.patch}, "
        f"{options.dtype}"
    )
    reference = TorchMNet(config.model)
    state = {name: torch.from_numpy(value.copy()) for name, value in write_segneuron(collections, config.model).items()}
    reference.load_state_dict({name: state[name] for name in reference.state_dict()})
    image = jnp.asarray(rng.random((options.batch, *options.patch, 1), np.float32))
    reference = reference.to(device())
    channels_first = torch.from_numpy(np.array(image[..., 0])[:, None]).to(device())
    half = torch.autocast(device(), torch.bfloat16, enabled=options.dtype == "bfloat16")
    voxels = options.batch * int(np.prod(options.patch))
    forward = jax.jit(lambda collections, x: definition.bind(collections)(x))

    def ours():
        return jax.block_until_ready(forward(collections, image))

    def theirs():
        with torch.no_grad(), half:
            found = reference(channels_first)
        finish()
        return found

    difference = np.abs(np.moveaxis(np.asarray(ours()[0], np.float32), -1, 1) - theirs()[0].float().cpu().numpy()).max()
    print(f"largest difference of affinities: {difference:.1e}")
    compare("forward", ours, theirs, voxels, options.repeats)
    if options.train:
        _training(config, definition, collections, reference, image, channels_first, half, options)
    if options.pipeline:
        _pipeline(config, collections, options.pipeline, options.patch)


def _training(config, definition, collections, reference, image, channels_first, half, options) -> None:
    labels = np.random.default_rng(1).integers(0, 5, (options.batch, *options.patch)).astype(np.int32)
    batch = {"image": jnp.asarray(image[..., 0]), "labels": jnp.asarray(labels)}
    optimizer = optax.adam(1e-3)

    @jax.jit
    def step(params, state):
        def loss(params):
            return segneuron.loss(config, definition.bind({"params": params}), batch, jax.random.key(0), True)[0]

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    params = collections["params"]
    state = optimizer.init(params)
    wanted = segneuron.targets(config, batch)
    affinities, inside = (
        torch.from_numpy(np.moveaxis(np.array(wanted[name]), -1, 1)).to(device())
        for name in ("affinities", "foreground")
    )
    torch_optimizer = torch.optim.Adam(reference.parameters(), 1e-3)

    def theirs():
        torch_optimizer.zero_grad()
        with half:
            first, second = reference(channels_first)
        voxels = inside.numel()
        (
            ((first.float() - affinities) ** 2).sum() / voxels + ((second.float() - inside) ** 2).sum() / voxels
        ).backward()
        torch_optimizer.step()
        finish()

    compare(
        "training step",
        lambda: jax.block_until_ready(step(params, state)),
        theirs,
        options.batch * int(np.prod(options.patch)),
        options.repeats,
    )


def _pipeline(config, collections, shape, patch) -> None:
    from emjax.data.phantom import PhantomConfig, make_phantom
    from emjax.inference.predictor import Network
    from emjax.inference.tilings import blend, tiling

    raw = np.asarray(make_phantom(PhantomConfig(shape=shape)).raw)
    net = Network(config, collections, patch)
    stride = tuple(max(1, n // 2) for n in patch)
    net(np.zeros((1, *patch), np.uint8))
    run = lambda patches: {k: np.asarray(v)[: len(patches)] for k, v in net(patches).items()}  # noqa: E731
    found = {}

    def predict():
        found.update(blend(raw, tiling(shape, "centred", patch, stride), run, net.batch))

    wall, _ = clocks(predict)
    voxels = int(np.prod(shape))
    print(f"prediction of {shape}: {wall:.1f} s, {voxels / wall / 1e6:.4f} MVox/s")
    wall, _ = clocks(lambda: segneuron.decode(config, found))
    print(f"foreground-restricted multicut: {wall:.1f} s, {voxels / wall / 1e6:.3f} MVox/s")


if __name__ == "__main__":
    main()

"""Peak memory of predicting and segmenting a large volume, with kills on the way.

    python eval/bench/memory.py --checkpoint runs/segneuron/finetune                            # 512 x 512 x 512 voxels
    python eval/bench/memory.py --checkpoint runs/agq/agq_cpu --shape 256,512,512 --kills 60,120
    python eval/bench/memory.py --fresh configs/segneuron/finetune.py:debug --shape 128,256,256 # without a training
    python eval/bench/memory.py --made_up configs/segneuron/finetune.py:local                   # the segmentation alone

Writes a volume (synthetic neuropil, mirrored to the wanted size, slab by slab), runs ``python -m emjax.segment`` on it
with the given memory limits, kills it with SIGKILL after each of ``--kills`` seconds and starts the same command again,
until it is done. Other arguments go to ``emjax.segment``. Prints and writes the peak resident memory and the time of
each attempt. Scores mean nothing here. ``--made_up`` skips the network: affinities and foreground are made from the
labels of the synthetic volume, with noise, and only segmented.
"""

import argparse
import math
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
from scipy import ndimage

from emjax.config import load
from emjax.data.phantom import PhantomConfig, make_phantom
from emjax.data.volume import create_volume, is_complete, open_volume
from emjax.inference.options import byte_size
from emjax.training.checkpoints import Checkpoints
from emjax.training.state import fresh

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from trainings import machine

TILE = 128


def triple(text: str) -> tuple[int, int, int]:
    z, y, x = (int(part) for part in text.split(","))
    return z, y, x


def mirrored(length: int) -> np.ndarray:
    """Positions in a tile that is mirrored again and again."""
    place = np.arange(length) % (2 * TILE)
    return np.minimum(place, 2 * TILE - 1 - place)


def write_image(path: pathlib.Path, shape: tuple[int, int, int]) -> None:
    """A synthetic volume of any size, mirrored at multiples of :data:`TILE`."""
    raw = np.asarray(make_phantom(PhantomConfig(shape=(TILE,) * 3, seed=0)).raw)
    z, y, x = (mirrored(length) for length in shape)
    with create_volume(str(path), shape, np.uint8, voxel_size=(10, 10, 10), chunks=(64, 64, 64)) as out:
        for start in range(0, shape[0], 64):
            out[start : start + 64] = raw[np.ix_(z[start : start + 64], y, x)]


def write_prediction(path: pathlib.Path, shape: tuple[int, int, int]) -> None:
    """Affinities and foreground as SegNeuron predicts them, of the labels of the synthetic volume, with noise."""
    labels = np.asarray(make_phantom(PhantomConfig(shape=(TILE,) * 3, seed=0)).labels)
    affinities = np.zeros((3, *labels.shape), np.float32)
    for axis in range(3):
        along = np.moveaxis(labels, axis, 0)
        np.moveaxis(affinities[axis], axis, 0)[1:] = (along[1:] == along[:-1]) & (along[1:] > 0)
    # Membranes some voxels wide and blurred, as a network's are.
    wide = [ndimage.minimum_filter(channel, (1, 3, 3)) for channel in (*affinities, (labels > 0).astype(np.float32))]
    smooth = [ndimage.gaussian_filter(channel, 0.7) for channel in wide]
    rng = np.random.default_rng(0)
    z, y, x = (mirrored(length) for length in shape)
    offsets = [[-1, 0, 0], [0, -1, 0], [0, 0, -1]]
    for name, channels in (("affinities", smooth[:3]), ("foreground", smooth[3:])):
        attributes = {"scale": 1 / 255, **({"offsets": offsets} if name == "affinities" else {})}
        with create_volume(
            f"{path}:{name}",
            (len(channels), *shape),
            np.uint8,
            voxel_size=(10, 10, 10),
            attributes=attributes,
            chunks=(1, 64, 64, 64),
        ) as out:
            for number, channel in enumerate(channels):
                for start in range(0, shape[0], 64):
                    part = channel[np.ix_(z[start : start + 64], y, x)]
                    part = part + rng.normal(0, 0.02, part.shape).astype(np.float32)
                    out[number, start : start + 64] = np.rint(255 * np.clip(part, 0, 1)).astype(np.uint8)


def fresh_run(spec: str, workdir: pathlib.Path) -> pathlib.Path:
    """A work directory with a checkpoint of random weights."""
    experiment = load(spec)
    state = jax.jit(lambda key: fresh(experiment, key))(jax.random.key(0))
    shutil.rmtree(workdir, ignore_errors=True)
    workdir.mkdir(parents=True)
    checkpoints = Checkpoints(workdir, experiment)
    checkpoints.save(1, state)
    checkpoints.close()
    return workdir


def attempt(command: list[str], kill_after: float | None) -> tuple[int, float, float]:
    """Exit code, peak resident memory (GB) and seconds of one start of the command."""
    begin, peak = time.monotonic(), 0.0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        status = pathlib.Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            try:
                lines = status.read_text().splitlines()
                peak = max([peak, *(float(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))])
            except OSError:
                break
            if kill_after is not None and time.monotonic() - begin > kill_after:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.25)
        code = process.wait()
    return code, peak, time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="work directory of a run")
    source.add_argument(
        "--made_up", metavar="FILE.py[:variant]", help="segment a made-up prediction, as configured there"
    )
    source.add_argument("--fresh", metavar="FILE.py[:variant]", help="a network with random weights instead")
    parser.add_argument("--shape", type=triple, default=(512, 512, 512), help="z,y,x (default: %(default)s)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/memory"), help="default: %(default)s")
    parser.add_argument("--memory", default="1GB", help="working memory for blocks (default: %(default)s)")
    parser.add_argument("--kills", default="60", help="seconds after which attempts are killed; empty for none")
    parser.add_argument("--output", type=pathlib.Path, help="also write the table here")
    options, more = parser.parse_known_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    name = "x".join(map(str, options.shape))
    image, labels = options.folder / f"image_{name}.zarr", options.folder / f"labels_{name}.zarr"
    command = [sys.executable, "-m", "emjax.segment", "--output", str(labels)]
    if options.made_up:
        image = options.folder / f"prediction_{name}.zarr"
        if not (image.exists() and is_complete(f"{image}:foreground")):
            write_prediction(image, options.shape)
        command += ["--config", options.made_up]
    else:
        if not (image.exists() and is_complete(str(image))):
            write_image(image, options.shape)
        checkpoint = options.checkpoint or str(fresh_run(options.fresh, options.folder / "fresh"))
        command += ["--checkpoint", checkpoint, "--which", "latest"]
    command += ["--input", str(image)]
    command += ["--memory", options.memory, "--memory-whole", options.memory, "--threads", "1", *more]
    kills: list[float | None] = [float(text) for text in options.kills.split(",") if text]
    voxels = math.prod(options.shape)
    lines = [
        f"`python {shlex.join(sys.argv)}`: {name} voxels ({voxels / 1e6:.0f} MVox), {machine()}, blocks may take "
        f"{byte_size(options.memory, '--memory') / 1e9:g} GB.",
        "",
        "| attempt | ended | seconds | peak resident memory (GB) |",
        "|---|---|---|---|",
    ]
    for number, kill_after in enumerate([*kills, None], 1):
        code, peak, seconds = attempt(command, kill_after)
        ended = "done" if code == 0 else "killed" if code == -signal.SIGKILL else f"failed with code {code}"
        lines.append(f"| {number} | {ended} | {seconds:.0f} | {peak:.2f} |")
        print(lines[-1], flush=True)
        if code not in (0, -signal.SIGKILL):
            return 1
        if code == 0:
            break
    found = open_volume(str(labels))
    segments: set[int] = set()
    empty = 0
    for start in range(0, options.shape[0], 32):
        part = found[start : start + 32]
        segments.update(np.unique(part).tolist())
        empty += int((part == 0).sum())
    lines += ["", f"{len(segments - {0})} segments; {100 * empty / voxels:.1f} % of the voxels are background."]
    print("\n".join(lines))
    if options.output:
        options.output.write_text("# Memory of a large volume\n\n" + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

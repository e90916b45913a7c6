"""FGNet on CREMI A, B and C, with one command: the last 25 sections of each, both recipes, scores.

    python eval/fgnet_cremi.py --checkpoint runs/fgnet_cremi --data ../cremi

``--data`` holds ``sample_A_20160501.hdf`` and so on (cremi.org). Sections 100 to 124 of each sample are predicted by windows as
trained at half a window's stride, blended by a Gaussian, and segmented as in ``fgnet_ac3.py``: agglomeration at 0.5 and
multicut, each in a table of its own, nothing tuned on the test sections. One checkpoint serves all samples; of checkpoints
that were trained on one sample each, give ``--samples A`` and so on. VOI in bits, adapted Rand error and CREMI score,
ground truth 0 left out. No published table of this split could be read, so none is printed beside.
"""

import argparse
import os
import pathlib
import sys
import tempfile

import numpy as np
from fgnet_ac3 import affinities_of, recipes

from emjax.cli import run as run_command
from emjax.data.volume import open_volume
from emjax.errors import UserError
from emjax.metrics import Scores, border_mask, score

TEST = slice(100, 125)
VOXEL_SIZE = (40.0, 4.0, 4.0)
IGNORED = 2**64 - 1
"""What CREMI's files have where there is no ground truth."""


def truth_of(file: str) -> np.ndarray:
    """Test labels uint64, 0 where there is no ground truth."""
    labels = np.asarray(open_volume(f"{file}:volumes/labels/neuron_ids", voxel_size=VOXEL_SIZE)[TEST]).astype(np.uint64)
    return np.where(labels == IGNORED, np.uint64(0), labels)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="work directory of emjax.train")
    parser.add_argument("--which", default="best", help="best, latest or a step")
    parser.add_argument("--data", required=True, type=pathlib.Path, help="folder of sample_X_20160501.hdf")
    parser.add_argument("--samples", default="ABC")
    parser.add_argument("--flips", default="", help="axes of test-time flips, such as zyx (default: none)")
    parser.add_argument("--border", type=float, default=0.0, help="leave out voxels nearer to a label border, nm")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the post-processing")
    options = parser.parse_args(arguments)
    files = {sample: options.data / f"sample_{sample}_20160501.hdf" for sample in options.samples}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"--data {options.data}: {file.name} is not there (cremi.org has it)")
    found: dict[str, dict[str, Scores]] = {}
    for sample, file in files.items():
        labels = truth_of(str(file))
        kept = ~border_mask(labels, options.border, VOXEL_SIZE) if options.border else None
        with tempfile.TemporaryDirectory() as folder:
            output = str(pathlib.Path(folder) / "prediction.zarr")
            raw = f"{file}:volumes/raw"
            affinities = affinities_of(options.checkpoint, options.which, raw, TEST, options.flips, output)
        for recipe, segmentation in recipes(affinities, options.threads).items():
            found.setdefault(recipe, {})[sample] = score(segmentation, labels, kept)
    for recipe, scores in found.items():
        print(f"\n{recipe}\n{'':<8}{'split':>8}{'merge':>8}{'VOI':>8}{'ARAND':>8}{'CREMI':>8}")
        rows = {
            sample: (one.voi_split, one.voi_merge, one.voi_sum, one.arand_skimage, one.cremi_score)
            for sample, one in scores.items()
        }
        if len(rows) > 1:
            rows["mean"] = tuple(np.mean(list(rows.values()), axis=0))
        for name, row in rows.items():
            print(f"{name:<8}" + "".join(f"{value:8.3f}" for value in row))
    return 0


if __name__ == "__main__":
    run_command(main, sys.argv[1:])

"""Converts checkpoints of published networks to emjax and back.

    python -m emjax.convert sam2.1_hiera_tiny.pt weights/sam2.1_tiny            # to an Orbax folder
    python -m emjax.convert model.safetensors weights/sam2.1_tiny.safetensors   # Hugging Face names, without PyTorch
    python -m emjax.convert weights/sam2.1_tiny back.pt                         # and back to the official names
    python -m emjax.convert sam2.1_hiera_tiny.pt --describe                     # only check it and say what it is

Every name and shape must be accounted for; otherwise all of them are listed and nothing is written.
"""

import pathlib

import numpy as np

from emjax.cli import parser, run
from emjax.errors import UserError
from emjax.weights.agq import FAMILY as AGQ
from emjax.weights.family import Checkpoint, read_checkpoint, to_state, write_checkpoint
from emjax.weights.files import check_target
from emjax.weights.rules import leaves, parameter_count
from emjax.weights.sam2 import FAMILY as SAM2
from emjax.weights.sam4em import FAMILY as SAM4EM
from emjax.weights.segneuron import FAMILY as SEGNEURON

FAMILIES = (SAM2, AGQ, SEGNEURON, SAM4EM)


def describe(checkpoint: Checkpoint) -> str:
    """One line: network, size, version, arrays, values."""
    arrays = leaves(checkpoint.collections)
    settings = ", ".join(f"{name} {value}" for name, value in checkpoint.settings.items())
    return (
        f"{checkpoint.family.name} ({settings}): {len(arrays)} arrays, "
        f"{parameter_count(checkpoint.collections):,} values, read from {checkpoint.source.get('names', 'emjax')} names"
    )


def expect(checkpoint: Checkpoint, wanted: dict[str, str | None]) -> None:
    """Raises :class:`UserError` if the checkpoint is not what the user says it is."""
    for setting, value in wanted.items():
        found = checkpoint.settings.get(setting)
        if value is not None and str(found) != value:
            raise UserError(f"the checkpoint's {setting} is {found}, but --{setting} {value} was asked for")


def verify(target: pathlib.Path, checkpoint: Checkpoint) -> None:
    """Reads the written file again and compares every bit. Raises ``RuntimeError`` where one differs."""
    again = read_checkpoint(target, FAMILIES)
    mine, theirs = (to_state(one, "emjax") for one in (checkpoint, again))
    wrong = [name for name in mine if name not in theirs or not np.array_equal(mine[name], theirs[name])]
    if wrong or len(mine) != len(theirs):
        raise RuntimeError(f"{target} does not hold what was written: {', '.join(wrong[:10])}")


def main(arguments: list[str]) -> int:
    options = parser("convert", __doc__ or "")
    options.add_argument("source", type=pathlib.Path, help=".pt, .safetensors, Hugging Face folder, or Orbax folder")
    options.add_argument("target", type=pathlib.Path, nargs="?", help="NAME.safetensors, NAME.pt, or an Orbax folder")
    options.add_argument("--names", help="names in the target: official, huggingface or emjax")
    options.add_argument("--model", choices=[family.name for family in FAMILIES], help="fail if it is another network")
    options.add_argument("--size", help="fail if it is another size, such as tiny")
    options.add_argument("--version", help="fail if it is another version, such as 2.1")
    options.add_argument("--overwrite", action="store_true", help="replace the target if it is there")
    options.add_argument("--verify", action="store_true", help="read the target again and compare every bit")
    options.add_argument("--describe", action="store_true", help="only check the source and say what it is")
    chosen = options.parse_args(arguments)
    if chosen.target is None and not chosen.describe:
        raise UserError("a target is missing: NAME.safetensors, NAME.pt, a folder for Orbax, or --describe")
    if chosen.target is not None and not chosen.describe:
        check_target(chosen.target, chosen.overwrite)
    families = [family for family in FAMILIES if chosen.model in (None, family.name)]
    checkpoint = read_checkpoint(chosen.source, families)
    expect(checkpoint, {"size": chosen.size, "version": chosen.version})
    print(describe(checkpoint))
    if chosen.describe:
        return 0
    names = write_checkpoint(chosen.target, checkpoint, chosen.names)
    if chosen.verify:
        verify(chosen.target, checkpoint)
    print(f"wrote {chosen.target} with {names} names" + (", verified" if chosen.verify else ""))
    return 0


if __name__ == "__main__":
    run(main)

"""The official AGQ checkpoint: 257 names, strict in both directions, and the optimiser's state beside them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from emjax.errors import UserError
from emjax.models.agq import AGQ, AGQConfig
from emjax.models.functional import Definition, define
from emjax.weights.family import Family, Shapes, Spelling
from emjax.weights.rules import Rules, State, read_state, write_state

_COUNTER = "num_batches_tracked"

_RENAMES = (
    (r"^stem\.", "conv_in."),
    (r"^down\.(\d+)\.reduce\.", r"down_layers.\1.1."),
    (r"^down\.(\d+)\.block\.", r"down_layers.\1.2.conv."),
    (r"^up\.(\d+)\.merge\.", r"up_layers.\1.0."),
    (r"^up\.(\d+)\.block\.", r"up_layers.\1.1.conv."),
    (r"\.conv\.first\.", ".conv.0."),
    (r"\.conv\.second\.", ".conv.1."),
    (r"^fusion\.pre\.", "fusion_block.pre_convs."),
    (r"^fusion\.post\.", "fusion_block.post_convs.0."),
    (r"^(mask|affinity)_branch\.convs\.(\d+)\.", r"\1_branch.mask_convs.\2.0."),
    (r"^decoder\.query_convs\.", "inst_decoder.rpn.inst_convs."),
    (r"^decoder\.learned\.", "inst_decoder.rpn.learned_masks_embed."),
    (r"^decoder\.heads\.0\.kernel\.", "inst_decoder.rpn.mask_kernel."),
    (r"^decoder\.heads\.0\.", "inst_decoder.rpn."),
    (r"^decoder\.updates\.", "inst_decoder.kernel_updators."),
    (r"^decoder\.interactions\.", "inst_decoder.kernel_interactors."),
    (r"\.attention_in\.", ".attn.c_attn."),
    (r"\.attention_out\.", ".attn.c_proj."),
    (r"\.norm_attention\.", ".ln_1."),
    (r"\.mlp_in\.", ".mlp.c_fc."),
    (r"\.mlp_out\.", ".mlp.c_proj."),
    (r"\.norm_mlp\.", ".ln_2."),
    (r"\.conv\.weight$", ".0.weight"),
    (r"\.norm\.(\w+)$", r".1.\1"),
)


def rules(iterations: int = 2) -> Rules:
    """The names of a network with this many ``iterations``.

    The reference numbers heads and backgrounds of the iterations from 0, and lists the first stage's background last.
    """
    numbered = []
    for index in range(1, iterations + 1):
        theirs = f"inst_decoder.predictors.{index - 1}."
        numbered.append((rf"^decoder\.heads\.{index}\.kernel\.", f"{theirs}fc_kernel."))
        numbered.append((rf"^decoder\.heads\.{index}\.", theirs))
    for index in range(iterations + 1):
        theirs = f"inst_decoder.bg_convs.{(index - 1) % (iterations + 1)}."
        numbered.append((rf"^decoder\.backgrounds\.{index}\.", theirs))
    return Rules(renames=(*numbered, *_RENAMES))


def network(config: AGQConfig) -> Definition:
    """Shapes and structure of a network."""
    return define(lambda rngs: AGQ(config, rngs=rngs))


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def config_of(state: Mapping[str, Any], what: str = "checkpoint", **changes: Any) -> AGQConfig:
    """The configuration that a state dict's shapes tell; ``changes`` replace what they do not.

    Widths, isotropic levels, iterations, convolutions per branch and learned queries are read off; the number of slots
    for guided queries, group and head counts and precision leave no trace in a checkpoint.

    Raises:
        UserError: the state has not the names of an AGQ network.
    """
    levels = _count(state, r"down_layers\.(\d+)\.")
    telling = [f"down_layers.{level}.1.0.weight" for level in range(levels)] + ["fusion_block.post_convs.0.0.weight"]
    missing = [name for name in telling if name not in state]
    if levels < 2 or missing:
        lacking = missing[0] if missing else "down_layers"
        raise UserError(f"{what}: not an AGQ network, {lacking} is missing (found {len(state)} arrays)")
    learned = state.get("inst_decoder.rpn.learned_masks_embed.weight")
    found = AGQConfig(
        filters=tuple(int(state[name].shape[0]) for name in telling[:-1]),
        isotropic=tuple(state[name].shape[2] == 3 for name in telling[:-1]),
        features=int(state[telling[-1]].shape[0]),
        branch_convs=max(1, _count(state, r"mask_branch\.mask_convs\.(\d+)\.")),
        iterations=max(1, _count(state, r"inst_decoder\.predictors\.(\d+)\.")),
        learned=0 if learned is None else int(learned.shape[0]),
    )
    return dataclasses.replace(found, **changes)


def read_agq(state: Mapping[str, np.ndarray], config: AGQConfig, what: str = "checkpoint") -> dict:
    """A PyTorch state dict as the collections of ``AGQ(config)``: float32, bit for bit.

    Raises:
        UserError: names or shapes that do not fit, all of them listed.
    """
    return read_state(state, network(config).shapes, rules(config.iterations), what)


def _with_counters(state: State, batches: int = 0) -> State:
    counters = [name.removesuffix("running_mean") for name in state if name.endswith(".running_mean")]
    return state | {f"{prefix}{_COUNTER}": np.asarray(batches, np.int64) for prefix in counters}


def write_agq(collections: Mapping[str, Mapping], config: AGQConfig, batches: int = 0) -> State:
    """Our collections under the reference's names; every batch norm's counter of batches is set to ``batches``."""
    return _with_counters(write_state(collections, rules(config.iterations)), batches)


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What the official checkpoint holds.

    ``collections`` as :func:`read_agq` gives them; ``first`` and ``second`` moments of Adam, nested like
    ``collections["params"]``; ``iteration``: updates done.
    """

    collections: dict
    first: dict
    second: dict
    iteration: int


def read_training_state(checkpoint: Mapping[str, Any], config: AGQConfig, what: str = "checkpoint") -> TrainingState:
    """Weights, Adam's moments and the iteration of an official checkpoint.

    It has the entries ``state_dict``, ``optimizer`` and ``iteration``. The optimiser numbers
    the parameters in the order of the state dict.

    Raises:
        UserError: a part is missing, or the optimiser's state is that of other parameters.
    """
    for part in ("state_dict", "optimizer"):
        if part not in checkpoint:
            raise UserError(f"{what}: has no {part!r}, found {', '.join(map(str, checkpoint))}")
    state = checkpoint["state_dict"]
    collections = read_agq(state, config, what)
    buffers = ("running_mean", "running_var", _COUNTER)
    names = [name for name in state if not name.endswith(buffers)]
    numbers = [number for group in checkpoint["optimizer"]["param_groups"] for number in group["params"]]
    moments = checkpoint["optimizer"]["state"]
    if len(numbers) != len(names) or any(number not in moments for number in numbers):
        raise UserError(
            f"{what}: the optimiser has {len(numbers)} parameters, {len(moments)} of them with a state; "
            f"expected {len(names)}"
        )
    shapes = {"params": network(config).shapes["params"]}

    def moment(part: str) -> dict:
        arrays = {name: np.asarray(moments[number][part]) for name, number in zip(names, numbers)}
        return read_state(arrays, shapes, rules(config.iterations), f"{what}: {part}")["params"]

    steps = {int(moments[number]["step"]) for number in numbers}
    iteration = int(checkpoint.get("iteration", max(steps, default=0)))
    return TrainingState(collections, moment("exp_avg"), moment("exp_avg_sq"), iteration)


_TOLD = ("filters", "isotropic", "features", "branch_convs", "iterations", "learned")


def _recognise(shapes: Shapes) -> str | None:
    return "official" if "inst_decoder.rpn.mask_kernel.weight" in shapes else None


def _identify(shapes: Shapes, spelling: str, what: str) -> dict[str, Any]:
    stand_ins = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    found = config_of(stand_ins, what)
    # JSON has lists, not tuples.
    settings = {name: getattr(found, name) for name in _TOLD}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def config_from(settings: Mapping[str, Any], **changes: Any) -> AGQConfig:
    """The network's configuration from a checkpoint's settings; ``changes`` replace fields, such as ``dtype``."""
    told: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    return dataclasses.replace(AGQConfig(**told), **changes)


FAMILY = Family(
    name="agq",
    spellings={"official": Spelling(rules(), finish=_with_counters)},
    recognise=_recognise,
    identify=_identify,
    network=lambda settings: network(config_from(settings)),
)

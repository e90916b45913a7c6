"""Checkpoints of SegNeuron: names, layouts, the heads that its forward pass never uses, and which network one holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from emjax.errors import UserError
from emjax.models.functional import Definition, define
from emjax.models.mnet import Config, MNet
from emjax.weights.family import Family, Shapes, Spelling
from emjax.weights.rules import Rules, State, read_state, write_state

DEAD_HEADS = r"^outputs2?\.[1-6]\.weight$"

RULES = Rules(
    renames=(
        (r"^(encoder|affinity|foreground)\.", ""),
        (r"^affinity_head\.", "outputs.0."),
        (r"^foreground_head\.", "outputs2.0."),
        (r"\.planar\.", ".CB2d."),
        (r"\.volumetric\.", ".CB3d."),
    ),
    ignored=(r"\.num_batches_tracked$", DEAD_HEADS),
)


def dead_heads(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the twelve head tensors that are in every checkpoint and in no computation."""
    inputs = [config.widths[level] for level in (1, 1, 2, 2, 3, 3)]
    return {
        f"{head}.{index}.weight": (features, width, 1, 1, 1)
        for head, features in zip(("outputs", "outputs2"), config.outputs)
        for index, width in enumerate(inputs, 1)
    }


def without_prefix(state: Mapping[str, np.ndarray]) -> State:
    """The state without the ``module.`` that data-parallel training puts before every name."""
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def config_of(state: Mapping[str, np.ndarray], what: str = "checkpoint") -> Config:
    """Widths, merge kind (``cat``, or ``sub``, which cannot be told from ``sum``), skips and outputs from the shapes.

    Raises:
        UserError: the state has not the names of an MNet.
    """
    state = without_prefix(state)
    levels = [f"{name}.CB2d.conv1.conv.weight" for name in ("down11", "down12", "down13", "down14", "bottleneck1")]
    telling = [*levels, "down22.CB2d.conv1.conv.weight", "up14.CB2d.conv1.conv.weight"]
    heads = ["outputs.0.weight", "outputs2.0.weight"]
    missing = [name for name in telling + heads if name not in state]
    if missing:
        raise UserError(f"{what}: not a SegNeuron network, {missing[0]} is missing (found {len(state)} arrays)")
    widths = tuple(int(state[name].shape[0]) for name in levels)
    doubled = 2 if state[telling[-2]].shape[1] == 2 * widths[1] else 1
    return Config(
        widths=widths,  # type: ignore[arg-type]
        merge="cat" if doubled == 2 else "sub",
        in_features=int(state[levels[0]].shape[1]),
        outputs=(int(state[heads[0]].shape[0]), int(state[heads[1]].shape[0])),
        skips=state[telling[-1]].shape[1] != doubled * widths[1],
    )


def read_segneuron(state: Mapping[str, np.ndarray], config: Config, what: str = "checkpoint") -> dict:
    """A PyTorch state dict (462 names, with or without ``module.``) as the collections of ``MNet(config)``.

    Raises:
        UserError: names or shapes that do not fit, all of them listed; for a network with skips, a checkpoint of the
            pretraining network; and the other way round.
    """
    state = without_prefix(state)
    found = config_of(state, what)
    if found.skips != config.skips:
        kinds = {True: "segmentation network", False: "pretraining network (no skip connections)"}
        raise UserError(
            f"{what}: holds SegNeuron's {kinds[found.skips]}, expected the {kinds[config.skips]}; "
            "a pretraining checkpoint serves only as init_from of fine-tuning"
        )
    wrong = [
        f"{name} is {state[name].shape}, expected {shape}"
        for name, shape in dead_heads(config).items()
        if name in state and state[name].shape != shape
    ]
    if wrong:
        raise UserError(f"{what}: {len(wrong)} of another shape: {'; '.join(wrong)}")
    return read_state(state, define(lambda rngs: MNet(config, rngs)).shapes, RULES, what)


def write_segneuron(collections: Mapping[str, Mapping], config: Config) -> State:
    """Our collections as SegNeuron's 462 arrays, the unused heads as zeros, so that its strict loading accepts them."""
    unused = {name: np.zeros(shape, np.float32) for name, shape in dead_heads(config).items()}
    return write_state(collections, RULES) | unused


def network(settings: Mapping[str, Any]) -> Definition:
    """The network of stored settings (fields of :class:`emjax.models.mnet.Config`)."""
    plain: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()
    }
    config = Config(**plain)
    return define(lambda rngs: MNet(config, rngs))


def _recognise(shapes: Shapes) -> str | None:
    names = {name.removeprefix("module.") for name in shapes}
    return "official" if {"bottleneck5.CB3d.conv1.conv.weight", "outputs2.0.weight"} <= names else None


def _stand_ins(shapes: Shapes) -> State:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}


def _identify(shapes: Shapes, spelling: str, what: str) -> dict[str, Any]:
    config = config_of(_stand_ins(shapes), what)
    fields = ("widths", "merge", "in_features", "outputs", "skips")
    return {name: value for name, value in dataclasses.asdict(config).items() if name in fields}


def _with_dead_heads(state: State) -> State:
    unused = dead_heads(config_of(state))
    return state | {name: np.zeros(shape, np.float32) for name, shape in unused.items()}


FAMILY = Family(
    name="segneuron",
    spellings={"official": Spelling(RULES, prepare=without_prefix, finish=_with_dead_heads)},
    recognise=_recognise,
    identify=_identify,
    network=network,
)
"""For ``python -m emjax.convert``. Merging by ``sum`` leaves no trace; the published ``sub`` is assumed."""

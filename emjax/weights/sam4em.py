"""Checkpoints of SAM4EM: the published names, start-up from a SAM 2, and export with scaled and merged adapters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from emjax.errors import UserError
from emjax.models import sam4em
from emjax.models.functional import Definition, define
from emjax.models.layers.lora import LoRA, is_adapter, merge
from emjax.models.layers.position import pixel_position
from emjax.models.sam2.config import HIERA
from emjax.weights.family import Family, Shapes, Spelling
from emjax.weights.rules import CHANNELS_LAST, TRANSPOSED_KERNEL, Rules, State, leaves, nested, write_state
from emjax.weights.sam2 import OFFICIAL, trunk_size

PREFIX = "sam."
BUFFERS = r"^sam\.mem\.(memory|positional_encoding)$"
DEAD = r"^sam\.(fpn\.downsampling_(128|64)|mask_decoder\.skip_connect)\."

RULES = Rules(
    renames=(
        (r"^", PREFIX),
        (r"attn\.qkv\.", "attn.qkv.qkv."),
        (r"attn\.lora\.([qkv])\.([ab])\.", r"attn.qkv.linear_\2_\1."),
        (r"(neck\.convs\.\d+)\.", r"\1.conv."),
        (r"mask_downscaling\.conv1\.", "mask_downscaling.0."),
        (r"mask_downscaling\.norm1\.", "mask_downscaling.1."),
        (r"mask_downscaling\.conv2\.", "mask_downscaling.3."),
        (r"mask_downscaling\.norm2\.", "mask_downscaling.4."),
        (r"mask_downscaling\.conv3\.", "mask_downscaling.6."),
        (r"\.upscale1\.", ".output_upscaling.0."),
        (r"\.upscale_norm\.", ".output_upscaling.1."),
        (r"\.upscale2\.", ".output_upscaling.3."),
        (r"\.join_conv1\.", ".skip_connect.0."),
        (r"\.join_norm1\.", ".skip_connect.1."),
        (r"\.join_conv2\.", ".skip_connect.3."),
        (r"\.join_norm2\.", ".skip_connect.4."),
        (r"fpn\.middle_conv\.", "fpn.smooth_64.0."),
        (r"fpn\.middle_norm\.", "fpn.smooth_64.1."),
        (r"fpn\.coarse_conv\.", "fpn.smooth_32.0."),
        (r"fpn\.coarse_norm\.", "fpn.smooth_32.1."),
        (r"fpn\.fusion_conv1\.", "fpn.fusion.0."),
        (r"fpn\.fusion_norm1\.", "fpn.fusion.1."),
        (r"fpn\.fusion_conv2\.", "fpn.fusion.3."),
        (r"fpn\.fusion_norm2\.", "fpn.fusion.4."),
        (r"fpn\.fusion_conv3\.", "fpn.fusion.6."),
        (r"fpn\.fusion_norm3\.", "fpn.fusion.7."),
        (r"fpn\.projection\.", "fpn.out_proj.0."),
        (r"mem\.mask_conv1\.", "mem.mask_encoder.0."),
        (r"mem\.mask_conv2\.", "mem.mask_encoder.3."),
        (r"(mem\.\w+_proj)\.", r"\1.0."),
    ),
    layouts=(
        (r"trunk\.pos_embed", CHANNELS_LAST),
        (r"upscale[12]\.kernel$", TRANSPOSED_KERNEL),
    ),
    ignored=(r"\.num_batches_tracked$", BUFFERS, DEAD),
)

_NORMS = ("smooth_32.1", "smooth_64.1", "fusion.1", "fusion.4", "fusion.7")
_DEAD_CONVS = ("downsampling_128.0", "downsampling_128.3", "downsampling_64.0", "downsampling_64.3")
_DEAD_NORMS = ("downsampling_128.1", "downsampling_128.4", "downsampling_64.1", "downsampling_64.4")


def dead_shapes(features: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the 31 arrays that are in every checkpoint and in no computation (without batch counters)."""
    fine = features // 8
    shapes: dict[str, tuple[int, ...]] = {}
    for name in _DEAD_CONVS:
        shapes[f"sam.fpn.{name}.weight"] = (features, features, 3, 3)
        shapes[f"sam.fpn.{name}.bias"] = (features,)
    for name in _DEAD_NORMS:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"sam.fpn.{name}.{leaf}"] = (features,)
    joining = "sam.mask_decoder.skip_connect"
    shapes |= {f"{joining}.0.weight": (fine, 2 * fine, 1, 1), f"{joining}.3.weight": (fine, fine, 3, 3)}
    shapes |= {f"{joining}.{i}.{leaf}": (fine,) for i, leaf in ((0, "bias"), (1, "weight"), (1, "bias"), (3, "bias"))}
    return shapes | {f"{joining}.4.weight": (fine,), f"{joining}.4.bias": (fine,)}


def _recognise(shapes: Shapes) -> str | None:
    telling = {"sam.mask_decoder2.mask_tokens.weight", "sam.mem.output_proj.0.weight", "sam.fpn.out_proj.0.weight"}
    return "official" if telling <= set(shapes) else None


def _identify(shapes: Shapes, spelling: str, what: str) -> dict[str, Any]:
    """Size of the trunk, rank and width of its adapters, classes, and the grid of the buffers."""
    size = trunk_size(shapes, "sam.image_encoder.trunk.", what)
    needed = {
        "rank": "sam.image_encoder.trunk.blocks.0.attn.qkv.linear_a_q.weight",
        "tokens": "sam.mask_decoder.mask_tokens.weight",
        "features": "sam.fpn.out_proj.0.weight",
        "memory": "sam.mem.memory",
    }
    missing = [name for name in needed.values() if name not in shapes]
    if missing:
        raise UserError(f"{what} is no whole SAM4EM: {', '.join(missing)} is missing")
    wrong = [
        f"{name} is {shapes[name]}, expected {shape}"
        for name, shape in dead_shapes(shapes[needed["features"]][0]).items()
        if name in shapes and shapes[name] != shape
    ]
    if wrong:
        raise UserError(f"{what}: {len(wrong)} of another shape: {'; '.join(wrong)}")
    return {
        "size": size,
        "rank": shapes[needed["rank"]][0],
        "classes": shapes[needed["tokens"]][0] - 1,
        "grid": list(shapes[needed["memory"]][-2:]),
    }


def config_of(settings: Mapping[str, Any], **changes) -> sam4em.Config:
    """The network of a checkpoint's settings, in the published mode; ``changes`` replace fields."""
    base = sam4em.published(sam4em.Config(hiera=HIERA[settings["size"]], classes=settings["classes"]))
    return dataclasses.replace(base, lora=LoRA(rank=settings["rank"], faithful_halves=True), **changes)


def _network(settings: Mapping[str, Any]) -> Definition:
    config = config_of(settings)
    return define(lambda rngs: sam4em.SAM4EM(config, rngs))


def _unused(features: int, grid: tuple[int, int], slots: int = 8) -> State:
    """The arrays that the strict loading of the published code asks for and its forward pass never reads or resets."""
    state = {
        name: (np.ones if name.endswith("running_var") else np.zeros)(shape, np.float32)
        for name, shape in dead_shapes(features).items()
    }
    for name in (*_NORMS, *_DEAD_NORMS):
        state[f"sam.fpn.{name}.num_batches_tracked"] = np.zeros((), np.int64)
    place = np.asarray(pixel_position(*grid, features // 2))
    state["sam.mem.positional_encoding"] = np.ascontiguousarray(place.transpose(2, 0, 1)[None])
    state["sam.mem.memory"] = np.zeros((slots, features // 2, *grid), np.float32)
    return state


def _completed(state: State, grid: tuple[int, int] = (128, 128)) -> State:
    return state | _unused(state["sam.fpn.out_proj.0.weight"].shape[0], grid)


FAMILY = Family(
    name="sam4em",
    spellings={"official": Spelling(RULES, finish=_completed)},
    recognise=_recognise,
    identify=_identify,
    network=_network,
)
"""For ``python -m emjax.convert``. Written files have the buffers of 512 x 512 inputs, as published."""


def export(collections: Mapping[str, Mapping], config: sam4em.Config, grid: tuple[int, int] = (128, 128)) -> State:
    """A trained network under the published names, so that the published code loads and runs it.

    That code has no factor before its adapters and none in its decoders: the factor goes into B, and adapters of decoders
    are merged into their matrices. Its memory and second prompt work as published whatever was trained, so a network
    trained in another mode gives other masks there. Raises ``UserError`` for a network with parts that it has not.
    """
    if config.lora is None or set(config.lora.targets) != {"q", "v"}:
        raise UserError("the published SAM4EM has adapters of q and v in its encoder; this network has others, or none")
    if config.decoders != 2 or config.memory.update == "none":
        raise UserError("the published SAM4EM has two decoders and a memory; this network lacks one of them")
    params = dict(collections["params"])
    if config.decoder_lora is not None:
        params |= {name: merge(params[name], config.decoder_lora) for name in ("mask_decoder", "mask_decoder2")}
    flat = leaves(params)
    flat = {
        path: value * config.lora.scale if is_adapter(path) and path.endswith(".b.kernel") else value
        for path, value in flat.items()
    }
    return _completed(write_state({**collections, "params": nested(flat)}, RULES), grid)


_SAM2_PROMPT, _SAM2_DECODER = "sam_prompt_encoder", "sam_mask_decoder"
_FRESH = ("mask_tokens", "output_hypernetworks_mlps", "iou_prediction_head", "join_")
"""Parts of a decoder that start-up never takes from SAM 2: they are other ones, or of another number."""


def _origin(path: str, first_decoder: bool) -> str | None:
    """The path in SAM 2 that the array at our ``path`` starts from, or None."""
    part, _, rest = path.partition(".")
    origins = {"image_encoder": "image_encoder"}
    for suffix in ("", "2") if first_decoder else ("2",):
        origins |= {f"prompt_encoder{suffix}": _SAM2_PROMPT, f"mask_decoder{suffix}": _SAM2_DECODER}
    if part not in origins or is_adapter(path) or any(mark in rest for mark in _FRESH):
        return None
    return f"{origins[part]}.{rest}"


def started_from_sam2(
    shapes: Mapping[str, Mapping], sam2: Mapping[str, Mapping], first_decoder: bool = True, what: str = "SAM 2 weights"
) -> dict[str, Any]:
    """The arrays that a SAM4EM with variables of ``shapes`` takes from a SAM 2 of the same trunk, by path, all
    collections in one nested dict.

    Encoder, second decoder and second prompt encoder come from SAM 2, as in the published start-up; with
    ``first_decoder`` the first decoder and the first prompt encoder too (there they stay random because of a slip). The
    first convolution of the prompt encoders is repeated for every class, divided by their number. Raises ``UserError``
    if an array is missing or its shape differs (a SAM 2 of another size).
    """
    given = {path: value for tree in sam2.values() for path, value in leaves(tree).items()}
    taken: dict[str, Any] = {}
    for path, leaf in ((path, leaf) for tree in shapes.values() for path, leaf in leaves(tree).items()):
        origin = _origin(path, first_decoder)
        if origin is None:
            continue
        if origin not in given:
            raise UserError(f"{what}: {origin} is missing, which {path} starts from")
        value = np.asarray(given[origin])
        if path.endswith("mask_downscaling.conv1.kernel") and value.shape != leaf.shape:
            value = np.repeat(value, leaf.shape[2], axis=2) / leaf.shape[2]
        if value.shape != leaf.shape:
            raise UserError(
                f"{what}: {origin} is {value.shape}, expected {tuple(leaf.shape)}: a SAM 2 of another size than "
                "system.model.hiera and system.model.features say"
            )
        taken[path] = value
    return nested(taken)


def copied_names(shapes: Mapping[str, Mapping], first_decoder: bool = False) -> dict[str, str]:
    """Published name, before adapters are put in, -> official SAM 2 name, of all that :func:`started_from_sam2` takes."""
    found = {}
    for tree in shapes.values():
        for path in leaves(tree):
            if (origin := _origin(path, first_decoder)) is not None:
                name = RULES.name(path).removeprefix(PREFIX).replace(".qkv.qkv.", ".qkv.")
                found[name] = OFFICIAL.name(origin)
    return found

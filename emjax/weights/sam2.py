"""Names of SAM 2's official checkpoints and of Hugging Face transformers, and which network a checkpoint holds."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from emjax.errors import UserError
from emjax.models.functional import Definition, define
from emjax.models.sam2.config import HIERA, SIZES, SAM2Config, sam2_config
from emjax.models.sam2.model import SAM2
from emjax.weights.family import Family, Shapes, Spelling
from emjax.weights.rules import CHANNELS_LAST, TRANSPOSED_KERNEL, Rules, State

_SHARED = "prompt_encoder.shared_embedding.positional_embedding"
_COPY = "shared_image_embedding.positional_embedding"
_POINTS = "prompt_encoder.point_embed.weight"
_HEADS = r"(output_hypernetworks_mlps\.\d|iou_prediction_head|pred_obj_score_head|object_pointer_proj)"

_LAYOUTS = (
    (r"trunk\.pos_embed", CHANNELS_LAST),
    (r"upscale[12]\.kernel$", TRANSPOSED_KERNEL),
)

OFFICIAL = Rules(
    renames=(
        (r"(neck\.convs\.\d+)\.", r"\1.conv."),
        (r"mask_downscaling\.conv1\.", "mask_downscaling.0."),
        (r"mask_downscaling\.norm1\.", "mask_downscaling.1."),
        (r"mask_downscaling\.conv2\.", "mask_downscaling.3."),
        (r"mask_downscaling\.norm2\.", "mask_downscaling.4."),
        (r"mask_downscaling\.conv3\.", "mask_downscaling.6."),
        (r"sam_mask_decoder\.upscale1\.", "sam_mask_decoder.output_upscaling.0."),
        (r"sam_mask_decoder\.upscale_norm\.", "sam_mask_decoder.output_upscaling.1."),
        (r"sam_mask_decoder\.upscale2\.", "sam_mask_decoder.output_upscaling.3."),
        (r"mask_downsampler\.convs\.0\.", "mask_downsampler.encoder.0."),
        (r"mask_downsampler\.convs\.1\.", "mask_downsampler.encoder.3."),
        (r"mask_downsampler\.convs\.2\.", "mask_downsampler.encoder.6."),
        (r"mask_downsampler\.convs\.3\.", "mask_downsampler.encoder.9."),
        (r"mask_downsampler\.norms\.0\.", "mask_downsampler.encoder.1."),
        (r"mask_downsampler\.norms\.1\.", "mask_downsampler.encoder.4."),
        (r"mask_downsampler\.norms\.2\.", "mask_downsampler.encoder.7."),
        (r"mask_downsampler\.norms\.3\.", "mask_downsampler.encoder.10."),
        (r"mask_downsampler\.final\.", "mask_downsampler.encoder.12."),
        (r"(memory_encoder\.fuser)\.(\d)", r"\1.layers.\2"),
    ),
    layouts=_LAYOUTS,
)


HUGGINGFACE = Rules(
    renames=(
        (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
        (r"^image_encoder\.neck\.", "vision_encoder.neck."),
        (r"patch_embed\.proj\.", "patch_embed.projection."),
        (r"^sam_prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", _SHARED),
        (r"^sam_prompt_encoder\.", "prompt_encoder."),
        (r"\.point_embeddings\.", ".point_embed."),
        (r"mask_downscaling\.norm(\d)", r"mask_embed.layer_norm\1"),
        (r"mask_downscaling\.", "mask_embed."),
        (r"^sam_mask_decoder\.", "mask_decoder."),
        (r"upscale_norm\.", "upscale_layer_norm."),
        (r"upscale(\d)\.", r"upscale_conv\1."),
        (r"norm_final_attn", "layer_norm_final_attn"),
        (r"\bnorm(\d)\.", r"layer_norm\1."),
        (r"^memory_attention\.norm\.", "memory_attention.layer_norm."),
        (r"(self_attn|cross_attn\w*|final_attn\w*)\.out_proj\.", r"\1.o_proj."),
        (r"mlp\.layers\.0\.", "mlp.proj_in."),
        (r"mlp\.layers\.1\.", "mlp.proj_out."),
        (r"^obj_ptr_proj\.", "object_pointer_proj."),
        (rf"{_HEADS}\.layers\.0\.", r"\1.proj_in."),
        (rf"{_HEADS}\.layers\.1\.", r"\1.layers.0."),
        (rf"{_HEADS}\.layers\.2\.", r"\1.proj_out."),
        (r"mask_downsampler\.convs\.(\d)\.", r"mask_downsampler.layers.\1.conv."),
        (r"mask_downsampler\.norms\.(\d)\.", r"mask_downsampler.layers.\1.layer_norm."),
        (r"mask_downsampler\.final\.", "mask_downsampler.final_conv."),
        (r"pix_feat_proj", "feature_projection"),
        (r"memory_encoder\.fuser\.(\d)\.dwconv", r"memory_encoder.memory_fuser.layers.\1.depthwise_conv"),
        (r"memory_encoder\.fuser\.(\d)\.norm", r"memory_encoder.memory_fuser.layers.\1.layer_norm"),
        (r"memory_encoder\.fuser\.(\d)\.pwconv", r"memory_encoder.memory_fuser.layers.\1.pointwise_conv"),
        (r"memory_encoder\.fuser\.(\d)\.gamma", r"memory_encoder.memory_fuser.layers.\1.scale"),
        (r"^memory_encoder\.out_proj", "memory_encoder.projection"),
        (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
        (r"^no_mem_embed$", "no_memory_embedding"),
        (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
        (r"^no_obj_ptr$", "no_object_pointer"),
        (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
        (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
    ),
    layouts=_LAYOUTS,
)


def _split(state: State) -> State:
    """One table of point embeddings becomes four, and the second copy of the Fourier matrix goes, if it is a copy."""
    state = dict(state)
    table = state.pop(_POINTS, None)
    if table is not None:
        state |= {f"prompt_encoder.point_embed.{i}.weight": row[None] for i, row in enumerate(table)}
    if _COPY in state and _SHARED in state and np.array_equal(state[_COPY], state[_SHARED]):
        del state[_COPY]
    return state


def _joined(state: State) -> State:
    """The inverse of :func:`_split`."""
    state = dict(state)
    state[_POINTS] = np.concatenate([state.pop(f"prompt_encoder.point_embed.{i}.weight") for i in range(4)])
    state[_COPY] = state[_SHARED].copy()
    return state


_TRUNKS = {"official": "image_encoder.trunk.", "huggingface": "vision_encoder.backbone."}
_VERSION_21 = {
    "official": ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias"),
    "huggingface": (
        "occlusion_spatial_embedding_parameter",
        "temporal_positional_encoding_projection_layer.weight",
        "temporal_positional_encoding_projection_layer.bias",
    ),
}


def _recognise(shapes: Shapes) -> str | None:
    for spelling, prefix in _TRUNKS.items():
        if any(name.startswith(prefix) for name in shapes):
            return spelling
    return None


def trunk_size(shapes: Shapes, prefix: str, what: str) -> str:
    """Which published size a trunk has whose names begin with ``prefix``, by its width and depth.

    Raises :class:`UserError` where none fits.
    """
    trunk = re.escape(prefix)
    numbers = [int(found[1]) for name in shapes if (found := re.match(rf"{trunk}blocks\.(\d+)\.", name))]
    depth = max(numbers, default=-1) + 1
    widths = [
        shape[axis]
        for name, shape in shapes.items()
        for pattern, axis, rank in ((r"pos_embed$", 1, 4), (r"patch_embed\.proj(ection)?\.bias$", 0, 1))
        if re.match(trunk + pattern, name) and len(shape) == rank
    ]
    sizes = [size for size in SIZES if HIERA[size].depth == depth and HIERA[size].width in widths]
    if not sizes:
        known = ", ".join(f"{size} ({hiera.width}, {hiera.depth})" for size, hiera in HIERA.items() if size in SIZES)
        raise UserError(
            f"{what} has a SAM 2 trunk of {widths[0] if widths else 'unknown'} channels and {depth} blocks; the "
            f"published sizes are {known}"
        )
    return sizes[0]


def _identify(shapes: Shapes, spelling: str, what: str) -> dict[str, Any]:
    """Size by the trunk's width and depth, version by the three names of 2.1, and whether the memory is there."""
    size = trunk_size(shapes, _TRUNKS[spelling], what)
    if not any(name.startswith(("memory_attention.", "memory_encoder.")) for name in shapes):
        return {"size": size, "version": "image only"}
    new = any(name in shapes for name in _VERSION_21[spelling])
    return {"size": size, "version": "2.1" if new else "2.0"}


def _network(settings: Mapping[str, Any]) -> Definition:
    config = config_of(settings)
    return define(lambda rngs: SAM2(config, rngs))


def config_of(settings: Mapping[str, Any], **changes) -> SAM2Config:
    """The network's configuration from a checkpoint's settings; ``changes`` replace fields, such as ``dtype``."""
    if settings["version"] == "image only":
        return sam2_config(
            settings["size"], "2.1", pointer_time_encoding=False, occlusion_embedding=False, image_only=True, **changes
        )
    return sam2_config(settings["size"], settings["version"], **changes)


FAMILY = Family(
    name="sam2",
    spellings={"official": Spelling(OFFICIAL), "huggingface": Spelling(HUGGINGFACE, _split, _joined)},
    recognise=_recognise,
    identify=_identify,
    network=_network,
)

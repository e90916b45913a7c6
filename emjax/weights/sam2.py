"""Names of SAM 2's official checkpoints and of Hugging Face transformers, and which network a checkpoint holds."""

from emjax.models.functional import Definition, define
from emjax.models.sam2.config import sam2_config
from emjax.models.sam2.model import SAM2
from emjax.weights.rules import CHANNELS_LAST, TRANSPOSED_KERNEL, Rules

RULES = Rules(
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
    layouts=(
        (r"trunk\.pos_embed", CHANNELS_LAST),
        (r"upscale[12]\.kernel$", TRANSPOSED_KERNEL),
    ),
)

VERSION_21 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
"""The three names that version 2.1 has and 2.0 has not."""


def network(size: str, version: str) -> Definition:
    """Shapes and structure of a published network."""
    config = sam2_config(size, version)
    return define(lambda rngs: SAM2(config, rngs))

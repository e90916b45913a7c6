"""Follow objects through a stack with SAM 2, from prompts in a JSON file or in a label layer.

    python -m emjax.segment --config configs/sam2/stack.py --input stack.h5:raw --output labels.zarr \
        --config.system.checkpoint=weights/sam2.1_tiny --config.system.prompts=prompts.json

Variants: ``""`` tiny at 1024 x 1024, as the published weights were trained; ``native`` without resizing; ``debug``
random weights at 128 x 128, for a try on a CPU, whose masks mean nothing. Weights are to be downloaded and converted:
docs/sam2.md.
"""

from emjax.config import Data, Experiment, variant_error
from emjax.systems import sam2_stack


def get_config(variant: str = "") -> Experiment:
    systems = {
        "": sam2_stack.Config(),
        "native": sam2_stack.Config(input_size=(0, 0)),
        "debug": sam2_stack.Config(input_size=(128, 128), batch=2, objects=4),
    }
    if variant not in systems:
        raise variant_error(variant, systems)
    return Experiment(system=systems[variant], data=Data(train=()))

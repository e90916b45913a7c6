"""Sizes and versions of SAM 2 as dataclasses: everything that differs between the eight published networks."""

import dataclasses

import jax.numpy as jnp

from emjax.models.layers.lora import LoRA

SIZES = ("tiny", "small", "base_plus", "large")
"""The published ones."""
VERSIONS = ("2.0", "2.1")
STRIDE = 32
"""Height and width of an input are multiples of this."""


@dataclasses.dataclass(frozen=True)
class HieraConfig:
    """The image trunk. ``windows`` has one entry per stage, ``global_blocks`` the blocks that see the whole map;
    ``lora`` adapts the attention of every block."""

    width: int
    heads: int
    stages: tuple[int, int, int, int]
    global_blocks: tuple[int, ...]
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    background: tuple[int, int] = (7, 7)
    window_embedding: tuple[int, int] = (8, 8)
    mlp_ratio: int = 4
    remat: bool = False
    lora: LoRA | None = None

    @property
    def depth(self) -> int:
        return sum(self.stages)

    @property
    def stage_ends(self) -> tuple[int, ...]:
        """Index of the last block of each stage."""
        return tuple(sum(self.stages[: i + 1]) - 1 for i in range(len(self.stages)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage, fine to coarse."""
        return tuple(self.width << i for i in range(len(self.stages)))


@dataclasses.dataclass(frozen=True)
class SAM2Config:
    """One SAM 2 network.

    ``pointer_time_encoding`` and ``occlusion_embedding`` are what version 2.1 added. ``image_only`` leaves out all that
    tracking needs. ``dtype`` is that of activations and matrix products; parameters, norms' statistics and softmax
    stay in float32.
    """

    hiera: HieraConfig
    pointer_time_encoding: bool = True
    occlusion_embedding: bool = True
    image_only: bool = False
    features: int = 256
    memory_features: int = 64
    memories: int = 7
    pointers: int = 16
    memory_layers: int = 4
    dtype: str = "float32"
    attention: str = "auto"

    @property
    def version(self) -> str:
        return "2.1" if self.occlusion_embedding else "2.0"


HIERA = {
    "tiny": HieraConfig(96, 1, (1, 2, 7, 2), (5, 7, 9)),
    "small": HieraConfig(96, 1, (1, 2, 11, 2), (7, 10, 13)),
    "base_plus": HieraConfig(112, 2, (2, 3, 16, 3), (12, 16, 20), background=(14, 14)),
    "large": HieraConfig(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
    # Not of SAM 2: what two CPU cores can train, with windows that need no padding at 128 x 128 pixels.
    "nano": HieraConfig(48, 1, (1, 2, 3, 1), (5,), windows=(8, 4, 8, 4)),
}


def sam2_config(size: str = "tiny", version: str = "2.1", **changes) -> SAM2Config:
    """The published network of a ``size`` (tiny, small, base_plus, large) and ``version`` (2.0, 2.1).

    ``nano`` is a size of emjax for CPUs, of which no SAM 2 weights exist.
    ``changes`` replace fields, such as ``dtype="bfloat16"``. Raises ``ValueError`` for unknown names.
    """
    if size not in HIERA:
        raise ValueError(f"SAM 2 size is {size!r}; expected one of {', '.join(HIERA)}")
    if version not in VERSIONS:
        raise ValueError(f"SAM 2 version is {version!r}; expected one of {', '.join(VERSIONS)}")
    new = version == "2.1"
    made = SAM2Config(HIERA[size], pointer_time_encoding=new, occlusion_embedding=new)
    made = dataclasses.replace(made, **changes)
    jnp.dtype(made.dtype)
    return made


def check_size(height: int, width: int, channels: int = 3) -> None:
    """Raises ``ValueError`` unless the input is a positive multiple of 32 in both axes and has three channels."""
    if height < STRIDE or width < STRIDE or height % STRIDE or width % STRIDE:
        up = [max(STRIDE, -(-n // STRIDE) * STRIDE) for n in (height, width)]
        raise ValueError(
            f"SAM 2 input is {height} x {width} pixels; both must be multiples of {STRIDE}: pad or resize it, "
            f"for example to {up[0]} x {up[1]}"
        )
    if channels != 3:
        raise ValueError(f"SAM 2 input has {channels} channels; expected 3 (repeat a grey slice, channels last)")

"""Low-rank adapters of attention (LoRA, Hu et al. 2022): y = W x + (alpha / rank) B A x, with W frozen and B = 0 at first.

An attention module with a :class:`LoRA` has one more child, ``lora``, beside its projections (one matrix ``qkv``, or
``q_proj``, ``k_proj``, ``v_proj``). Without one its parameters and its numbers are what they were, so checkpoints of the
plain network load as they are, and :func:`merge` turns an adapted network's parameters back into the plain network's.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from emjax.errors import UserError

TARGETS = ("q", "k", "v")
NAME = "lora"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
    """What is adapted, and how much.

    Attributes:
        rank: of the update.
        alpha: the update is multiplied by ``alpha / rank``; ``None`` leaves it as it is (``alpha = rank``).
        targets: the projections that are adapted, of ``"q"``, ``"k"``, ``"v"``.
        faithful_halves: updates are as wide as the *input*, as in SAM4EM's code: where the width doubles (the first
            blocks of Hiera's stages) only the first half of the channels of q and k, and the last half of those of v, are
            adapted.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("q", "v")
    faithful_halves: bool = False

    @property
    def scale(self) -> float:
        """The factor before the update."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def validate(self) -> None:
        """Raises ``UserError`` for values that cannot work."""
        if self.rank < 1:
            raise UserError(f"lora.rank {self.rank}: expected at least 1")
        if not self.targets or not set(self.targets) <= set(TARGETS) or len(set(self.targets)) < len(self.targets):
            raise UserError(f"lora.targets {self.targets}: expected some of {', '.join(TARGETS)}, each once")


def is_adapter(path: str) -> bool:
    """Whether the parameter at a dotted path belongs to an adapter."""
    return f".{NAME}." in f".{path}"


class LowRank(nnx.Module):
    """B A x without biases; A as PyTorch draws a linear layer (uniform within 1 / sqrt(inputs)), B zero."""

    def __init__(self, inputs: int, outputs: int, rank: int, dtype: str, rngs):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        options = {"use_bias": False, "dtype": jnp.dtype(dtype), "rngs": rngs}
        self.a = nnx.Linear(inputs, rank, kernel_init=uniform, **options)
        self.b = nnx.Linear(rank, outputs, kernel_init=nnx.initializers.zeros_init(), **options)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.b(self.a(x))


def _columns(target: str, update: int, outputs: int) -> slice:
    """The channels of a projection that a target's update belongs to."""
    return slice(outputs - update, outputs) if target == "v" else slice(0, update)


class Adapters(nnx.Module):
    """The adapters of one attention module, a :class:`LowRank` for each target, called ``q``, ``k``, ``v``."""

    def __init__(self, config: LoRA, inputs: Mapping[str, int] | int, outputs: int, dtype: str, rngs):
        """``inputs``: channels before the projections, one number or one for each target; ``outputs``: after them."""
        for target in config.targets:
            width = inputs if isinstance(inputs, int) else inputs[target]
            adapted = min(width, outputs) if config.faithful_halves else outputs
            setattr(self, target, LowRank(width, adapted, config.rank, dtype, rngs))
        self.config = config

    def adapt(self, target: str, projected: jax.Array, x: jax.Array) -> jax.Array:
        """``projected`` (..., outputs) plus the update of ``x`` (..., inputs), if the target is adapted."""
        if target not in self.config.targets:
            return projected
        update = getattr(self, target)(x) * jnp.asarray(self.config.scale, projected.dtype)
        outputs = projected.shape[-1]
        columns = _columns(target, update.shape[-1], outputs)
        margins = [(0, 0)] * (update.ndim - 1) + [(columns.start, outputs - columns.stop)]
        return projected + jnp.pad(update, margins)


def merge(params: Mapping, config: LoRA) -> dict:
    """Parameters (nested dict) of an adapted network as those of the plain one: every update added to its matrix.

    Exact up to the rounding of one float32 product and sum. ``config`` gives the scale; the rest is read from shapes.
    """
    merged = {
        name: merge(value, config) if isinstance(value, Mapping) else value
        for name, value in params.items()
        if name != NAME
    }
    for target, adapter in params.get(NAME, {}).items():
        product = jnp.matmul(adapter["a"]["kernel"], adapter["b"]["kernel"], precision=jax.lax.Precision.HIGHEST)
        fused = "qkv" in merged
        owner = "qkv" if fused else f"{target}_proj"
        kernel = jnp.asarray(merged[owner]["kernel"])
        outputs = kernel.shape[1] // 3 if fused else kernel.shape[1]
        first = TARGETS.index(target) * outputs if fused else 0
        columns = _columns(target, product.shape[1], outputs)
        update = config.scale * product
        kernel = kernel.at[:, first + columns.start : first + columns.stop].add(update)
        merged[owner] = {**merged[owner], "kernel": kernel}
    return merged

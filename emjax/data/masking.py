"""Hiding random blocks of a patch, for reconstruction as pretraining (SegNeuron, section on pretraining)."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Shape = tuple[int, int, int]
Fill = Literal["gaussian", "zero", "mean"]


def kept(shape: Shape, block: Shape, masked: Bool[Array, "blocks"]) -> Bool[Array, "z y x"]:
    """False in the hidden blocks; ``masked`` marks them in row-major order. A rest that fills no block is visible."""
    grid = tuple(size // step for size, step in zip(shape, block))
    volume = ~jnp.reshape(masked, grid)
    for axis, step in enumerate(block):
        volume = jnp.repeat(volume, step, axis)
    rest = [(0, size - n * step) for size, n, step in zip(shape, grid, block)]
    return jnp.pad(volume, rest, constant_values=True)


def kept_of_list(shape: Shape, block: Shape, chosen: Int[Array, "masked"]) -> Bool[Array, "z y x"]:
    """:func:`kept` from the row-major numbers of the hidden blocks."""
    count = 1
    for size, step in zip(shape, block):
        count *= size // step
    return kept(shape, block, jnp.zeros(count, bool).at[chosen].set(True))


def hide(
    clean: Float[Array, "z y x"], noise: Float[Array, "z y x"] | float, visible: Bool[Array, "z y x"]
) -> Float[Array, "z y x"]:
    """``clean`` where visible, else ``noise`` (or one grey value)."""
    return jnp.where(visible, clean, noise).astype(jnp.float32)


class Draws(NamedTuple):
    """All that is random about hiding: number of the block shape, share of hidden blocks, a score per block of the
    finest grid (the lowest scores are hidden), and noise of unit deviation."""

    scale: jax.Array
    ratio: jax.Array
    scores: jax.Array
    noise: jax.Array


def most_blocks(shape: Shape, blocks: Sequence[Shape]) -> int:
    """Number of blocks of the finest grid."""
    return max((shape[0] // block[0]) * (shape[1] // block[1]) * (shape[2] // block[2]) for block in blocks)


def draw(key: jax.Array, shape: Shape, blocks: Sequence[Shape], ratio: tuple[float, float]) -> Draws:
    """Draws for one sample: block shape and share uniform, each by itself."""
    scale, share, scores, noise = jax.random.split(key, 4)
    return Draws(
        jax.random.randint(scale, (), 0, len(blocks)),
        jax.random.uniform(share, (), minval=ratio[0], maxval=ratio[1]),
        jax.random.uniform(scores, (most_blocks(shape, blocks),)),
        jax.random.normal(noise, shape),
    )


def visible(draws: Draws, shape: Shape, blocks: Sequence[Shape]) -> Bool[Array, "z y x"]:
    """The mask of a sample: ``int(number of blocks * ratio)`` distinct blocks of the drawn shape are hidden."""

    def with_block(block: Shape):
        count = most_blocks(shape, [block])

        def make(draws: Draws) -> jax.Array:
            order = jnp.argsort(draws.scores[:count])
            hidden = jnp.floor(count * draws.ratio).astype(jnp.int32)
            masked = jnp.zeros(count, bool).at[order].set(jnp.arange(count) < hidden)
            return kept(shape, block, masked)

        return make

    return jax.lax.switch(draws.scale, [with_block((z, y, x)) for z, y, x in blocks], draws)


def hidden_patch(
    clean: Float[Array, "z y x"], draws: Draws, blocks: Sequence[Shape], fill: Fill = "gaussian"
) -> Float[Array, "z y x"]:
    """The network's input for a clean patch with grey values 0..1.

    ``gaussian`` fills hidden blocks with noise of the patch's own mean and deviation (not clipped, as published),
    ``mean`` with the mean, ``zero`` with 0 (the ablations of the paper).
    """
    z, y, x = clean.shape
    contents: dict[str, Callable[[], jax.Array | float]] = {
        "gaussian": lambda: clean.mean() + clean.std() * draws.noise,
        "mean": lambda: clean.mean(),
        "zero": lambda: 0.0,
    }
    return hide(clean, contents[fill](), visible(draws, (z, y, x), blocks))

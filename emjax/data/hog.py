"""The HOG image, target of SegNeuron's pretraining, in closed form and on the device.

scikit-image draws histograms of oriented gradients as little bars; with cells of four pixels every bar is two or three
pixels, so the drawing is a fixed pattern of sums of the histogram. Dalal and Triggs 2005 (here without interpolation
and without block normalisation); equal to ``skimage.feature.hog(pixels_per_cell=4, visualize=True)``.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

CELL = 4
ORIENTATIONS = 9


def hog_histogram(image: Float[Array, "*batch y x"]) -> Float[Array, "*batch rows columns orientation"]:
    """Mean gradient magnitude per cell of 4 x 4 pixels and bin of 20 degrees; rows = y // 4, the rest is left out.

    Gradients are differences of the two neighbours (not halved) and 0 at the border along their axis.
    """
    rise = jnp.zeros_like(image).at[..., 1:-1, :].set(image[..., 2:, :] - image[..., :-2, :])
    run = jnp.zeros_like(image).at[..., 1:-1].set(image[..., 2:] - image[..., :-2])
    magnitude = jnp.hypot(rise, run)
    # Orientations have no sign: the half plane 0 <= angle < 180 degrees.
    below = (rise < 0) | ((rise == 0) & (run < 0))
    rise, run = jnp.where(below, -rise, rise), jnp.where(below, -run, run)
    step = math.pi / ORIENTATIONS
    # A cross product with each limit instead of an arc tangent: no rounding to the wrong side, and cheap.
    bins = jnp.zeros(image.shape, jnp.int32)
    for k in range(1, ORIENTATIONS):
        bins += (rise * math.cos(step * k) - run * math.sin(step * k) >= 0).astype(jnp.int32)
    rows, columns = image.shape[-2] // CELL, image.shape[-1] // CELL
    cells = (*image.shape[:-2], rows, CELL, columns, CELL)

    def by_cell(values: jax.Array) -> jax.Array:
        return values[..., : rows * CELL, : columns * CELL].reshape(cells)

    magnitude, bins = by_cell(magnitude), by_cell(bins)
    chosen = [jnp.where(bins == k, magnitude, 0).sum((-3, -1)) for k in range(ORIENTATIONS)]
    return jnp.stack(chosen, -1) / CELL**2


def drawn(histogram: Float[Array, "*batch rows columns orientation"]) -> Float[Array, "*batch y x"]:
    """The drawing of a histogram, 4 x 4 pixels for each cell."""
    low = histogram[..., :4].sum(-1)
    upright = histogram[..., 4]
    high = histogram[..., 5:].sum(-1)
    nothing = jnp.zeros_like(low)
    pattern = [
        [nothing, nothing, nothing, nothing],
        [nothing, high, low, nothing],
        [nothing, low + upright, upright + high, upright],
        [nothing, nothing, nothing, nothing],
    ]
    # Axes: rows, row in the cell, columns, column in the cell.
    image = jnp.stack([jnp.stack(row, -1) for row in pattern], -3)
    return image.reshape(*image.shape[:-4], image.shape[-4] * CELL, image.shape[-2] * CELL)


def hog_image(image: Float[Array, "*batch y x"]) -> Float[Array, "*batch y x"]:
    """The drawing of :func:`hog_histogram`, section by section, of the image's size; 0 where no whole cell fits."""
    cells = drawn(hog_histogram(image))
    rest = [(0, have - got) for have, got in zip(image.shape[-2:], cells.shape[-2:])]
    return jnp.pad(cells, [(0, 0)] * (image.ndim - 2) + rest)

"""From AGQ's mask logits to labels: block labels on the accelerator, blocks into a volume, instances across faces."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from emjax.errors import UserError
from emjax.models.layers.interpolate import resize_linear
from emjax.postprocess.block_merge import block_border, merge_blocks

Triple = tuple[int, int, int]
SOFT_AREA = 40.0
"""Queries whose probabilities over a block sum to less than this (in voxels) are dropped."""
INSTANCE_BITS = 20
"""Prediction numbers an instance (block number + 1) << 20 | its id in the block."""


def block_labels(masks: jax.Array, size: Sequence[int], soft_area: float = SOFT_AREA) -> tuple[jax.Array, jax.Array]:
    """Labels int16 (z, y, x) of one block and the soft areas (1 + n,) of all mask channels.

    ``masks`` (z, y', x', 1 + n) logits, background first; ``size`` (z, y, x) of the block. Per section: linear resize
    (half-pixel centres), softmax, channels of too small a soft area to zero, argmax. The full-size probabilities exist
    for one section at a time: the first pass sums areas, the second takes the argmax. 0 = background, otherwise the
    mask channel.
    """
    if masks.shape[0] != size[0]:
        raise UserError(f"AGQ: masks have {masks.shape[0]} sections, the block {size[0]}; expected as many")

    def probabilities(section: jax.Array) -> jax.Array:
        full = resize_linear(section[None, None], (1, size[1], size[2]))[0, 0]
        return jax.nn.softmax(full, -1)

    def add(total: jax.Array, section: jax.Array) -> tuple[jax.Array, None]:
        return total + probabilities(section).sum((0, 1)), None

    areas, _ = jax.lax.scan(add, jnp.zeros(masks.shape[-1], jnp.float32), masks)
    kept = areas >= soft_area

    def label(section: jax.Array) -> jax.Array:
        # Zeroed probabilities, not logits: where all kept ones are 0, the voxel is background.
        return jnp.where(kept, probabilities(section), 0).argmax(-1).astype(jnp.int16)

    return jax.lax.map(label, masks), areas


def block_affinities(logits: jax.Array, size: Sequence[int]) -> jax.Array:
    """Affinities float32 (b, z, y, x, 3) in 0..1 at the block's ``size`` from logits on the half grid."""
    return resize_linear(jax.nn.sigmoid(logits.astype(jnp.float32)), (size[0], size[1], size[2]))


def block_starts(length: int, size: int, stride: int) -> list[int]:
    """First voxels of blocks along one axis: multiples of ``stride``, the last one moved back to end at the border."""
    last = max(length - size, 0)
    return [*range(0, last, stride), last]


def block_positions(shape: Sequence[int], size: Sequence[int], stride: Sequence[int]) -> np.ndarray:
    """First voxels (n, 3) of all blocks of a volume, z slowest."""
    axes = [block_starts(*numbers) for numbers in zip(shape, size, stride)]
    return np.array(list(itertools.product(*axes)), np.int64)


class Concatenated(NamedTuple):
    """Blocks in one volume: ``labels`` uint32 (z, y, x), ids unique over blocks; ``affinities`` float32 (3, z, y, x);
    ``border`` bool (3, z, y, x), the first plane of each block, channel c along axis c."""

    labels: np.ndarray
    affinities: np.ndarray
    border: np.ndarray


def concatenate(blocks: Iterable[tuple[Sequence[int], np.ndarray, np.ndarray]], shape: Sequence[int]) -> Concatenated:
    """Writes blocks by position into a volume of ``shape`` (z, y, x), any shape, square or not.

    ``blocks`` gives (position, labels (z, y, x), affinities (3, z, y, x)) in order: later labels overwrite earlier
    ones, background too; affinities are the mean over the covering blocks.

    Raises:
        UserError: a block reaches over the volume, or a voxel is in no block.
    """
    labels = np.zeros(shape, np.uint32)
    affinities = np.zeros((3, *shape), np.float32)
    covered = np.zeros(shape, np.uint16)
    starts: list[set[int]] = [set(), set(), set()]
    first = 0
    for position, ids, values in blocks:
        box = tuple(slice(int(start), int(start) + length) for start, length in zip(position, ids.shape))
        if any(part.start < 0 or part.stop > length for part, length in zip(box, shape)):
            raise UserError(f"AGQ: a block of {ids.shape} at {tuple(position)} is not inside the volume {tuple(shape)}")
        labels[box] = np.where(ids > 0, ids.astype(np.uint32) + np.uint32(first), 0)
        first += int(ids.max(initial=0))
        affinities[(slice(None), *box)] += values
        covered[box] += 1
        for axis, part in enumerate(box):
            starts[axis].add(part.start)
    if not covered.all():
        raise UserError(f"AGQ: {int((covered == 0).sum())} voxels of the volume {tuple(shape)} are in no block")
    affinities /= covered
    return Concatenated(labels, affinities, block_border((shape[0], shape[1], shape[2]), starts))


def border_between_blocks(instances: np.ndarray) -> np.ndarray:
    """(3, z, y, x) bool: faces between voxels of different blocks, from ids that carry the block's number.

    ``instances`` uint64 (z, y, x), :data:`INSTANCE_BITS` bits of id below the number.
    """
    number = instances >> np.uint64(INSTANCE_BITS)
    border = np.zeros((3, *instances.shape), bool)
    for axis in range(3):
        along = np.moveaxis(number, axis, 0)
        np.moveaxis(border[axis], axis, 0)[1:] = along[1:] != along[:-1]
    return border


def segment_in_memory(
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    image: np.ndarray,
    size: Triple,
    stride: Triple,
    *,
    on_border: float = 0.3,
    threshold: float = 0.5,
    threads: int = 1,
) -> np.ndarray:
    """The published inference of a volume in memory: uint32 labels (z, y, x).

    ``run`` gives labels (z, y, x) and affinities (3, z, y, x) of one block of ``image`` (z, y, x). A volume smaller
    than a block is continued by reflection.
    """
    padding = [(0, max(block - length, 0)) for length, block in zip(image.shape, size)]
    padded = np.pad(image, padding, mode="symmetric") if any(after for _, after in padding) else image

    def blocks() -> Iterable[tuple[Sequence[int], np.ndarray, np.ndarray]]:
        for position in block_positions(padded.shape, size, stride):
            box = tuple(slice(start, start + length) for start, length in zip(position, size))
            yield (position, *run(padded[box]))

    whole = concatenate(blocks(), padded.shape)
    merged = merge_blocks(
        whole.affinities, whole.labels, whole.border, on_border=on_border, threshold=threshold, threads=threads
    )
    return np.ascontiguousarray(merged[tuple(slice(length) for length in image.shape)])

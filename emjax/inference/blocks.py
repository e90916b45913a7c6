"""Geometry of block-wise prediction: where the network looks, how its outputs are weighed, what is written at once.

Everything is separable: along each axis a :class:`Axis` lists the blocks, and a block of the volume is a triple of
indices into the three axes.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np

from emjax.systems.protocol import Block, Triple

Box = tuple[slice, slice, slice]


@dataclasses.dataclass(frozen=True)
class Axis:
    """Blocks along one axis of the region that is predicted.

    Attributes:
        length: voxels of the region.
        size: voxels that the network sees.
        starts: first voxel of each block, relative to the region; may be negative or run over the end.
        weights: (blocks, size) float32, weight of each voxel of each block's output; 0 is thrown away.
        rule: a voxel's weight is the product of its three; ``"plus"`` adds ``floor`` to the product, ``"least"`` takes
            at least ``floor``.
    """

    length: int
    size: int
    starts: tuple[int, ...]
    weights: np.ndarray
    rule: str = ""
    floor: float = 0.0

    def touching(self, start: int, stop: int) -> range:
        """The blocks that have a weight somewhere in [start, stop)."""
        chosen = []
        for number, first in enumerate(self.starts):
            low, high = max(start - first, 0), min(stop - first, self.size)
            if low < high and self.weights[number, low:high].any():
                chosen.append(number)
        return range(chosen[0], chosen[-1] + 1)


def block_starts(length: int, size: int, stride: int, halo: int) -> tuple[int, ...]:
    """First voxels of the blocks along an axis: every ``stride`` from ``-halo`` on.

    The last block is moved back so that it ends ``halo`` behind the region: it then sees real voxels, not reflected
    ones. A region shorter than one block is given one block.
    """
    count = max(1, math.ceil((length - (size - 2 * halo)) / stride) + 1)
    last = max(-halo, length + halo - size)
    return tuple(min(-halo + number * stride, last) for number in range(count))


def centred_starts(length: int, size: int, stride: int) -> tuple[int, ...]:
    """First voxels of blocks at whole strides that reach out of both ends of the region alike (SegNeuron)."""
    count = max(1, (length - size) // stride + 2)
    out = size + (count - 1) * stride - length
    return tuple(number * stride - out // 2 for number in range(count))


def block_weights(
    starts: Sequence[int], length: int, size: int, halo: int, blending: str, sigma: float = 0.25, stride: int = 0
) -> np.ndarray:
    """Weights (blocks, size) along one axis.

    ``"crop"``: 1 for voxels nearer to this block's centre than to its neighbours', else 0 (ties: the later block). With
    ``stride``, the last block counts as if it had not been moved back: cores then meet at whole strides, and with them
    the blocks that are written, which no network block straddles.
    ``"linear"``: falls from the centre to the halo, 1 / (size of the inner part) at its outermost voxel.
    ``"gaussian"``: exp(-d^2 / 2 (sigma * size)^2) of the distance d from the centre.
    ``"gaussian_plus"``, ``"gaussian_least"``: exp(-c^2 / 2 sigma^2) of the coordinate c, -1..1 from border to border.
    Outside of the region and in the halo weights are 0, except that crop never leaves a voxel of the region without.
    """
    weights = np.zeros((len(starts), size), np.float32)
    regular = [starts[0] + number * stride for number in range(len(starts))] if stride else list(starts)
    for number, first in enumerate(starts):
        voxel = np.arange(size)
        inside = (voxel >= halo) & (voxel < size - halo)
        if blending == "crop":
            low = 0 if number == 0 else (regular[number - 1] + regular[number] + size) // 2
            high = length if number == len(starts) - 1 else (regular[number] + regular[number + 1] + size) // 2
            weights[number] = inside & (first + voxel >= low) & (first + voxel < high)
        elif blending == "linear":
            distance = np.abs(voxel - (size - 1) / 2)
            weights[number] = np.where(inside, 1 - 2 * distance / (size - 2 * halo + 1), 0)
        elif blending == "gaussian":
            distance = (voxel - (size - 1) / 2) / (sigma * size)
            # A floor keeps the sum of weights far from the smallest float32, whatever sigma.
            weights[number] = np.where(inside, np.maximum(np.exp(-0.5 * distance**2), 1e-6), 0)
        elif blending in ("gaussian_plus", "gaussian_least"):
            coordinate = np.linspace(-1, 1, size) if size > 1 else np.zeros(1)
            weights[number] = np.where(inside, np.exp(-0.5 * (coordinate / sigma) ** 2), 0)
        else:
            raise ValueError(f"blending is {blending!r}; expected 'crop', 'linear', 'gaussian' or one of its kin")
        weights[number, (first + voxel < 0) | (first + voxel >= length)] = 0
    return weights


def plan_axes(shape: Sequence[int], plan: Block) -> tuple[Axis, Axis, Axis]:
    """The three axes of a region of ``shape`` (z, y, x)."""
    axes = []
    for length, size, stride, halo in zip(shape, plan.size, plan.stride, plan.halo):
        if plan.placement == "centred":
            starts = centred_starts(length, size, stride)
        else:
            starts = block_starts(length, size, stride, halo)
        weights = block_weights(starts, length, size, halo, plan.blending, plan.sigma, stride)
        rule = plan.blending.partition("_")[2]
        axes.append(Axis(length, size, starts, weights, rule, plan.floor if rule else 0.0))
    return axes[0], axes[1], axes[2]


def blocks_for(axes: Sequence[Axis], box: Box) -> list[Triple]:
    """The network's blocks that contribute to ``box``, in raster order."""
    z, y, x = (axis.touching(part.start, part.stop) for axis, part in zip(axes, box))
    return list(itertools.product(z, y, x))


def input_box(axes: Sequence[Axis], blocks: Sequence[Triple]) -> Box:
    """The box that the network needs to see for ``blocks``; may reach over the region's border."""
    parts = []
    for place, axis in enumerate(axes):
        starts = [axis.starts[block[place]] for block in blocks]
        parts.append(slice(min(starts), max(starts) + axis.size))
    return parts[0], parts[1], parts[2]


@dataclasses.dataclass(frozen=True)
class Grid:
    """What is written at once: boxes of ``step`` that tile a region of ``shape``, each a whole number of shards.

    Attributes:
        shape: region, voxels (z, y, x).
        step: voxels of one written block, and of one shard of the output.
        chunks: voxels of one chunk of the output; ``step`` is a whole multiple.
    """

    shape: Triple
    step: Triple
    chunks: Triple

    @property
    def counts(self) -> Triple:
        """Blocks along z, y, x."""
        z, y, x = (math.ceil(length / step) for length, step in zip(self.shape, self.step))
        return z, y, x

    def __len__(self) -> int:
        return math.prod(self.counts)

    def box(self, index: Triple) -> Box:
        """Voxels of one block, clipped to the region."""
        parts = [slice(i * s, min((i + 1) * s, n)) for i, s, n in zip(index, self.step, self.shape)]
        return parts[0], parts[1], parts[2]

    def voxels(self, index: Triple) -> int:
        """Number of voxels of one block."""
        return math.prod(part.stop - part.start for part in self.box(index))

    def indices(self, order: str = "morton") -> list[Triple]:
        """All blocks, in ``"raster"`` or ``"morton"`` order (blocks near in time are then near in space)."""
        listed: Iterator[Triple] = itertools.product(*(range(count) for count in self.counts))  # type: ignore[assignment]
        return sorted(listed, key=morton) if order == "morton" else list(listed)


def morton(index: Triple) -> int:
    """Position of a block on the Z-order curve."""
    code = 0
    for bit in range(max(index).bit_length()):
        for axis, number in enumerate(reversed(index)):
            code |= (number >> bit & 1) << (3 * bit + axis)
    return code


def name_of(index: Triple) -> str:
    """Name of a block in the ledger."""
    return "-".join(map(str, index))


def chunk_near(extent: int, wanted: int) -> int:
    """The divisor of ``extent`` that is nearest to ``wanted`` in ratio."""
    divisors = [d for d in range(1, extent + 1) if extent % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d / wanted)), d))


def plan_grid(
    shape: Sequence[int],
    plan: Block,
    bytes_per_voxel: int,
    memory_bytes: int,
    wanted_chunks: Sequence[int] = (64, 64, 64),
    step: Sequence[int] | None = None,
) -> Grid:
    """Blocks to write, as large as the memory allows, because overlapping inputs are computed once for each.

    Faces lie where the cores of the network's blocks meet (multiples of the stride), so that with ``"crop"`` no block
    is computed twice. One written block is at most 64 (``"crop"``) or 512 network blocks, as it is what a stopped run
    loses.

    Args:
        shape: region, voxels (z, y, x).
        plan: the network's blocks.
        bytes_per_voxel: of working memory for one block.
        memory_bytes: what one block may use.
        wanted_chunks: chunks are divisors of the block near to these.
        step: size to use instead (rounded up to whole strides where it does not span the region).
    """
    counts = [math.ceil(length / stride) for length, stride in zip(shape, plan.stride)]
    most = list(counts) if step is None else [math.ceil(s / stride) for s, stride in zip(step, plan.stride)]
    chosen = [min(limit, count) for limit, count in zip(most, counts)]

    def extent(axis: int) -> int:
        return shape[axis] if chosen[axis] >= counts[axis] else chosen[axis] * plan.stride[axis]

    most_blocks = 64 if plan.blending == "crop" else 512

    def too_large() -> bool:
        return (
            math.prod(extent(axis) for axis in range(3)) * bytes_per_voxel > memory_bytes
            or math.prod(chosen) > most_blocks
        )

    while step is None and too_large():
        longest = max(range(3), key=lambda axis: (chosen[axis] > 1, extent(axis)))
        if chosen[longest] == 1:
            break
        chosen[longest] = math.ceil(chosen[longest] / 2)
    steps, chunks = [], []
    for axis in range(3):
        if chosen[axis] >= counts[axis]:
            chunk = min(wanted_chunks[axis], shape[axis])
            chunks.append(chunk)
            steps.append(math.ceil(shape[axis] / chunk) * chunk)
        else:
            steps.append(extent(axis))
            chunks.append(chunk_near(extent(axis), wanted_chunks[axis]))
    return Grid(tuple(shape), tuple(steps), tuple(chunks))  # type: ignore[arg-type]


def redundancy(axes: Sequence[Axis], grid: Grid) -> float:
    """Network voxels computed per voxel of the region (1 = no overlap at all)."""
    along = []
    for axis, step, length in zip(axes, grid.step, grid.shape):
        seen = sum(len(axis.touching(a, min(a + step, length))) * axis.size for a in range(0, length, step))
        along.append(seen / length)
    return math.prod(along)

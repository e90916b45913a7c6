"""What the spine (training, inference, commands) knows of a published system, and nothing more.

A system is a module of this room. Its ``Config`` is a frozen dataclass, and the module of a config object *is* the
system: ``system_of(config).build(config, rngs)``. To add one, write a module with these names.

More are optional. ``compose(config)`` gives the function ``(sampler, generator) -> sample`` that makes training
samples, where one augmented crop is not all. ``inherits(config, other)`` says which parameters a run takes over from a
run of another system (``train.init_from``). ``pretrained(config)`` gives parameters and constants of a fresh run (a
nested dict by the network's paths; the others are fresh), such as a published encoder's. ``domain(config, voxel_size)`` gives a warning for volumes of a voxel size
that the system was not made for, or raises. ``refuse_segmentation(config)``, of a system that only prepares another
(pretraining), raises ``UserError`` before anything is predicted for a segmentation. ``agglomeration(config)``, of a
system whose ``decode`` is watershed and agglomeration of the output ``affinities``, gives ``low``, ``high``, ``score``
and ``threshold`` (and ``regrow``, if it has it): such a system is also segmented block by block and at other
thresholds. ``block_decoder(config)`` gives a :class:`BlockDecoder`, by which predictions are decoded that do not fit
into memory.

``segment_volume(config, collections, image)`` is for a system that cannot work by independent blocks, because what it
finds in a slice depends on the slices before (tracking, memory). It gives a :class:`Streaming`: the volumes to be
written, and a function that goes through the image in slabs of a few slices. ``emjax.segment`` then neither predicts
nor decodes: it writes what each slab gives, keeps the state now and then, and goes on from there after a kill.
``collections`` are the variables of ``--checkpoint``, None without one; ``image`` is an opened volume (z, y, x), uint8
or float32 in 0..1, of which only what is indexed is read. Whatever can be wrong (prompts, sizes, weights) raises
``UserError`` here, before anything is written.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from emjax.data.volume import Volume
from emjax.errors import UserError
from emjax.postprocess.region_graph import Graph

Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """How a volume is cut for prediction; sizes in voxels (z, y, x).

    Attributes:
        size: what the network is given.
        stride: from one block to the next.
        halo: border of a block's output that is thrown away on each side (not at the border of the volume, where the
            block is reflected).
        blending: ``"crop"`` keeps for each voxel the block whose centre is nearest (``stride = size - 2 * halo``),
            ``"linear"`` and ``"gaussian"`` weigh overlapping blocks. ``"gaussian_plus"`` and ``"gaussian_least"`` (both
            of SegNeuron) take the distance in all three axes with coordinates -1..1 from border to border and add
            ``floor``, or take at least that.
        sigma: width of the Gaussian as a share of the block's size; of the last two, in their coordinates.
        floor: see ``blending``.
        placement: ``"flush"`` moves the last block back to the end of the region; ``"centred"`` keeps all strides and
            lets the first and last block reach out of the region alike (SegNeuron).
    """

    size: Triple
    stride: Triple
    halo: Triple = (0, 0, 0)
    blending: Literal["crop", "linear", "gaussian", "gaussian_plus", "gaussian_least"] = "crop"
    sigma: float = 0.25
    floor: float = 0.0
    placement: Literal["flush", "centred"] = "flush"

    def validate(self) -> None:
        """Raises ``UserError`` if blocks of this plan would leave gaps."""
        for name in ("size", "stride", "halo"):
            if len(getattr(self, name)) != 3:
                raise UserError(f"block.{name}: three numbers (z, y, x) expected, found {getattr(self, name)}")
        for size, stride, halo in zip(self.size, self.stride, self.halo):
            if size < 1 or stride < 1 or halo < 0 or stride > size - 2 * halo:
                raise UserError(
                    f"block: size {self.size}, halo {self.halo} and stride {self.stride} (z, y, x) leave gaps; "
                    "expected 1 <= stride <= size - 2 * halo"
                )
        if self.sigma <= 0 or self.floor < 0:
            raise UserError(f"block: sigma {self.sigma} and floor {self.floor}, expected more than 0, and 0 or more")
        if self.placement == "centred" and (self.blending == "crop" or any(self.halo)):
            raise UserError(
                f"block: centred placement with blending {self.blending!r} and halo {self.halo}; expected weighted "
                "blocks without halo"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """One named output of ``predict``.

    Attributes:
        kind: ``"affinities"`` and ``"probability"`` are blended over overlapping blocks and stored as uint8 with
            ``scale = 1/255``; ``"instances"`` are integer ids local to a block, stitched by the system's own rule.
        channels: length of the last axis of the block output.
        attributes: stored with the volume; affinities must have ``offsets`` (list of z, y, x).
    """

    kind: Literal["affinities", "probability", "instances"]
    channels: int
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One volume that a :class:`Streaming` writes.

    Attributes:
        dtype: as stored.
        channels: length of the first axis (channel, z, y, x); 0 for (z, y, x).
        kept: False for what is only read back during the run; it is removed at the end.
        attributes: stored with the volume, such as ``scale`` of probabilities.
    """

    dtype: Any
    channels: int = 0
    kept: bool = True
    attributes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Slab:
    """One step of a :class:`Streaming`.

    Attributes:
        arrays: (layer, first slice, values (z, y, x) or (channel, z, y, x)): whole slices, to be written.
        state: dicts and lists of arrays and numbers of bounded size, from which the run goes on behind this slab once
            its arrays are written: ``run(written, state)`` must give the rest exactly as if it had not stopped.
    """

    arrays: Sequence[tuple[str, int, np.ndarray]]
    state: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Streaming:
    """A whole image segmented slab by slab, in an order of the system's choice.

    Attributes:
        run: ``run(written, state)``: the slabs from the beginning (``state`` None) or from a kept state (arrays are
            NumPy's). ``written[layer][z0:z1]`` reads back what earlier slabs gave.
        steps: how many slabs ``run`` gives.
        layers: by name; ``labels`` (uint32) is the result.
        slab: slices that belong together: a layer is stored in shards of as many, beginning at slice 0, so that slabs
            cut there write whole shards.
        sources: files and volumes other than the image that decide the result (prompts, weights); a run does not go on
            if one has changed.
    """

    run: Callable[[Mapping[str, Volume], Any], Iterator[Slab]]
    steps: int
    layers: Mapping[str, Layer]
    slab: int
    sources: Sequence[str] = ()


class System(Protocol):
    """The names that a system's module defines."""

    def build(self, config: Any, rngs: nnx.Rngs) -> nnx.Module:
        """The network."""

    def trainable(self, config: Any, path: str) -> bool:
        """Whether the parameter at a dotted path trains."""

    def targets(self, config: Any, batch: Mapping[str, jax.Array]) -> Any:
        """Targets from ``batch`` (``labels`` int32 (b, z, y, x), optional ``mask``), computed on the accelerator."""

    def loss(
        self, config: Any, model: nnx.Module, batch: Mapping[str, jax.Array], key: jax.Array, train: bool
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scalar loss and scalars to log. ``batch["image"]`` is uint8, or float32 in 0..1, (b, z, y, x)."""

    def predict(self, config: Any, model: nnx.Module, image: jax.Array) -> dict[str, jax.Array]:
        """Outputs (b, z, y, x, channel) of blocks ``image`` (b, z, y, x), uint8, or float32 in 0..1; jit-able."""

    def flip_back(self, config: Any, outputs: dict[str, jax.Array], axes: tuple[int, ...]) -> dict[str, jax.Array]:
        """Outputs of an image flipped along ``axes`` (of z, y, x = 0, 1, 2), turned back; for test-time flips."""

    def outputs(self, config: Any) -> dict[str, Output]:
        """What ``predict`` returns, by name."""

    def decode(self, config: Any, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Labels uint32 (z, y, x) of whole-volume outputs (channel, z, y, x): the default post-processing."""

    def block(self, config: Any) -> Block:
        """The plan of prediction."""

    def validate(self, config: Any) -> None:
        """Raises ``UserError`` for a configuration that cannot work, before anything is compiled."""


class BlockDecoder(Protocol):
    """``decode`` in parts that each see one block, for volumes of any size; the segmentation does not depend on blocks.

    Fragments of blocks are numbered through, faces between them become one region graph, its partition says which
    fragments are one segment. Picklable; all methods are pure.

    Attributes:
        pieces: the output whose equal values, 26-connected over the faces of blocks too, are the fragments (0 is
            background); ``None`` if :meth:`fragments` makes them, and none reaches over a face.
        whole_sections: blocks have whole sections.
        bytes_per_voxel: memory for one voxel of a block in work.
    """

    pieces: str | None
    whole_sections: bool
    bytes_per_voxel: int

    def fragments(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """Fragments uint32 (z, y, x), 1, 2, ... without gaps, of a block's outputs (channel, z, y, x)."""

    def notes(self, outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What :meth:`partition` wants to know of each block."""

    def edges(self, outputs: Mapping[str, np.ndarray], fragments: np.ndarray, lead: Triple) -> Graph:
        """Edges of the faces whose upper voxel lies in a block; both arguments have ``lead`` more planes below it."""

    def partition(self, graph: Graph, nodes: int, notes: list[dict[str, np.ndarray]]) -> np.ndarray:
        """Segment of each fragment 0..nodes, uint32, 0 stays 0. Raises ``UserError`` for outputs that cannot be."""

    def finish(self, outputs: Mapping[str, np.ndarray], labels: np.ndarray) -> np.ndarray:
        """The labels of a block as they are stored."""


def system_of(config: Any) -> System:
    """The system that a ``Config`` object belongs to."""
    return cast(System, sys.modules[type(config).__module__])


def unit_grey(image: jax.Array) -> jax.Array:
    """Grey values as float32 in 0..1, from uint8 or from what is already in that range."""
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def flip_back_affinities(affinities: jax.Array, offsets: tuple[Triple, ...], axes: tuple[int, ...]) -> jax.Array:
    """Affinities (b, z, y, x, offset) predicted on an image flipped along ``axes``, in the unflipped frame.

    Flipping turns the pair (v, v + e) into (v, v - e), which is the pair stored at v + e. Raises ``UserError`` for an
    offset with components both on flipped and unflipped axes, whose mirror image is not predicted.
    """
    turned = jnp.flip(affinities, [axis + 1 for axis in axes])
    channels = []
    for channel, offset in enumerate(offsets):
        moved = {axis for axis in range(3) if offset[axis]}
        plane = turned[..., channel]
        if moved & set(axes):
            if not moved <= set(axes):
                raise UserError(f"test-time flips along {axes} have no mirror image of offset {offset}")
            # Edge values stand in where v + e is outside; those pairs have no partner and are never read.
            index = [jnp.clip(jnp.arange(plane.shape[a + 1]) + offset[a], 0, plane.shape[a + 1] - 1) for a in range(3)]
            for axis in moved:
                plane = jnp.take(plane, index[axis], axis + 1)
        channels.append(plane)
    return jnp.stack(channels, -1)

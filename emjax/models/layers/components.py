"""Connected components inside a compiled function: hooking and pointer jumping, a handful of rounds for any shape.

Plain propagation of the smallest index needs as many rounds as the longest path through an object has voxels (thousands
for a winding neurite). Here every component is a tree of pointers towards its smallest raster index. A round looks up
the smallest root among each voxel's neighbours, hooks the voxel's *root* onto it, and shortens all paths, so that whole
trees merge at once (Shiloach and Vishkin 1982).
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_JUMPS = 4
_NEIGHBOURS = tuple(offset for offset in itertools.product((-1, 0, 1), repeat=3) if any(offset))


def _shifted(volume: jax.Array, offset: Sequence[int], outside: int) -> jax.Array:
    """``volume[v + offset]``, ``outside`` beyond the border."""
    padded = jnp.pad(volume, [(max(-step, 0), max(step, 0)) for step in offset], constant_values=outside)
    start = [max(step, 0) for step in offset]
    return jax.lax.slice(padded, start, [first + size for first, size in zip(start, volume.shape)])


def _smallest_around(roots: jax.Array, mask: jax.Array, nothing: int) -> jax.Array:
    """Minimum over the 3 x 3 x 3 window, one axis after the other; ``nothing`` outside the mask."""
    for axis in range(3):
        before, after = [0, 0, 0], [0, 0, 0]
        before[axis], after[axis] = -1, 1
        roots = jnp.minimum(
            roots,
            jnp.minimum(_shifted(roots, before, nothing), _shifted(roots, after, nothing)),
        )
    return jnp.where(mask, roots, nothing)


def _smallest_alike(roots: jax.Array, labels: jax.Array, nothing: int) -> jax.Array:
    """Minimum over those of the 27 voxels around that carry the voxel's own label."""
    smallest = roots
    for offset in _NEIGHBOURS:
        alike = _shifted(labels, offset, 0) == labels
        smallest = jnp.minimum(smallest, jnp.where(alike, _shifted(roots, offset, nothing), nothing))
    return jnp.where(labels > 0, smallest, nothing)


def component_roots(volume: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest raster index of each voxel's 26-connected component, and the number of rounds it took.

    ``volume`` (z, y, x) is a boolean mask, or int32 ids of which each is split into its connected parts; False and ids
    of at most 0 are background. Returns int32 (z, y, x), equal to ``volume.size`` in the background, and an int32
    scalar. jit-able and vmap-able (a batch takes the rounds of its slowest member).
    """
    nothing = volume.size
    mask = volume if volume.dtype == jnp.bool_ else volume > 0
    index = jnp.arange(nothing, dtype=jnp.int32).reshape(volume.shape)
    # Runs along x are joined up front: the last run start at or before a voxel is the root of its run.
    previous = _shifted(volume, (0, 0, -1), 0)
    starts = mask & ~((previous == volume) & mask)
    roots = jnp.where(mask, jax.lax.cummax(jnp.where(starts, index, -1), axis=2), nothing)

    def unsettled(state):
        return state[2]

    def merge(state):
        parents, rounds, _ = state
        roots = parents[:nothing].reshape(volume.shape)
        if volume.dtype == jnp.bool_:
            smallest = _smallest_around(roots, mask, nothing)
        else:
            smallest = _smallest_alike(roots, volume, nothing)
        hooked = parents.at[roots.reshape(-1)].min(smallest.reshape(-1))
        for _ in range(_JUMPS):
            hooked = hooked[hooked]
        return hooked, rounds + 1, jnp.any(hooked != parents)

    # One more entry, pointing to itself, stands for the background.
    parents = jnp.concatenate([roots.reshape(-1), jnp.full((1,), nothing, jnp.int32)])
    parents, rounds, _ = jax.lax.while_loop(unsettled, merge, (parents, jnp.int32(0), mask.any()))
    return parents[:nothing].reshape(volume.shape), rounds


def connected_components(volume: jax.Array) -> jax.Array:
    """26-connected parts of a mask or of each positive id, numbered 1, 2, ... in raster order of their first voxels.

    ``volume`` (z, y, x) bool or int32; returns int32 of the same shape, 0 = background. The numbering is that of
    ``skimage.measure.label(volume, connectivity=3)``.
    """
    roots, _ = component_roots(volume)
    flat = roots.reshape(-1)
    first = flat == jnp.arange(volume.size, dtype=jnp.int32)
    rank = jnp.cumsum(first.astype(jnp.int32))
    return jnp.where(flat < volume.size, rank[jnp.minimum(flat, volume.size - 1)], 0).reshape(volume.shape)

"""The five kinds of affinity volume that post-processing is timed on: made-up cells, seen through a made-up network."""

import numpy as np
from scipy import ndimage, spatial

# name -> (shape in voxels, voxel size relative to x, stored as uint8)
KINDS = {
    "b128": ((128, 128, 128), (1.0, 1.0, 1.0), False),
    "b128q": ((128, 128, 128), (1.0, 1.0, 1.0), True),
    "snemi": ((50, 512, 512), (5.0, 1.0, 1.0), False),
    "snemiq": ((50, 512, 512), (5.0, 1.0, 1.0), True),
    "b256": ((256, 256, 256), (1.0, 1.0, 1.0), False),
}


def affinity_volume(shape: tuple[int, int, int], scale: tuple[float, float, float], seed: int = 0) -> np.ndarray:
    """(3, z, y, x) float32 affinities of tubular cells: near 1 inside, low on membranes, smooth noise in logits."""
    rng = np.random.default_rng(seed)
    size = np.array(shape) * np.array(scale)
    cells = max(8, int(size.prod() / 30_000))
    chains = rng.uniform(0, 1, (cells, 1, 3)) * size + np.cumsum(rng.normal(0, 12, (cells, 6, 3)), axis=1)
    tree = spatial.cKDTree(chains.reshape(-1, 3))
    owner = np.repeat(np.arange(cells), 6)
    half = [np.arange(0, n, 2, dtype=np.float32) for n in shape]
    grid = np.stack(np.meshgrid(*half, indexing="ij"), axis=-1) * np.array(scale, np.float32)
    warp = np.stack([ndimage.gaussian_filter(rng.normal(0, 1, grid.shape[:3]), 4) for _ in range(3)], axis=-1)
    grid += (warp * (6 / warp.std())).astype(np.float32)
    distance, nearest = tree.query(grid.reshape(-1, 3), k=6, workers=-1)
    other = owner[nearest] != owner[nearest[:, :1]]
    gap = np.where(other.any(1), np.take_along_axis(distance, other.argmax(1)[:, None], 1)[:, 0], 50.0) - distance[:, 0]
    gap = gap.reshape(grid.shape[:3]).astype(np.float32)
    gap = ndimage.zoom(gap, [n / m for n, m in zip(shape, gap.shape)], order=1)[tuple(slice(n) for n in shape)]
    field = 0.8 * gap - 2.0 + 1.2 * _smooth_noise(rng, shape, scale)
    affinities = np.empty((3, *shape), np.float32)
    for channel in range(3):
        logit = (field + np.roll(field, 1, channel)) / 2 + 0.25 * _smooth_noise(rng, shape, scale)
        affinities[channel] = 1 / (1 + np.exp(-logit))
    return affinities


def _smooth_noise(rng, shape, scale):
    """Noise of standard deviation 1, blurred by about two voxels."""
    noise = ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), [2.2 / s**0.5 for s in scale])
    return noise / noise.std()


def volume(kind: str, seed: int = 0) -> np.ndarray:
    """The affinities of one of ``KINDS``, float32 or uint8."""
    shape, scale, quantised = KINDS[kind]
    affinities = affinity_volume(shape, scale, seed)
    return np.round(affinities * 255).astype(np.uint8) if quantised else affinities

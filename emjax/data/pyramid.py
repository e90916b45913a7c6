"""Downsampling pyramids beside a volume: mean for images, mode for labels."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import tensorstore as ts

from emjax.data import ome
from emjax.data.folder import Folder, context, is_remote, join, one_line
from emjax.data.location import locate
from emjax.data.stores import zarr_node
from emjax.data.stores_write import create_array, default_shards, zarr_array_spec
from emjax.data.volume import Volume, blocks, open_volume
from emjax.errors import UserError

Triple = tuple[float, float, float]

METHODS = ("mean", "mode")
SMALLEST = 64


def level_factors(shape: Sequence[int], voxel_size: Triple, levels: int | None = None) -> list[tuple[int, int, int]]:
    """Downsampling of each level against the one before it: 2 along the axes with the finest voxels, else 1.

    Axes are halved while their voxels are below twice the finest of that level, so that voxels become cubes first.

    Args:
        shape: z, y, x of the finest level.
        voxel_size: nm, zyx, of the finest level.
        levels: how many to make; None: until no axis is longer than 64 voxels.
    """
    factors: list[tuple[int, int, int]] = []
    size, length = list(voxel_size), list(shape)
    while len(factors) < levels if levels is not None else max(length) > SMALLEST:
        halved = [n > 1 and s < 2 * min(size) for n, s in zip(length, size)]
        if not any(halved):
            halved = [n > 1 for n in length]
        if not any(halved):
            break
        step = tuple(2 if h else 1 for h in halved)
        size = [s * f for s, f in zip(size, step)]
        length = [-(-n // f) for n, f in zip(length, step)]
        factors.append(step)  # type: ignore[arg-type]
    return factors


def default_method(volume: Volume) -> str:
    """ "mode" for what looks like labels (integers of 4 bytes and more, precomputed segmentations), else "mean"."""
    labels = volume.dtype.kind in "iu" and volume.dtype.itemsize >= 4
    return "mode" if labels or volume.attributes.get("type") == "segmentation" else "mean"


def write_pyramid(spec: str, *, levels: int | None = None, method: str | None = None) -> list[tuple[int, ...]]:
    """Write the coarser levels of an OME-Zarr image or a precomputed volume, replacing those that are there.

    Works block by block of the output's shards, so the memory does not grow with the volume. Readers of
    OME-Zarr see the new levels only when all are written.

    Args:
        spec: the volume, whole.
        levels: how many coarser levels; None: until no axis is longer than 64 voxels.
        method: "mean" or "mode"; None: by dtype, see :func:`default_method`.

    Returns:
        The shapes of all levels, the finest first.

    Raises:
        UserError: not an OME-Zarr image or a precomputed volume, no voxel size, or unknown method.
    """
    place = locate(spec)
    if place.kind not in ("zarr", "precomputed"):
        raise UserError(f"{spec}: pyramids are written for OME-Zarr and precomputed volumes, not for {place.kind}")
    volume = open_volume(spec)
    method = method or default_method(volume)
    if method not in METHODS:
        raise UserError(f"pyramid method {method!r} is unknown, expected mean or mode")
    factors = level_factors(volume.spatial_shape, volume.require_voxel_size(), levels)
    if place.kind == "precomputed":
        return _precomputed_pyramid(place.path, factors, method)
    return _zarr_pyramid(join(place.path, place.dataset or ""), volume, factors, method)


def _geometries(volume: Volume, factors: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], Triple, Triple]]:
    """Shape, voxel size and offset of each level; a coarse voxel's centre lies between those of its fine ones."""
    shape, size, offset = volume.shape, volume.require_voxel_size(), volume.offset
    yield shape, size, offset
    for step in factors:
        offset = tuple(o + (f - 1) / 2 * s for o, f, s in zip(offset, step, size))  # type: ignore[assignment]
        size = tuple(f * s for f, s in zip(step, size))  # type: ignore[assignment]
        shape = (*shape[:-3], *(-(-n // f) for n, f in zip(shape[-3:], step)))
        yield shape, size, offset


def _open(spec: dict[str, Any], **options: Any) -> ts.TensorStore:
    return ts.open(spec, open=True, context=context(), **options).result()


def _reduce(fine: ts.TensorStore, coarse: ts.TensorStore, step: Sequence[int], method: str) -> None:
    """Fill ``coarse`` from ``fine`` by whole shards; both in the same axis order, their domains starting anywhere."""
    reduced = ts.downsample(fine, list(step), method)  # type: ignore[call-overload]
    reduced = reduced[ts.d[:].translate_to[0]]
    target = coarse[ts.d[:].translate_to[0]]
    for box in blocks(target.shape, [int(n or 1) for n in target.chunk_layout.write_chunk.shape or ()]):
        target[box].write(reduced[box].read().result()).result()


def _zarr_pyramid(location: str, volume: Volume, factors: list[tuple[int, int, int]], method: str) -> list[tuple]:
    node = Folder(location, write=True)
    kind, attributes, metadata = zarr_node(node)
    multiscale = ome.multiscales_of(attributes)
    if kind != "group" or multiscale is None:
        raise UserError(
            f"{location} is not an OME-Zarr image (a group with multiscales): convert it with emjax.prepare"
        )
    version = 3 if metadata.get("zarr_format") == 3 else 2
    paths = [ome.level_paths(multiscale)[0]]
    stem = paths[0].rstrip("0123456789")
    start = int(paths[0][len(stem) :] or 0)
    paths += [f"{stem}{start + number}" for number in range(1, len(factors) + 1)]
    levels = list(_geometries(volume, factors))
    axes = volume.axes
    with one_line(f"cannot write the pyramid of {location}"):
        finest = node.child(paths[0])
        spec = {"driver": "zarr3" if version == 3 else "zarr", "kvstore": finest.spec}
        fine = _open(spec, read=True)
        stored = ome.multiscale_axes(multiscale, fine.rank)
        if stored != axes:
            raise UserError(f"{location}: pyramids are written for axes {axes}, the levels are stored as {stored}")
        chunks = tuple(int(n or 1) for n in fine.chunk_layout.read_chunk.shape or ())
        sharded = fine.chunk_layout.write_chunk.shape != fine.chunk_layout.read_chunk.shape
        for path, step, (shape, _, _) in zip(paths[1:], factors, levels[1:]):
            child = node.child(path)
            if child.bytes("zarr.json" if version == 3 else ".zarray") is not None:
                child.remove()
            pieces = tuple(min(c, n) for c, n in zip(chunks, shape))
            shards = default_shards(shape, pieces) if sharded else None
            shards = None if shards == pieces else shards
            create_array(child, zarr_array_spec(version, shape, volume.dtype, axes, pieces, shards))
            coarse = _open({"driver": spec["driver"], "kvstore": child.spec}, read=True, write=True)
            _reduce(fine, coarse, (1,) * (len(shape) - 3) + tuple(step), method)
            fine = coarse
    image = ome.build_multiscales(
        str(multiscale.get("name", "")),
        axes,
        [(path, size, offset) for path, (_, size, offset) in zip(paths, levels)],
        "0.5" if version == 3 else "0.4",
        method,
    )
    _replace_multiscales(node, version, image)
    return [shape for shape, _, _ in levels]


def _replace_multiscales(node: Folder, version: int, image: list[dict[str, Any]]) -> None:
    name = "zarr.json" if version == 3 else ".zattrs"
    document = node.json(name) or {}
    if version == 3:
        attributes = document.setdefault("attributes", {})
        attributes["ome"] = {**attributes.get("ome", {}), "version": "0.5", "multiscales": image}
    else:
        document["multiscales"] = image
    node.write_json(name, document)


def _precomputed_pyramid(location: str, factors: list[tuple[int, int, int]], method: str) -> list[tuple]:
    folder = Folder(location, write=True)
    base = {"driver": "neuroglancer_precomputed", "kvstore": folder.spec}
    info = folder.json("info") or {}
    first = info["scales"][0]
    resolution, corner, size = (list(first[key]) for key in ("resolution", "voxel_offset", "size"))
    # Old coarse scales go, from the list and from the disk, before new ones of perhaps other sizes come.
    for old in info["scales"][1:]:
        stale = folder.child(str(old["key"]))
        inside = ".." not in str(old["key"]).split("/")
        if inside and not is_remote(location) and os.path.isdir(stale.location):
            stale.remove()
    folder.write_json("info", {**info, "scales": [first]})
    with one_line(f"cannot write the pyramid of {location}"):
        fine = _open({**base, "scale_index": 0}, read=True)
        for step in factors:
            f = step[::-1]
            # The coarse grid starts at the corner rounded down; its first voxels may hold fewer fine ones.
            end = [-(-(c + n) // k) for c, n, k in zip(corner, size, f)]
            corner = [c // k for c, k in zip(corner, f)]
            size = [e - c for e, c in zip(end, corner)]
            resolution = [r * k for r, k in zip(resolution, f)]
            scale = {key: first[key] for key in ("encoding", "compressed_segmentation_block_size") if key in first}
            scale |= {
                "size": size,
                "voxel_offset": corner,
                "resolution": resolution,
                "chunk_size": first["chunk_sizes"][0],
            }
            create_array(folder, {"driver": base["driver"], "scale_metadata": scale})
            coarse = _open({**base, "scale_metadata": {"resolution": resolution}}, read=True, write=True)
            _reduce(fine, coarse, (*f, 1), method)
            fine = coarse
    return level_shapes(f"precomputed://{location}")


def level_shapes(spec: str) -> list[tuple[int, ...]]:
    """Shapes of the levels that an OME-Zarr image or precomputed volume has, the finest first."""
    place = locate(spec)
    location = join(place.path, place.dataset or "") if place.kind == "zarr" else place.path
    folder = Folder(location)
    if place.kind == "precomputed":
        count = len((folder.json("info") or {}).get("scales", []))
        return [open_volume(f"precomputed://{location}:{number}").shape for number in range(count)]
    multiscale = ome.multiscales_of(zarr_node(folder)[1])
    paths = ome.level_paths(multiscale) if multiscale else [""]
    return [open_volume(join(location, path), allow_incomplete=True).shape for path in paths]

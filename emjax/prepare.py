"""Prepare volumes: convert them to OME-Zarr 0.5 (or another format) with their voxel size, offset and attributes.

python -m emjax.prepare list [NAME]                     known public data sets, or all about one
python -m emjax.prepare NAME --source DIR --output DIR  a downloaded data set, or a box of a streamed one (--bbox)
python -m emjax.prepare volume --input A --output B     any volume into any format
python -m emjax.prepare affinities --input A --output B --convention banis|seung|elf-boundary
python -m emjax.prepare pyramid --input A               coarser levels beside a volume
python -m emjax.prepare rescale --input A --output B --to Z,Y,X   other voxel size, in nm
python -m emjax.prepare emneuron --source DIR           check EMNeuron as downloaded, write its manifests
python -m emjax.prepare phantom --output OUT.zarr       synthetic neuropil: raw, labels, mitochondria
"""

import argparse
import collections
import dataclasses
import glob
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from emjax import cli
from emjax.data import emneuron
from emjax.data.affinities import as_affinities, convention_offsets, create_affinities, from_convention, quantise
from emjax.data.catalogue import CATALOGUE, Entry, Member, entry
from emjax.data.files import open_hdf5
from emjax.data.intensity import as_uint8, percentile_window
from emjax.data.location import FORMATS, locate
from emjax.data.phantom import PhantomConfig, sectioned, write_phantom
from emjax.data.pyramid import write_pyramid
from emjax.data.rescale import rescale_image, rescale_labels, rescaled_shape
from emjax.data.transfer import Summary, copy_labels, copy_volume, white_as_label
from emjax.data.volume import Volume, blocks, common_region, open_volume, save_volume, triple
from emjax.errors import UserError
from emjax.inference.options import bounding_box, byte_size, whole_triple


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return cli.DONE if arguments else cli.WRONG_USE
    command, rest = arguments[0], arguments[1:]
    steps: dict[str, Callable[[list[str]], int]] = {
        "list": list_sets,
        "volume": prepare_volume,
        "affinities": prepare_affinities,
        "pyramid": prepare_pyramid,
        "phantom": prepare_phantom,
        "rescale": prepare_rescaled,
        "emneuron": prepare_emneuron,
    }
    if command.startswith("-"):
        raise UserError(f"the first argument is {command}; expected {', '.join(steps)} or the name of a data set")
    if command in steps:
        return steps[command](rest)
    return prepare_set(entry(command), rest)


# --- options ---------------------------------------------------------------------------------------------------------


def _add_geometry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--voxel-size", metavar="Z,Y,X", help="nm; wins over what the file says")
    parser.add_argument("--offset", metavar="Z,Y,X", help="nm; wins over what the file says")
    parser.add_argument("--axes", help="stored order, e.g. xyz, where the file is silent or wrong")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pyramid", action="store_true", help="write coarser levels too (OME-Zarr and precomputed)")
    parser.add_argument("--overwrite", action="store_true", help="replace a volume that is there")
    parser.add_argument("--memory", default="1GB", help="working memory (default: %(default)s)")


def _add_region(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bbox", metavar="Z0:Z1,Y0:Y1,X0:X1", help="only this box, voxels counted from the first one")
    parser.add_argument("--bbox-nm", metavar="Z0:Z1,Y0:Y1,X0:X1", help="only this box, nm as in the volume's metadata")


def _region(volume: Volume, options: argparse.Namespace) -> Volume:
    """The part of a volume that --bbox or --bbox-nm names."""
    if options.bbox and options.bbox_nm:
        raise UserError("--bbox and --bbox-nm name the same thing; give one of them")
    if options.bbox:
        return volume.crop(bounding_box(options.bbox, volume.spatial_shape, volume.spec))
    if options.bbox_nm:
        return volume.crop(_box_of_nanometres(options.bbox_nm, volume))
    return volume


def _box_of_nanometres(text: str, volume: Volume) -> tuple[slice, ...]:
    parts = [re.fullmatch(r"\s*(-?[\d.]+)\s*:\s*(-?[\d.]+)\s*", part) for part in text.split(",")]
    if len(parts) != 3 or None in parts:
        raise UserError(f"--bbox-nm {text}: expected z0:z1,y0:y1,x0:x1 in nm, such as 4000:5200,0:1024,0:1024")
    box = []
    for axis, part, size, offset, length in zip(
        "zyx", parts, volume.require_voxel_size(), volume.offset, volume.spatial_shape
    ):
        low, high = (round((float(number) - offset) / size) for number in part.groups())  # type: ignore[union-attr]
        if not 0 <= low < high <= length:
            raise UserError(
                f"--bbox-nm {text}: along {axis} the volume reaches from {offset:g} to {offset + size * length:g} nm"
            )
        box.append(slice(low, high))
    return tuple(box)


def _progress(name: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == total else ""
            print(f"\r{name}: {done} of {total} blocks", end=end, file=sys.stderr, flush=True)

    return show


def _window(volume: Volume, text: str | None) -> Volume:
    """The volume as uint8 through the window that --window asks for; itself if nothing was asked."""
    if text is None:
        return volume
    if text == "auto":
        return as_uint8(volume, percentile_window(volume))
    parts = text.split(",")
    try:
        return as_uint8(volume, [float(part) for part in parts])
    except ValueError:
        raise UserError(f"--window {text}: expected auto, or two rising grey values such as 0,4095") from None


def _finish(path: str, summary: Summary, pyramid: bool, method: str | None) -> None:
    print("\n".join(summary.lines()))
    if pyramid:
        shapes = write_pyramid(path, method=method)
        print(f"  levels: {', '.join('x'.join(map(str, shape)) for shape in shapes)}")


# --- list ------------------------------------------------------------------------------------------------------------


def list_sets(arguments: list[str]) -> int:
    """Prints the catalogue, or all about one data set."""
    parser = cli.parser("prepare list", "Known public data sets.")
    parser.add_argument("name", nargs="?", help="show all about this one")
    options = parser.parse_args(arguments)
    if options.name is None:
        width = max(len(found.name) for found in CATALOGUE)
        for found in CATALOGUE:
            size = ",".join(f"{v:g}" for v in found.voxel_size) if found.voxel_size else "varies"
            print(f"{found.name:{width}}  {size:>10} nm  {'streamed' if found.streamed else 'files   '}  {found.title}")
        return cli.DONE
    found = entry(options.name)
    size = ",".join(f"{v:g}" for v in found.voxel_size) if found.voxel_size else "varies"
    print(f"{found.name}: {found.title}")
    print(f"  voxel size (z,y,x)  {size} nm, stored axes {found.axes}")
    print(f"  licence             {found.licence}")
    print(f"  cite                {found.citation}")
    print(f"  access              {found.access}")
    for url in found.urls:
        print(f"  where               {url}")
    for member in found.members:
        labels = f", labels {' or '.join(member.labels)}" if member.labels else ""
        print(
            f"  volume {member.name} {f'({member.split})' if member.split else ''}: {' or '.join(member.image)}{labels}"
        )
    return cli.DONE


# --- a data set ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """A member of a data set whose files are there."""

    name: str
    image: str
    labels: str | None
    member: Member


def _there(pattern: str) -> list[str]:
    """Names of volumes that a pattern with an optional ``:dataset`` matches."""
    path, colon, dataset = pattern.partition(":")
    return [found + colon + dataset for found in sorted(glob.glob(path))]


def _fill(pattern: str, image: str, root: str) -> str:
    """Placeholders of a member's patterns, from the path of its image."""
    path = image.partition(":")[0]
    stem = os.path.splitext(os.path.basename(path))[0]
    parents = os.path.relpath(os.path.dirname(path), root).split(os.sep)
    values = {
        "path": os.path.relpath(path, root),
        "folder": os.path.relpath(os.path.dirname(path), root),
        "stem": stem,
        "tail": stem.partition("_")[2],
        "parent": parents[-1],
        "parents": "_".join(parents[1:] or parents),
    }
    return pattern.format(**values)


def find_members(found: Entry, source: str) -> Iterator[Found]:
    """The members of a data set whose files are in ``source``; of alternatives the first that is there."""
    seen: set[str] = set()
    for member in found.members:
        images: list[str] = []
        for pattern in member.image:
            images = images or _there(os.path.join(source, pattern))
        labels_of: dict[str, str] = {}
        for image in images:
            for pattern in member.labels:
                if image not in labels_of and (label := _there(os.path.join(source, _fill(pattern, image, source)))):
                    labels_of[image] = label[0]
        images = [image for image in images if image not in labels_of.values()]
        for image in images if member.each else images[:1]:
            name = _fill(member.name, image, source)
            if name not in seen:
                seen.add(name)
                yield Found(name, image, labels_of.get(image), member)


def prepare_set(found: Entry, arguments: list[str]) -> int:
    """Converts a downloaded data set, or streams a box of one."""
    parser = cli.parser(f"prepare {found.name}", f"{found.title}\n{found.access}\ncite: {found.citation}")
    where = "address or local copy, where it is not the public one" if found.streamed else "folder with the files"
    parser.add_argument("--source", required=not found.streamed, help=where)
    parser.add_argument("--output", "--out", required=True, help="folder for NAME.zarr, or one name that ends in .zarr")
    names = ", ".join(dict.fromkeys(member.name for member in found.members))
    parser.add_argument("--member", action="append", help=f"only this volume, may be repeated: {names}")
    parser.add_argument("--scale", help="streamed: key or number of the resolution level (default: the finest)")
    parser.add_argument("--whole", action="store_true", help="streamed: fetch a large volume as a whole")
    _add_geometry(parser)
    _add_region(parser)
    _add_output(parser)
    options = parser.parse_args(arguments)
    if not found.members:
        raise UserError(f"{found.name}: {found.access}")
    if found.streamed:
        return _stream(found, options)
    if not os.path.isdir(options.source):
        raise UserError(f"--source {options.source} is not a folder; expected the one with the files of {found.name}")
    members = list(find_members(found, options.source))
    if options.member:
        _check_members(options.member, [member.name for member in members], options.source)
        members = [member for member in members if member.name in options.member]
    if not members:
        wanted = ", ".join(dict.fromkeys(pattern for member in found.members for pattern in member.image))
        raise UserError(f"{options.source} holds no files of {found.name}: looked for {wanted}")
    outputs = _outputs(options.output, [member.name for member in members])
    for member in members:
        _prepare_member(found, member, outputs[member.name], options)
    return cli.DONE


def _check_members(asked: list[str], known: list[str], where: str) -> None:
    missing = [name for name in asked if name not in known]
    if missing:
        raise UserError(f"no volume {missing[0]!r} in {where}: found {', '.join(known) or 'none'}")


def _outputs(output: str, names: list[str]) -> dict[str, str]:
    if output.endswith(".zarr"):
        if len(names) > 1:
            raise UserError(
                f"--output {output} is one volume, but there are {len(names)}: {', '.join(names)} (--member)"
            )
        return {names[0]: output}
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"two volumes would be called {repeated[0]}.zarr; choose with --member and --output")
    return {name: os.path.join(output, f"{name.replace('/', '_')}.zarr") for name in names}


def _notes(found: Entry, split: str) -> dict[str, Any]:
    notes = {"dataset": found.name, "citation": found.citation, "licence": found.licence, "source": found.urls[0]}
    return {**notes, "split": split} if split else notes


def _prepare_member(found: Entry, part: Found, output: str, options: argparse.Namespace) -> None:
    size = options.voxel_size or None
    image = _open(part.image, found, size, options, options.axes or part.member.image_axes)
    if image.axes == "czyx":
        print(f"{image.spec}: {image.shape[0]} channels, the first is taken")
        image = image.channel(0)
    if part.member.image_z:
        low, high = part.member.image_z
        image = image.crop([slice(low, min(high, image.shape[0])), slice(None), slice(None)])
    labels = None
    if part.labels is not None:
        labels = _open(part.labels, found, size, options, options.axes or part.member.labels_axes)
        if part.member.labels_as == "white":
            labels = white_as_label(labels)
        if labels.spatial_shape == image.spatial_shape and labels.offset == (0.0, 0.0, 0.0):
            labels = dataclasses.replace(labels, offset=image.offset)
    print(image.describe())
    memory = byte_size(options.memory) // 4
    shared: dict[str, Any] = {"overwrite": options.overwrite, "memory": memory}
    notes = _notes(found, part.member.split)
    region = _region(image, options)
    summary = copy_volume(region, output, attributes=notes, progress=_progress(output), **shared)
    _finish(output, summary, options.pyramid, "mean")
    if labels is not None:
        print(labels.describe())
        convert = _lookup(part.labels or "", part.member.transforms)
        target, mask = f"{output}:labels/labels", f"{output}:labels/ignore_mask"
        if region is not image:
            # The box counts voxels of the image; padded images and their labels start at different places.
            labels = common_region(region, labels)[1]
        summary = copy_labels(
            labels, target, mask, attributes=notes, convert=convert, progress=_progress(target), **shared
        )
        _finish(target, summary, options.pyramid, "mode")


def _open(spec: str, found: Entry, size: Any, options: argparse.Namespace, axes: str | None) -> Volume:
    volume = open_volume(spec, voxel_size=size, offset=options.offset, axes=axes)
    if volume.voxel_size is None and found.voxel_size is not None:
        volume = dataclasses.replace(volume, voxel_size=found.voxel_size)
    volume.require_voxel_size()
    return volume


def _lookup(spec: str, dataset: str | None) -> Callable[[np.ndarray], np.ndarray] | None:
    """Stored ids to bodies, by the table (stored, body) in the labels' own file, if it has one."""
    if dataset is None:
        return None
    with open_hdf5(locate(spec).path) as file:
        if dataset not in file:
            return None
        table = np.asarray(file[dataset])
    if table.ndim != 2 or table.shape[1] != 2:
        raise UserError(f"{spec}: {dataset} has the shape {table.shape}, expected rows of a stored id and its body")
    order = np.argsort(table[:, 0])
    stored, bodies = table[order, 0].astype(np.uint64), table[order, 1].astype(np.uint64)

    def convert(block: np.ndarray) -> np.ndarray:
        ids = block.astype(np.uint64)
        places = np.minimum(np.searchsorted(stored, ids), len(stored) - 1)
        return np.where(stored[places] == ids, bodies[places], ids)

    return convert


def _stream(found: Entry, options: argparse.Namespace) -> int:
    """Copies boxes of public volumes, or of local copies of them."""
    members = {member.name: member for member in found.members}
    _check_members(options.member or [], list(members), found.name)
    chosen = options.member or list(members)
    if options.source and len(chosen) > 1:
        raise UserError(f"--source is one volume, but {found.name} has {', '.join(members)}: choose one with --member")
    if not (options.bbox or options.bbox_nm or options.whole):
        raise UserError(f"{found.name} is large: give a box with --bbox or --bbox-nm, or --whole")
    outputs = _outputs(options.output, chosen)
    for name in chosen:
        spec = options.source or members[name].image[0]
        volume = open_volume(
            spec, dataset=options.scale, voxel_size=options.voxel_size, offset=options.offset, axes=options.axes
        )
        print(volume.describe())
        volume = _region(volume, options)
        memory = byte_size(options.memory) // 4
        shared: dict[str, Any] = {
            "overwrite": options.overwrite,
            "memory": memory,
            "progress": _progress(outputs[name]),
        }
        notes = {**_notes(found, ""), "source": spec}
        output = outputs[name]
        labelled = volume.attributes.get("type") == "segmentation"
        if labelled:
            dtype = volume.dtype if volume.dtype.itemsize == 8 else np.uint32
            summary = copy_labels(
                volume, output, f"{output}:labels/ignore_mask", attributes=notes, dtype=dtype, **shared
            )
        else:
            summary = copy_volume(volume, output, attributes=notes, **shared)
        _finish(output, summary, options.pyramid, "mode" if labelled else "mean")
    return cli.DONE


# --- any volume ------------------------------------------------------------------------------------------------------


def prepare_volume(arguments: list[str]) -> int:
    """Converts any volume into any format."""
    parser = cli.parser("prepare volume", "Convert a volume: any format into any format, block by block.")
    parser.add_argument("--input", required=True, help="volume, e.g. stack.tif, 'slices/*.png', raw.h5:main")
    parser.add_argument("--output", required=True, help="out.zarr, out.zarr:labels/x, out.n5:x, out.h5:x, out.tif, ...")
    parser.add_argument("--dataset", help="dataset, level or scale of the input, where its name does not say it")
    parser.add_argument("--labels", action="store_true", help="ids: special ones become 0 and a mask, levels by mode")
    parser.add_argument("--mask-output", help="where that mask goes (default: beside the labels)")
    parser.add_argument("--channel", type=int, help="only this channel, numbered from 0")
    parser.add_argument("--window", metavar="LOW,HIGH", help="grey values that become 0 and 255, or auto (percentiles)")
    parser.add_argument("--dtype", help="type of the output; values must fit")
    parser.add_argument("--format", choices=FORMATS, help="format of the output, where its name does not say it")
    parser.add_argument("--chunks", metavar="Z,Y,X", help="voxels read at once")
    parser.add_argument("--shards", metavar="Z,Y,X", help="voxels written at once (Zarr 3)")
    parser.add_argument("--encoding", choices=("raw", "compressed_segmentation"), help="of precomputed outputs")
    _add_geometry(parser)
    _add_region(parser)
    _add_output(parser)
    options = parser.parse_args(arguments)
    volume = open_volume(
        options.input,
        dataset=options.dataset,
        voxel_size=options.voxel_size,
        offset=options.offset,
        axes=options.axes,
    )
    print(volume.describe())
    volume.require_voxel_size()
    if options.channel is not None:
        volume = volume.channel(options.channel)
    volume = _region(volume, options)
    chosen: dict[str, Any] = {
        "overwrite": options.overwrite,
        "format": options.format,
        "encoding": options.encoding,
        "memory": byte_size(options.memory) // 4,
        "dtype": _dtype(options.dtype),
        "progress": _progress(options.output),
    }
    for name in ("chunks", "shards"):
        given = whole_triple(getattr(options, name), f"--{name}")
        if given is not None:
            chosen[name] = (1,) * (volume.ndim - 3) + given
    if options.labels:
        if options.window:
            raise UserError("--window is for images, --labels for ids; give one of them")
        mask = options.mask_output or _mask_beside(options.output)
        summary = copy_labels(volume, options.output, mask, **chosen)
    else:
        summary = copy_volume(_window(volume, options.window), options.output, **chosen)
    _finish(options.output, summary, options.pyramid, "mode" if options.labels else None)
    return cli.DONE


def _dtype(text: str | None) -> np.dtype | None:
    try:
        return None if text is None else np.dtype(text)
    except TypeError:
        raise UserError(f"--dtype {text}: expected a NumPy type such as uint8, uint32 or float32") from None


def _mask_beside(output: str) -> str:
    """``a.zarr:labels/x`` to ``a.zarr:labels/x_ignore``, ``a.tif`` to ``a_ignore.tif``."""
    found = re.match(r"(.*?)(\.(?:zarr|n5|h5|hdf5|hdf|tif|tiff))?(:[^:/][^:]*)?$", output)
    assert found is not None
    path, suffix, inner = found[1], found[2] or "", found[3]
    return f"{path}{suffix}{inner}_ignore" if inner else f"{path}_ignore{suffix}"


# --- affinities ------------------------------------------------------------------------------------------------------


def prepare_affinities(arguments: list[str]) -> int:
    """Converts affinities of another convention, or of another format."""
    parser = cli.parser("prepare affinities", "Affinities of others into ours: offsets, order, uint8 with scale.")
    parser.add_argument("--input", required=True, help="affinities, four axes")
    parser.add_argument("--output", required=True)
    parser.add_argument("--convention", choices=("emjax", "banis", "seung", "elf-boundary"), default="emjax")
    parser.add_argument("--offsets", help="z,y,x;z,y,x;... of the channels, where they are not the nearest ones")
    parser.add_argument("--long-range", type=int, default=10, help="distance of BANIS' long affinities (default: 10)")
    parser.add_argument("--float", action="store_true", help="store float32, not uint8")
    _add_geometry(parser)
    _add_output(parser)
    options = parser.parse_args(arguments)
    name = options.convention
    axes = options.axes or {"banis": "cxyz", "seung": "xyzc"}.get(name)
    volume = open_volume(options.input, voxel_size=options.voxel_size, offset=options.offset, axes=axes)
    print(volume.describe())
    offsets = _offsets(options.offsets)
    if name == "emjax":
        attributes = {**volume.attributes, **({"offsets": offsets} if offsets else {})}
        stored = as_affinities(dataclasses.replace(volume, attributes=attributes))
        volume, found, halo = stored.volume, stored.offsets, (0, 0, 0)
    else:
        volume.require_axes("czyx")
        found = convention_offsets(name, volume.shape[0], offsets, options.long_range)
        halo = tuple(max(abs(offset[axis]) for offset in found) for axis in range(3))  # type: ignore[assignment]
    scale = volume.attributes.get("scale", 1.0 / 255.0 if volume.dtype == np.uint8 else 1.0)
    dtype = np.dtype(np.float32 if options.float else np.uint8)
    made = create_affinities(
        options.output,
        volume.spatial_shape,
        found,
        dtype=dtype,
        voxel_size=volume.require_voxel_size(),
        offset=volume.offset,
        overwrite=options.overwrite,
        attributes={key: value for key, value in volume.attributes.items() if key not in ("offsets", "scale")},
    )
    with made as out:
        block = _affinity_block(out, halo, byte_size(options.memory))
        for box in blocks(out.spatial_shape, block):
            read = [slice(max(0, b.start - h), min(n, b.stop + h)) for b, h, n in zip(box, halo, out.spatial_shape)]
            values = volume[(slice(None), *read)].astype(np.float32) * np.float32(scale)
            values = values if name == "emjax" else _convert(values, name, offsets, options.long_range)
            inner = tuple(slice(b.start - r.start, b.stop - r.start) for b, r in zip(box, read))
            values = values[(slice(None), *inner)]
            low, high = float(values.min()), float(values.max())
            if low < 0 or high > 1 or not np.isfinite(low + high):
                raise UserError(f"{volume.spec}: affinities from {low:g} to {high:g}; 0 to 1 is expected")
            out[(slice(None), *box)] = values if options.float else quantise(values)
    print(as_affinities(open_volume(options.output)).describe())
    if options.pyramid:
        write_pyramid(options.output, method="mean")
    return cli.DONE


def _convert(values: np.ndarray, name: str, offsets: Any, long_range: int) -> np.ndarray:
    """``from_convention`` of a block whose axes are already c, z, y, x."""
    order = {"banis": (0, 3, 2, 1), "seung": (3, 2, 1, 0), "elf-boundary": (0, 1, 2, 3)}[name]
    return from_convention(values.transpose(order), name, offsets=offsets, long_range=long_range)[0]


def _affinity_block(out: Volume, halo: tuple[int, int, int], memory: int) -> list[int]:
    """Whole shards, enlarged along x, then y, then z while a block with its halo stays within a quarter of memory."""
    shards = out.shards or out.shape
    block = [min(s, n) for s, n in zip(shards[1:], out.spatial_shape)]
    for axis in (2, 1, 0):
        while block[axis] < out.spatial_shape[axis]:
            longer = [*block]
            longer[axis] = min(block[axis] + shards[1 + axis], out.spatial_shape[axis])
            if 8 * out.shape[0] * np.prod([n + 2 * h for n, h in zip(longer, halo)]) > memory // 4:
                return block
            block = longer
    return block


def _offsets(text: str | None) -> list[list[int]] | None:
    if text is None:
        return None
    try:
        return [[int(number) for number in part.split(",")] for part in text.split(";")]
    except ValueError:
        raise UserError(f"--offsets {text}: expected z,y,x;z,y,x;..., such as '-1,0,0;0,-1,0;0,0,-1'") from None


# --- pyramid ---------------------------------------------------------------------------------------------------------


def prepare_pyramid(arguments: list[str]) -> int:
    """Writes coarser levels beside a volume."""
    parser = cli.parser("prepare pyramid", "Coarser levels of an OME-Zarr image or a precomputed volume.")
    parser.add_argument("--input", required=True)
    parser.add_argument("--levels", type=int, help="how many coarser levels (default: until 64 voxels a side)")
    parser.add_argument("--method", choices=("mean", "mode"), help="default: mode for labels, mean for images")
    options = parser.parse_args(arguments)
    shapes = write_pyramid(options.input, levels=options.levels, method=options.method)
    print(f"{options.input}: levels {', '.join('x'.join(map(str, shape)) for shape in shapes)}")
    return cli.DONE


def prepare_rescaled(arguments: list[str]) -> int:
    """Writes a volume at another voxel size; the whole of it is held in memory."""
    parser = cli.parser("prepare rescale", "A volume at another voxel size; ids by the nearest voxel (--labels).")
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", "--out", required=True)
    parser.add_argument("--to", required=True, metavar="Z,Y,X", help="nm")
    parser.add_argument("--labels", action="store_true", help="the volume holds ids, not grey values")
    parser.add_argument("--voxel-size", metavar="Z,Y,X", help="nm; wins over what the file says")
    parser.add_argument("--overwrite", action="store_true", help="replace a volume that is there")
    options = parser.parse_args(arguments)
    given = triple(options.voxel_size, "--voxel-size", positive=True) if options.voxel_size else None
    volume = open_volume(options.input, voxel_size=given).require_axes("zyx")
    wanted = triple(options.to, "--to", positive=True)
    shape = rescaled_shape(volume.shape, volume.require_voxel_size(), wanted)
    made = (rescale_labels if options.labels else rescale_image)(volume[...], shape)
    # Whole voxels: the size that was asked for is met up to the rounding of the shape.
    size = tuple(v * n / m for v, n, m in zip(volume.require_voxel_size(), volume.shape, shape))
    save_volume(options.output, made, voxel_size=size, offset=volume.offset, overwrite=options.overwrite)
    print(open_volume(options.output).describe())
    return cli.DONE


def prepare_emneuron(arguments: list[str]) -> int:
    """Manifests of EMNeuron as downloaded; with --output, copies of its volumes as for any other data set."""
    if any(argument.startswith("--out") for argument in arguments):
        return prepare_set(entry("emneuron"), arguments)
    parser = cli.parser(
        "prepare emneuron", "Checks the unpacked archives and writes labelled.json, unlabelled.json, validation.json."
    )
    parser.add_argument("--source", required=True, help="folder with labeled/ and valid/, unpacked")
    for line in emneuron.prepare(pathlib.Path(parser.parse_args(arguments).source)):
        print(line)
    return cli.DONE


def prepare_phantom(arguments: list[str]) -> int:
    """Writes a synthetic volume with exact labels."""
    parser = cli.parser("prepare phantom", "Synthetic neuropil with exact labels, a function of these options alone.")
    parser.add_argument("--output", "--out", required=True, help="a .zarr store or an .h5 file; gets raw, labels, ...")
    parser.add_argument(
        "--sectioned", action="store_true", help="thick sections with jitter, as ssTEM (default: FIB-SEM)"
    )
    parser.add_argument("--shape", metavar="Z,Y,X", help="voxels (default: 128,128,128; sectioned 32,256,256)")
    parser.add_argument("--voxel-size", metavar="Z,Y,X", help="nm (default: 8,8,8; sectioned 40,4,4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--density", type=float, help="neurites per cubic micrometre")
    parser.add_argument("--overwrite", action="store_true", help="replace a phantom that is there")
    options = parser.parse_args(arguments)
    changes: dict[str, Any] = {"seed": options.seed}
    if options.shape:
        changes["shape"] = whole_triple(options.shape, "--shape")
    if options.voxel_size:
        changes["voxel_size"] = triple(options.voxel_size, "--voxel-size", positive=True)
    if options.density is not None:
        changes["density"] = options.density
    config = dataclasses.replace(sectioned() if options.sectioned else PhantomConfig(), **changes)
    for spec in write_phantom(options.output, config, overwrite=options.overwrite).values():
        print(open_volume(spec).describe())
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)

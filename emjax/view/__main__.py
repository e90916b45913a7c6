"""``python -m emjax.view VOLUME [VOLUME ...]``: look at volumes in Neuroglancer, served from 127.0.0.1 only.

    python -m emjax.view raw.h5:raw labels.zarr
    python -m emjax.view image=raw.h5:raw truth=raw.h5:labels affinities=prediction.zarr

Prints a link and serves until Ctrl-C. With the extra ``view`` the viewer itself also comes from this machine.
"""

import argparse
import importlib.util
import os
import re
import time
from typing import Any

import numpy as np

from emjax import cli
from emjax.data.location import locate
from emjax.data.pyramid import level_shapes
from emjax.data.volume import Volume, open_volume
from emjax.errors import UserError
from emjax.view import neuroglancer
from emjax.view.server import HOST, Server, Shown

Triple = tuple[float, float, float]


def kind_of(volume: Volume) -> str:
    """What a volume most likely is: affinities have offsets, labels are wide integers."""
    if volume.axes == "czyx" and volume.shape[0] >= 3:
        return "affinities"
    if (volume.dtype.kind in "iu" and volume.dtype.itemsize >= 4) or volume.attributes.get("type") == "segmentation":
        return "segmentation"
    return "image"


def named(text: str) -> tuple[str, str]:
    """``NAME=VOLUME``, or a name made from the volume's."""
    match = re.match(r"([A-Za-z][\w-]*)=(.+)", text)
    if match:
        return match[1], match[2]
    parts = re.split(r"[:/\\]+", text.rstrip("/"))
    return re.sub(r"\W+", "_", "_".join(parts[-2:] if ":" in text.split("/")[-1] else parts[-1:])), text


def show(name: str, spec: str, options: argparse.Namespace) -> Shown:
    """Opens a volume, with its coarser levels where it has them."""
    volume = open_volume(spec, voxel_size=options.voxel_size, allow_incomplete=True)
    print(volume.describe())
    kind = kind_of(volume)
    if name in (options.segmentation or []):
        kind = "segmentation"
    if name in (options.image or []):
        kind = "image"
    place = locate(spec)
    chunked = place.kind in ("zarr", "n5", "precomputed") and os.path.isdir(place.path)
    return Shown(
        name,
        volume,
        volume.require_voxel_size(),
        volume.offset,
        kind,
        place.path if chunked else None,
        tuple(_coarser(volume, spec, place.kind, place.dataset)),
    )


def _coarser(
    volume: Volume, spec: str, kind: str, dataset: str | None
) -> list[tuple[Volume, tuple[float, float, float]]]:
    if kind != "zarr":
        return []
    try:
        count = len(level_shapes(spec))
    except UserError:
        return []
    found = []
    for level in range(1, count):
        separator = "/" if dataset else ":"
        coarse = open_volume(f"{spec}{separator}{level}", allow_incomplete=True)
        # Neuroglancer wants levels whose voxels are whole multiples.
        factor = np.round(np.divide(volume.spatial_shape, coarse.spatial_shape))
        size = volume.require_voxel_size()
        found.append((coarse, (size[0] * factor[0], size[1] * factor[1], size[2] * factor[2])))
    return found


def state_of(server: Server, shown: list[Shown]) -> dict[str, Any]:
    """The viewer's state: all volumes as layers, the first one's middle in view."""
    layers = [
        neuroglancer.layer(entry.name, f"precomputed://{server.address}/{entry.name}", entry.kind) for entry in shown
    ]
    volume, size = shown[0].scales[0]
    shape = volume.shape[-3:]
    position = [n / 2 + o / s for n, o, s in zip(shape, shown[0].offset, size)]
    return neuroglancer.state(layers, size, position, shape)


def local_viewer(state: dict[str, Any]) -> Any:
    """A viewer served by this process, by the neuroglancer package (extra ``view``); None without the package."""
    if importlib.util.find_spec("neuroglancer") is None:
        return None
    import neuroglancer as package

    package.set_server_bind_address(HOST)
    viewer = package.Viewer()
    viewer.set_state(state)
    return viewer


def main(arguments: list[str]) -> int:
    """Runs the command until it is interrupted; returns its exit code."""
    parser = cli.parser("view", __doc__ or "")
    parser.add_argument("volumes", nargs="+", metavar="[NAME=]VOLUME")
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    parser.add_argument("--voxel-size", metavar="Z,Y,X", help="nm; wins over what the volumes say")
    parser.add_argument("--segmentation", action="append", metavar="NAME", help="show this one as labels")
    parser.add_argument("--image", action="append", metavar="NAME", help="show this one as grey values")
    parser.add_argument("--ng-base", metavar="URL", help=f"another deployment of Neuroglancer than {neuroglancer.DEMO}")
    options = parser.parse_args(arguments)
    pairs = [named(text) for text in options.volumes]
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1 or name == "files":
            raise UserError(f"two volumes are called {name!r} (or it is taken); write NAME=VOLUME")
    unknown = set((options.segmentation or []) + (options.image or [])) - set(names)
    if unknown:
        raise UserError(f"no volume is called {sorted(unknown)[0]!r}; there are {', '.join(names)}")
    shown = [show(name, spec, options) for name, spec in pairs]
    try:
        server = Server(shown, options.port, print)
    except OSError as error:
        raise UserError(f"--port {options.port}: {error.strerror or error}; choose another, or leave it out") from None
    with server:
        for entry in shown:
            files = f", files at {server.address}/files/{entry.name}/" if entry.folder else ""
            print(f"{entry.name} ({entry.kind}): precomputed://{server.address}/{entry.name}{files}")
        state = state_of(server, shown)
        viewer = None if options.ng_base else local_viewer(state)
        if viewer is not None:
            print(f"\n{viewer.get_viewer_url()}\n\nor, with the viewer from the network:")
        print(f"\n{neuroglancer.link(state, options.ng_base or neuroglancer.DEMO)}")
        try:
            print("\nserving on this machine only; Ctrl-C ends", flush=True)
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return cli.DONE


if __name__ == "__main__":
    cli.run(main)

"""Serves volumes to Neuroglancer from this machine, to this machine only (127.0.0.1).

Any volume that can be indexed is shown as a precomputed volume made on the fly; files of stores are served as they are,
with CORS and range requests, for other viewers.
"""

import functools
import http.server
import json
import mimetypes
import os
import re
import threading
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

CHUNK = (64, 64, 64)
HOST = "127.0.0.1"


class Shown:
    """A volume as Neuroglancer's precomputed format.

    Args:
        name: of its layer, and of its address.
        volume: has ``shape`` (z, y, x) or (channel, z, y, x), ``dtype``, and reads when it is indexed.
        voxel_size: nm, zyx.
        offset: nm, zyx.
        kind: ``"image"``, ``"affinities"`` or ``"segmentation"``.
        folder: local store to serve as files too, or None.
        levels: coarser versions of the volume, each with its voxel size: (volume, voxel size).
    """

    def __init__(
        self,
        name: str,
        volume: Any,
        voxel_size: tuple[float, float, float],
        offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
        kind: str = "image",
        folder: str | None = None,
        levels: tuple[tuple[Any, tuple[float, float, float]], ...] = (),
    ):
        self.name, self.kind, self.folder = name, kind, folder
        self.scales = [(volume, voxel_size), *levels]
        self.offset = offset
        self._lock = threading.Lock()

    def served_dtype(self) -> np.dtype:
        """The type that is sent: images as they can be shown, segmentations as uint32 or uint64."""
        dtype = np.dtype(self.scales[0][0].dtype)
        if self.kind == "segmentation":
            return np.dtype(np.uint64 if dtype.itemsize == 8 else np.uint32)
        if dtype.kind == "b":
            return np.dtype(np.uint8)
        return np.dtype(np.float32) if dtype.kind == "f" else dtype

    def info(self) -> dict[str, Any]:
        """The ``info`` document."""
        channels = self.scales[0][0].shape[0] if len(self.scales[0][0].shape) == 4 else 1
        scales = []
        for number, (volume, size) in enumerate(self.scales):
            scales.append(
                {
                    "key": f"s{number}",
                    "size": list(reversed(volume.shape[-3:])),
                    "resolution": list(reversed(size)),
                    "voxel_offset": [round(o / s) for o, s in zip(reversed(self.offset), reversed(size))],
                    "chunk_sizes": [list(reversed(CHUNK))],
                    "encoding": "raw",
                }
            )
        return {
            "@type": "neuroglancer_multiscale_volume",
            "type": "segmentation" if self.kind == "segmentation" else "image",
            "data_type": self.served_dtype().name,
            "num_channels": channels,
            "scales": scales,
        }

    def chunk(self, scale: int, box: tuple[slice, slice, slice]) -> bytes:
        """Voxels of ``box`` (z, y, x of the volume itself), x fastest, then y, z, channel."""
        volume = self.scales[scale][0]
        index = (slice(None), *box) if len(volume.shape) == 4 else box
        # HDF5 and TIFF readers are not safe for threads.
        with self._lock:
            values = volume[index]
        return np.ascontiguousarray(values, self.served_dtype().newbyteorder("<")).tobytes()


def parse_chunk(name: str, shown: Shown, scale: int) -> tuple[slice, slice, slice] | None:
    """The box of a chunk's file name ``x0-x1_y0-y1_z0-z1``, or None if it is not one inside the volume."""
    match = re.fullmatch(r"(-?\d+)-(-?\d+)_(-?\d+)-(-?\d+)_(-?\d+)-(-?\d+)", name)
    if match is None:
        return None
    volume = shown.scales[scale][0]
    first = shown.info()["scales"][scale]["voxel_offset"]
    bounds = [int(value) for value in match.groups()]
    parts = []
    for axis, length in zip(range(3), reversed(volume.shape[-3:])):
        low, high = bounds[2 * axis] - first[axis], bounds[2 * axis + 1] - first[axis]
        if not 0 <= low < high <= length:
            return None
        parts.append(slice(low, high))
    return parts[2], parts[1], parts[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, shown: Mapping[str, Shown], say: Callable[[str], None], *arguments: Any):
        self.shown, self.say = shown, say
        super().__init__(*arguments)

    def do_OPTIONS(self) -> None:
        self._send(204, b"", "text/plain")

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = [urllib.parse.unquote(part) for part in urllib.parse.urlsplit(self.path).path.split("/") if part]
        try:
            if parts[:1] == ["files"] and len(parts) > 2 and parts[1] in self.shown:
                self._file(self.shown[parts[1]].folder, parts[2:])
            elif parts and parts[0] in self.shown:
                self._precomputed(self.shown[parts[0]], parts[1:])
            else:
                self._send(404, b"no such volume", "text/plain")
        except BrokenPipeError:
            pass
        except Exception as error:
            self.say(f"{self.path}: {error}")
            self._send(500, str(error).encode(), "text/plain")

    def _precomputed(self, shown: Shown, parts: list[str]) -> None:
        if parts == ["info"]:
            self._send(200, json.dumps(shown.info()).encode(), "application/json")
            return
        match = re.fullmatch(r"s(\d+)", parts[0]) if len(parts) == 2 else None
        scale = int(match[1]) if match else len(shown.scales)
        box = parse_chunk(parts[1], shown, scale) if scale < len(shown.scales) else None
        if box is None:
            self._send(404, b"no such chunk", "text/plain")
            return
        self._send(200, shown.chunk(scale, box), "application/octet-stream")

    def _file(self, folder: str | None, parts: list[str]) -> None:
        if folder is None or any(part in ("..", ".") or "/" in part or "\\" in part for part in parts):
            self._send(404, b"no such file", "text/plain")
            return
        root = os.path.realpath(folder)
        path = os.path.realpath(os.path.join(root, *parts))
        if not path.startswith(root + os.sep) or not os.path.isfile(path):
            self._send(404, b"no such file", "text/plain")
            return
        size = os.path.getsize(path)
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None or wanted.groups() == ("", ""):
            with open(path, "rb") as file:
                self._send(200, file.read(), kind)
            return
        if wanted[1]:
            low, high = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
        else:
            low, high = max(size - int(wanted[2]), 0), size - 1
        if low > high:
            self._send(416, b"", kind, {"Content-Range": f"bytes */{size}"})
            return
        with open(path, "rb") as file:
            file.seek(low)
            self._send(206, file.read(high - low + 1), kind, {"Content-Range": f"bytes {low}-{high}/{size}"})

    def _send(self, code: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Access-Control-Allow-Origin", "*")
        self.send_header("Access-Control-Allow-Headers", "*")
        self.send_header("Access-Control-Allow-Methods", "GET, HEAD, OPTIONS")
        self.send_header("Access-Control-Expose-Headers", "Content-Range, Content-Length, Accept-Ranges")
        # Browsers ask before a public page (the demo viewer) may read from this machine.
        self.send_header("Access-Control-Allow-Private-Network", "true")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Cache-Control", "no-cache")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


class Server:
    """The running server; close it, or use it in ``with``.

    Args:
        shown: volumes, of different names.
        port: 0 takes a free one.
        say: told of requests that failed.
    """

    def __init__(
        self,
        shown: list[Shown],
        port: int = 0,
        say: Callable[[str], None] = lambda line: None,
    ):
        handler = functools.partial(_Handler, {entry.name: entry for entry in shown}, say)
        self._server = http.server.ThreadingHTTPServer((HOST, port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.address = f"http://{HOST}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

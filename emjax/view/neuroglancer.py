"""Neuroglancer states and links, built by ourselves: a state is JSON, a link is that JSON behind an address."""

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

DEMO = "https://neuroglancer-demo.appspot.com"

RGB_SHADER = (
    "void main() { emitRGB(vec3(toNormalized(getDataValue(0)), toNormalized(getDataValue(1)), "
    "toNormalized(getDataValue(2)))); }"
)
GREY_SHADER = "#uicontrol invlerp normalized\nvoid main() { emitGrayscale(normalized()); }"


def layer(name: str, source: str, kind: str, segments: Sequence[int] = (), visible: bool = True) -> dict[str, Any]:
    """One layer.

    Args:
        name: shown on the tab.
        source: ``zarr://http://...``, ``precomputed://http://...`` and so on.
        kind: ``"image"``, ``"affinities"`` or ``"segmentation"``.
        segments: ids shown at first; all if empty.
        visible: whether it is switched on.
    """
    made: dict[str, Any] = {
        "type": "segmentation" if kind == "segmentation" else "image",
        "source": source,
        "name": name,
    }
    if kind == "segmentation":
        made["selectedAlpha"] = 0.35
        made["segments"] = [str(segment) for segment in segments]
    elif kind == "affinities":
        made["shader"] = RGB_SHADER
        made["opacity"] = 0.6
    else:
        made["shader"] = GREY_SHADER
    if not visible:
        made["visible"] = False
    return made


def state(
    layers: Sequence[Mapping[str, Any]],
    voxel_size: Sequence[float],
    position: Sequence[float],
    extent: Sequence[int] | None = None,
) -> dict[str, Any]:
    """A whole state.

    Args:
        layers: of :func:`layer`, lowest first.
        voxel_size: nm, zyx; the unit of positions.
        position: zyx in voxels from the origin of the coordinate system.
        extent: voxels zyx that should fit the view.
    """
    made: dict[str, Any] = {
        "dimensions": {axis: [size * 1e-9, "m"] for axis, size in zip("xyz", reversed(list(voxel_size)))},
        "position": [float(value) for value in reversed(list(position))],
        "layers": [dict(entry) for entry in layers],
        "layout": "4panel" if extent is None or min(extent) > 1 else "xy",
        "showSlices": False,
    }
    if extent is not None:
        made["crossSectionScale"] = max(max(extent) / 400, 0.1)
        made["projectionScale"] = float(1.5 * max(extent))
    return made


def link(state_: Mapping[str, Any], base: str = DEMO) -> str:
    """The address that opens a state."""
    text = json.dumps(state_, separators=(",", ":"))
    return f"{base.rstrip('/')}/#!{urllib.parse.quote(text, safe='')}"

"""The report of an evaluation: one HTML file that needs nothing else, with pictures, curves, numbers and lists."""

import base64
import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jinja2
import numpy as np

from emjax.metrics import Contingency
from emjax.view import overlay

MOST_PIXELS = 640
ZOOM = 128


class Sections(Protocol):
    """What is drawn: an array, or a volume that reads when it is indexed."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Drawn:
    """The volumes of one place, all of the same (z, y, x); what is None is not drawn.

    Attributes:
        segmentation, labels: ids (z, y, x).
        table: their overlaps, of the whole volume.
        image: grey values (z, y, x).
        affinities: (channel, z, y, x).
    """

    segmentation: Sections
    labels: Sections
    table: Contingency
    image: Sections | None = None
    affinities: Sections | None = None

    def pictures(self, z: int, window: tuple[slice, slice], step: int = 1) -> dict[str, overlay.Rgb]:
        """Pictures of one section, every ``step``-th voxel of ``window`` (y, x)."""
        where = (z, *window)
        thin = (slice(None, None, step), slice(None, None, step))
        segments, truth = self.segmentation[where][thin], self.labels[where][thin]
        below = None if self.image is None else overlay.grey(self.image[where])[..., 0][thin]
        made: dict[str, overlay.Rgb] = {}
        if below is not None:
            made["image"] = overlay.grey(below)
        if self.affinities is not None:
            read = self.affinities[(slice(0, 3), *where)]
            made["affinities"] = overlay.affinities_as_rgb(read[(slice(None), *thin)])
        made["segmentation"] = overlay.labels_over(below, segments)
        made["ground truth"] = overlay.labels_over(below, truth)
        made["errors"] = overlay.errors_over(below, *overlay.error_amounts(segments, truth, self.table))
        return made


@dataclasses.dataclass(frozen=True)
class DrawnClasses:
    """Semantic volumes of one place, all of the same (z, y, x).

    Attributes:
        segmentation, labels: class numbers from 1 (z, y, x), 0 for none.
        image: grey values (z, y, x).
    """

    segmentation: Sections
    labels: Sections
    image: Sections | None = None

    def pictures(self, z: int, window: tuple[slice, slice], step: int = 1) -> dict[str, overlay.Rgb]:
        """Pictures of one section, every ``step``-th voxel of ``window`` (y, x)."""
        where = (z, *window)
        thin = (slice(None, None, step), slice(None, None, step))
        predicted, true = self.segmentation[where][thin], self.labels[where][thin]
        below = None if self.image is None else overlay.grey(self.image[where])[..., 0][thin]
        made = {} if below is None else {"image": overlay.grey(below)}
        made["segmentation"] = overlay.labels_over(below, predicted)
        made["ground truth"] = overlay.labels_over(below, true)
        wrong = predicted != true
        surplus, missing = (((part > 0) & wrong).astype(np.float32) for part in (predicted, true))
        made["errors"] = overlay.errors_over(below, surplus, missing)
        return made


def data_address(picture: overlay.Rgb) -> str:
    """A picture as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(overlay.png(picture, small=True)).decode()}"


class Pictures(Protocol):
    """What sections are drawn of."""

    @property
    def segmentation(self) -> Sections: ...

    def pictures(self, z: int, window: tuple[slice, slice], step: int = 1) -> dict[str, overlay.Rgb]: ...


def section_rows(drawn: Pictures, count: int = 3) -> list[dict[str, Any]]:
    """Evenly spaced sections with their pictures."""
    depth, height, width = drawn.segmentation.shape
    step = max(1, math.ceil(max(height, width) / MOST_PIXELS))
    chosen = sorted({int((number + 0.5) * depth / count) for number in range(count)})
    window = (slice(0, height), slice(0, width))
    return [
        {
            "title": f"section z = {z}",
            "note": f"every {step}th voxel" if step > 1 else "",
            "pictures": {name: data_address(picture) for name, picture in drawn.pictures(z, window, step).items()},
        }
        for z in chosen
    ]


def error_cards(
    drawn: Drawn,
    entries: Sequence[Mapping[str, Any]],
    kind: str,
    link_to: Callable[[Sequence[int]], str],
    count: int = 6,
) -> list[dict[str, Any]]:
    """Close-ups of the worst errors (``kind`` "split" or "merge"); the broken object or joining segment is outlined."""
    cards = []
    for entry in entries[:count]:
        z, window, place = _view_of(drawn, entry, kind)
        pictures = drawn.pictures(z, window)
        ids = drawn.labels if kind == "split" else drawn.segmentation
        edge = overlay.borders(ids[(z, *window)] == entry["id"])
        for picture in pictures.values():
            picture[edge] = 255
        cards.append(
            {
                **entry,
                "place": list(place),
                "link": link_to(place),
                "pictures": {
                    name: data_address(pictures[name])
                    for name in ("image", "segmentation", "ground truth", "errors")
                    if name in pictures
                },
            }
        )
    return cards


def _view_of(
    drawn: Drawn, entry: Mapping[str, Any], kind: str
) -> tuple[int, tuple[slice, slice], tuple[int, int, int]]:
    """Section, window and place of an error: the second largest piece, where the object is broken or joined.

    The middle of the piece shows more than its first voxel, but may lie outside of a curved one.
    """
    piece = entry["pieces"][1]
    owners, parts = (drawn.labels, drawn.segmentation) if kind == "split" else (drawn.segmentation, drawn.labels)
    for position in (piece["centroid"], piece["position_voxel"]):
        z, y, x = (min(round(value), n - 1) for value, n in zip(position, drawn.segmentation.shape))
        window = overlay.crop_about((y, x), drawn.segmentation.shape, ZOOM)
        inside = (owners[(z, *window)] == entry["id"]) & (parts[(z, *window)] == piece["id"])
        if inside.any():
            rows, columns = np.nonzero(inside)
            nearest = np.argmin((rows + window[0].start - y) ** 2 + (columns + window[1].start - x) ** 2)
            return z, window, (z, int(rows[nearest]) + window[0].start, int(columns[nearest]) + window[1].start)
    return z, window, (z, y, x)


def curve_svg(curve: Sequence[Mapping[str, float]], marked: float | None) -> str:
    """VOI split, merge and sum over the threshold as inline SVG; colours come from the page, light or dark."""
    if len(curve) < 2:
        return ""
    width, height, left, right, top, bottom = 640, 300, 46, 90, 14, 38
    xs = [float(point["threshold"]) for point in curve]
    series = (("voi_sum", "sum", "c-sum"), ("voi_split", "split", "c-split"), ("voi_merge", "merge", "c-merge"))
    # A curve that starts at ten bits must not flatten its interesting part.
    most = min(max(float(point["voi_sum"]) for point in curve), 4 * min(float(point["voi_sum"]) for point in curve))
    most = most or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - xs[0]) / (xs[-1] - xs[0])
        return left + share * (width - left - right), height - bottom - y / most * (height - top - bottom)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="VOI over the threshold" class="curve">']
    # Curves leave the frame at its top instead of running along it.
    frame = f'x="{left}" y="{top}" width="{width - left - right}" height="{height - top - bottom + 1}"'
    parts.append(f'<clipPath id="frame"><rect {frame}/></clipPath>')
    for tick in _ticks(most):
        _, y = at(xs[0], tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for x in [value for value in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9) if xs[0] <= value <= xs[-1]] or xs:
        place, _ = at(x, 0)
        parts.append(f'<text x="{place:.1f}" y="{height - bottom + 18}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">threshold</text>')
    parts.append(
        f'<text x="12" y="{height / 2}" transform="rotate(-90 12 {height / 2})" text-anchor="middle">bits</text>'
    )
    if marked is not None:
        place, _ = at(marked, 0)
        parts.append(f'<line class="marked" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{height - bottom}"/>')
    lowest_label = -math.inf
    ends = sorted(series, key=lambda entry: -float(curve[-1][entry[0]]))
    for key, name, css in series:
        line = " ".join("{:.1f},{:.1f}".format(*at(x, float(point[key]))) for x, point in zip(xs, curve))
        parts.append(f'<polyline class="{css}" clip-path="url(#frame)" points="{line}"/>')
        for x, point in zip(xs, curve):
            if float(point[key]) <= most:
                px, py = at(x, float(point[key]))
                parts.append(
                    f'<circle class="{css}" cx="{px:.1f}" cy="{py:.1f}" r="2.6">'
                    f"<title>threshold {x:g}: {name} {float(point[key]):.4f} bits</title></circle>"
                )
    for key, name, css in ends:
        _, y = at(xs[-1], min(float(curve[-1][key]), most))
        y = max(y, lowest_label + 15)
        lowest_label = y
        parts.append(f'<text class="{css}" x="{width - right + 8}" y="{y + 4:.1f}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>"])


def _ticks(most: float) -> list[float]:
    raw = most / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw)
    return [round(step * number, 10) for number in range(int(most / step) + 1)]


def render(context: Mapping[str, Any], template: str = "report.html") -> str:
    """The page. ``context`` holds what the template names; missing names are errors."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("emjax.view", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["number"] = lambda value: f"{value:,}".replace(",", " ")
    return environment.get_template(template).render(**context)

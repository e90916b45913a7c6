"""Pictures of sections as uint8 RGB arrays: grey values, affinities, labels in colours, errors, and panels of them."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emjax.metrics import Contingency

Rgb = np.ndarray
"""(y, x, 3) uint8."""

GAP = 6
CAPTION = 18
INK, PAPER = (230, 230, 230), (24, 24, 27)


def grey(section: np.ndarray) -> Rgb:
    """A section (y, x) of uint8, bool, or float in 0..1; other types are spread from their 0.5 to 99.5 percentile."""
    section = np.asarray(section)
    if section.dtype == bool:
        section = section.astype(np.uint8) * 255
    elif section.dtype.kind == "f" and section.size and np.nanmin(section) >= 0 and np.nanmax(section) <= 1:
        section = np.rint(np.nan_to_num(section) * 255).astype(np.uint8)
    elif section.dtype != np.uint8:
        low, high = np.nanpercentile(section.astype(np.float64), (0.5, 99.5))
        spread = (section.astype(np.float64) - low) / max(high - low, 1e-12)
        section = np.rint(np.clip(np.nan_to_num(spread), 0, 1) * 255).astype(np.uint8)
    return np.repeat(section[..., None], 3, -1)


def affinities_as_rgb(section: np.ndarray) -> Rgb:
    """Affinities (channel, y, x), uint8 or float in 0..1; z, y, x become red, green, blue, so that black cuts all.

    Of one or two channels the missing ones repeat the last; further ones are not shown.
    """
    section = np.asarray(section)
    if section.dtype.kind == "f":
        section = np.rint(np.clip(section, 0, 1) * 255)
    chosen = [min(channel, section.shape[0] - 1) for channel in range(3)]
    return np.stack([section[channel] for channel in chosen], -1).astype(np.uint8)


def colours(ids: np.ndarray) -> Rgb:
    """A bright colour for each id, always the same for the same id; 0 is black."""
    ids = np.asarray(ids).astype(np.uint64)
    mixed = ids * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    hue = (mixed & np.uint64(0xFFFF)).astype(np.float32) / 65536
    saturation = 0.55 + 0.45 * ((mixed >> np.uint64(16)) & np.uint64(0xFF)).astype(np.float32) / 255
    value = 0.7 + 0.3 * ((mixed >> np.uint64(24)) & np.uint64(0xFF)).astype(np.float32) / 255
    channels = []
    for shift in (5.0, 3.0, 1.0):
        place = (shift + hue * 6) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(place, 4 - place), 0, 1))
    made = np.rint(np.stack(channels, -1) * 255).astype(np.uint8)
    made[ids == 0] = 0
    return made


def borders(labels: np.ndarray) -> np.ndarray:
    """Where a section's id differs from that to the right or below (bool)."""
    labels = np.asarray(labels)
    edge = np.zeros(labels.shape, bool)
    edge[:-1] |= labels[:-1] != labels[1:]
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return edge


def blend(below: Rgb, above: Rgb, share: np.ndarray | float) -> Rgb:
    """``above`` over ``below``; ``share`` is a number or (y, x) in 0..1."""
    weight = np.asarray(share, np.float32)
    weight = weight[..., None] if weight.ndim else weight
    return np.rint(below * (1 - weight) + above * weight).astype(np.uint8)


def labels_over(section: np.ndarray | None, labels: np.ndarray, share: float = 0.45) -> Rgb:
    """Labels in colours over the image, with borders drawn full; without an image, the colours alone."""
    painted = colours(labels)
    if section is None:
        return painted
    weight = np.where(np.asarray(labels) > 0, np.float32(share), np.float32(0))
    made = blend(grey(section), painted, weight)
    edge = borders(labels) & (np.asarray(labels) > 0)
    made[edge] = painted[edge]
    return made


def error_amounts(segments: np.ndarray, truth: np.ndarray, table: Contingency) -> tuple[np.ndarray, np.ndarray]:
    """How wrong each voxel is: (merge, split), float32 in 0..1, of the shape of ``segments``.

    Merge: the share of the voxel's segment that belongs to other objects. Split: the share of its object that lies in
    other segments. So the main body of an object is clean, and what spilled or broke off stands out. ``table`` is of
    the whole volume; voxels of ground truth 0 and pairs that it lacks are 0.
    """
    scored = table.without_labels((0,))
    merge, split = np.zeros(segments.shape, np.float32), np.zeros(segments.shape, np.float32)
    if not len(scored):
        return merge, split
    labels, segment_ids = scored.label_sizes[0], scored.segment_sizes[0]
    keys = _pair_keys(scored.labels, scored.segments, labels, segment_ids)[0]
    key, known = _pair_keys(np.asarray(truth, np.uint64), np.asarray(segments, np.uint64), labels, segment_ids)
    row = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    known &= keys[row] == key
    merge[known] = (1 - scored.counts / scored.size_of_segment)[row[known]]
    split[known] = (1 - scored.counts / scored.size_of_label)[row[known]]
    return merge, split


def _pair_keys(labels, segments, known_labels, known_segments) -> tuple[np.ndarray, np.ndarray]:
    first = np.minimum(np.searchsorted(known_labels, labels), len(known_labels) - 1)
    second = np.minimum(np.searchsorted(known_segments, segments), len(known_segments) - 1)
    known = (known_labels[first] == labels) & (known_segments[second] == segments)
    return first.astype(np.int64) * len(known_segments) + second, known


def errors_over(section: np.ndarray | None, merge: np.ndarray, split: np.ndarray) -> Rgb:
    """Merge errors in red, split errors in blue, both in purple, over a paler image."""
    base = np.full((*merge.shape, 3), 235, np.uint8) if section is None else blend(grey(section), np.uint8(255), 0.45)  # type: ignore[arg-type]
    # Half of a segment being foreign is as bad as it gets to the eye.
    red, blue = np.clip(2 * merge, 0, 1), np.clip(2 * split, 0, 1)
    colour = np.zeros((*merge.shape, 3), np.float32)
    colour[..., 0], colour[..., 2] = 215 * red, 225 * blue
    colour[..., 1] = 35 * np.maximum(red, blue) + 45 * blue * (1 - red)
    return blend(base, np.rint(colour).astype(np.uint8), 0.8 * np.maximum(red, blue))


def scaled(picture: Rgb, width: int) -> Rgb:
    """The picture at another width, without smoothing when enlarged."""
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    method = Image.Resampling.NEAREST if width >= picture.shape[1] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((width, height), method))


def tiles(pictures: Mapping[str, Rgb], columns: int | None = None) -> Rgb:
    """Pictures side by side with captions, in rows of ``columns``."""
    names = list(pictures)
    columns = columns or len(names)
    height = max(picture.shape[0] for picture in pictures.values())
    width = max(picture.shape[1] for picture in pictures.values())
    rows = -(-len(names) // columns)
    step_y, step_x = height + CAPTION + GAP, width + GAP
    canvas = Image.new("RGB", (columns * step_x + GAP, rows * step_y + GAP), PAPER)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=12)
    for number, name in enumerate(names):
        y, x = GAP + number // columns * step_y, GAP + number % columns * step_x
        draw.text((x, y), name, fill=INK, font=font)
        canvas.paste(Image.fromarray(pictures[name]), (x, y + CAPTION))
    return np.asarray(canvas)


def panel(
    raw: np.ndarray,
    affinities: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    table: Contingency | None = None,
    section: int | None = None,
) -> Rgb:
    """One section of a block, all that is known about it side by side.

    Args:
        raw: (z, y, x) grey values.
        affinities: (channel, z, y, x).
        labels: (z, y, x) segments.
        truth: (z, y, x) ground truth.
        table: overlaps of ``labels`` and ``truth``, for the error map.
        section: number of the section; the middle one if None.
    """
    z = raw.shape[0] // 2 if section is None else section
    pictures = {f"image, section {z}": grey(raw[z])}
    if affinities is not None:
        pictures["affinities z y x = r g b"] = affinities_as_rgb(affinities[:, z])
    if labels is not None:
        pictures["segmentation"] = labels_over(raw[z], labels[z])
    if truth is not None:
        pictures["ground truth"] = labels_over(raw[z], truth[z])
    if labels is not None and truth is not None and table is not None:
        pictures["red merged, blue split"] = errors_over(raw[z], *error_amounts(labels[z], truth[z], table))
    return tiles(pictures)


def training_panel(
    image: np.ndarray, outputs: Mapping[str, tuple[Any, np.ndarray]], labels: np.ndarray | None = None
) -> Rgb:
    """The middle section of a validation crop with what the network says of it.

    Args:
        image: (z, y, x), uint8 or float32 in 0..1.
        outputs: name -> (its ``emjax.systems.protocol.Output``, array (z, y, x, channel)).
        labels: (z, y, x) ground truth.
    """
    z = image.shape[0] // 2
    pictures = {"image": grey(image[z])}
    for name, (output, values) in outputs.items():
        chosen = np.moveaxis(np.asarray(values)[z], -1, 0)
        if output.kind == "instances":
            pictures[name] = labels_over(image[z], chosen[0])
        elif chosen.shape[0] >= 3:
            pictures[name] = affinities_as_rgb(chosen)
        else:
            pictures.update({f"{name} {channel}": grey(part) for channel, part in enumerate(chosen)})
    if labels is not None:
        pictures["ground truth"] = labels_over(image[z], np.where(labels[z] > 0, labels[z], 0))
    return tiles({name: _at_least(picture, 160) for name, picture in pictures.items()})


def _at_least(picture: Rgb, width: int) -> Rgb:
    times = -(-width // picture.shape[1])
    return np.repeat(np.repeat(picture, times, 0), times, 1)


def png(picture: Rgb, small: bool = False) -> bytes:
    """The picture as a PNG file; ``small`` keeps grey pictures exact and gives others the best 256 colours."""
    image = Image.fromarray(np.ascontiguousarray(picture))
    if small:
        is_grey = (picture[..., 0] == picture[..., 1]).all() and (picture[..., 0] == picture[..., 2]).all()
        image = image.convert("L") if is_grey else image.quantize(256, dither=Image.Dither.NONE)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def crop_about(position: Sequence[int], shape: Sequence[int], side: int) -> tuple[slice, slice]:
    """A square window (y, x) of at most ``side`` about a place, moved inside the section."""
    parts = []
    for centre, length in zip(position[-2:], shape[-2:]):
        low = min(max(centre - side // 2, 0), max(length - side, 0))
        parts.append(slice(low, min(low + side, length)))
    return parts[0], parts[1]

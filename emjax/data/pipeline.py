"""The training loader: batches as a pure function of the global step.

Sample ``i`` of the endless stream is made by a generator seeded with ``(seed, i)`` alone: source, position, and all
draws of the augmentations. Batch ``s`` is samples ``s * batch_size ...``; each process takes its own rows of it. So
nothing has to be saved to resume, any batch can be made again, and the global batch does not depend on the number of
processes.
"""

import dataclasses
import math
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from emjax.data.augment import Augmentation, apply_draws, draw_chain, needed_shape
from emjax.data.crops import Draws, Sample, Shape, as_float, as_int32_ids, as_uint8, split_components, with_membrane
from emjax.data.semantic import ClassVolume, check_values, open_classes
from emjax.data.volume import Volume, check_finite, common_region, open_volume, read_cached, require_same_grid
from emjax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One labelled (or raw) volume to draw crops from. Paths are what ``emjax.data.volume.open_volume`` takes.

    Attributes:
        raw: the image.
        labels: ids or classes of the same shape, or the volumes that classes are put together from; None for raw data
            alone (self-supervised training).
        mask: non-zero = counts in the loss.
        ignore: non-zero = does not count in the loss.
        ignore_labels: label values that do not count in the loss.
        label_values: of class labels: the only values but 0 that may be there; () for any.
        weight: share of crops, relative to the weights of the other sources.
        name: what messages call it; the path of ``raw`` if empty.
        voxel_size: nm (z, y, x), where the file does not state it.
        begin, end: the part of the volume that may be used, voxels (z, y, x); None = all.
        pad: voxels by which the volume is continued by reflection on each side (z, y, x).
        membrane: odd window (z, y, x); labels become 0 where it holds more than one id. For dense labels, without the
            membrane between objects that others leave unlabelled. None leaves them as they are.
        z_steps: every how many sections to take, drawn uniformly for each crop (SegNeuron trains on 1 to 3).
        intensity_range: grey values that become 0 and 1; None = the range of an integer dtype, 0 to 1 for floats.
    """

    raw: str
    labels: str | tuple[ClassVolume, ...] | None = None
    mask: str | None = None
    ignore: str | None = None
    ignore_labels: tuple[int, ...] = ()
    label_values: tuple[int, ...] = ()
    weight: float = 1.0
    name: str = ""
    voxel_size: tuple[float, float, float] | None = None
    begin: Shape | None = None
    end: Shape | None = None
    pad: Shape = (0, 0, 0)
    membrane: Shape | None = None
    z_steps: tuple[int, ...] = (1,)
    intensity_range: tuple[float, float] | None = None

    def __post_init__(self):
        if not self.weight > 0 or math.isinf(self.weight):
            raise UserError(f"source {self.title}: found weight {self.weight}, expected a positive number")
        if not self.z_steps or min(self.z_steps) < 1:
            raise UserError(f"source {self.title}: found z_steps {self.z_steps}, expected whole numbers from 1 up")
        if len(self.pad) != 3 or min(self.pad) < 0:
            raise UserError(f"source {self.title}: found pad {self.pad}, expected three numbers (z, y, x) from 0 up")
        if self.membrane is not None and (len(self.membrane) != 3 or any(n < 1 or n % 2 == 0 for n in self.membrane)):
            raise UserError(f"source {self.title}: found membrane {self.membrane}, expected three odd sizes (z, y, x)")
        if self.intensity_range is not None and not self.intensity_range[0] < self.intensity_range[1]:
            raise UserError(f"source {self.title}: found intensity_range {self.intensity_range}, expected (low, high)")

    @property
    def title(self) -> str:
        """The name, or the path of the image."""
        return self.name or self.raw


class _Unheld:
    """A volume read through a bounded cache, voxels checked as they come."""

    def __init__(self, volume: Volume, cache_bytes: int):
        self._volume = read_cached(volume, cache_bytes)

    def __getitem__(self, window: tuple[slice, slice, slice]) -> np.ndarray:
        return check_finite(self._volume[window], self._volume.spec)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One opened source: arrays or block readers, and the window of them that may be used."""

    source: Source
    raw: Any
    labels: Any
    mask: Any
    ignore: Any
    begin: Shape
    end: Shape
    cached: bool

    def extent(self, z_step: int) -> Shape:
        """Voxels to place crops in, reflection included, after taking every ``z_step``-th section."""
        z, y, x = (e - b + 2 * p for b, e, p in zip(self.begin, self.end, self.source.pad))
        return (-(-z // z_step), y, x)

    def read(self, array: Any, begin: Shape, shape: Shape, z_step: int) -> np.ndarray:
        """The crop at ``begin`` in the coordinates of :meth:`extent`; a view where it can be."""
        low = [o - p + a * s for o, p, a, s in zip(self.begin, self.source.pad, begin, (z_step, 1, 1))]
        high = [a + (n - 1) * s + 1 for a, n, s in zip(low, shape, (z_step, 1, 1))]
        if all(a >= b for a, b in zip(low, self.begin)) and all(a <= b for a, b in zip(high, self.end)):
            window = tuple(slice(a, b) for a, b in zip(low, high))
            return array[window][::z_step]
        lines = [
            _reflected(np.arange(a, b, s), first, last)
            for a, b, s, first, last in zip(low, high, (z_step, 1, 1), self.begin, self.end)
        ]
        origin = [int(line.min()) for line in lines]
        inner = array[tuple(slice(a, int(line.max()) + 1) for a, line in zip(origin, lines))]
        return inner[np.ix_(*(line - a for line, a in zip(lines, origin)))]


def _reflected(index: np.ndarray, first: int, end: int) -> np.ndarray:
    size = end - first
    if size == 1:
        return np.full_like(index, first)
    index = (index - first) % (2 * (size - 1))
    return first + np.where(index >= size, 2 * (size - 1) - index, index)


@dataclasses.dataclass(frozen=True)
class CropDraws:
    """Where a crop comes from: number of the source, every how many sections, first voxel (z, y, x)."""

    source: int
    z_step: int
    begin: Shape


@dataclasses.dataclass(frozen=True)
class SampleDraws:
    """Everything random about one sample: where from, and the draws of each augmentation."""

    crop: CropDraws
    chain: list[Draws]


class Sampler:
    """Crops of weighted sources and their augmentation, each a pure function of a generator or of recorded draws.

    Ways of making one sample out of several crops (domain mixing) call :meth:`draw_crop`, :meth:`read` and the chain
    themselves and are handed to :class:`Loader` as ``compose``.

    Raises:
        UserError: a source cannot be opened, has no three dimensions, holds NaN, is smaller than the crop that the
            augmentations need, differs in shape from its labels or mask, or only some sources have labels.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        crop: Shape,
        chain: Sequence[Augmentation] = (),
        *,
        cache_bytes: int = 8 << 30,
        min_labelled: float = 0.0,
        max_tries: int = 20,
    ):
        if not sources:
            raise UserError("sources: none given, expected at least one volume to train on")
        if len(crop) != 3 or min(crop) < 1:
            raise UserError(f"crop: found {tuple(crop)}, expected three sizes (z, y, x) from 1 up")
        if not 0 <= min_labelled <= 1:
            raise UserError(f"min_labelled: found {min_labelled}, expected a fraction between 0 and 1")
        if max_tries < 1:
            raise UserError(f"max_tries: found {max_tries}, expected 1 or more")
        labelled = {source.labels is not None for source in sources}
        if len(labelled) > 1:
            without = next(source.title for source in sources if source.labels is None)
            raise UserError(f"sources: {without} has no labels but others have; give labels to all or to none")
        self.sources = tuple(sources)
        self.crop: Shape = tuple(crop)  # type: ignore[assignment]
        self.chain = tuple(chain)
        self.needed = needed_shape(self.chain, self.crop)
        self.min_labelled = min_labelled if labelled == {True} else 0.0
        self.max_tries = max_tries
        self.masked = any(s.mask or s.ignore or s.ignore_labels for s in sources)
        weights = np.array([source.weight for source in sources], np.float64)
        self._cumulative = np.cumsum(weights / weights.sum())
        self._parts = _open_parts(self.sources, cache_bytes)
        for part in self._parts:
            self._check_fits(part)

    def _check_fits(self, part: _Part) -> None:
        for z_step in part.source.z_steps:
            extent = part.extent(z_step)
            if any(have < need for have, need in zip(extent, self.needed)):
                every = f", every {z_step}th section" if z_step > 1 else ""
                reason = "" if self.needed == self.crop else f" (crop {self.crop} and the margin of its augmentations)"
                raise UserError(
                    f"source {part.source.title}: volume of {extent}{every} is smaller than the {self.needed} voxels "
                    f"to be read{reason}; use a smaller crop, fewer augmentations or the source's pad"
                )

    def describe(self) -> list[str]:
        """One line per source: name, voxels, whether it is held in memory, share of crops."""
        shares = np.diff(self._cumulative, prepend=0)
        return [
            f"{part.source.title}: {' x '.join(str(n) for n in part.extent(1))} voxels, "
            f"{'in memory' if part.cached else 'read by blocks'}, {share:.1%} of crops"
            for part, share in zip(self._parts, shares)
        ]

    def draw_crop(
        self, rng: np.random.Generator, sources: Sequence[int] | None = None, z_step: int | None = None
    ) -> CropDraws:
        """A source by weight (or uniformly one of the numbers ``sources``), and a place in it.

        ``z_step`` takes the place of a draw from the source's ``z_steps``.
        """
        best: CropDraws | None = None
        best_fraction = -1.0
        for _ in range(self.max_tries if self.min_labelled > 0 else 1):
            if sources is None:
                number = int(np.searchsorted(self._cumulative, rng.random(), side="right"))
                number = min(number, len(self._parts) - 1)
            else:
                number = sources[int(rng.integers(len(sources)))]
            part = self._parts[number]
            steps = part.source.z_steps if z_step is None else (z_step,)
            step = steps[int(rng.integers(len(steps)))] if len(steps) > 1 else steps[0]
            begin = tuple(int(rng.integers(0, have - need + 1)) for have, need in zip(part.extent(step), self.needed))
            draws = CropDraws(number, step, begin)  # type: ignore[arg-type]
            if self.min_labelled == 0:
                return draws
            fraction = self._labelled_fraction(draws)
            if fraction >= self.min_labelled:
                return draws
            if fraction > best_fraction:
                best, best_fraction = draws, fraction
        assert best is not None
        return best

    def _labelled_fraction(self, draws: CropDraws) -> float:
        part = self._parts[draws.source]
        middle = tuple(b + (need - crop) // 2 for b, need, crop in zip(draws.begin, self.needed, self.crop))
        labels = part.read(part.labels, middle, self.crop, draws.z_step)  # type: ignore[arg-type]
        return float(np.count_nonzero(labels)) / labels.size

    def read(self, draws: CropDraws) -> Sample:
        """The crop as it lies in the volume, of the shape that the chain needs; perhaps views, not to be written."""
        part = self._parts[draws.source]
        source = part.source

        def crop(array: Any) -> np.ndarray:
            return part.read(array, draws.begin, self.needed, draws.z_step)

        sample = {"image": _grey(crop(part.raw), source)}
        if part.labels is not None:
            sample["labels"] = as_int32_ids(crop(part.labels))
            if source.label_values and not part.cached:
                check_values(sample["labels"], source.label_values, f"source {source.title}")
        if self.masked:
            keep = np.ones(self.needed, np.uint8) if part.mask is None else (crop(part.mask) != 0).astype(np.uint8)
            if part.ignore is not None:
                keep[crop(part.ignore) != 0] = 0
            if source.ignore_labels and part.labels is not None:
                keep[np.isin(sample["labels"], source.ignore_labels)] = 0
            sample["mask"] = keep
        if source.membrane is not None and part.labels is not None:
            # Last: what is left out of the loss goes by the labels as they are.
            sample["labels"] = with_membrane(sample["labels"], source.membrane)
        return sample

    def draw(self, rng: np.random.Generator) -> SampleDraws:
        """Everything random about one sample."""
        return SampleDraws(self.draw_crop(rng), draw_chain(self.chain, self.crop, rng))

    def make(self, draws: SampleDraws) -> Sample:
        """The augmented sample of recorded draws."""
        return apply_draws(self.chain, self.crop, self.read(draws.crop), draws.chain)


def one_crop(sampler: Sampler, rng: np.random.Generator) -> Sample:
    """The plainest way to make a sample: one crop, augmented."""
    return sampler.make(sampler.draw(rng))


class _Stacker:
    """Stacks samples into batches, in memory of earlier batches that nobody holds any more.

    Fresh memory for every batch costs more than all reading and augmenting (the system clears each page anew). A buffer
    is handed out as a view, which keeps a reference to it, as does a JAX array made of the view without a copy; so a
    buffer without references is free.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def _buffer(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        buffers = self._buffers.setdefault((shape, dtype), [])
        for i in range(len(buffers)):
            # References: the list, and the argument of getrefcount itself.
            if sys.getrefcount(buffers[i]) == 2:
                return buffers[i][:]
        buffers.append(np.empty(shape, dtype))
        return buffers[-1][:]

    def __call__(self, samples: Sequence[Sample]) -> dict[str, np.ndarray]:
        with self._lock:
            batch = {
                name: self._buffer((len(samples), *array.shape), array.dtype) for name, array in samples[0].items()
            }
        return {name: np.stack([sample[name] for sample in samples], out=out) for name, out in batch.items()}


def _grey(image: np.ndarray, source: Source) -> np.ndarray:
    if source.intensity_range is None:
        if image.dtype == np.uint8:
            return image
        if image.dtype.kind in "iu":
            low, high = 0.0, float(np.iinfo(image.dtype).max)
        elif image.dtype.kind == "f":
            if image.size and (image.min() < 0 or image.max() > 1):
                raise UserError(
                    f"source {source.title}: found grey values {image.min():g} to {image.max():g} of {image.dtype}, "
                    "expected 0 to 1; set the source's intensity_range"
                )
            return image.astype(np.float32)
        else:
            raise UserError(f"source {source.title}: found image dtype {image.dtype}, expected integers or floats")
    else:
        low, high = source.intensity_range
    scaled = (image.astype(np.float32) - np.float32(low)) * np.float32(1 / (high - low))
    return np.clip(scaled, 0, 1, out=scaled)


def _open_volumes(source: Source) -> dict[str, Volume]:
    """The volumes of a source, voxel on voxel."""
    volumes = {}
    for what in ("raw", "labels", "mask", "ignore"):
        spec = getattr(source, what)
        if spec is None:
            continue
        if isinstance(spec, tuple):
            volumes[what] = open_classes(spec, source.voxel_size)
            continue
        volume = open_volume(spec, voxel_size=source.voxel_size).require_axes("zyx")
        if what != "raw" and volume.dtype.kind not in "iub":
            raise UserError(f"source {source.title}: {what} {spec} has dtype {volume.dtype}, expected integers")
        volumes[what] = volume
    raw = volumes["raw"]
    for volume in list(volumes.values()):
        # Labels of a padded image (CREMI) say by their offset where they lie.
        if volume.offset != raw.offset and volume.voxel_size and raw.voxel_size:
            volumes["raw"], _ = common_region(volumes["raw"], volume)
    for what, volume in list(volumes.items()):
        if volume.offset != volumes["raw"].offset and volume.voxel_size and raw.voxel_size:
            _, volumes[what] = common_region(volumes["raw"], volume)
        require_same_grid(volumes["raw"], volumes[what])
    return volumes


def _bytes(volumes: dict[str, Volume]) -> int:
    # Labels are held as int32, whatever they are on disk.
    return sum(
        math.prod(volume.shape) * (4 if what == "labels" else volume.dtype.itemsize) for what, volume in volumes.items()
    )


def _open_parts(sources: Sequence[Source], cache_bytes: int) -> list[_Part]:
    opened = []
    for source in sources:
        volumes = _open_volumes(source)
        opened.append((source, volumes, *_window(source, volumes["raw"].spatial_shape)))

    left = cache_bytes
    held = []
    for _, volumes, _, _ in opened:
        size = _bytes(volumes)
        held.append(size <= left)
        left -= size if held[-1] else 0
    unheld = sum(_bytes(volumes) for (_, volumes, _, _), whole in zip(opened, held) if not whole)

    parts = []
    for (source, volumes, begin, end), whole in zip(opened, held):
        arrays: dict[str, Any] = {}
        for what, volume in volumes.items():
            if whole:
                array = check_finite(volume[...], volume.spec)
                if what == "labels" and source.label_values:
                    check_values(array, source.label_values, f"source {source.title}")
                arrays[what] = as_int32_ids(array) if what == "labels" else array
            else:
                arrays[what] = _Unheld(volume, int(left * volume.nbytes / unheld))
        parts.append(
            _Part(
                source,
                arrays["raw"],
                arrays.get("labels"),
                arrays.get("mask"),
                arrays.get("ignore"),
                begin,
                end,
                whole,
            )
        )
    return parts


def _window(source: Source, shape: Shape) -> tuple[Shape, Shape]:
    begin, end = source.begin or (0, 0, 0), source.end or shape
    if len(begin) != 3 or len(end) != 3 or any(not 0 <= b < e <= n for b, e, n in zip(begin, end, shape)):
        raise UserError(
            f"source {source.title}: found begin {tuple(begin)}, end {tuple(end)}, expected a part of its "
            f"{shape} voxels"
        )
    if any(p >= e - b for p, b, e in zip(source.pad, begin, end)):
        raise UserError(f"source {source.title}: found pad {source.pad}, expected less than the size of the volume")
    return tuple(begin), tuple(end)  # type: ignore[return-value]


class Loader:
    """Batches of augmented crops as a pure function of the global step.

    Args:
        sources: volumes to draw from.
        crop: size of a sample (z, y, x).
        batch_size: samples of the global batch, over all processes.
        augment: the chain of augmentations in order of application.
        seed: of the whole stream.
        process_index, process_count: which rows of each global batch are made here (the index-th of equal parts).
        threads: samples made at once by :meth:`iterate`.
        prefetch: batches that :meth:`iterate` makes ahead.
        cache_bytes: memory for volumes: those that fit are held whole, the others share the rest block by block.
        transport: dtype of the image in a batch, ``"uint8"`` (0..255) or ``"float32"`` (0..1).
        split_components: connected parts of the label crop become objects of their own (26 neighbours).
        min_labelled: least fraction of voxels with a positive label in the middle of the crop; a crop with less is
            drawn again, up to ``max_tries`` times, then the best of them is taken.
        compose: how a sample is made from a :class:`Sampler` and a generator; one augmented crop unless told
            otherwise.

    Raises:
        UserError: what :class:`Sampler` raises, or a batch that the processes cannot share equally.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        crop: Shape,
        batch_size: int,
        augment: Sequence[Augmentation] = (),
        seed: int = 0,
        *,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 2,
        prefetch: int = 2,
        cache_bytes: int = 8 << 30,
        transport: str = "uint8",
        split_components: bool = False,
        min_labelled: float = 0.0,
        max_tries: int = 20,
        compose: Callable[[Sampler, np.random.Generator], Sample] = one_crop,
    ):
        if batch_size < 1 or process_count < 1 or batch_size % process_count:
            raise UserError(
                f"batch_size: found {batch_size} for {process_count} processes, expected a multiple of their number"
            )
        if not 0 <= process_index < process_count:
            raise UserError(f"process_index: found {process_index}, expected 0 to {process_count - 1}")
        if transport not in ("uint8", "float32"):
            raise UserError(f"transport: found {transport!r}, expected 'uint8' or 'float32'")
        if seed < 0:
            raise UserError(f"seed: found {seed}, expected 0 or more")
        if threads < 1 or prefetch < 1:
            raise UserError(f"threads, prefetch: found {threads}, {prefetch}, expected 1 or more")
        self.sampler = Sampler(
            sources, crop, augment, cache_bytes=cache_bytes, min_labelled=min_labelled, max_tries=max_tries
        )
        self.batch_size, self.seed = batch_size, seed
        self.process_index, self.process_count = process_index, process_count
        self.threads, self.prefetch = threads, prefetch
        self.transport, self.split_components, self.compose = transport, split_components, compose
        self._rows = batch_size // process_count
        self._samples = grain.MapDataset.range(2**62).map(self._local_sample)
        self._stack = _Stacker()
        self._batches = self._samples.batch(self._rows, batch_fn=self._stack)

    def sample(self, index: int) -> Sample:
        """Sample ``index`` of the endless stream, ready for transport."""
        rng = np.random.default_rng((self.seed, index))
        sample = dict(self.compose(self.sampler, rng))
        sample["image"] = (
            as_uint8(sample["image"])
            if self.transport == "uint8"
            else np.ascontiguousarray(as_float(sample["image"]), np.float32)
        )
        if "labels" in sample and self.split_components:
            sample["labels"] = split_components(sample["labels"])
        return {name: np.ascontiguousarray(array) for name, array in sample.items()}

    def _local_sample(self, local: int) -> Sample:
        step, row = divmod(int(local), self._rows)
        return self.sample(step * self.batch_size + self.process_index * self._rows + row)

    def batch(self, step: int) -> dict[str, np.ndarray]:
        """This process's rows of batch ``step``.

        Returns:
            ``image`` uint8 or float32 (rows, z, y, x), ``labels`` int32 if the sources have labels, ``mask`` uint8 if
            any source has a mask or ignored labels, and whatever else ``compose`` makes.
        """
        return self._batches[step]

    def iterate(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """Endless batches from ``start_step`` on, made ahead by threads; equal to :meth:`batch` of each step."""
        ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.prefetch * self._rows)
        return iter(
            self._samples[start_step * self._rows :].to_iter_dataset(ahead).batch(self._rows, batch_fn=self._stack)
        )

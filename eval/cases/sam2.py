"""Parity of SAM 2: encoder, prompt encoder, decoder, memory, tracking, predictors, converter."""

import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from checks import Case, Row, load, load_json, seeded_state
from emjax.models.functional import define
from emjax.models.sam2.config import sam2_config
from emjax.models.sam2.model import SAM2
from emjax.weights.rules import read_state
from emjax.weights.sam2 import RULES

MODULE = 1e-4
TRACKING = 3e-4
PREDICTOR = 3e-3
OTHER_SIDE = 1e-3
_FAN_IN_MARKS = ("attn_token_to_image.", "attn_image_to_token.", ".query_proj.")


def weights(path: pathlib.Path, size: str, seed: int) -> dict[str, np.ndarray]:
    """The oracle's stand-in weights: attention projections with "token" in their name are brought to unit gain."""
    state = seeded_state(path.parent.parent, load_json(path.parent / f"manifest_{size}.json"), seed)
    for name, value in state.items():
        if name.endswith(".weight") and value.ndim > 1 and any(mark in name for mark in _FAN_IN_MARKS):
            state[name] = (value / np.float32(0.3 * math.sqrt(math.prod(value.shape[1:])))).astype(np.float32)
    return state


@functools.lru_cache(maxsize=2)
def network(path: pathlib.Path, size: str, seed: int):
    """(definition, collections) of a version 2.1 network with the oracle's weights."""
    config = sam2_config(size, "2.1")
    definition = define(lambda rngs: SAM2(config, rngs))
    collections = read_state(weights(path, size, seed), definition.shapes, RULES, str(path))
    return definition, jax.tree.map(jnp.asarray, collections)


def random_input(path: pathlib.Path, name: str, shape: tuple[int, ...], seed: int, scale: float) -> np.ndarray:
    name = f"input/{name}"
    drawn = seeded_state(path.parent.parent, {name: list(shape)}, seed)[name]
    return (drawn * np.float32(scale)).astype(np.float32)


def images(stack: np.ndarray) -> np.ndarray:
    """uint8 slices (n, h, w) as normalised (n, h, w, 3) float32."""
    x = np.repeat(stack[..., None].astype(np.float32) / np.float32(255), 3, axis=-1)
    return (x - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])


def rows(path: pathlib.Path, oracle: dict, name: str, got, tolerance: float, last: bool | None = None) -> Iterator[Row]:
    """One row per stored part of an array, in the reference's axis order.

    The tolerance is relative to the standard deviation of the reference (``noise_floor.json``), or, of a single number,
    to its magnitude. ``last``: the channel axis is the last one (by default: of all but four-axis arrays).
    """
    got = np.asarray(got, np.float64)
    floors = load_json(path.parent / "noise_floor.json").get(path.stem, {})
    stored = [oracle[key] for key in (name, f"{name}@value") if key in oracle]
    spread = floors[name][1] if name in floors else float(np.std(stored[0]))
    largest = float(np.abs(stored[0]).max())
    scale = spread if spread > 0 else max(largest, 1e-30)
    allowed = tolerance * scale
    words = f"{tolerance:g} std = {allowed:.1e}"

    def row(part: str, value: np.ndarray, want: np.ndarray) -> Row:
        label = f"{name} {part}".strip()
        if value.shape != want.shape:
            return Row(f"{label} shape {value.shape} for {want.shape}", math.inf, math.inf, words, False)
        worst = float(np.abs(value - want).max(initial=0.0))
        return Row(label, worst, worst / scale, words, bool(worst <= allowed))

    if name in oracle:
        yield row("", got, np.asarray(oracle[name], np.float64))
        return
    shape = tuple(int(n) for n in oracle[f"{name}@shape"])
    if got.shape != shape:
        yield Row(f"{name} shape {got.shape} for {shape}", math.inf, math.inf, words, False)
        return
    yield row("samples", got.reshape(-1)[oracle[f"{name}@index"]], oracle[f"{name}@value"])
    channel = got.ndim - 1 if (got.ndim != 4 if last is None else last) else 1
    if f"{name}@mean_channel" in oracle:
        yield row("mean over channels", got.mean(axis=channel), oracle[f"{name}@mean_channel"])
    if f"{name}@mean_space" in oracle:
        want = oracle[f"{name}@mean_space"]
        keep = (0, channel) if want.ndim == 2 else (channel,)
        yield row("mean over space", got.mean(axis=tuple(i for i in range(got.ndim) if i not in keep)), want)
    if f"{name}@mean" in oracle:
        yield row("mean", got.mean(), np.asarray(oracle[f"{name}@mean"], np.float64))
    if f"{name}@std" in oracle:
        yield row("std", got.std(), np.asarray(oracle[f"{name}@std"], np.float64))
    if f"{name}@bits" in oracle:
        bits = np.unpackbits(oracle[f"{name}@bits"])[: got.size].reshape(shape).astype(bool)
        share = float(((got > 0) != bits).mean())
        yield Row(f"{name} other side of zero", share, share, f"share <= {OTHER_SIDE:g}", share <= OTHER_SIDE)


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def precise(function: Callable[[pathlib.Path], Iterator[Row]]) -> Callable[[pathlib.Path], Iterator[Row]]:
    """Runs a case with full-precision matrix products."""

    @functools.wraps(function)
    def run(path: pathlib.Path) -> Iterator[Row]:
        with jax.default_matmul_precision("highest"):
            yield from function(path)

    return run


@precise
def encoder(path: pathlib.Path) -> Iterator[Row]:
    size = re.fullmatch(r"encoder_(.+)_\d+x\d+", path.stem)[1]
    oracle = load(path)
    definition, collections = network(path, size, int(oracle["seed"]))

    @jax.jit
    def run(collections, image):
        model = definition.bind(collections)
        steps = dict(model.image_encoder.trunk.steps(image))
        encoded = model.image_encoder(image)
        return steps, encoded, model.features(encoded)

    steps, encoded, features = run(collections, images(oracle["image_u8"][None]))
    got = {name: (value, True) for name, value in steps.items()}
    got |= {f"stage{i + 1}": (channels_first(x), False) for i, x in enumerate(encoded.stages)}
    got |= {f"neck{i}": (channels_first(x), False) for i, x in enumerate(encoded.levels)}
    got["vision_features"] = channels_first(encoded.embedding), False
    got["s0"], got["s1"] = (channels_first(features.fine), False), (channels_first(features.middle), False)
    for i, level in enumerate(encoded.levels):
        from emjax.models.layers.position import sine_position

        got[f"pos{i}"] = channels_first(sine_position(*level.shape[1:3], level.shape[-1])[None]), False
    for name in sorted({key.split("@")[0] for key in oracle} - {"image_u8", "seed"}):
        value, last = got[name]
        yield from rows(path, oracle, name, value, MODULE, last)


CASES = {
    "encoder_tiny_256x256.npz": Case(encoder),
    "encoder_*.npz": Case(encoder),
}

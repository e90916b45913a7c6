"""Parity of AGQ: network, criterion, training step, optimiser, targets, block labels, volume merge, metrics."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from checks import Case, Row, bound, close, exact, load, load_json, seeded_state
from emjax.models.agq import AGQConfig, AGQOutputs, without_background
from emjax.weights.agq import config_of, network, read_agq, write_agq

ATOL = 1e-4
ATOL_GATHERED = 5e-4
HALF_RTOL = 1e-3
# The reference without its random order: components in raster order, one threshold for the batch.
REFERENCE = {"selection": "raster", "threshold_scope": "batch"}


def precise(function: Callable[[pathlib.Path], Iterator[Row]]) -> Callable[[pathlib.Path], Iterator[Row]]:
    """Runs a case with full-precision matrix products."""

    @functools.wraps(function)
    def run(path: pathlib.Path) -> Iterator[Row]:
        with jax.default_matmul_precision("highest"):
            yield from function(path)

    return run


@functools.lru_cache(maxsize=2)
def weights(folder: pathlib.Path, seed: int) -> tuple[AGQConfig, dict]:
    """The oracle's stand-in weights and the configuration that their shapes tell."""
    state = seeded_state(folder.parent, load_json(folder / "manifest.json"), seed)
    config = config_of(state, str(folder), **REFERENCE)
    return config, jax.tree.map(jnp.asarray, read_agq(state, config, str(folder)))


@functools.lru_cache(maxsize=8)
def forward(config: AGQConfig) -> Callable[..., AGQOutputs]:
    definition = network(config)
    return jax.jit(lambda collections, image, **given: definition.bind(collections)(image, **given))


def last(array: np.ndarray) -> jax.Array:
    """Channels last."""
    return jnp.moveaxis(jnp.asarray(array), 1, -1)


def first(array: jax.Array) -> np.ndarray:
    """Channels second, as the reference has them."""
    return np.moveaxis(np.asarray(array), -1, 1)


def normalised(image: np.ndarray) -> np.ndarray:
    """(b, 1, z, y, x) float32 of uint8 (z, y, x) or (b, z, y, x)."""
    batch = image[None] if image.ndim == 3 else image
    return (((batch.astype(np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5))[:, None]


def compare(name: str, got: np.ndarray, want: np.ndarray) -> Row:
    """One float array; where the oracle kept every second voxel, or only the first queries, so do we."""
    if got.shape != want.shape and got.ndim == 5:
        got = got[:, :, ::2, ::2, ::2]
    if got.ndim == 3:
        got = got[:, : want.shape[1]]
    half = want.dtype == np.float16
    atol = ATOL_GATHERED if name.startswith("gathered") else ATOL
    return close(name, got, want, atol=atol, rtol=HALF_RTOL if half else 0.0)


def named(outputs: AGQOutputs) -> dict[str, np.ndarray]:
    """The network's arrays under the oracle's names, in the reference's layout, empty slots left out."""
    valid = np.asarray(outputs.valid)
    counts = valid.sum(1)
    if not (counts == counts[0]).all():
        raise ValueError(f"volumes of the batch have {counts.tolist()} queries, the reference needs equal numbers")

    def queries(array: jax.Array) -> np.ndarray:
        return np.stack([rows[keep] for rows, keep in zip(np.asarray(array), valid)])

    def masks(array: jax.Array) -> np.ndarray:
        channels = np.moveaxis(np.asarray(array), -1, 1)
        keep = np.concatenate([np.ones((len(valid), 1), bool), valid], 1)
        return np.stack([planes[rows] for planes, rows in zip(channels, keep)])

    got = {
        "conv_in": first(outputs.stem),
        "fused": first(outputs.fused),
        "affinity_logits": first(outputs.affinity_logits),
        "mask_features": first(outputs.mask_features),
        "query_features": first(outputs.query_features),
        "component_labels": np.asarray(outputs.component_labels),
    }
    got |= {f"P{level}": first(array) for level, array in enumerate(outputs.levels)}
    for index, stage in enumerate(outputs.stages):
        got[f"queries{index}"] = queries(stage.queries)
        got[f"kernels{index}"] = queries(stage.kernels)
        got[f"masks{index}"] = masks(stage.masks)
        if stage.gathered is not None:
            got[f"gathered{index - 1}"] = queries(stage.gathered)
            got[f"updated{index - 1}"] = queries(stage.updated)
    return got


def network_rows(oracle: dict[str, np.ndarray], got: dict[str, np.ndarray], prefix: str = "") -> Iterator[Row]:
    for name, value in got.items():
        want = oracle.get(prefix + name)
        if want is not None:
            row = exact(name, value, want) if name == "component_labels" else compare(name, value, want)
            yield dataclasses.replace(row, array=prefix + row.array)


@precise
def manifest(path: pathlib.Path) -> Iterator[Row]:
    """The converter: every name, and the state back bit for bit, for weights of two seeds."""
    shapes = load_json(path)
    for seed in (0, 1):
        state = seeded_state(path.parent.parent, shapes, seed)
        config = config_of(state, str(path))
        back = write_agq(read_agq(state, config, str(path)), config)
        missing = set(state) ^ set(back)
        yield bound(f"names, seed {seed}", len(missing), 0, f"{len(state)} names, differing")
        wrong = [name for name, value in state.items() if name in back and not np.array_equal(back[name], value)]
        yield bound(f"round trip, seed {seed}", len(wrong), 0, "arrays that differ")


@precise
def evaluation(path: pathlib.Path) -> Iterator[Row]:
    """The network in evaluation mode, with its own or a given affinity, and the variants on the same input."""
    oracle = load(path)
    config, collections = weights(path.parent, int(oracle["seed"]))
    image = normalised(oracle["image_u8"])
    yield exact("input", image, oracle["input"])
    given = {"affinity_override": last(oracle["affinity_given"])} if "affinity_given" in oracle else {}
    outputs = forward(config)(collections, last(image), **given)
    got = named(outputs)
    yield from network_rows(oracle, got)
    if "kept_ids" in oracle:
        areas = np.bincount(got["component_labels"].ravel())
        yield exact("kept_ids", np.flatnonzero(areas[1:] > config.min_area)[: config.guided] + 1, oracle["kept_ids"])
    if "P0_mean" in oracle:
        yield compare("P0_mean", got["P0"].mean((2, 3, 4)), oracle["P0_mean"])
    if "affinity_logits_own" in oracle:
        own = forward(config)(collections, last(image)).affinity_logits
        yield compare("affinity_logits_own", first(own), oracle["affinity_logits_own"])
    if "masks2_argmax" in oracle:
        yield exact("masks2_argmax", got["masks2"].argmax(1), oracle["masks2_argmax"])
    if "nobg_bg_channel" in oracle:
        changed = first(without_background(outputs.stages[-1].masks, first_only=True))
        yield exact("nobg_bg_channel", changed[:, 0], oracle["nobg_bg_channel"])
        yield exact("nobg other channels", changed[:, 1:], first(outputs.stages[-1].masks)[:, 1:])
    for prefix in sorted({match[0] for name in oracle if (match := re.match(r"(cap\d+|none)_", name))}):
        if prefix == "none_":
            variant = forward(config)(
                collections, last(image), affinity_override=jnp.zeros_like(outputs.affinity_logits)
            )
        else:
            capped = dataclasses.replace(config, guided=int(prefix[3:-1]))
            variant = forward(capped)(collections, last(image), **given)
        yield from network_rows(oracle, named(variant), prefix)


CASES = {
    "manifest.json": Case(manifest),
    "eval_*.npz": Case(evaluation),
}

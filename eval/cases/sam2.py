"""Parity of SAM 2: encoder, prompt encoder, decoder, memory, tracking, predictors, converter."""

import dataclasses
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
from emjax.models.layers.position import rotary_table, sine_of_scalar, sine_position
from emjax.models.sam2.config import sam2_config
from emjax.models.sam2.mask_decoder import single_mask, stability
from emjax.models.sam2.model import SAM2, Features
from emjax.models.sam2.stack import (
    BACKWARD,
    FORWARD,
    Memory,
    Tracked,
    TrackOptions,
    condition,
    empty_memory,
    prompt_points,
    push,
    remembered,
    track,
)
from emjax.systems.sam2_session import ImagePredictor, Network, Session
from emjax.weights.family import from_state, to_state
from emjax.weights.rules import read_state
from emjax.weights.sam2 import FAMILY, OFFICIAL

MODULE = 1e-4
TRACKING = 3e-4
PREDICTOR = 3e-3
OTHER_SIDE = 1e-3
NEW_IN_21 = ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight", "obj_ptr_tpos_proj.bias")
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
    collections = read_state(weights(path, size, seed), definition.shapes, OFFICIAL, str(path))
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

    The tolerance is relative to the standard deviation of the reference (``noise_floor.json``), or, of fewer than four
    numbers (whose deviation says nothing of their scale), to their magnitude. ``last``: the channel axis is the last one (by default: of all but four-axis arrays).
    """
    got = np.asarray(got, np.float64)
    floors = load_json(path.parent / "noise_floor.json").get(path.stem, {})
    stored = [oracle[key] for key in (name, f"{name}@value") if key in oracle]
    spread = floors[name][1] if name in floors else float(np.std(stored[0]))
    largest = float(np.abs(stored[0]).max())
    scale = spread if spread > 0 and stored[0].size >= 4 else max(largest, 1e-30)
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
        got[f"pos{i}"] = channels_first(sine_position(*level.shape[1:3], level.shape[-1])[None]), False
    for name in sorted({key.split("@")[0] for key in oracle} - {"image_u8", "seed"}):
        value, last = got[name]
        yield from rows(path, oracle, name, value, MODULE, last)


def compared(
    path: pathlib.Path, oracle: dict, got: dict, tolerance: float, inputs: set[str], **options
) -> Iterator[Row]:
    """Rows of every array that the file describes but its inputs; an array that was not computed is an error."""
    for name in sorted({key.split("@")[0] for key in oracle} - inputs):
        yield from rows(path, oracle, name, got[name], tolerance)


@precise
def prompt_encoder(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    definition, collections = network(path, "tiny", int(oracle["seed"]))
    arrays = {"point_coords", "point_labels", "point_coords_box", "point_labels_box", "boxes", "masks"}
    size = (int(oracle["image_size"]),) * 2

    @jax.jit
    def run(collections, given):
        encode = definition.bind(collections).sam_prompt_encoder
        points = given["point_coords"], given["point_labels"]
        corners = given["point_coords_box"], given["point_labels_box"]
        sparse_points, dense_none = encode(size, points)
        return {
            "sparse_points": sparse_points,
            "dense_none": jnp.moveaxis(dense_none, -1, 1),
            "sparse_box_as_points": encode(size, corners)[0],
            "sparse_points_and_boxes": encode(size, points, given["boxes"])[0],
            "sparse_boxes": encode(size, boxes=given["boxes"])[0],
            "dense_masks": jnp.moveaxis(encode(size, masks=jnp.moveaxis(given["masks"], 1, -1))[1], -1, 1),
            "dense_pe": jnp.moveaxis(encode.dense_position(size[0] // 16, size[1] // 16), -1, 1),
        }

    got = run(collections, {name: oracle[name] for name in arrays})
    yield from compared(path, oracle, got, MODULE, arrays | {"image_size", "seed"})


@precise
def mask_decoder(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    seed, grid = int(oracle["seed"]), int(oracle["grid"])
    definition, collections = network(path, "tiny", seed)
    threshold = float(oracle["dynamic_thresh"])
    batch, prompts = oracle["queries"].shape[0], oracle["queries"].shape[1] - 6
    wanted = {
        "image_embeddings": ((batch, 256, grid, grid), 4),
        "sparse": ((batch, prompts, 256), 2),
        "dense": ((batch, 256, grid, grid), 1.5),
        "high_res_s0": ((batch, 32, 4 * grid, 4 * grid), 4),
        "high_res_s1": ((batch, 64, 2 * grid, 2 * grid), 4),
    }
    drawn = {name: random_input(path, name, shape, seed, scale) for name, (shape, scale) in wanted.items()}
    given = {name: x if name == "sparse" else np.moveaxis(x, 1, -1) for name, x in drawn.items()}

    @jax.jit
    def run(collections, given):
        model = definition.bind(collections)
        decoder = model.sam_mask_decoder
        position = model.sam_prompt_encoder.dense_position(grid, grid)
        image, sparse, dense = given["image_embeddings"], given["sparse"], given["dense"]
        high = given["high_res_s0"], given["high_res_s1"]
        steps = decoder.transformer.steps(*decoder.flatten(image, position, sparse, dense))
        decoded = decoder(image, position, sparse, dense, high)
        repeated = decoder(image[:1], position, sparse, dense, (high[0][:1], high[1][:1]))
        single_masks, single_iou = single_mask(decoded)
        dynamic_masks, dynamic_iou = single_mask(decoded, threshold)
        got = {f"layer{i}_{part}": x for i, pair in enumerate(steps[:-1]) for part, x in zip(("queries", "keys"), pair)}
        return got | {
            "queries": steps[-1][0],
            "keys": steps[-1][1],
            "masks_all": decoded.masks,
            "iou_all": decoded.ious,
            "mask_tokens": decoded.tokens,
            "object_score_logits": decoded.score,
            "multi_masks": decoded.masks[:, 1:],
            "multi_iou": decoded.ious[:, 1:],
            "multi_tokens": decoded.tokens[:, 1:],
            "single_masks": single_masks,
            "single_iou": single_iou,
            "single_tokens": decoded.tokens[:, :1],
            "stability_scores": stability(single_masks),
            "dynamic_masks": dynamic_masks,
            "dynamic_iou": dynamic_iou,
            "repeat_masks": repeated.masks[:, 1:],
        }

    yield from compared(path, oracle, run(collections, given), MODULE, {"seed", "grid", "dynamic_thresh"})


@precise
def memory_encoder(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    seed, grid = int(oracle["seed"]), int(oracle["grid"])
    definition, collections = network(path, "tiny", seed)
    logits = oracle["mask_logits_quarter"][:, 0].repeat(4, axis=1).repeat(4, axis=2)
    drawn = random_input(path, "pix_feat", (len(logits), 256, grid, grid), seed, 8)
    scores = np.float32([2, -1])

    @jax.jit
    def run(collections, embedding, logits):
        model = definition.bind(collections)
        features = Features(embedding, None, None)
        downsampled, *layers, memory = model.memory_encoder.steps(
            embedding, (jax.nn.sigmoid(logits) * 20 - 10)[..., None]
        )
        got = {f"fuser_layer{i}": x for i, x in enumerate(layers)} | {
            "mask_downsampled": downsampled,
            "features": memory,
            "pos": jnp.broadcast_to(model.memory_encoder.position(grid, grid), memory.shape),
            "features_raw_sigmoid": model.memory_encoder(embedding, jax.nn.sigmoid(logits)[..., None]),
            "encode_new_memory": model.remember(features, logits, scores),
            "encode_new_memory_binarized": model.remember(features, logits, scores, binary=True),
            "encode_new_memory_non_overlap": model.remember(features, logits, scores, exclusive=True),
        }
        return {name: jnp.moveaxis(x, -1, 1) for name, x in got.items()}

    got = run(collections, np.moveaxis(drawn, 1, -1), logits)
    yield from compared(path, oracle, got, MODULE, {"seed", "grid", "mask_logits_quarter"})


@precise
def memory_attention(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    seed, grid = int(oracle["seed"]), int(oracle["grid"])
    memories, pointers = int(oracle["num_memories"]), int(oracle["num_pointer_tokens"])
    definition, collections = network(path, "tiny", seed)
    tokens, batch = grid * grid, int(oracle["out@shape"][1])
    keys = memories * tokens + pointers
    wanted = {
        "curr": ((tokens, batch, 256), 6),
        "curr_pos": ((tokens, batch, 256), 2),
        "memory": ((keys, batch, 64), 5),
        "memory_pos": ((keys, batch, 64), 2),
    }
    drawn = [random_input(path, name, shape, seed, scale) for name, (shape, scale) in wanted.items()]

    @jax.jit
    def run(collections, arrays):
        attention = definition.bind(collections).memory_attention
        image, image_position, memory, position = (x.swapaxes(0, 1) for x in arrays)
        *layers, out = attention.steps(image, image_position, memory, position, grid=(grid, grid), pointers=pointers)
        alone = attention(image, image_position, memory[:, :tokens], position[:, :tokens], grid=(grid, grid))
        got = {f"layer{i}": x for i, x in enumerate(layers)} | {"out": out, "out_no_pointers": alone}
        return {name: x.swapaxes(0, 1) for name, x in got.items()}

    got = run(collections, drawn)
    got["rope_cos"], got["rope_sin"] = rotary_table(grid, grid, 256)
    side = math.isqrt(int(oracle["rope64_cos@shape"][0]))
    got["rope64_cos"], got["rope64_sin"] = rotary_table(side, side, 256)
    got["pointer_sine_pe"] = sine_of_scalar(np.float32([0, 1, 2, 5, -3, 15]) / 15, oracle["pointer_sine_pe"].shape[1])
    yield from compared(path, oracle, got, MODULE, {"seed", "grid", "num_memories", "num_pointer_tokens"})


PLAIN = TrackOptions(stability_threshold=None, binary_prompts=False, memory_dtype="float32")
"""The YAML defaults, which the tracking oracles were made with."""


class Tracker:
    """Runs single steps of a track and keeps all that the oracles hold of them."""

    def __init__(self, path: pathlib.Path, oracle: dict, conditioning: int, objects: int = 1, **options):
        self.definition, self.collections = network(path, "tiny", int(oracle["seed"]))
        self.options = dataclasses.replace(PLAIN, **options)
        stack = oracle["stack_u8"]
        self.slices = len(stack)
        grid = stack.shape[1] // 16, stack.shape[2] // 16
        self.memory = empty_memory(self.definition.bind(self.collections), self.options, objects, conditioning, grid)
        encode = jax.jit(lambda collections, image: self.definition.bind(collections).encode(image))
        self.features = [encode(self.collections, images(stack[z : z + 1])) for z in range(self.slices)]

    @functools.cached_property
    def _track(self):
        @jax.jit
        def run(collections, features, memory, z, direction):
            model = self.definition.bind(collections)
            heads, recalled, tracked = track(model, self.options, features, memory, z, direction, self.slices)
            return heads, recalled, tracked, push(memory, z, tracked, jnp.ones(len(tracked.score), bool))

        return run

    def track(self, z: int, direction: int = FORWARD, memory: Memory | None = None) -> tuple[dict, Memory]:
        memory = self.memory if memory is None else memory
        heads, recalled, tracked, after = self._track(self.collections, self.features[z], memory, z, direction)
        return self.described(z, heads, recalled, tracked), after

    def points(self, z: int, place: int, coordinates, labels) -> dict:
        """Prompts a slice with points and makes it the conditioning slice at ``place``."""

        @jax.jit
        def run(collections, features, coordinates, labels):
            model = self.definition.bind(collections)
            heads = prompt_points(model, self.options, features, coordinates, labels)
            return heads, model.without_memory(features), remembered(model, self.options, features, heads)

        heads, embedding, tracked = run(self.collections, self.features[z], coordinates, labels)
        self.memory = condition(self.memory, place, z, tracked)
        return self.described(z, heads, embedding, tracked)

    def masks(self, z: int, place: int, masks) -> dict:
        @jax.jit
        def run(collections, features, masks):
            model = self.definition.bind(collections)
            heads, high = model.take_mask(features, masks)
            return heads, high, remembered(model, self.options, features, heads, high)

        heads, high, tracked = run(self.collections, self.features[z], masks)
        self.memory = condition(self.memory, place, z, tracked)
        embedding = jnp.broadcast_to(self.features[z].embedding, (len(masks), *self.features[z].embedding.shape[1:]))
        return self.described(z, heads, embedding, tracked, high)

    def described(self, z: int, heads, embedding, tracked, high=None) -> dict:
        high = heads.high(self.features[z].size) if high is None else high
        return {
            "pix_feat_with_mem": channels_first(embedding),
            "low_res_multimasks": heads.candidates,
            "ious": heads.ious,
            "low_res_masks": heads.low[:, None],
            "high_res_masks": high[:, None],
            "obj_ptr": heads.pointer,
            "object_score_logits": heads.score[:, None],
            "maskmem_features": channels_first(tracked.features),
        }


def steps_compared(path: pathlib.Path, oracle: dict, got: dict[str, dict], inputs: set[str]) -> Iterator[Row]:
    flat = {f"{step}/{name}": value for step, arrays in got.items() for name, value in arrays.items()}
    yield from compared(path, oracle, flat, TRACKING, inputs)


@precise
def track_short(path: pathlib.Path) -> Iterator[Row]:
    """Prompts on slice 0 (a click, or masks of several objects), then forward to the end."""
    oracle = load(path)
    inputs = {"image_size", "stack_u8", "seed", "point_coords", "point_labels", "mask_inputs", "mask_shape"}
    if "mask_shape" in oracle:
        shape = tuple(int(n) for n in oracle["mask_shape"])
        masks = np.unpackbits(oracle["mask_inputs"])[: math.prod(shape)].reshape(shape)[:, 0]
        tracker = Tracker(path, oracle, 1, len(masks))
        got = {"frame0": tracker.masks(0, 0, masks)}
    else:
        tracker = Tracker(path, oracle, 1, len(oracle["point_coords"]))
        got = {"frame0": tracker.points(0, 0, oracle["point_coords"], oracle["point_labels"])}
    for z in range(1, tracker.slices):
        got[f"frame{z}"], tracker.memory = tracker.track(z)
    yield from steps_compared(path, oracle, got, inputs)


@precise
def track_long(path: pathlib.Path) -> Iterator[Row]:
    """Two conditioning slices, forward, backward, and one slice with strided memories and few conditioning slices."""
    oracle = load(path)
    steps = {key.split("/")[0] for key in oracle if "/" in key}
    numbers = {
        kind: sorted(int(step.removeprefix(kind)) for step in steps if step.startswith(kind))
        for kind in ("cond", "forward", "reverse", "strided")
    }
    side = oracle["stack_u8"].shape[2], oracle["stack_u8"].shape[1]
    click = np.float32([[[0.4 * side[0], 0.55 * side[1]]]]), np.int32([[1]])
    box = np.float32([[[0.2 * side[0], 0.2 * side[1]], [0.75 * side[0], 0.8 * side[1]]]]), np.int32([[2, 3]])
    tracker = Tracker(path, oracle, len(numbers["cond"]))
    got = {}
    for place, (z, prompt) in enumerate(zip(numbers["cond"], (click, box), strict=True)):
        got[f"cond{z:02d}"] = tracker.points(z, place, *prompt)
    start = tracker.memory
    for z in numbers["forward"]:
        got[f"forward{z:02d}"], tracker.memory = tracker.track(z)
    memory = start
    for z in reversed(numbers["reverse"]):
        got[f"reverse{z:02d}"], memory = tracker.track(z, BACKWARD, memory)
    strided = Tracker(path, oracle, 3, most_conditioning=2, stride=3)
    kept = {**{z: got[f"cond{z:02d}"] for z in numbers["cond"]}, 4: got["forward04"]}

    def tracked(arrays: dict) -> Tracked:
        low, score, iou = arrays["low_res_masks"][:, 0], arrays["object_score_logits"][:, 0], arrays["ious"].max(-1)
        return Tracked(low, score, iou, arrays["obj_ptr"], jnp.moveaxis(jnp.asarray(arrays["maskmem_features"]), 1, -1))

    for place, (z, arrays) in enumerate(kept.items()):
        strided.memory = condition(strided.memory, place, z, tracked(arrays))
    for z in numbers["strided"]:
        for other in (n for n in numbers["forward"] if n not in kept and n < z):
            strided.memory = push(strided.memory, other, tracked(got[f"forward{other:02d}"]), jnp.ones(1, bool))
        got[f"strided{z:02d}"], _ = strided.track(z)
    yield from steps_compared(path, oracle, got, {"image_size", "stack_u8", "seed"})


def predictor_network(path: pathlib.Path, size: str, seed: int) -> Network:
    _, collections = network(path, size, seed)
    return Network(sam2_config(size, "2.1"), collections, TrackOptions())


@precise
def video_predictor(path: pathlib.Path) -> Iterator[Row]:
    """The documented session: a click, a mask, forward, a correction, backward; the reference loses corrections."""
    oracle = load(path)
    rows_columns = tuple(int(n) for n in oracle["video_hw"])
    stack = oracle["stack_u8"]
    height, width = rows_columns
    session = Session(
        predictor_network(path, "tiny", int(oracle["seed"])),
        lambda z: stack[z],
        len(stack),
        stack.shape[1:],
        rows_columns,
        corrections_stick=False,
        holes=0,
    )
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.22 * height) ** 2
    got = {}
    with session:
        got["prompt/obj1"] = session.add_points(1, 0, [[0.55 * height, 0.4 * width]], [1])
        got["prompt/obj2"] = session.add_mask(2, 1, disc)
        got |= {f"forward/frame{z}": logits for z, logits in session.propagate(0)}
        points = np.asarray([[0.3 * height, 0.7 * width], [0.8 * height, 0.2 * width]])
        corrected = next(key.split("@")[0] for key in oracle if key.startswith("correct/frame"))
        z = int(corrected.removeprefix("correct/frame"))
        got[corrected] = session.add_points(1, z, points, np.asarray([1, 0]))
        got |= {f"reverse/frame{z}": logits for z, logits in session.propagate(len(stack) - 1, BACKWARD)}
        records = [session.record(1, z) for z in range(len(stack))]
    got = {name: logits[:, None] for name, logits in got.items()}
    got[f"ptr/obj1_frame{len(stack) - 1}"] = records[-1][1][None]
    got["score/obj1"] = np.float32([[score] for score, _ in records])
    yield from compared(path, oracle, got, PREDICTOR, {"image_size", "video_hw", "stack_u8", "seed"})


@precise
def image_predictor(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    name, side = path.stem.removeprefix("image_predictor_").rsplit("_", 1)
    size = (int(side),) * 2
    net = predictor_network(path, name, int(oracle["seed"]))
    net = dataclasses.replace(net, options=dataclasses.replace(net.options, stability_threshold=None))
    predictor = ImagePredictor(net, oracle["image_u8"], size)
    model = net._definition.bind(net.variables)
    got = {
        f"input_{size[0]}": channels_first(predictor.input),
        "image_embed": channels_first(model.without_memory(predictor.features)),
    }

    def add(name: str, result) -> None:
        masks, ious, low = result
        got[f"{name}/masks"], got[f"{name}/iou"], got[f"{name}/low_res"] = masks[None], ious[None], low[None]

    first = predictor.predict(oracle["point"][:, ::-1], np.ones(len(oracle["point"]), int))
    add("points", first)
    corners = oracle["box"].reshape(2, 2)[:, ::-1].ravel()
    add("box", predictor.predict(box=corners, several=False))
    best = first[2][np.argmax(first[1])]
    labels = np.int32([1, 0])
    add("refine", predictor.predict(oracle["refine_points"][:, ::-1], labels, mask=best, several=False))
    yield from compared(path, oracle, got, MODULE, {"image_u8", "point", "box", "refine_points", "seed"})


def manifest(path: pathlib.Path) -> Iterator[Row]:
    """Converter: every name and shape of versions 2.1 and 2.0, official and Hugging Face names, bit for bit."""
    shapes = load_json(path)
    size = path.stem.removeprefix("manifest_")
    state = {name: np.float32(value) for name, value in seeded_state(path.parent.parent, shapes, 0).items()}
    for version in ("2.1", "2.0"):
        if version == "2.0":
            state = {name: value for name, value in state.items() if name not in NEW_IN_21}
        checkpoint = from_state(state, [FAMILY], path.name)
        settings = {"size": size, "version": version}
        yield Row(f"{version} recognised", 0, 0, str(settings), checkpoint.settings == settings)
        back = to_state(checkpoint, "official")
        other = from_state(to_state(checkpoint, "huggingface"), [FAMILY], path.name)
        for label, found in (("official", back), ("Hugging Face", to_state(other, "official"))):
            wrong = [n for n in state if n not in found or not np.array_equal(found[n], state[n])]
            same = not wrong and len(found) == len(state)
            yield Row(f"{version} {label} names, {len(state)} arrays", len(wrong), math.nan, "bit-exact", same)


CASES = {
    "encoder_tiny_1024x1024.npz": Case(encoder, slow=True),
    "encoder_large_*.npz": Case(encoder, slow=True),
    "encoder_base_plus_*.npz": Case(encoder, slow=True),
    "encoder_*.npz": Case(encoder),
    "prompt_encoder.npz": Case(prompt_encoder),
    "mask_decoder.npz": Case(mask_decoder),
    "memory_encoder.npz": Case(memory_encoder),
    "memory_attention.npz": Case(memory_attention),
    "video_predictor.npz": Case(video_predictor),
    "image_predictor_*.npz": Case(image_predictor, slow=True),
    "manifest_large.json": Case(manifest, slow=True),
    "manifest_*.json": Case(manifest),
    "track_long.npz": Case(track_long),
    "track_*.npz": Case(track_short),
}

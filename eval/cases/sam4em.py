"""Parity of SAM4EM: network, gradients, batch statistics, losses, metrics, schedule, preprocessing, names."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cases.sam2 import channels_first, precise, random_input, rows
from checks import Case, Row, bound, close, exact, load, load_json, seeded_state
from emjax.config import Optimizer
from emjax.data.slices import resize_grey, resize_labels, zoom_labels
from emjax.metrics import overlap, soft_dice, surface_distances
from emjax.metrics.overlap import reference_sam4em_evaluation
from emjax.models.functional import join, partition, paths, variables
from emjax.models.sam4em import Masks
from emjax.systems import sam4em as system
from emjax.training.optimizers import schedule as rate_schedule
from emjax.weights.family import from_state, to_state
from emjax.weights.rules import leaves
from emjax.weights.sam4em import BUFFERS, FAMILY, PREFIX, RULES, config_of, copied_names, dead_shapes

MODULE = 1e-4
OTHER_SIDE = 1e-3
GRADIENT, NO_GRADIENT = 1e-3, 1e-6
SCALAR = 1e-6
ROUNDING = 1e-12
"""Figures that are to be exact up to float64 rounding."""
MANIFEST = "manifest.json"
_FAN_IN_MARKS = ("attn_token_to_image.", "attn_image_to_token.", ".query_proj.")


def weights(path: pathlib.Path, seed: int, shapes: dict | None = None) -> dict[str, np.ndarray]:
    """The oracle's stand-in weights: projections with "token" or "query" in their name are brought to unit gain."""
    state = seeded_state(path.parent.parent, shapes or load_json(path.parent / MANIFEST), seed)
    for name, value in state.items():
        if name.endswith(".weight") and value.ndim > 1 and any(mark in name for mark in _FAN_IN_MARKS):
            state[name] = (value / np.float32(0.3 * math.sqrt(math.prod(value.shape[1:])))).astype(np.float32)
    return state


@functools.lru_cache(maxsize=1)
def network(folder: pathlib.Path, seed: int):
    """(configuration of the system in the published mode, definition, collections) with the oracle's weights."""
    checkpoint = from_state(weights(folder / MANIFEST, seed), [FAMILY], MANIFEST)
    made = config_of(checkpoint.settings)
    classes = tuple(system.Class(name=f"class{i + 1}", labels=(i + 1,)) for i in range(made.classes))
    config = system.published(system.Config(model=made, classes=classes))
    collections = jax.tree.map(jnp.asarray, checkpoint.collections)
    return dataclasses.replace(config, model=made), FAMILY.network(checkpoint.settings), collections


def unpacked(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(bits)[: math.prod(shape)].reshape(shape)


def _as_cut(oracle: dict, name: str, prompts: list) -> np.ndarray:
    """The second prompt, which no stored mask tells exactly.

    It is made of the first mask, whose logits are cut at zero. Those within the tolerance of zero may be cut either way;
    one of them decides about one place of the map alone, where the way that was recorded is taken.
    """
    without, with_them = (channels_first(prompt) for prompt in prompts)
    stored = oracle[name].mean(1) if name in oracle else oracle[f"{name}@mean_channel"]
    nearer = np.abs(with_them.mean(1) - stored) < np.abs(without.mean(1) - stored)
    return np.where(nearer[:, None], with_them, without)


@precise
def forward(path: pathlib.Path) -> Iterator[Row]:
    """Encoder, enhancer, then slice by slice, each prompted with the stored mask of the slice before.

    The prompts that this network makes itself are compared with those; they may differ in single pixels.
    """
    oracle = load(path)
    config, definition, collections = network(path.parent, int(oracle["seed"]))
    stack = oracle["stack_u8"]
    count, height, width = stack.shape
    stored = [unpacked(oracle[f"slice{i}/prompt_mask@bits"], (height, width)) for i in range(count)]

    @jax.jit
    def encode(collections, grey):
        model = definition.bind(collections)
        encoded = model.image_encoder(system.normalised(grey.astype(jnp.float32) / 255, config.normalisation))
        return encoded, model.positions(encoded), model.fuse(encoded)

    spread = float(np.std(oracle["mask1"] if "mask1" in oracle else oracle["mask1@value"]))

    @jax.jit
    def segment(collections, state, features):
        model = definition.bind(collections)
        state, one = model.segment(state, features)
        size = height // 4 * 16, width // 4 * 16
        logits = one.first.masks
        cut = [(logits > limit).astype(jnp.float32) for limit in (MODULE * spread, -MODULE * spread)]
        return state, one, [model.prompt_encoder2(size, masks=mask)[1] for mask in cut], (cut[0] != cut[1]).mean()

    encoded, positions, fused = encode(collections, stack)
    got = {f"stage{i + 1}": channels_first(x) for i, x in enumerate(encoded.stages)}
    for i, (level, place) in enumerate(zip(encoded.levels, positions)):
        got[f"fpn{i}"] = channels_first(level)
        got[f"pos{i}"] = np.broadcast_to(channels_first(place[None]), got[f"fpn{i}"].shape)
    got["fused"] = channels_first(fused)
    state = definition.bind(collections).initial_state(1, (height, width))
    if "warm" in path.stem:
        shape = load_json(path.parent / MANIFEST)["sam.mem.memory"]
        shape = [*shape[:2], int(oracle["grid"]), int(oracle["grid"])]
        slots = weights(path, int(oracle["seed"]), {"sam.mem.memory": shape})["sam.mem.memory"]
        state = state._replace(slots=jnp.moveaxis(jnp.asarray(slots), 1, -1)[None])
    found, shares, undecided = [], [], []
    for i in range(count):
        if i:
            shares.append(float((np.asarray(state.prompt)[0, ..., 0] != stored[i]).mean()))
        state = state._replace(prompt=jnp.asarray(stored[i], jnp.float32)[None, ..., None])
        state, one, second_prompts, share = segment(collections, state, fused[i : i + 1])
        undecided.append(float(share))
        found.append(one)
        got |= {
            f"slice{i}/memory_enhanced": channels_first(one.remembered),
            f"slice{i}/dense_prompt": channels_first(one.first_prompt),
            f"slice{i}/dense_prompt_second": _as_cut(oracle, f"slice{i}/dense_prompt_second", second_prompts),
            # Products of output tokens and image tokens, which the published decoder returns and nothing uses.
            f"slice{i}/mask_feature1": np.einsum("btc,bpc->btp", one.first.tokens, one.first.image),
            f"slice{i}/iou1": one.first.ious,
            f"slice{i}/iou2": one.second.ious,
        }
        for stage, decoded in ((1, one.first), (2, one.second)):
            name = f"slice{i}/upscaled{stage}"
            whole = channels_first(decoded.upscaled)
            kept = oracle[name].shape if name in oracle else oracle[f"{name}@shape"]
            step = whole.shape[-1] // int(kept[-1])
            got[name] = whole[..., ::step, ::step]
    for stage in (1, 2):
        got[f"mask{stage}"] = np.concatenate([channels_first(one.masks[stage - 1]) for one in found])
    shape = oracle["memory_after"].shape if "memory_after" in oracle else oracle["memory_after@shape"]
    got["memory_after"] = np.moveaxis(np.asarray(state.slots[0]), -1, 1)[: int(shape[0])]
    names = {key.split("@")[0] for key in oracle}
    for name in sorted(names & set(got)):
        yield from rows(path, oracle, name, got[name], MODULE)
    yield bound("first masks, undecided", max(undecided), OTHER_SIDE, "share of pixels within the tolerance of zero")
    for i, share in enumerate(shares, 1):
        yield bound(f"slice{i}/prompt_mask, own", share, OTHER_SIDE, "share of other pixels")
    inputs = {
        "size",
        "grid",
        "stack_u8",
        "labels",
        "labels_shape",
        "previous_mask",
        "previous_mask_shape",
        "seed",
        "rank",
    }
    learning = {name for name in names if name.startswith(("loss/", "grad_"))}
    for name in sorted(names - set(got) - inputs - learning):
        if not name.endswith("/prompt_mask"):
            yield Row(f"{name}: nothing to compare with", math.nan, math.nan, "a value", False)
    if learning:
        yield from _learning(path, oracle, stored)


def _learning(path: pathlib.Path, oracle: dict, stored: list[np.ndarray]) -> Iterator[Row]:
    """Losses of the stack, and the norm of every parameter's gradient."""
    config, definition, collections = network(path.parent, int(oracle["seed"]))
    shape = tuple(int(n) for n in oracle["labels_shape"])
    truth = unpacked(oracle["labels"], shape).astype(np.float32)[None, ..., None]
    chosen, rest = partition(collections["params"], lambda name: system.trainable(config, name))
    prompts = jnp.asarray(np.stack(stored), jnp.float32)[:, None, ..., None]
    wanted = {"masks": jnp.asarray(truth), "weights": jnp.ones_like(truth)}

    def total(chosen):
        model = definition.bind({**collections, "params": join(chosen, rest)})
        grey = oracle["stack_u8"].astype(np.float32) / 255
        features = model.encode(system.normalised(grey, config.normalisation))[:, None]

        def one(state, now):
            features, prompt = now
            state, masks = model.step(state._replace(prompt=prompt), features)
            return state, masks

        start = model.initial_state(1, shape[1:])
        _, masks = jax.lax.scan(one, start, (features, prompts))
        found = system.terms(config, Masks(*(jnp.swapaxes(logits, 0, 1) for logits in masks)), wanted)
        return found["total"], found

    gradient, found = jax.jit(jax.grad(total, has_aux=True))(chosen)
    for name in sorted(key for key in oracle if key.startswith("loss/")):
        yield close(name, found[name.removeprefix("loss/")], oracle[name], atol=SCALAR)
    if "grad_names" not in oracle:
        return
    norms = {RULES.name(name): float(jnp.linalg.norm(value.ravel())) for name, value in leaves(gradient).items()}
    dead = dead_shapes(config.model.features)
    worst: dict[str, list[tuple[float, bool]]] = {}
    for name, want in zip(oracle["grad_names"].tolist(), oracle["grad_norm"].tolist()):
        name = name if name.startswith(PREFIX) else PREFIX + name
        have = norms.get(name, 0.0 if name in dead else math.nan)
        # -1: no gradient reaches it.
        error = abs(have - max(want, 0.0))
        part = ".".join(name.split(".")[1:3])
        worst.setdefault(part, []).append((error, error <= GRADIENT * max(want, 0.0) + NO_GRADIENT))
    for part, errors in sorted(worst.items()):
        words = f"{GRADIENT:g} rel + {NO_GRADIENT:g}, {len(errors)} parameters"
        yield Row(f"grad_norm {part}", max(e for e, _ in errors), math.nan, words, all(ok for _, ok in errors))


@precise
def fusion_train(path: pathlib.Path) -> Iterator[Row]:
    """The enhancer alone with batch statistics, and the running statistics after it."""
    oracle = load(path)
    seed, grid = int(oracle["seed"]), int(oracle["grid"])
    _, definition, collections = network(path.parent, seed)
    shape = tuple(int(n) for n in (oracle["out"].shape if "out" in oracle else oracle["out@shape"]))
    levels = [
        jnp.moveaxis(random_input(path, f"p{i}", (*shape[:2], grid >> i, grid >> i), seed, 5), 1, -1) for i in range(3)
    ]

    @jax.jit
    def fuse(collections):
        model = definition.bind(collections)
        return model.fpn(*levels, True), variables(model)["batch_stats"]

    out, statistics = fuse(collections)
    yield from rows(path, oracle, "out", channels_first(out), MODULE)
    after = {RULES.name(name).removeprefix("sam.fpn."): value for name, value in leaves(statistics).items()}
    for name in sorted(key for key in oracle if key.startswith("after/")):
        yield from rows(path, oracle, name, after[name.removeprefix("after/")], MODULE)


@precise
def losses(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    logits = [jnp.moveaxis(jnp.asarray(oracle[name]), 1, -1)[None] for name in ("pred_mask", "pred_hint")]
    truth = jnp.asarray(oracle["labels"], jnp.float32)[None, ..., None]
    for key in sorted(key for key in oracle if "/" in key):
        setting, name = key.split("/")
        shares = {k: float(v) for k, v in re.findall(r"(\w+)=([\d.]+)", setting)}
        config = system.Config(dice_share=shares["dice_parm"], first_share=shares["mask1_parm"])
        found = system.terms(config, Masks(*logits), {"masks": truth, "weights": jnp.ones_like(truth)})
        yield close(key, found[name], oracle[key], atol=SCALAR)


def metrics(path: pathlib.Path) -> Iterator[Row]:
    """The published evaluator, defects included, and MedPy's surface distances per slice and with voxel sizes."""
    oracle = load(path)
    truth, found = oracle["gt"], oracle["pred"]
    slices = [reference_sam4em_evaluation(found[i : i + 1], truth[i : i + 1]) for i in range(len(truth))]
    yield close("per_slice_iou", [part.iou for part in slices], oracle["per_slice_iou"], rtol=ROUNDING)
    yield close("per_slice_dice", [part.dice for part in slices], oracle["per_slice_dice"], rtol=ROUNDING)
    whole = reference_sam4em_evaluation(found, truth, oracle["batches"].tolist())
    yield close("evaluator_miou", whole.iou, oracle["evaluator_miou"], rtol=ROUNDING)
    yield close("evaluator_dice", whole.dice, oracle["evaluator_dice"], rtol=ROUNDING)
    yield close("evaluator_accuracy", whole.accuracy, oracle["evaluator_accuracy"], rtol=ROUNDING)
    yield close("true_accuracy", overlap(found, truth).accuracy, oracle["true_accuracy"], rtol=ROUNDING)
    # The one figure that the reference computes in float32.
    yield close("dice_smooth_0p1", soft_dice(found, truth, 0.1), oracle["dice_smooth_0p1"], rtol=2**-23)
    count = len(oracle["hd"])
    distances = [surface_distances(found[i], truth[i]) for i in range(count)]
    for name in ("hd", "hd95", "assd"):
        yield close(name, [getattr(part, name) for part in distances], oracle[name], rtol=ROUNDING)
    volume = surface_distances(found[:count], truth[:count], (3, 1, 1))
    for name in ("hd95", "assd"):
        yield close(f"{name}_volume_spacing", getattr(volume, name), oracle[f"{name}_volume_spacing"], rtol=ROUNDING)


def schedule(path: pathlib.Path) -> Iterator[Row]:
    """The rate in every epoch, in the first and last step of it, as published (one epoch late) and as meant."""
    oracle = load(path)
    for name in sorted({key.split("/")[0] for key in oracle}):
        base, count, warm, batches = (float(value) for value in oracle[f"{name}/config"])
        steps = int(count) * int(batches)
        for key, late in (("lr_used_in_epoch", True), ("schedule_of_epoch", False)):
            config = Optimizer(
                schedule="epochs",
                lr=base,
                final_lr=1e-6,
                warmup_steps=int(warm),
                warmup_factor=0.01,
                epoch_steps=int(batches),
                late_epochs=late,
            )
            rate = rate_schedule(config, steps)
            first = np.arange(int(count)) * int(batches)
            for label, step in (("first step", first), ("last step", first + int(batches) - 1)):
                yield close(
                    f"{name}/{key}, {label}", rate(jnp.asarray(step)), oracle[f"{name}/{key}"], atol=SCALAR * base
                )


def preprocess(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    kinds = ("balanced", "simple", "minmax", "standard")
    shape = oracle["balanced"].shape if "balanced" in oracle else oracle["balanced@shape"]
    size = int(shape[-2]), int(shape[-1])
    grey = resize_grey(oracle["image_u8"], size)
    step = size[0] // oracle["resized_image"].shape[0]
    yield exact("resized_image", grey[::step, ::step], oracle["resized_image"])
    label = resize_labels(oracle["label"], size)
    yield exact("label", label, unpacked(oracle["label_512"], size).astype(label.dtype))
    low = math.isqrt(8 * oracle["low_res_label"].size)
    yield exact("low_res_label", zoom_labels(label, (low, low)), unpacked(oracle["low_res_label"], (low, low)) > 0)
    unit = jnp.asarray(grey[None], jnp.float32) / 255
    for kind in kinds:
        yield from rows(path, oracle, kind, channels_first(system.normalised(unit, kind)), MODULE)


def manifest(path: pathlib.Path) -> Iterator[Row]:
    """Converter: every published name, there and back bit for bit but for what the network never reads."""
    state = weights(path, 0)
    checkpoint = from_state(state, [FAMILY], path.name)
    yield Row("recognised", 0, 0, str(checkpoint.settings), True)
    back = to_state(checkpoint, "official")
    features = config_of(checkpoint.settings).features
    unread = set(dead_shapes(features)) | {
        n for n in state if re.search(BUFFERS, n) or n.endswith("num_batches_tracked")
    }
    wrong = [n for n in state if n not in back or back[n].shape != state[n].shape]
    wrong += [n for n in set(state) - unread - set(wrong) if not np.array_equal(back[n], state[n])]
    same = not wrong and set(back) == set(state)
    yield Row(f"{len(state)} names, {len(unread)} of them never read", len(wrong), math.nan, "bit-exact", same)


def trainable(path: pathlib.Path) -> Iterator[Row]:
    """Which parameters train in the first stage."""
    wanted = load_json(path)
    config, definition, _ = network(path.parent, 0)
    chosen, rest = (
        {RULES.name(name) for name in paths(part)}
        for part in partition(definition.shapes["params"], lambda name: system.trainable(config, name))
    )
    parameters = {name for name in dead_shapes(config.model.features) if not re.search(r"\.running_(mean|var)$", name)}
    for label, found in (("trainable", chosen | parameters), ("frozen", rest)):
        names = {name if name.startswith(PREFIX) else PREFIX + name for name in wanted[label]}
        yield Row(f"{label}, {len(names)} names", len(names ^ found), math.nan, "equal sets", names == found)


def copied(path: pathlib.Path) -> Iterator[Row]:
    """Which arrays come from which of SAM 2's in the published start-up."""
    wanted = {name.removeprefix(PREFIX): origin for name, origin in load_json(path).items()}
    _, definition, _ = network(path.parent, 0)
    found = copied_names(definition.shapes, first_decoder=False)
    other = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    yield Row(f"{len(wanted)} names", len(other), math.nan, "equal", not other)


CASES = {
    "forward_full.npz": Case(forward, slow=True),
    "forward_small.npz": Case(forward, slow=True),
    "forward_*.npz": Case(forward),
    "fusion_train.npz": Case(fusion_train),
    "losses.npz": Case(losses),
    "metrics.npz": Case(metrics),
    "schedule.npz": Case(schedule),
    "preprocess.npz": Case(preprocess),
    "manifest.json": Case(manifest),
    "trainable.json": Case(trainable),
    "copied_from_sam2.json": Case(copied),
}

"""Parity of AGQ: network, criterion, training step, optimiser, targets, block labels, volume merge, metrics."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from checks import Case, Row, bound, close, exact, load, load_json, seeded_state
from emjax.config import load as load_config
from emjax.metrics import (
    Contingency,
    adapted_rand_cremi,
    adapted_rand_skimage,
    contingency,
    variation_of_information,
)
from emjax.models.agq import AGQConfig, AGQOutputs, without_background
from emjax.models.functional import variables
from emjax.postprocess.block_merge import merge_blocks
from emjax.postprocess.components import label_components
from emjax.systems import agq
from emjax.systems.agq import Merge
from emjax.systems.agq_blocks import INSTANCE_BITS, block_affinities, block_labels, block_positions, concatenate
from emjax.systems.agq_loss import (
    LossConfig,
    Matched,
    Targets,
    criterion,
    gumbel,
    make_targets,
    match_on_host,
    match_scores,
    split_and_erode,
)
from emjax.training import optimizers
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


def loss_shapes(oracle: dict[str, np.ndarray], config: LossConfig) -> LossConfig:
    """The sample size is the one that the network of the oracle was given: never more than the voxels there are."""
    return dataclasses.replace(config, samples=min(config.samples, oracle["gumbel_uniform"].shape[1]))


def matching_rows(oracle: dict[str, np.ndarray], matched: Matched, suffixes: list[str]) -> Iterator[Row]:
    """Pairs (mask channel, target rank) in ascending channel, as the oracle lists them."""
    for volume, suffix in enumerate(suffixes):
        rows = np.asarray(matched.rows[volume])
        target = np.flatnonzero(rows > 0)
        order = np.argsort(rows[target])
        yield exact(f"match_query{suffix}", rows[target][order], oracle[f"match_query{suffix}"])
        yield exact(f"match_target{suffix}", target[order], oracle[f"match_target{suffix}"])


def term_rows(oracle: dict[str, np.ndarray], terms: dict[str, jax.Array], rtol: float) -> Iterator[Row]:
    for kind in ("loss", "loss_f64"):
        for name in sorted(name for name in oracle if name.startswith(f"{kind}/")):
            yield close(name, terms[name.removeprefix(f"{kind}/")], oracle[name], rtol=rtol)
    for name in ("total", "total_f64"):
        yield close(name, sum(terms.values()), oracle[name], rtol=rtol)


def relative_gradient(name: str, got: np.ndarray, want: np.ndarray, scale: float, tolerance: float) -> Row:
    """Gradients against their largest value."""
    largest = float(np.abs(want).max())
    return close(name, got * scale, want, atol=tolerance * largest)


@precise
def criterion_case(path: pathlib.Path) -> Iterator[Row]:
    """Matching, every term and the gradients of made-up network outputs."""
    oracle = load(path)
    config = loss_shapes(oracle, LossConfig())
    targets = Targets(jnp.asarray(oracle["label"]), last(oracle["affinity_target"]))
    volumes, channels = oracle["masks0"].shape[:2]
    valid = jnp.ones((volumes, channels - 1), bool)
    noise = gumbel(jnp.asarray(oracle["gumbel_uniform"]))
    stages = sorted(name for name in oracle if re.fullmatch(r"masks\d+", name))
    inputs = {name: last(oracle[name]) for name in stages} | {
        "pixel_feature": last(oracle["pixel_feature"]),
        "affinity": last(oracle["affinity_logits"]),
    }

    # Targets are arguments: as constants the compiler would evaluate their sorting itself, slowly.
    def loss(inputs, targets, noise):
        terms, matched = criterion(
            config,
            [inputs[name] for name in stages],
            valid,
            inputs["pixel_feature"],
            inputs["affinity"],
            targets,
            noise,
        )
        return sum(terms.values()), (terms, matched)

    gradient, (terms, matched) = jax.jit(jax.grad(loss, has_aux=True))(inputs, targets, noise)
    yield from matching_rows(oracle, matched, [f"_{volume}" for volume in range(volumes)])
    for volume in range(volumes):
        rows = np.asarray(matched.rows[volume])
        exist = np.flatnonzero(np.asarray(matched.targets[volume]))
        masks = np.moveaxis(np.asarray(matched.masks[volume]), -1, 0).reshape(channels, *oracle["masks0"].shape[2:])
        want = oracle[f"target_masks_{volume}"]
        yield exact(f"targets of volume {volume}", len(exist), len(want))
        shown = np.stack([masks[rows[target]] for target in exist])
        # Unmatched targets have no mask of their own; the oracles have more queries than targets.
        yield close(f"target_masks_{volume}", shown, want, atol=1e-6, rtol=HALF_RTOL)
        scores = match_scores(
            jax.nn.softmax(inputs["masks0"][volume].reshape(-1, channels), -1),
            jnp.asarray(want.reshape(len(want), -1).T, jnp.float32),
        )
        host = match_on_host(np.asarray(scores), np.ones(channels, bool), np.ones(len(want), bool))
        yield exact(f"SciPy's matching of volume {volume}", host, rows[exist])
    yield from term_rows(oracle, terms, 1e-5)
    for name in sorted(name for name in oracle if name.startswith("grad")):
        kind, part = name.split("/")
        got = first(gradient[part])
        if kind == "grad_absmean":
            yield close(
                name,
                np.abs(got.astype(np.float64)).mean(),
                oracle[name],
                rtol=1e-4 if part == "pixel_feature" else 1e-5,
            )
        else:
            yield relative_gradient(name, got, oracle[name].astype(np.float64), 1e4, 1e-3)


# Parameters whose gradient is zero in exact arithmetic, because a batch norm follows.
ZERO_GRADIENT = r"(mask_kernel|fc_kernel)\.bias$|kernel_interactors\.{last}\.ln_2\.bias$"


@precise
def train_step(path: pathlib.Path) -> Iterator[Row]:
    """Training mode, criterion and backward pass of the whole network, and the running statistics after it."""
    oracle = load(path)
    config, collections = weights(path.parent, int(oracle["seed"]))
    loss_config = loss_shapes(oracle, LossConfig())
    definition = network(config)
    image = normalised(oracle["image_u8"])
    yield exact("input", image, oracle["input"])
    targets = Targets(jnp.asarray(oracle["label"]), last(oracle["affinity_target"]))
    noise = gumbel(jnp.asarray(oracle["gumbel_uniform"]))
    labels = jnp.asarray(oracle["component_labels"])

    def loss(params, image, labels, targets, noise):
        model = definition.bind(collections | {"params": params})
        outputs = model(image, train=True, component_labels=labels)
        terms, matched = criterion(
            loss_config,
            [stage.masks for stage in outputs.stages],
            outputs.valid,
            outputs.mask_features,
            outputs.affinity_logits,
            targets,
            noise,
        )
        return sum(terms.values()), (terms, matched, outputs, variables(model)["batch_stats"])

    gradient, (terms, matched, outputs, statistics) = jax.jit(jax.grad(loss, has_aux=True))(
        collections["params"], last(image), labels, targets, noise
    )
    # Slots in which no component is do not count: mask channels are those of the network without slots.
    present = np.flatnonzero(np.concatenate([[True], np.asarray(outputs.valid[0])]))
    rows = np.asarray(matched.rows)
    compact = np.where(rows > 0, np.searchsorted(present, rows), -1)
    got = named(outputs)
    for name in ("masks0", "masks2", "affinity_logits"):
        yield compare(name, got[name], oracle[name])
    yield from matching_rows(oracle, matched._replace(rows=compact), [""])
    yield from term_rows(oracle, terms, 1e-4)
    after = write_agq(collections | {"batch_stats": statistics}, config)
    theirs = write_agq({"params": gradient, "batch_stats": statistics}, config)
    zero = ZERO_GRADIENT.replace("{last}", str(config.iterations - 1))
    largest = max(float(oracle[name]) for name in oracle if name.startswith("grad_norm/"))
    for name, want in oracle.items():
        kind, _, parameter = name.partition("/")
        if kind == "buffer_after":
            yield close(name, after[parameter], want, atol=1e-5, rtol=1e-4)
        elif kind == "grad_norm" and re.search(zero, parameter):
            yield bound(
                name, float(np.linalg.norm(theirs[parameter].astype(np.float64))), 1e-5 * largest, "zero gradient"
            )
        elif kind == "grad_norm":
            yield close(name, np.linalg.norm(theirs[parameter].astype(np.float64)), want, rtol=1e-2)
        elif kind == "grad":
            yield relative_gradient(name, theirs[parameter], want, 1.0, 1e-2)


def targets_case(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    split, eroded = jax.jit(split_and_erode)(jnp.asarray(oracle["raw_label"])[None])
    made = jax.jit(make_targets)(jnp.asarray(oracle["raw_label"])[None])
    yield exact("split_label", split[0], oracle["split_label"])
    yield exact("eroded_label", eroded[0], oracle["eroded_label"])
    yield exact("eroded_label (targets)", made.labels[0], oracle["eroded_label"])
    yield exact("affinity", np.moveaxis(np.asarray(made.affinities[0]), -1, 0).astype(np.uint8), oracle["affinity"])


@precise
def block_case(path: pathlib.Path) -> Iterator[Row]:
    """Labels and affinities of one block, on the accelerator."""
    oracle = load(path)
    size = tuple(int(length) for length in oracle["out_size"])
    threshold = float(oracle["area_threshold"])
    run = jax.jit(lambda masks: block_labels(masks, size, threshold))
    for prefix, name in (("", "mask_logits"), ("nobg_", "mask_logits_nobg")):
        labels, areas = run(last(oracle[name])[0])
        yield exact(f"{prefix}mask_int", labels, oracle[f"{prefix}mask_int"])
        if not prefix:
            yield close("soft_areas", areas, oracle["soft_areas"], atol=ATOL, rtol=1e-5)
    without = without_background(last(oracle["mask_logits"]))
    yield exact("mask_logits_nobg", first(without), oracle["mask_logits_nobg"])
    affinity = block_affinities(last(oracle["affinity_logits"]), size)
    yield close("affinity", first(affinity)[0], oracle["affinity"], atol=ATOL)


def canonical(labels: np.ndarray) -> np.ndarray:
    """The partition: ids replaced by the rank of each label's first voxel, 0 kept."""
    _, where, inverse = np.unique(labels, return_index=True, return_inverse=True)
    firsts = np.where(labels.ravel()[where] == 0, -1, where)
    rank = np.empty(len(firsts), np.int64)
    rank[np.argsort(firsts)] = np.arange(len(firsts))
    return rank[inverse].reshape(labels.shape) + (0 if (labels == 0).any() else 1)


def metric_rows(name: str, table: Contingency, want: np.ndarray, kind: str) -> Iterator[Row]:
    """VOI split, merge and (of four numbers) sum, then the adapted Rand error."""
    voi = variation_of_information(table)
    rand = adapted_rand_cremi(table) if kind == "cremi" else adapted_rand_skimage(table)
    got = [voi.split, voi.merge, *([voi.sum] if len(want) == 4 else []), rand.error]
    yield close(name, got, want, atol=1e-9)


def merge_case(path: pathlib.Path) -> Iterator[Row]:
    """Blocks by position into a volume, connected parts, merge across faces, scores."""
    oracle = load(path)
    shape, size, stride = (tuple(int(n) for n in oracle[name]) for name in ("full_shape", "block_shape", "stride"))
    positions = block_positions(shape, size, stride)
    yield exact("positions", positions, oracle["positions"])
    blocks = zip(oracle["positions"], oracle["block_labels"], oracle["block_affinity"].astype(np.float32))
    whole = concatenate(blocks, shape)
    yield exact("concat_labels", canonical(whole.labels), canonical(oracle["concat_labels"]))
    yield exact("border_mask", whole.border, oracle["border_mask"])
    yield close("mean_affinity", whole.affinities, oracle["mean_affinity"], atol=1e-6)
    fragments = label_components(whole.labels, 26)
    yield exact("fragments", canonical(fragments), canonical(oracle["fragments"]))
    # The way through stored predictions: blocks numbered in the ids, borders read off them.
    numbered = np.zeros(shape, np.uint64)
    for number, (position, labels) in enumerate(zip(oracle["positions"], oracle["block_labels"])):
        box = tuple(slice(start, start + length) for start, length in zip(position, labels.shape))
        ids = labels.astype(np.uint64)
        numbered[box] = np.where(ids > 0, ids | np.uint64((number + 1) << INSTANCE_BITS), 0)
    merges = {"merged": Merge()}
    for name in oracle:
        if match := re.fullmatch(r"merged_border_(\d+)p(\d+)", name):
            merges[name] = Merge(on_border=float(f"{match[1]}.{match[2]}"))
    for name, settings in merges.items():
        merged = merge_blocks(
            oracle["mean_affinity"],
            whole.labels,
            whole.border,
            on_border=settings.on_border,
            threshold=settings.threshold,
        )
        yield exact(name, canonical(merged), canonical(oracle[name]))
        decoded = agq.decode(
            agq.Config(merge=settings), {"instances": numbered[None], "affinities": oracle["mean_affinity"]}
        )
        yield exact(f"{name} (decode)", canonical(decoded), canonical(oracle[name]))
    for name in sorted(name for name in oracle if name.startswith("metrics_")):
        segmentation = oracle[name.removeprefix("metrics_")]
        yield from metric_rows(name, contingency(segmentation, oracle["ground_truth"]), oracle[name], "skimage")
    for name in sorted(name for name in oracle if name.endswith("3_positions")):
        want = oracle[name]
        block = agq.Config().plan
        corner = tuple(int(n) + length for n, length in zip(want.max(0), block.size))
        yield exact(name, block_positions(corner, block.size, block.stride), want)


def metrics_case(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    segmentations = {"seg": "seg", "segnz": "seg_without_zeros"}
    for name in sorted(name for name in oracle if name.rpartition("_")[2] in ("skimage", "cremi")):
        segmentation, _, kind = name.rpartition("_")
        table = contingency(oracle[segmentations[segmentation]], oracle["ground_truth"])
        yield from metric_rows(name, table, oracle[name], kind)


def schedule_length(iterations: np.ndarray, rates: np.ndarray, lr: float, warmup: int) -> int:
    """The length of the cosine that the stored rates follow, from the one nearest to half way down."""
    decaying = np.flatnonzero(iterations > warmup)
    middle = decaying[np.argmin(np.abs(rates[decaying] - lr / 2))]
    return round(np.pi * iterations[middle] / np.arccos(2 * rates[middle] / lr - 1))


def optimizer_case(path: pathlib.Path) -> Iterator[Row]:
    """The published optimiser and schedule, as the configuration of AC4 states them."""
    oracle = load(path)
    config = load_config(str(pathlib.Path(__file__).parents[2] / "configs" / "agq" / "ac4.py")).optimizer
    decays = {name.partition("/")[2]: float(oracle[name]) for name in oracle if name.startswith("weight_decay/")}
    config = dataclasses.replace(config, weight_decay=max(decays.values()))
    length = schedule_length(oracle["lr_iteration"], oracle["lr"], config.lr, config.warmup_steps)
    rates = jax.vmap(optimizers.schedule(config, length))(jnp.asarray(oracle["lr_iteration"]))
    yield close("lr", rates, oracle["lr"], atol=1e-6 * config.lr, rtol=1e-6)
    before = {name: jnp.asarray(oracle[f"before/{name}"]) for name in decays}
    chain = optimizers.make(config, length)
    params, state = before, chain.init(before)
    for step in range(int(oracle["steps"])):
        gradient = {name: jnp.asarray(oracle[f"grad/{name}"][step]) for name in decays}
        updates, state = chain.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    for name in decays:
        moved = float(np.abs(oracle[f"after/{name}"] - oracle[f"before/{name}"]).max())
        yield close(f"after/{name}", params[name], oracle[f"after/{name}"], atol=1e-7 + 1e-4 * moved)
    # With a decay a thousand times larger, what is and what is not decayed shows in the first update.
    strong = optimizers.make(dataclasses.replace(config, name="sgd", weight_decay=1.0), length)
    zero = jax.tree.map(jnp.zeros_like, before)
    updates, _ = strong.update(zero, strong.init(before), before)
    for name, decay in decays.items():
        yield exact(f"weight_decay/{name}", bool(np.any(np.asarray(updates[name]))), decay > 0)


CASES = {
    "manifest*.json": Case(manifest),
    "eval_*.npz": Case(evaluation),
    "loss_*.npz": Case(criterion_case),
    "train_step*.npz": Case(train_step),
    "targets*.npz": Case(targets_case),
    "block_postprocess*.npz": Case(block_case),
    "volume_merge*.npz": Case(merge_case),
    "metrics*.npz": Case(metrics_case),
    "optimizer*.npz": Case(optimizer_case),
}

"""Parity of SegNeuron: network, training steps, data functions, tilings, and the foreground-restricted multicut."""

import dataclasses
import functools
import json
import math
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import ndimage

from checks import Case, Row, bound, close, exact, load, load_json, seeded_state
from emjax import config as configuration
from emjax.data.augment import Blur, Cutout, ElasticGrid, FlipTranspose, GaussianNoise, Grayscale
from emjax.data.augment_geometry import grid_displacement
from emjax.data.emneuron import LABELLED, data_set_of_volume
from emjax.data.hog import ORIENTATIONS, drawn, hog_histogram, hog_image
from emjax.data.masking import hide, kept_of_list
from emjax.data.mixing import AFFINITY_BITS, Mixing, affinity_bits, assemble, half_width, ignored_by, mix_frequencies
from emjax.data.targets import affinities, foreground, inside, loss_mask
from emjax.errors import UserError
from emjax.inference.tilings import Tiling, blend, tiling
from emjax.metrics.contingency import contingency
from emjax.metrics.information import variation_of_information
from emjax.metrics.rand import adapted_rand_skimage
from emjax.models.functional import define
from emjax.models.mnet import Config, MNet, is_encoder
from emjax.postprocess import agglomerate, apply, parse_score, region_graph
from emjax.postprocess.foreground_multicut import (
    Settings,
    boundary,
    foreground_multicut,
    fragments,
    partition,
    restricted,
)
from emjax.postprocess.multicut import boundary_edge_features, multicut, multicut_costs, multicut_energy
from emjax.postprocess.seeded_watershed import _gaussian, squared_distance, superhuman_fragments
from emjax.systems import segneuron, segneuron_pretraining
from emjax.training.optimizers import AmsgradState, make, schedule
from emjax.weights.rules import leaves, parameter_count, write_state
from emjax.weights.segneuron import RULES, config_of, dead_heads, read_segneuron, write_segneuron

OUTPUT = 5e-4
FEATURE = 3e-3
DATA = 1e-6


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


@functools.lru_cache(maxsize=16)
def _shapes_as_arrays(manifest: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in load_json(manifest).items()}


def manifest_for(folder: pathlib.Path, widths: tuple[int, ...], merge: str, skips: bool) -> pathlib.Path:
    """The manifest of the network with these widths, kind of merge and skips."""
    for manifest in sorted(folder.glob("manifest*.json")):
        found = config_of(_shapes_as_arrays(manifest), manifest.name)
        if (found.widths, found.merge == "cat", found.skips) == (widths, merge == "cat", skips):
            return manifest
    raise ValueError(f"no manifest in {folder} has widths {widths}, merge {merge}, skips {skips}")


def network(path: pathlib.Path, oracle: dict, dtype: str = "float32"):
    """(definition, parameters by collection, config, PyTorch state) of the network that a case was made with."""
    widths = tuple(int(width) for width in oracle["kn"])
    merge = str(oracle["fmu"]) if "fmu" in oracle else "sub"
    manifest = manifest_for(path.parent, widths, merge, "pretrain" not in path.stem)
    state = seeded_state(path.parent.parent, load_json(manifest), int(oracle["seed"]))
    found = config_of(state)
    config = Config(widths=widths, merge=merge, outputs=found.outputs, skips=found.skips, dtype=dtype)
    return define(lambda rngs: MNet(config, rngs)), read_segneuron(state, config), config, state


def mnet(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    definition, collections, _, _ = network(path, oracle)
    wanted = sorted(name.removeprefix("feat_shape/") for name in oracle if name.startswith("feat_shape/"))

    @jax.jit
    def run(collections, x):
        model = definition.bind(collections)
        features = model.features(x)
        logits = model.heads(features)
        return logits, [jax.nn.sigmoid(head) for head in logits], {name: features[name] for name in wanted}

    with jax.default_matmul_precision("highest"):
        logits, outputs, features = run(collections, channels_last(oracle["input"]))
    for name, got in zip(("output", "output2"), outputs):
        yield close(name, channels_first(got), oracle[name], atol=OUTPUT)
    for name, got in zip(("logits", "logits2"), logits):
        if name in oracle:
            yield close(name, channels_first(got), oracle[name], atol=FEATURE)
    for name in wanted:
        got, want = channels_first(features[name]), oracle[f"feat/{name}"]
        shape = tuple(oracle[f"feat_shape/{name}"])
        yield exact(f"feat_shape/{name}", got.shape[-len(shape) :], shape)
        if f"feat_stride/{name}" in oracle:
            got = got.reshape(-1)[:: int(oracle[f"feat_stride/{name}"])]
        elif got.ndim > want.ndim:
            got = got[0]
        else:
            got = got[: len(want)]
        yield close(f"feat/{name}", got, want, atol=FEATURE)


def manifest(path: pathlib.Path) -> Iterator[Row]:
    """Names, shapes and values survive the way to our network and back, with and without ``module.``."""
    state = seeded_state(path.parent.parent, load_json(path), 0)
    config = config_of(state, path.name)
    collections = read_segneuron(state, config, path.name)
    back = write_segneuron(collections, config)
    yield exact("names in common", len(set(back) & set(state)), len(set(back) | set(state)))
    yield exact("shapes equal", all(back[name].shape == value.shape for name, value in state.items()), True)
    dead = dead_heads(config)
    same = [name for name in state if name not in dead and np.array_equal(back[name], state[name])]
    yield exact("arrays that survive", len(same) + len(dead), len(state))
    unused = sum(int(np.prod(shape)) for shape in dead.values())
    total = sum(value.size for value in state.values())
    yield exact("parameters", parameter_count(collections) + unused, total)
    prefixed = read_segneuron({f"module.{name}": value for name, value in state.items()}, config, path.name)
    pairs = zip(jax.tree.leaves(prefixed), jax.tree.leaves(collections))
    yield exact("with module.", all(np.array_equal(a, b) for a, b in pairs), True)
    kept = {name for name in leaves(collections["params"]) if is_encoder(name)}
    theirs = [name for name in state if not name.startswith(("up", "outputs"))]
    yield exact("arrays handed on by pretraining", len(kept), len(theirs))
    if not config.skips:
        try:
            read_segneuron(state, Config(widths=config.widths), path.name)
            refused = False
        except UserError:
            refused = True
        yield exact("refused for inference", refused, True)


def optimizer_config(**changes):
    """The optimiser of the published recipe, from its configuration file."""
    file = pathlib.Path(__file__).resolve().parents[2] / "configs/segneuron/finetune.py"
    return dataclasses.replace(configuration.load(f"{file}:local").optimizer, decay_steps=200_000, **changes)


STEPS = 400_000


def train_steps(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    pretraining = "pretrain" in path.stem
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        definition, collections, _, _ = network(path, oracle, "float64")
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), collections["params"])
        images = {name: value for name, value in oracle.items() if value.ndim == 5 and "/" not in name}
        batch = {name: jnp.asarray(channels_last(value), jnp.float64) for name, value in images.items()}
        if pretraining:
            settings = segneuron_pretraining.Config()
            wanted = {"image": batch["clean"], "hog": batch["hog_image"]}
            weights = settings.image_weight, settings.hog_weight
        else:
            settings = segneuron.Config()
            wanted = {"affinities": batch["affinity"], "foreground": batch["foreground"], "mask": batch["loss_mask"]}
            weights = settings.affinity_weight, settings.foreground_weight

        def loss(params):
            outputs = definition.bind({"params": params})(batch["input"])
            if pretraining:
                first, second = segneuron_pretraining.terms(outputs, wanted)
            else:
                first, second = segneuron.terms(settings, outputs, wanted)
            total = weights[0] * first + weights[1] * second
            return total, jnp.stack([first, second, total])

        differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
        optimizer = make(optimizer_config(), STEPS)
        state = optimizer.init(params)
        losses, first_gradient = [], {}
        for _ in oracle["losses"]:
            (_, values), gradient = differentiate(params)
            losses.append(np.asarray(values))
            first_gradient = first_gradient or write_state({"params": gradient}, RULES)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        final = write_state({"params": params}, RULES)
    yield close("losses", np.stack(losses), oracle["losses"], rtol=1e-8)
    # After a step the reference's own float32 run drifts from its float64 run: only the first is comparable.
    yield close("losses_f32 of step 1", losses[0], oracle["losses_f32"][0], rtol=1e-5)
    names = [str(name) for name in oracle["parameter_names"]]
    yield exact("parameter_names in common", len(set(names) & set(final)), len(set(names) | set(final)))
    unused = {str(name) for name in oracle["unused_parameters"]}
    yield exact("unused_parameters in our tree", len(unused & set(final)), 0)
    for name, tree, figure in (
        ("grad_norm", first_gradient, np.linalg.norm),
        ("grad_sum", first_gradient, np.sum),
        ("param_norm", final, np.linalg.norm),
        ("param_sum", final, np.sum),
    ):
        got = np.array([figure(np.asarray(tree[key], np.float64).ravel()) for key in names])
        yield close(name, got, oracle[name], atol=1e-7, rtol=1e-8)
    for name in oracle:
        kind, _, key = name.partition("/")
        if kind in ("grad", "param3"):
            yield close(name, (first_gradient if kind == "grad" else final)[key], oracle[name], atol=1e-7)


def optimizer(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    for name in oracle:
        if name == "lr" or name.startswith("lr_warmup"):
            warmup = int(name.removeprefix("lr").removeprefix("_warmup") or 0)
            rate = schedule(optimizer_config(warmup_steps=warmup), STEPS)
            yield close(name, [rate(int(iteration) - 1) for iteration in oracle["iterations"]], oracle[name], atol=DATA)
    transform = make(optimizer_config(), STEPS)
    params = jnp.asarray(oracle["p0"])
    state = transform.init(params)
    found = []
    for gradient in oracle["grads"]:
        updates, state = transform.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    yield close("params", np.stack(found), oracle["params"], atol=DATA)
    moments = next(part for part in state if isinstance(part, AmsgradState))
    names = {"exp_avg": moments.mean, "exp_avg_sq": moments.square, "max_exp_avg_sq": moments.largest}
    for name, got in names.items():
        yield close(name, got, oracle[name], atol=DATA)


def affinity_targets(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    labels = jnp.asarray(oracle["labels"].astype(np.int32))
    offsets = [tuple(int(step) for step in offset) for offset in oracle["offsets"]]
    replicated = np.moveaxis(np.asarray(affinities(labels, offsets, "replicate")), -1, 0)
    yield exact("affinity_replicate", replicated, oracle["affinity_replicate"])
    within = np.stack([np.asarray(inside(labels.shape, offset)) for offset in offsets])
    yield exact("affinity_nopad", np.where(within, replicated, 0), oracle["affinity_nopad"])
    bits = affinity_bits(oracle["labels"])
    yield exact("affinity bits", np.stack([bits >> axis & 1 for axis in range(3)]), oracle["affinity_replicate"])
    yield exact("foreground", foreground(labels), oracle["foreground"])
    unlabelled = LABELLED[0].ignored
    yield exact("loss_mask", loss_mask(labels, None, unlabelled), oracle["loss_mask"])


def losses(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    predictions = tuple(jnp.asarray(channels_last(oracle[f"pred_{name}"])) for name in ("affinity", "foreground"))
    wanted = {
        "affinities": channels_last(oracle["affinity"]).astype(np.float32),
        "foreground": channels_last(oracle["foreground"]).astype(np.float32),
        "mask": channels_last(oracle["loss_mask"]).astype(np.float32),
    }
    for kind in ("mse", "bce"):
        settings = segneuron.Config(loss=kind)
        first, second = segneuron.terms(settings, predictions, wanted)
        yield close(f"{kind}_affinity", first, oracle[f"{kind}_affinity"], rtol=1e-5)
        yield close(f"{kind}_foreground", second, oracle[f"{kind}_foreground"], rtol=1e-5)
        yield close(f"{kind}_total", first + second, oracle[f"{kind}_total"], rtol=1e-5)
        total = lambda outputs, settings=settings: sum(segneuron.terms(settings, outputs, wanted))  # noqa: E731
        gradients = jax.grad(total)(predictions)
        for name, got in zip(("affinity", "foreground"), gradients):
            want = oracle[f"{kind}_grad_{name}"]
            yield close(f"{kind}_grad_{name}", channels_first(got), want, rtol=1e-5, atol=1e-8)
        whole = {**wanted, "mask": np.ones_like(wanted["mask"])}
        unweighted = segneuron.terms(settings, predictions, whole)[0]
        yield close(f"{kind}_affinity_unweighted", unweighted, oracle[f"{kind}_affinity_unweighted"], rtol=1e-5)


def hog(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    image = jnp.asarray(oracle["image"].astype(np.float32) / np.float32(255))
    histogram, target = hog_histogram(image), hog_image(image)
    yield close("histogram", histogram, oracle["histogram"], atol=DATA)
    yield close("hog_image", target, oracle["hog_image"], atol=DATA)
    yield exact("bar_footprint", drawn(jnp.eye(ORIENTATIONS)[:, None, None]), oracle["bar_footprint"])
    # Not used by the network: L2-Hys normalisation of each cell by itself.
    values = np.asarray(histogram, np.float64)
    eps = 1e-5
    values = np.minimum(values / np.sqrt((values**2).sum(-1, keepdims=True) + eps**2), 0.2)
    values = values / np.sqrt((values**2).sum(-1, keepdims=True) + eps**2)
    yield close("descriptor", values.reshape(len(values), -1), oracle["descriptor"], atol=DATA)
    settings = segneuron_pretraining.Config()
    first, second = segneuron_pretraining.terms(
        (oracle["pred_image"], oracle["pred_hog"]), {"image": image, "hog": target}
    )
    yield close("loss_image", first, oracle["loss_image"], atol=DATA)
    yield close("loss_hog", second, oracle["loss_hog"], atol=DATA)
    total = settings.image_weight * first + settings.hog_weight * second
    yield close("loss_total", total, oracle["loss_total"], atol=DATA)


def flipped(volume: np.ndarray, rule: np.ndarray) -> np.ndarray:
    """Reflections z, x, y, then y/x transpose, as the oracle writes them down."""
    z, x, y, transpose = (bool(bit) for bit in rule)
    draws = {"flips": (z, y, x), "order": (0, 2, 1) if transpose else (0, 1, 2)}
    return np.ascontiguousarray(FlipTranspose().apply({"image": volume}, draws)["image"])


def gaussian_mask(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    crop = flipped(oracle["crop"], oracle["flip_rule"])
    block = tuple(int(oracle[name]) for name in ("block_z", "block_xy", "block_xy"))
    # noise_loc and noise_scale are those of the crop.
    yield close("noise_loc", crop.mean(), oracle["noise_loc"], rtol=DATA)
    yield close("noise_scale", crop.std(), oracle["noise_scale"], rtol=DATA)
    count = math.prod(size // step for size, step in zip(crop.shape, block))
    yield exact("masked_blocks", int(count * float(oracle["mask_ratio"])), len(oracle["masked_blocks"]))
    random = np.random.RandomState(int(oracle["noise_seed"]))
    noise = random.normal(float(oracle["noise_loc"]), float(oracle["noise_scale"]), crop.shape) / 255
    clean = jnp.asarray(crop.astype(np.float32) / np.float32(255))
    visible = kept_of_list(crop.shape, block, oracle["masked_blocks"])
    at = oracle["slices"]
    yield close("masked", hide(clean, noise.astype(np.float32), visible)[at], oracle["masked"], atol=DATA)
    yield close("clean", clean[at], oracle["clean"], atol=DATA)
    yield close("hog_image", hog_image(clean)[at], oracle["hog_image"], atol=DATA)


def mask_blocks(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    for name, chosen in oracle.items():
        if name.startswith("sel_"):
            scale = name.removeprefix("sel_")
            z, xy = (int(number) for number in scale.split("_"))
            got = np.packbits(np.asarray(kept_of_list(segneuron.PATCH, (z, xy, xy), chosen)))
            yield exact(f"mask_bits_{scale}", got, oracle[f"mask_bits_{scale}"])


def frequency_mixing(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    for name, want in oracle.items():
        if not name.startswith("mixed_"):
            continue
        marked = re.fullmatch(r"mixed_(\w*?)_?L([\d._]+)", name)
        kind = f"_{marked[1]}" if marked[1] else ""
        share = float(marked[2].replace("_", "."))
        source, target = oracle[f"source{kind}"], oracle[f"target{kind}"]
        mixed = mix_frequencies(source, target, share)
        yield close(name, mixed[: len(want)], want, atol=DATA)
        label = name.removeprefix("mixed_")
        if f"clipped_{label}" in oracle:
            want = oracle[f"clipped_{label}"]
            yield close(f"clipped_{label}", np.clip(mixed, 0, 1)[: len(want)], want, atol=DATA)
        if f"b_{label}" in oracle:
            yield exact(f"b_{label}", half_width(source.shape, share), oracle[f"b_{label}"])


def mixing(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    draws = json.loads(str(oracle["draws"]))
    volumes = [draws["volume"]] + ([draws["spatial_volume"]] if "spatial_volume" in draws else [])
    if "partner" in oracle and "spatial_volume" not in draws:
        volumes.append(draws["volume"])
    sets = []
    for number in volumes:
        index, within = data_set_of_volume(int(number))
        sets.append(LABELLED[index].ignored_by(within))
    main = {"image": oracle["main"], "labels": oracle["main_labels"].astype(np.int32)}
    second = None
    if "partner" in oracle:
        second = {"image": oracle["partner"], "labels": oracle["partner_labels"].astype(np.int32)}
    settings = Mixing(square=int(draws.get("square_size", 1)), reference=True)
    corner = int(draws.get("square_y0", 0)), int(draws.get("square_x0", 0))
    sample = assemble(main, oracle.get("freq_partner"), second, corner, settings, ignored_by(sets, True))
    batch = {name: jnp.asarray(sample[name])[None] for name in ("labels", "mask", AFFINITY_BITS)}
    wanted = segneuron.targets(segneuron.Config(), batch)
    at = oracle["slices"]
    yield close("image", sample["image"][at], oracle["image"], atol=DATA)
    got = np.moveaxis(np.asarray(wanted["affinities"][0]), -1, 0)
    yield exact("affinity", got[:, at], oracle["affinity"])
    yield exact("foreground", wanted["foreground"][0, ..., 0][at], oracle["foreground"])
    yield exact("loss_mask", wanted["mask"][0, ..., 0][at], oracle["loss_mask"])


def augmentations(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    image, labels = oracle["image"].astype(np.float32) / np.float32(255), oracle["labels"]
    last = len(image) - 1
    for number, rule in enumerate(oracle["flip_rules"]):
        want = oracle[f"flip_{number}"]
        yield exact(f"flip_{number}", flipped(labels, rule)[: len(want)], want)
    grey = next(step for step in _chain() if isinstance(step, Grayscale))
    for name in ("intensity_2d", "intensity_3d"):
        mode, *uniforms = oracle[f"{name}_draws"]
        # A mode draw above 3/4 means the whole block.
        yield exact(f"{name} by section", mode < grey.sections, len(uniforms) > 3)
        drawn_ = {"uniforms": np.reshape(uniforms, (-1, 3)), "invert": False}
        got = grey.apply({"image": image}, drawn_)["image"]
        yield close(name, got[[0, 2, last]], oracle[name], atol=DATA)
    unit = np.random.RandomState(int(oracle["noise_seed"])).normal(0, 1, image.shape)
    drawn_ = {"sigma": float(oracle["noise_std"]), "noise": unit.astype(np.float32)}
    yield close("noise", GaussianNoise().apply({"image": image}, drawn_)["image"][[0, 3]], oracle["noise"], atol=DATA)
    for name, want in oracle.items():
        if re.fullmatch(r"blur_\d+", name):
            kernel, sigma = oracle[f"{name}_params"]
            got = Blur().apply({"image": image}, {"radius": int(kernel) // 2, "sigma": float(sigma)})["image"]
            yield close(name, got[: len(want)], want, atol=DATA)
    size = (int(oracle["cutout_size_z"]), int(oracle["cutout_size_xy"]), int(oracle["cutout_size_xy"]))
    yield exact("cutout_count", len(oracle["cutout_corners"]), oracle["cutout_count"])
    ones = np.ones(tuple(oracle["cutout_shape"]), np.float32)
    kept = Cutout().apply({"image": ones}, {"size": size, "corners": oracle["cutout_corners"]})["image"]
    yield exact("cutout_mask_bits", np.packbits(kept > 0), oracle["cutout_mask_bits"])
    offsets = oracle["elastic_control_offsets"][1:].astype(np.float64)
    elastic = next(step for step in _chain() if isinstance(step, ElasticGrid))
    padded = tuple(int(n) for n in oracle["elastic_padded_shape"])
    yield exact("elastic_padded_shape", elastic._padded(image.shape), padded)
    got = grid_displacement(offsets, padded)[:, ::3, ::5, ::5]
    yield close("elastic_displacement_sub", got, oracle["elastic_displacement_sub"], atol=1e-5)
    moved = elastic.apply({"image": image, "labels": labels}, {"offsets": offsets})
    yield exact("elastic_image", np.rint(moved["image"] * 255), oracle["elastic_image"])
    yield exact("elastic_labels", moved["labels"], oracle["elastic_labels"])


def _chain():
    file = pathlib.Path(__file__).resolve().parents[2] / "configs/segneuron/finetune.py"
    return configuration.load(f"{file}:local").data.augment


def stand_in(patches: np.ndarray) -> dict[str, np.ndarray]:
    """The oracle's position-dependent function of a patch in place of the network."""
    z, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in patches.shape[1:]), indexing="ij")
    p = patches.astype(np.float64)
    channels = [p * (0.5 + 0.5 * z), 0.25 + 0.5 * p * y, 1 - p * x]
    inner = (0.5 * p + 0.5 * y * x)[..., None]
    return {"affinity": np.stack(channels, -1).astype(np.float32), "foreground": inner.astype(np.float32)}


def _blended(oracle: dict, plan: Tiling) -> Iterator[Row]:
    volume = oracle["volume"].astype(np.float32) / np.float32(255)
    found = blend(volume, plan, stand_in, batch=3)
    if "out_shape" in oracle:
        yield exact("out_shape", found["affinity"].shape, tuple(oracle["out_shape"]))
    z, y, x = (int(step) for step in oracle["subsample"])
    for name in ("affinity", "foreground"):
        yield close(name, found[name][:, ::z, ::y, ::x], oracle[name], atol=2e-6)


def _weight_rows(oracle: dict, plan: Tiling) -> Iterator[Row]:
    z, y, x = (size // 2 for size in plan.size)
    weight = plan.weight
    lines = {
        "weight_centre_line": weight[z, y],
        "weight_centre_lines": np.stack([weight[z, :, x], weight[z, y]]),
        "weight_z_line": weight[:, y, x],
        "weight_corner": weight[0, 0, 0],
    }
    for name, got in lines.items():
        if name in oracle:
            yield close(name, got, oracle[name], atol=DATA)


def tilings(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    shape = oracle["volume"].shape
    variant = "notebook" if "notebook" in path.stem else "centred" if "current" in path.stem else "clamped"
    plan = tiling(shape, variant)
    yield from _weight_rows(oracle, plan)
    if "padding" in oracle:
        before = np.asarray(plan.padding)
        yield exact("padding", before if oracle["padding"].ndim == 2 else before[:, 0], oracle["padding"])
    if "padded_shape" in oracle:
        yield exact("padded_shape", plan.padded_shape, tuple(oracle["padded_shape"]))
    if "windows_per_axis" in oracle:
        yield exact("windows_per_axis", [len(line) for line in plan.starts], oracle["windows_per_axis"])
    for axis, line in zip("zyx", plan.starts):
        if f"starts_{axis}" in oracle:
            yield exact(f"starts_{axis}", line, oracle[f"starts_{axis}"])
    if "window_starts" in oracle:
        yield exact("window_starts", plan.windows(), oracle["window_starts"])
    yield from _blended(oracle, plan)


def agreement(got: np.ndarray, want: np.ndarray) -> float:
    """Share of voxels whose label is the commonest partner of the oracle's label."""
    pairs, counts = np.unique(np.stack([want.ravel(), got.ravel()]), axis=1, return_counts=True)
    best = np.zeros(int(pairs[0].max()) + 1, np.int64)
    np.maximum.at(best, pairs[0], counts)
    return float(best.sum() / got.size)


def scores(labels: np.ndarray, segmentation: np.ndarray) -> tuple[float, float, float]:
    """Adapted Rand error, VOI split and merge."""
    table = contingency(segmentation, labels)
    voi = variation_of_information(table)
    return adapted_rand_skimage(table).error, voi.split, voi.merge


def postprocess(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    plain = oracle["affinity"].astype(np.float32) / np.float32(255)
    inner = oracle["foreground"].astype(np.float32) / np.float32(255)
    suffixes = sorted(name.removeprefix("fragments") for name in oracle if re.fullmatch(r"fragments(_[a-z]+)?", name))
    for suffix in (name for name in suffixes if name != "_per_slice"):
        values = plain if suffix else restricted(plain, inner)
        want = oracle[f"fragments{suffix}"]
        got = fragments(values)
        short = 1 - agreement(got, want.astype(np.uint32))
        yield bound(f"fragments{suffix}", short, 0.01, "unequal voxels")
        offsets = np.cumsum([0, *oracle[f"fragments_per_slice{suffix}"]])[:-1]
        largest = want.reshape(len(want), -1).max(1) - offsets
        yield exact(f"fragments_per_slice{suffix}", largest, oracle[f"fragments_per_slice{suffix}"])
        edges = boundary_edge_features(values, want.astype(np.uint32))
        yield exact(f"edges{suffix}", edges.uv, oracle[f"edges{suffix}"])
        yield close(f"edge_probability{suffix}", edges.probability, oracle[f"edge_probability{suffix}"], atol=DATA)
        yield close(f"edge_size{suffix}", edges.size, oracle[f"edge_size{suffix}"], atol=DATA)
        for name in oracle:
            if not re.fullmatch(rf"costs{suffix}_b[\d.]+", name):
                continue
            end = name.removeprefix("costs")
            settings = Settings(beta=float(end.rpartition("_b")[2]))
            costs = multicut_costs(edges.probability, edges.size, settings.beta)
            yield close(name, costs, oracle[name], atol=DATA)
            theirs = oracle[f"node_labels{end}"]
            yield close(
                f"energy{end}", multicut_energy(edges.uv, oracle[name], theirs), oracle[f"energy{end}"], atol=DATA
            )
            greedy = multicut(len(theirs), edges.uv, costs, refine=False)
            best = multicut(len(theirs), edges.uv, costs)
            for kind, found in (("energy_gaec", greedy), ("energy", best)):
                excess = multicut_energy(edges.uv, oracle[name], found) - float(oracle[f"{kind}{end}"])
                yield bound(f"{kind}{end} excess", excess, 1e-6, "energy above the reference")
            whole = foreground_multicut(plain, inner, dataclasses.replace(settings, restrict=not suffix))
            truth = oracle["labels"]
            for figure, mine in zip(("are", "vi_first", "vi_second"), scores(truth, whole)):
                difference = abs(mine - float(oracle[f"{figure}{end}"]))
                yield bound(f"{figure}{end} difference", difference, 0.02, "from the reference")
            figures = [float(oracle[f"{figure}{end}"]) for figure in ("are", "vi_first", "vi_second")]
            stored = scores(truth, oracle[f"segmentation{end}"].astype(np.uint32))
            yield close(f"scores of segmentation{end}", stored, figures, atol=1e-10)
            lut = partition(edges, int(want.max()), settings)
            given = scores(truth, lut[want])
            worst = max(abs(a - b) for a, b in zip(given, figures))
            yield bound(f"node_labels{end} scores", worst, 0.02, "from the reference")
    if "slice_index" in oracle:
        yield from _section(oracle, restricted(plain, inner))


def _section(oracle: dict, values: np.ndarray) -> Iterator[Row]:
    """Every stage of one section's watershed."""
    section = boundary(values)[int(oracle["slice_index"])]
    settings = Settings()
    distance = np.sqrt(squared_distance(section <= settings.threshold).astype(np.float32))
    smooth = _gaussian(distance, settings.sigma_seeds)
    scaled = (smooth - smooth.min()) / smooth.max()
    weights = _gaussian(section, settings.sigma_weights)
    height = np.float32(settings.alpha) * weights + np.float32(1 - settings.alpha) * (1 - scaled)
    peaks = (ndimage.maximum_filter(smooth, 3, mode="nearest") == smooth) & (smooth > smooth.min())
    stages = {"boundary": section, "distance": distance, "distance_smooth": smooth, "heightmap": height}
    for name, got in stages.items():
        yield close(f"slice_{name}", got, oracle[f"slice_{name}"], atol=1e-5)
    seeds = ndimage.label(peaks, np.ones((3, 3)))[0]
    yield exact("slice_seeds", _renumbered(seeds), _renumbered(oracle["slice_seeds"]))
    for name, least in (("watershed", 0), ("final", settings.min_size)):
        at = int(oracle["slice_index"])
        got = fragments(values[:, at : at + 1], dataclasses.replace(settings, min_size=least))
        short = 1 - agreement(got, oracle[f"slice_{name}"][None].astype(np.uint32))
        yield bound(f"slice_{name}", short, 0.01, "unequal voxels")


def _renumbered(labels: np.ndarray) -> np.ndarray:
    """Ids in raster order of their first voxel."""
    found, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.zeros(len(found), np.int64)
    positive = np.flatnonzero(found > 0)
    rank[positive[np.argsort(first[positive])]] = np.arange(1, len(positive) + 1)
    return rank[inverse].reshape(labels.shape)


def multicuts(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    for name in oracle:
        if not name.startswith("edges_"):
            continue
        number = name.removeprefix("edges_")
        uv, costs, nodes = oracle[name], oracle[f"costs_{number}"], int(oracle[f"nodes_{number}"])
        for kind, refine in (("_gaec", False), ("", True)):
            stored = multicut_energy(uv, costs, oracle[f"labels{kind}_{number}"])
            yield close(f"energy{kind}_{number} of the labels", stored, oracle[f"energy{kind}_{number}"], atol=DATA)
            found = multicut_energy(uv, costs, multicut(nodes, uv, costs, refine=refine))
            excess = found - float(oracle[f"energy{kind}_{number}"])
            yield bound(f"energy{kind}_{number} excess", excess, 1e-6, "energy above the reference")
        if f"optimum_{number}" in oracle:
            yield bound(f"optimum_{number}", float(oracle[f"optimum_{number}"]) - found, 1e-6, "below the optimum")


def waterz_variant(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    truth = load(path.with_name("postprocess.npz"))["labels"]
    values = oracle["affinity"].astype(np.float32) / np.float32(255)
    fragments, _ = superhuman_fragments(values)
    short = 1 - agreement(fragments, oracle["fragments"].astype(np.uint32))
    yield bound("fragments", short, 0.01, "unequal voxels")
    score = parse_score("hist_quant_50_initmax")
    given = oracle["fragments"].astype(np.uint32)
    graph = region_graph(values, given, score.statistics("waterz"))
    for name in oracle:
        if name.startswith("segmentation_"):
            threshold = name.removeprefix("segmentation_")
            # waterz with its discretised queue, as many bins as the histograms have.
            tree = agglomerate(graph, float(threshold), score=score, ties="waterz", discretize_queue=256)
            found = apply(tree.cut(float(threshold)), given)
            yield exact(name, _renumbered(found), _renumbered(oracle[name]))
            error = scores(truth, found)[0]
            yield close(f"are_{threshold}", error, oracle[f"are_{threshold}"], atol=DATA)


def metrics(path: pathlib.Path) -> Iterator[Row]:
    oracle = load(path)
    for name in oracle:
        if name.startswith("labels_"):
            number = name.removeprefix("labels_")
            table = contingency(oracle[f"prediction_{number}"], oracle[name])
            rand, voi = adapted_rand_skimage(table), variation_of_information(table)
            found = (rand.error, rand.precision, rand.recall)
            yield close(f"are_{number}", found, oracle[f"are_{number}"], atol=1e-10)
            yield close(f"vi_{number}", (voi.split, voi.merge), oracle[f"vi_{number}"], atol=1e-10)


CASES = {
    "manifest*.json": Case(manifest),
    "mnet_full*.npz": Case(mnet, slow=True),
    "mnet_pretrain_full*.npz": Case(mnet, slow=True),
    "mnet_*.npz": Case(mnet),
    "train_steps*.npz": Case(train_steps, slow=True),
    "optimizer*.npz": Case(optimizer),
    "affinity_targets*.npz": Case(affinity_targets),
    "losses*.npz": Case(losses),
    "hog*.npz": Case(hog),
    "gaussian_mask*.npz": Case(gaussian_mask),
    "mask_blocks*.npz": Case(mask_blocks),
    "frequency_mixing*.npz": Case(frequency_mixing),
    "mixing_*.npz": Case(mixing),
    "augmentations*.npz": Case(augmentations),
    "tiling*.npz": Case(tilings),
    "postprocess_waterz*.npz": Case(waterz_variant),
    "postprocess*.npz": Case(postprocess),
    "multicut*.npz": Case(multicuts),
    "metrics*.npz": Case(metrics),
}

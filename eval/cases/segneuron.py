"""Parity of SegNeuron: network, training steps, data functions, tilings, and the foreground-restricted multicut."""

import functools
import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from checks import Case, Row, close, exact, load, load_json, seeded_state
from emjax.errors import UserError
from emjax.models.functional import define
from emjax.models.mnet import Config, MNet, is_encoder
from emjax.weights.rules import leaves, parameter_count
from emjax.weights.segneuron import config_of, dead_heads, read_segneuron, write_segneuron

OUTPUT = 5e-4
FEATURE = 3e-3


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


CASES = {
    "manifest*.json": Case(manifest),
    "mnet_full*.npz": Case(mnet, slow=True),
    "mnet_pretrain_full*.npz": Case(mnet, slow=True),
    "mnet_*.npz": Case(mnet),
}

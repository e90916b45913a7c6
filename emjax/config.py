"""One experiment = one frozen, nested dataclass, returned by ``get_config(variant)`` of a Python file.

``load("configs/affinity_unet/fib25.py:cpu", ["optimizer.lr=3e-4"])`` reads and overrides it, :func:`to_json` and
:func:`from_json` store it in work directories and checkpoints.
"""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pathlib
import types
import typing
from typing import Any, Literal

from emjax.data.pipeline import Source
from emjax.errors import UserError, nearest
from emjax.systems.protocol import system_of

Triple = tuple[int, int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Where crops come from.

    Attributes:
        train, validation: volumes; validation crops are fixed, not augmented.
        crop: size of a training crop (z, y, x).
        batch_size: crops per step, over all processes and devices.
        augment: chain of augmentations (``emjax.data.augment``), in order.
        threads: reading and augmenting threads of each process.
        cache_gb: volumes are kept in memory up to this size.
        validation_batches: batches of ``batch_size`` fixed validation crops.
        transport: how grey values travel to the device, ``"uint8"`` (0..255) or ``"float32"`` (0..1).
        split_components: connected parts of a label crop become objects of their own.
        min_labelled: least labelled share of a crop; crops with less are drawn again.
    """

    train: tuple[Source, ...]
    validation: tuple[Source, ...] = ()
    crop: Triple = (32, 128, 128)
    batch_size: int = 2
    augment: tuple[Any, ...] = ()
    threads: int = 4
    cache_gb: float = 8.0
    validation_batches: int = 4
    transport: Literal["uint8", "float32"] = "uint8"
    split_components: bool = False
    min_labelled: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimiser, schedule, clipping.

    Attributes:
        name: ``"adamw"`` (decoupled decay), ``"adam"`` (decay added to the gradient, as PyTorch's Adam), ``"amsgrad"``
            (PyTorch's AMSGrad) or ``"sgd"`` (Nesterov momentum ``b1``).
        lr: rate at the end of the warm-up.
        schedule: ``"cosine"`` to ``final_lr``, ``"poly"`` (power ``power``), ``"poly_warm"`` (SegNeuron's: over
            ``decay_steps``, constant from there on), ``"epochs"`` (SAM4EM's: constant within epochs of ``epoch_steps``,
            whole epochs of warm-up, then a cosine), or ``"constant"``.
        decay_steps: length of the decay of ``"poly_warm"``; 0 for all steps.
        warmup_steps: linear from ``warmup_factor * lr``.
        epoch_steps: steps of an epoch of ``"epochs"``.
        late_epochs: every epoch has the rate of the one before, and the first one ``lr``, as SAM4EM's code does it.
        decay_norms: also decay scales and biases.
        clip_norm: largest global norm of the gradient; 0 switches clipping off.
        multipliers: (regular expression on the dotted path, factor) pairs; the first match scales a parameter's
            update, for layer-wise rates.
        holds: (regular expression on the dotted path, steps) pairs; the first match keeps a parameter as it is for that
            many steps, while its moments are gathered.
    """

    name: Literal["adamw", "adam", "amsgrad", "sgd"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "poly", "poly_warm", "epochs", "constant"] = "cosine"
    final_lr: float = 0.0
    power: float = 1.5
    decay_steps: int = 0
    warmup_steps: int = 100
    warmup_factor: float = 0.0
    epoch_steps: int = 100
    late_epochs: bool = False
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay_norms: bool = False
    clip_norm: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()
    holds: tuple[tuple[str, int], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Length and habits of a run.

    Attributes:
        steps: optimiser steps.
        accumulate: micro-batches per step; ``data.batch_size`` crops are split into that many.
        ema: decay of the averaged parameters used for validation and prediction; 0 switches it off.
        log_every, validate_every, save_every: steps; 0 switches validation off.
        keep_latest, keep_best: checkpoints kept.
        best: validation scalar that decides "best", the lowest wins.
        overlays: fixed validation crops drawn at each validation.
        profile: (first step, number of steps) traced with the JAX profiler; (0, 0) for none.
        most_skipped: consecutive steps with a non-finite loss or gradient that end the run.
        init_from: checkpoint directory whose parameters start the run (strictly the same model), or "".
    """

    steps: int = 1000
    accumulate: int = 1
    ema: float = 0.0
    log_every: int = 10
    validate_every: int = 200
    save_every: int = 200
    keep_latest: int = 2
    keep_best: int = 1
    best: str = "loss"
    overlays: int = 2
    profile: tuple[int, int] = (0, 0)
    most_skipped: int = 20
    init_from: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How work is laid over devices; the sizes multiply to the number of devices, -1 takes what is left.

    Attributes:
        data: the batch is split over this axis.
        model: parameters are split over this axis (and over ``data`` with ``fsdp``).
        space: blocks are split along ``space_axis`` ("z", "y" or "x") over this axis.
        fsdp: parameters and optimiser state larger than ``fsdp_min_size`` values are split over ``data`` and ``model``.
        rules: (regular expression, axis number or -1) pairs that go before the general rule; -1 keeps the parameter
            whole, an axis number splits that axis. The first match wins.
        cpu_devices: CPU devices to use where there is no accelerator; 0 takes one per core.
    """

    data: int = -1
    model: int = 1
    space: int = 1
    space_axis: Literal["z", "y", "x"] = "y"
    fsdp: bool = False
    fsdp_min_size: int = 65536
    rules: tuple[tuple[str, int], ...] = ()
    cpu_devices: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """All of a run. ``system`` is the ``Config`` of a module in ``emjax.systems``."""

    system: Any
    data: Data
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh = Mesh()
    seed: int = 0


def load(spec: str, overrides: typing.Sequence[str] = ()) -> Any:
    """The configuration of ``FILE.py[:variant]`` with ``path.to.field=value`` overrides applied.

    Raises ``UserError`` for a missing file, a file without ``get_config``, an unknown variant or field, or a value of
    another type.
    """
    name, _, variant = spec.partition(":")
    path = pathlib.Path(name)
    if not path.is_file():
        raise UserError(f"--config {name}: no such file")
    module_spec = importlib.util.spec_from_file_location(f"emjax_config_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config {name}: the file defines no get_config(variant)")
    config = module.get_config(variant)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--config.{text}: expected --config.{text}=VALUE")
        config = override(config, key, value)
    return config


def variant_error(variant: str, known: typing.Iterable[str]) -> UserError:
    """What a config file raises for a variant that it does not have."""
    known = list(known)
    return UserError(f"variant {variant!r} is unknown{nearest(variant, known)}; known: {', '.join(map(repr, known))}")


def override(config: Any, key: str, text: str) -> Any:
    """``config`` with the field at dotted path ``key`` (tuple elements by number) set to the parsed ``text``."""
    return _set(config, key.split("."), text, key)


def _set(node: Any, path: list[str], text: str, whole: str) -> Any:
    name, rest = path[0], path[1:]
    if isinstance(node, tuple):
        if not name.isdigit() or int(name) >= len(node):
            raise UserError(f"--config.{whole}: {name!r} is not an index below {len(node)}")
        index = int(name)
        value = _set(node[index], rest, text, whole) if rest else _parse(text, type(node[index]), whole)
        return (*node[:index], value, *node[index + 1 :])
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        raise UserError(f"--config.{whole}: there is nothing below {name!r}")
    fields = [field.name for field in dataclasses.fields(node)]
    if name not in fields:
        raise UserError(f"--config.{whole}: {type(node).__name__} has no field {name!r}{nearest(name, fields)}")
    if rest:
        return dataclasses.replace(node, **{name: _set(getattr(node, name), rest, text, whole)})
    value = _parse(text, typing.get_type_hints(type(node))[name], whole)
    return dataclasses.replace(node, **{name: value})


def _parse(text: str, kind: Any, where: str) -> Any:
    if kind is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return _fit(value, kind, where)


def _fit(value: Any, kind: Any, where: str) -> Any:
    """``value`` as ``kind``, or a ``UserError`` that says what was expected."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    wrong = UserError(f"--config.{where}: {value!r} is not {getattr(kind, '__name__', None) or kind}")
    if kind is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"--config.{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _fit(value, option, where)
            except UserError:
                continue
        raise wrong
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise wrong
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_fit(item, arguments[0], where) for item in value)
        if len(value) != len(arguments):
            raise UserError(f"--config.{where}: {value!r} has {len(value)} values, {len(arguments)} are expected")
        return tuple(_fit(item, item_kind, where) for item, item_kind in zip(value, arguments))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is type(None):
        kind = types.NoneType
    if inspect.isclass(kind) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise wrong
    return value


def to_json(config: Any) -> str:
    """The configuration as JSON; every dataclass carries its class, so that :func:`from_json` can rebuild it."""
    return json.dumps(_plain(config), indent=1)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}.{type(value).__qualname__}", **fields}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def from_json(text: str) -> Any:
    """The inverse of :func:`to_json`. Only classes of emjax are built; unknown fields are errors with a near name."""
    return _build(json.loads(text))


def _build(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_build(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "class" not in value:
        return {key: _build(item) for key, item in value.items()}
    module_name, _, class_name = value["class"].rpartition(".")
    if not module_name.startswith("emjax."):
        raise UserError(f"stored configuration: class {value['class']!r} is not one of emjax")
    kind = getattr(importlib.import_module(module_name), class_name, None)
    if not dataclasses.is_dataclass(kind):
        raise UserError(f"stored configuration: emjax {module_name} has no {class_name}; another version wrote it")
    known = [field.name for field in dataclasses.fields(kind)]
    fields = {name: _build(item) for name, item in value.items() if name != "class"}
    for name in fields:
        if name not in known:
            raise UserError(f"stored configuration: {class_name} has no field {name!r}{nearest(name, known)}")
    return kind(**fields)  # type: ignore[operator]


def validate(config: Experiment, device_count: int | None = None, process_count: int = 1) -> None:
    """Checks what can be checked before anything is read or compiled; raises ``UserError``."""
    system_of(config.system).validate(config.system)
    data, train = config.data, config.train
    if not data.train:
        raise UserError("data.train: no training volume given")
    if train.steps < 1 or train.accumulate < 1 or data.batch_size < 1:
        raise UserError("train.steps, train.accumulate and data.batch_size must be at least 1")
    if data.batch_size % (train.accumulate * process_count):
        raise UserError(
            f"data.batch_size {data.batch_size} is not divisible by train.accumulate {train.accumulate} "
            f"times {process_count} processes"
        )
    if device_count is not None:
        sizes = mesh_sizes(config.mesh, device_count)
        if (data.batch_size // train.accumulate) % sizes["data"]:
            raise UserError(
                f"data.batch_size {data.batch_size} / train.accumulate {train.accumulate} is not divisible by "
                f"the {sizes['data']} devices of mesh axis 'data'"
            )
        side = data.crop["zyx".index(config.mesh.space_axis)]
        if side % sizes["space"]:
            raise UserError(
                f"data.crop {data.crop}: {side} voxels along {config.mesh.space_axis} are not divisible by the "
                f"{sizes['space']} devices of mesh axis 'space'"
            )


def mesh_sizes(mesh: Mesh, device_count: int) -> dict[str, int]:
    """Sizes of the mesh axes for a number of devices; ``UserError`` if they do not multiply to it."""
    sizes = {"data": mesh.data, "model": mesh.model, "space": mesh.space}
    free = [name for name, size in sizes.items() if size == -1]
    known = 1
    for size in sizes.values():
        known *= 1 if size == -1 else size
    if len(free) > 1 or known < 1 or (device_count % known if free else device_count != known):
        raise UserError(f"mesh {sizes} does not fit {device_count} devices")
    for name in free:
        sizes[name] = device_count // known
    return sizes

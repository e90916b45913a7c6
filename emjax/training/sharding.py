"""How arrays are laid over devices: a mesh of axes data, model, space, and rules from parameter paths to axes."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import Mesh as DeviceMesh
from jax.sharding import PartitionSpec as P

from emjax.config import Mesh, mesh_sizes
from emjax.errors import UserError


def make_mesh(config: Mesh, devices: list[jax.Device] | None = None) -> DeviceMesh:
    """The device mesh; ``data`` is the outermost axis, so that each process holds whole rows of the batch."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def _largest_divisible(shape: tuple[int, ...], parts: int) -> int | None:
    fitting = [axis for axis, size in enumerate(shape) if size % parts == 0]
    return max(fitting, key=lambda axis: shape[axis], default=None)


def parameter_spec(config: Mesh, mesh: DeviceMesh, path: str, shape: tuple[int, ...]) -> P:
    """Where one parameter (or its moment) goes: the first rule that matches, then the general rule, else replicated."""
    axes = [name for name in ("data", "model") if mesh.shape[name] > 1 and (config.fsdp or name == "model")]
    parts = int(np.prod([mesh.shape[name] for name in axes])) if axes else 1
    if parts == 1:
        return P()
    for pattern, axis in config.rules:
        if re.search(pattern, path):
            if axis == -1:
                return P()
            if axis >= len(shape) or shape[axis] % parts:
                raise UserError(f"mesh.rules: {pattern!r} splits axis {axis} of {path} {shape} over {parts} devices")
            return P(*[tuple(axes) if index == axis else None for index in range(len(shape))])
    largest = _largest_divisible(shape, parts) if int(np.prod(shape)) >= config.fsdp_min_size else None
    return P() if largest is None else P(*[tuple(axes) if index == largest else None for index in range(len(shape))])


def dotted(path: tuple) -> str:
    """A JAX key path as text: ``params.down.0.kernel``."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def state_shardings(config: Mesh, mesh: DeviceMesh, state: Any) -> Any:
    """A sharding for every leaf of the training state; moments follow the parameters they belong to by their path."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, parameter_spec(config, mesh, dotted(path), leaf.shape)), state
    )


def batch_shardings(config: Mesh, mesh: DeviceMesh, batch: Mapping[str, Any]) -> dict[str, NamedSharding]:
    """The batch axis goes over ``data``; volumes (b, z, y, x, ...) are also split over ``space``."""
    axis = 1 + "zyx".index(config.space_axis)

    def sharding(shape: tuple[int, ...]) -> NamedSharding:
        spec: list[str | None] = ["data"] + [None] * (len(shape) - 1)
        if mesh.shape["space"] > 1 and len(shape) > axis:
            spec[axis] = "space"
        return NamedSharding(mesh, P(*spec))

    return {name: sharding(array.shape) for name, array in batch.items()}


def to_devices(batch: Mapping[str, np.ndarray], shardings: Mapping[str, NamedSharding], global_rows: int) -> dict:
    """This process's rows of a batch as global arrays."""
    return {
        name: jax.make_array_from_process_local_data(shardings[name], array, (global_rows, *array.shape[1:]))
        for name, array in batch.items()
    }

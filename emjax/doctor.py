"""What this installation can do: ``python -m emjax.doctor`` prints versions, devices, memory, storage, extras."""

import importlib.metadata
import importlib.util
import os
import platform
import sys

from emjax import __version__, cli

CORE = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy", "numba", "connectomics")
EXTRAS = {
    "cuda": (("jax-cuda13-plugin", "jax-cuda12-plugin"), "training and prediction on NVIDIA GPUs"),
    "tpu": (("libtpu",), "training and prediction on TPUs"),
    "dask": (("distributed",), "prediction over a Dask cluster"),
    "torch": (("torch",), "reading PyTorch checkpoints (.pt, .pth, .ckpt)"),
    "view": (("neuroglancer",), "showing arrays in Neuroglancer"),
}
# One store of each kind is opened on nothing: an unknown driver says so, a known one only misses its data.
STORES = ("file", "memory", "gcs", "s3", "http")
FORMATS = ("zarr", "zarr3", "n5", "neuroglancer_precomputed")


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def has_driver(kind: str, name: str) -> bool:
    """Whether TensorStore knows a key-value store or a format."""
    import tensorstore

    try:
        if kind == "store":
            tensorstore.KvStore.Spec({"driver": name})
        else:
            tensorstore.Spec({"driver": name, "kvstore": "memory://"})
    except ValueError as error:
        return "not registered" not in str(error)
    return True


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def memory() -> tuple[int, int]:
    """Bytes of memory of the machine: all, available now."""
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def report() -> tuple[list[str], list[str]]:
    """Lines of the report, and what is broken (missing extras are not)."""
    import jax

    problems = []
    total, free = memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [
        f"emjax {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"cores {cores}, memory {gibibytes(total)} ({gibibytes(free)} unused)",
        "",
        "packages",
    ]
    for name in CORE:
        version = installed(name)
        lines.append(f"  {name:<18}{version or 'MISSING'}")
        if version is None:
            problems.append(f"{name} is not installed: pip install -e .")
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        problems.append(f"Python {platform.python_version()} is not among 3.11 to 3.13")
    try:
        devices = jax.devices()
    except RuntimeError as error:
        devices = []
        problems.append(f"JAX finds no device: {' '.join(str(error).split())[:200]}")
    lines += ["", "devices"]
    for device in devices:
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        lines.append(
            f"  {device.platform} {device.id}: {device.device_kind}" + (f", {gibibytes(limit)}" if limit else "")
        )
    lines += ["", "storage"]
    for kind, names in (("format", FORMATS), ("store", STORES)):
        known = [name for name in names if has_driver(kind, name)]
        lines.append(f"  {kind + 's':<10}{', '.join(known)}")
        problems += [f"TensorStore lacks {kind} {name}" for name in names if name not in known]
    lines.append("  others    HDF5, TIFF, PNG, NumPy")
    lines += ["", "extras"]
    for extra, (distributions, use) in EXTRAS.items():
        found = [f"{name} {installed(name)}" for name in distributions if installed(name)]
        state = ", ".join(found) if found else f"missing: pip install 'emjax[{extra}]'"
        lines.append(f"  {extra:<7}{use:<48}{state}")
    return lines, problems


def main(arguments: list[str]) -> int:
    """Runs the command: 0 if all that is needed is there, 1 otherwise."""
    cli.parser("doctor", __doc__).parse_args(arguments)
    lines, problems = report()
    print("\n".join(lines))
    print()
    for problem in problems:
        print(f"problem: {problem}")
    if not problems:
        print("all that emjax needs is here")
    return cli.FAILED if problems else cli.DONE


if __name__ == "__main__":
    cli.run(main)

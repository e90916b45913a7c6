"""Shared set-up: compilation caches, eight host devices, and the place of the shared oracles and data."""

import os
import pathlib

_CACHE = pathlib.Path(__file__).resolve().parent.parent / ".cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("NUMBA_CACHE_DIR", str(_CACHE / "numba"))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compilation is most of the time of these tests, and half of it is optimisation that tiny networks do not need.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"

import pytest
from shared_folder import SHARED


def _folder(name: str) -> pathlib.Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; set EMJAX_SHARED to the folder that holds {name}/")
    return folder


@pytest.fixture(scope="session")
def oracles() -> pathlib.Path:
    """The folder of recorded reference outputs."""
    return _folder("oracles")


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real EM volumes."""
    return _folder("data")

"""Where PyTorch runs in a benchmark: on the same device as JAX. Needs the extra ``torch``."""

import jax
import torch


def device() -> str:
    """Its name for PyTorch. Asking starts JAX, so only after the benchmark has said which devices it wants."""
    return "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"


def finish() -> None:
    """Waits for PyTorch's device, which is given work and not waited for."""
    if device() == "cuda":
        torch.cuda.synchronize()

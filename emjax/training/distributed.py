"""Several processes: when to connect them, and how they agree to stop. The host's own cores and memory."""

import ctypes
import logging
import os
import signal
import threading

import jax

from emjax.errors import UserError

logger = logging.getLogger(__name__)

ADDRESS, COUNT, INDEX = "EMJAX_COORDINATOR", "EMJAX_PROCESS_COUNT", "EMJAX_PROCESS_INDEX"


def _in_cluster() -> bool:
    environment = os.environ
    slurm = int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_NODELIST" in environment
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return slurm or len([host for host in hosts if host]) > 1 or int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1


def connect() -> None:
    """Joins the processes of a run, where there are several.

    Either the three variables ``EMJAX_COORDINATOR`` (host:port), ``EMJAX_PROCESS_COUNT`` and ``EMJAX_PROCESS_INDEX``
    say so (``train/launch.py`` and the Kubernetes recipe set them), or JAX recognises a SLURM step, a TPU pod slice or
    Open MPI by itself. Raises ``UserError`` if only some of the variables are set.
    """
    given = [name for name in (ADDRESS, COUNT, INDEX) if os.environ.get(name)]
    if len(given) == 3:
        jax.distributed.initialize(os.environ[ADDRESS], int(os.environ[COUNT]), int(os.environ[INDEX]))
    elif given:
        missing = sorted({ADDRESS, COUNT, INDEX} - set(given))
        raise UserError(f"{', '.join(given)} set but not {', '.join(missing)}; set all three or none")
    elif _in_cluster():
        jax.distributed.initialize()


def use_cpu_devices(count: int, batch: int) -> None:
    """Splits the host into several CPU devices, one per core unless told otherwise, as far as ``batch`` divides.

    XLA's CPU convolutions run on one core each; data parallelism over cores is what uses the others. Without effect
    where an accelerator is the default, and where XLA_FLAGS already says how many.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    usable = count or max(number for number in range(1, cores + 1) if batch % number == 0)
    jax.config.update("jax_num_cpu_devices", usable)


def keep_freed_memory() -> None:
    """Keeps what is freed for the next step instead of handing it back, where the host itself is the device.

    XLA takes its temporaries anew for every step; glibc returns blocks that large to the system at once, and faulting
    their pages in again costs time, little on an idle machine and more beside other work (docs/performance.md). Without
    effect for accelerators and other C libraries.
    """
    if jax.default_backend() != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):
        return
    trim_threshold, mmap_max = -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)


class Stop:
    """Turns SIGTERM and SIGINT into a flag that all processes see at the same step."""

    def __init__(self):
        self._asked = threading.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                # JAX's own notifier takes SIGTERM where several processes run.
                if number == signal.SIGINT or jax.process_count() == 1:
                    signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        logger.warning("%s: finishing this step, then saving", signal.Signals(number).name)
        self._asked.set()
        # A second Ctrl-C stops at once.
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(self, step: int) -> bool:
        """Whether to stop after ``step``."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked.is_set()

"""Starts one training run as several processes of this machine (for a GPU each, or to try a multi-host run).

    python train/launch.py --processes 2 -- --config configs/smoke/affinity_unet.py --workdir runs/smoke

What follows ``--`` goes to ``python -m emjax.train``. The processes find each other by the variables
EMJAX_COORDINATOR, EMJAX_PROCESS_COUNT and EMJAX_PROCESS_INDEX, as they do in the Kubernetes recipe. If one
process fails the others are stopped; SIGTERM and Ctrl-C are passed on, and the same command resumes the run.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time


def free_port() -> int:
    """A port of the loop-back interface that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(processes: int, arguments: list[str]) -> int:
    """Runs ``python -m emjax.train arguments`` as several processes; the first failing exit code, or 0."""
    address = f"127.0.0.1:{free_port()}"
    running = []
    for index in range(processes):
        environment = os.environ | {
            "EMJAX_COORDINATOR": address,
            "EMJAX_PROCESS_COUNT": str(processes),
            "EMJAX_PROCESS_INDEX": str(index),
        }
        running.append(subprocess.Popen([sys.executable, "-m", "emjax.train", *arguments], env=environment))

    def pass_on(number: int, frame: object) -> None:
        for process in running:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, pass_on)
    while any(process.poll() is None for process in running):
        failed = [process for process in running if process.poll() not in (None, 0)]
        if failed:
            # The others would wait for it for ever; give them a moment to end by themselves.
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and any(process.poll() is None for process in running):
                time.sleep(0.2)
            for process in running:
                process.kill()
        time.sleep(0.2)
    return next((process.returncode for process in running if process.returncode), 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGUMENTS OF emjax.train")
    options = parser.parse_args()
    return launch(options.processes, [text for text in options.arguments if text != "--"])


if __name__ == "__main__":
    sys.exit(main())

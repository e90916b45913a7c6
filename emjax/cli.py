"""What all commands share: exit codes, one-line errors, and logging set-up."""

import argparse
import logging
import sys
from collections.abc import Callable

from emjax.errors import UserError

DONE, FAILED, WRONG_USE = 0, 1, 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see python -m {self.prog} --help)")


def parser(command: str, description: str) -> argparse.ArgumentParser:
    """An argument parser whose errors are :class:`UserError`, with ``--debug`` (shows tracebacks) built in."""
    made = _Parser(
        prog=f"emjax.{command}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def run(main: Callable[[list[str]], int | None], arguments: list[str] | None = None) -> None:
    """Runs a command and exits with 0 done, 1 failed work, 2 wrong use; errors are one line on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for chatty in ("jax", "orbax", "grain"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Orbax warns of a metadata file that it reads before it looks whether there is one.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        code = main(arguments) or DONE
    except UserError as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        code = WRONG_USE
    except KeyboardInterrupt:
        print("stopped by the user; the same command goes on from here", file=sys.stderr)
        code = FAILED
    except BrokenPipeError:
        code = FAILED
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(
            f"failed: {type(error).__name__}: {' '.join(str(error).split())[:500]} (--debug shows where)",
            file=sys.stderr,
        )
        code = FAILED
    sys.exit(code)

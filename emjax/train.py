"""Train a system: ``python -m emjax.train --config FILE.py[:variant] --workdir DIR``. The same command resumes."""

import logging
import pathlib

from emjax import cli
from emjax.config import Experiment, load, to_json
from emjax.errors import UserError
from emjax.training import distributed, loop

logger = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = cli.parser("train", __doc__)
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:variant with get_config(variant)")
    parser.add_argument("--workdir", type=pathlib.Path, help="where checkpoints and records go")
    parser.add_argument("--dry_run", action="store_true", help="compile, print parameters, operations and memory, stop")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
    # --config.path.to.field=value goes to the configuration, not to argparse.
    overrides = [text[len("--config.") :] for text in arguments if text.startswith("--config.")]
    options = parser.parse_args([text for text in arguments if not text.startswith("--config.")])
    config = load(options.config, overrides)
    if not isinstance(config, Experiment):
        raise UserError(f"--config {options.config}: get_config gives a {type(config).__name__}, not an Experiment")
    if options.print_config:
        print(to_json(config))
        return cli.DONE
    if options.workdir is None and not options.dry_run:
        raise UserError("--workdir is missing: where shall checkpoints and records go?")
    distributed.use_cpu_devices(config.mesh.cpu_devices, config.data.batch_size // max(config.train.accumulate, 1))
    distributed.connect()
    distributed.keep_freed_memory()
    if options.dry_run:
        loop.validate_run(config)
        compiled = loop.compile_step(config, loop.batch_shapes(config))
        print(loop.describe(config, compiled))
        return cli.DONE
    outcome = loop.run(config, options.workdir)
    if not outcome.finished:
        logger.warning("stopped at step %d; the same command goes on from here", outcome.step)
        return cli.FAILED
    logger.info("done: %d steps, in %s", outcome.step, options.workdir)
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)

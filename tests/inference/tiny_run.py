"""Runs a tiny prediction as a command does, for tests that kill it: ``tiny_run.py SLOW prediction options...``."""

import functools

from inference import tiny_systems

from emjax import cli
from emjax.inference.prediction import add_prediction_options, predict_volume


def main(arguments):
    parser = cli.parser("tiny", "a test")
    parser.add_argument("slow", type=float)
    parser.add_argument("--input")
    parser.add_argument("--output")
    add_prediction_options(parser)
    options = parser.parse_args(arguments)
    predict_volume(
        functools.partial(tiny_systems.load, slow=options.slow), options.input, options.output, options=options
    )


if __name__ == "__main__":
    cli.run(main)

"""``python -m emjax.predict``: a checkpoint and a volume become affinities (or what else the system predicts).

``--config.system.FIELD=VALUE`` changes a field of the configuration that the checkpoint was trained with, such as
``--config.system.plan.stride=...`` or ``--config.system.predicted=all``.
"""

import functools

from emjax import cli
from emjax.errors import UserError
from emjax.inference.prediction import add_prediction_options, predict_volume
from emjax.training.loading import load_system, trained_window


def main(arguments: list[str]) -> int:
    parser = cli.parser("predict", __doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="work directory of a training run")
    parser.add_argument("--input", required=True, metavar="VOLUME", help="image: .zarr, .h5:DATASET, .tif, gs://...")
    parser.add_argument(
        "--output", required=True, metavar="OUT.zarr", help="a killed run is resumed by the same command"
    )
    add_prediction_options(parser)
    overrides = tuple(text[len("--config.") :] for text in arguments if text.startswith("--config."))
    options = parser.parse_args([text for text in arguments if not text.startswith("--config.")])
    if options.batch < 0:
        raise UserError(f"--batch {options.batch}: expected at least 1")
    load = functools.partial(load_system, options.checkpoint, options.which, overrides)
    trained = trained_window(options.checkpoint, options.which)
    places, _ = predict_volume(load, options.input, options.output, options=options, trained=trained)
    for name, place in places.items():
        print(f"{name}: {place}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)

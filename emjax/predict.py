"""``python -m emjax.predict``: a checkpoint and a volume become affinities (or what else the system predicts)."""

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
    options = parser.parse_args(arguments)
    if options.batch < 0:
        raise UserError(f"--batch {options.batch}: expected at least 1")
    load = functools.partial(load_system, options.checkpoint, options.which)
    trained = trained_window(options.checkpoint, options.which)
    places, _ = predict_volume(load, options.input, options.output, options=options, trained=trained)
    for name, place in places.items():
        print(f"{name}: {place}")
    return cli.DONE


if __name__ == "__main__":
    cli.run(main)

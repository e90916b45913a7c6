"""The report page of an evaluation: what ``emjax.view.report`` draws, put together from numbers and volumes."""

import datetime
import os
import shlex
from collections.abc import Sequence
from typing import Any

from emjax import __version__
from emjax.inference.evaluation import DEFINITIONS, Evaluation
from emjax.view import neuroglancer, report

DEFAULT_PORT = 9000


def report_page(
    evaluation: Evaluation, numbers_: dict[str, Any], drawn: report.Drawn, named: dict[str, str], config: str = ""
) -> str:
    """The HTML report; ``named`` are the volumes by layer name, for the viewer."""
    scores, size = evaluation.scores, evaluation.voxel_size or (1.0, 1.0, 1.0)
    kinds = {"image": "image", "affinities": "affinities"}
    base = f"http://127.0.0.1:{DEFAULT_PORT}"
    layers = [
        neuroglancer.layer(name, f"precomputed://{base}/{layer_path(name)}", kinds.get(name, "segmentation"))
        for name in named
    ]

    def link_to(place: Sequence[int]) -> str:
        position = [p + 0.5 + o / s for p, o, s in zip(place, evaluation.offset, size)]
        return neuroglancer.link(neuroglancer.state(layers, size, position, drawn.segmentation.shape))

    joined = "Segments that join several objects, by their share of VOI merge. The segment is outlined in white."
    broken = "Objects that several segments share, by their share of VOI split. The object is outlined in white."
    groups = (
        ("Worst merges", "merges", "segment", "objects", joined),
        ("Worst splits", "splits", "object", "segments", broken),
    )
    serve = ["python", "-m", "emjax.view", "--port", str(DEFAULT_PORT)]
    serve += [
        f"{layer_path(name)}={os.path.abspath(spec) if '://' not in spec else spec}" for name, spec in named.items()
    ]
    return report.render(
        {
            "title": os.path.basename(named["segmentation"].rstrip("/")) or named["segmentation"],
            "truth_name": named["ground truth"],
            "shape": " x ".join(map(str, drawn.segmentation.shape)),
            "voxel_size": " x ".join(f"{v:g}" for v in evaluation.voxel_size) if evaluation.voxel_size else "",
            "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            "variant": evaluation.variant,
            "headline": [
                {"name": "VOI, bits", "value": f"{scores.voi_sum:.3f}"},
                {"name": "VOI split, bits", "value": f"{scores.voi_split:.3f}"},
                {"name": "VOI merge, bits", "value": f"{scores.voi_merge:.3f}"},
                {"name": "ARAND (scikit-image)", "value": f"{scores.arand_skimage:.3f}"},
                {"name": f"segments for {scores.objects} objects", "value": str(scores.segments)},
            ],
            "sections": report.section_rows(drawn),
            "curve": numbers_["curve"],
            "curve_svg": report.curve_svg(numbers_["curve"], evaluation.best.threshold if evaluation.best else None),
            "best": numbers_["best_threshold"],
            "errors": [
                {
                    "title": title,
                    "owner": owner,
                    "pieces": pieces,
                    "note": note,
                    "entries": numbers_[key],
                    "cards": report.error_cards(drawn, numbers_[key], key[:-1], link_to),
                }
                for title, key, owner, pieces, note in groups
            ],
            "score_rows": [
                {
                    "name": name,
                    "value": f"{value:.4f}" if isinstance(value, float) else f"{value}",
                    "definition": DEFINITIONS.get(name, ""),
                }
                for name, value in numbers_["scores"].items()
            ],
            "serve_command": shlex.join(serve),
            "neuroglancer_link": link_to([n // 2 for n in drawn.segmentation.shape]),
            "command": numbers_["command"],
            "facts": {
                **named,
                **{name: numbers_[name] for name in ("mask", "ignore") if numbers_[name]},
                "emjax": __version__,
            },
            "config": config,
        }
    )


def layer_path(name: str) -> str:
    """A layer's name in addresses."""
    return name.replace(" ", "_")

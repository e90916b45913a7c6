"""The report page of a semantic evaluation."""

import dataclasses
import datetime
import math
import os
from collections.abc import Mapping, Sequence

import numpy as np

from emjax import __version__
from emjax.data.volume import Volume
from emjax.inference.semantic import DEFINITIONS, SemanticClass, SemanticEvaluation
from emjax.view import overlay, report


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """A volume whose classes read as 1, 2, ... in order, all else as 0."""

    volume: Volume
    classes: Sequence[SemanticClass]
    truth: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.volume.shape

    def __getitem__(self, index: tuple[int, slice, slice]) -> np.ndarray:
        read = self.volume[index]
        made = np.zeros(read.shape, np.uint32)
        for number, one in enumerate(self.classes, 1):
            made[one.of_truth(read) if self.truth else one.of_prediction(read)] = number
        return made


def semantic_page(
    evaluation: SemanticEvaluation,
    classes: Sequence[SemanticClass],
    segmentation: Volume,
    labels: Volume,
    image: Volume | None,
    facts: Mapping[str, str],
    command: str,
) -> str:
    """The HTML report: one file that fetches nothing."""
    drawn = report.DrawnClasses(_Numbered(segmentation, classes, False), _Numbered(labels, classes, True), image)
    scores = evaluation.scores
    named = overlay.colours(np.arange(1, len(classes) + 1))
    return report.render(
        {
            "title": os.path.basename(segmentation.spec.rstrip("/")) or segmentation.spec,
            "truth_name": labels.spec,
            "shape": " x ".join(map(str, labels.shape)),
            "voxel_size": " x ".join(f"{value:g}" for value in evaluation.voxel_size),
            "date": datetime.datetime.now().strftime("%Y-%m-%d %H:%M"),
            "variant": evaluation.variant,
            "notes": evaluation.notes,
            "headline": [
                {"name": f"{name}, {label}", "value": f"{getattr(found, field):.3f}"}
                for name, found in scores.items()
                for label, field in (("IoU", "iou"), ("Dice", "dice"))
            ],
            "legend": [
                {"name": one.name, "colour": "#" + "".join(f"{channel:02x}" for channel in colour)}
                for one, colour in zip(classes, named)
            ],
            "sections": report.section_rows(drawn),
            "class_names": list(scores),
            "score_rows": [
                {
                    "name": field,
                    "values_": [_shown(getattr(found, field)) for found in scores.values()],
                    "definition": definition,
                }
                for field, definition in DEFINITIONS.items()
            ],
            "command": command,
            "facts": {**facts, "emjax": __version__},
        },
        "semantic.html",
    )


def _shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value}" if value >= 0 else "-"
    return f"{value:.4f}" if math.isfinite(value) else "inf" if math.isinf(value) else "-"

"""A model without the records of its run → the little that it says about itself."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pixelplay import __version__
from pixelplay.evaluation.intervals import wilson
from pixelplay.evaluation.selective import risk_coverage
from pixelplay.model.bundle import Bundle
from pixelplay.outputs.report.charts import Chart, risk_chart
from pixelplay.text import percent

HELD_OUT = {
    "oof": "photographs held out in turn while it was made",
    "val": "the validation part of its run",
}
MISSING = (
    "Figures of each class, the confusion matrix, mistakes, suspect labels and what was wrong with the "
    "photographs: they stand in the run's own folder, which pixelplay train or crossval has made. "
    "For figures on other labelled photographs: pixelplay evaluate MODEL LABELLED_PHOTOS."
)


@dataclass(frozen=True, kw_only=True)
class ModelPage:
    """What the template of a model alone needs."""

    title: str
    version: str
    verdict: str
    facts: Mapping[str, Any]
    priors: Mapping[str, float]
    chart: Chart
    missing: str


def make_model_page(bundle: Bundle, folder: str) -> ModelPage:
    """Tell what the bundle knows: its classes, how it decides, its held-out scores."""
    held_out = bundle.held_out
    right, n = int(held_out.is_right.sum()), len(held_out.is_right)
    accuracy = wilson(right, n)
    curve = risk_coverage(held_out.confidence, held_out.is_right.astype(bool))
    return ModelPage(
        title=_name(os.path.abspath(folder)),
        version=__version__,
        verdict=(
            f"Right on {percent(accuracy.value)} of {n:,} {HELD_OUT.get(held_out.part, 'photographs')} "
            f"(95 % interval {percent(accuracy.low)} to {percent(accuracy.high)}; they also chose, so "
            "slightly optimistic)."
        ),
        facts={
            "backbone": bundle.backbone.name,
            **bundle.made_by,
            "image size": f"{bundle.preprocessing.input_size} px",
            "different photographs learned from": f"{len(bundle.trained_on):,}",
            "temperature": f"{bundle.temperature:.3f}",
            "tau": f"{bundle.tau:.2g}",
            "decisions tuned for": bundle.metric,
        },
        priors={name: float(p) for name, p in zip(bundle.classes, bundle.priors, strict=True)},
        chart=risk_chart([{"coverage": c, "risk": r} for c, r in curve.points()]),
        missing=MISSING,
    )


def _name(folder: str) -> str:
    """What people call a model: the folder of the run that holds it, or its own."""
    name = os.path.basename(folder)
    return os.path.basename(os.path.dirname(folder)) or name if name == "model" else name

"""PixelPlay turns a folder of labelled images into an image classifier you can trust.

>>> import pixelplay
>>> report = pixelplay.train("photos", "runs/first")  # doctest: +SKIP
>>> predictions = pixelplay.Predictor("runs/first").predict("new_photos")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pixelplay.api import cross_validate, evaluate, explain, predict, train
    from pixelplay.config import (
        AugmentConfig,
        ComputeConfig,
        DataConfig,
        FinetuneConfig,
        TrainConfig,
        UncertaintyConfig,
        original_recipe,
    )
    from pixelplay.data.audit import Audit
    from pixelplay.data.dataset import ImageDataset
    from pixelplay.dataset_scan import scan
    from pixelplay.errors import (
        BundleError,
        ConfigError,
        DataError,
        ImageError,
        MissingExtraError,
        PixelPlayError,
    )
    from pixelplay.evaluation.evaluate import Evaluation
    from pixelplay.inference.explain import Explainer, Explanation
    from pixelplay.inference.predictor import EnsemblePredictor, Predictions, Predictor
    from pixelplay.outputs.crossval_report import CrossvalReport
    from pixelplay.outputs.evaluation_report import EvaluationReport
    from pixelplay.outputs.label_issues import LabelIssue, LabelIssueReport, read_label_issues
    from pixelplay.outputs.predictions_table import PredictionSummary
    from pixelplay.outputs.report.build import report
    from pixelplay.outputs.train_report import TrainReport

__all__ = [
    "Audit",
    "AugmentConfig",
    "BundleError",
    "ComputeConfig",
    "ConfigError",
    "CrossvalReport",
    "DataConfig",
    "DataError",
    "EnsemblePredictor",
    "Evaluation",
    "EvaluationReport",
    "Explainer",
    "Explanation",
    "FinetuneConfig",
    "ImageDataset",
    "ImageError",
    "LabelIssue",
    "LabelIssueReport",
    "MissingExtraError",
    "PixelPlayError",
    "PredictionSummary",
    "Predictions",
    "Predictor",
    "TrainConfig",
    "TrainReport",
    "UncertaintyConfig",
    "cross_validate",
    "evaluate",
    "explain",
    "original_recipe",
    "predict",
    "read_label_issues",
    "report",
    "scan",
    "train",
]

# imported on first use, so that `import pixelplay` and `pixelplay --help` load no PyTorch
_MODULES = {
    "api": ("cross_validate", "evaluate", "explain", "predict", "train"),
    "config": (
        "AugmentConfig",
        "ComputeConfig",
        "DataConfig",
        "FinetuneConfig",
        "TrainConfig",
        "UncertaintyConfig",
        "original_recipe",
    ),
    "data.audit": ("Audit",),
    "data.dataset": ("ImageDataset",),
    "dataset_scan": ("scan",),
    "errors": (
        "BundleError",
        "ConfigError",
        "DataError",
        "ImageError",
        "MissingExtraError",
        "PixelPlayError",
    ),
    "evaluation.evaluate": ("Evaluation",),
    "inference.explain": ("Explainer", "Explanation"),
    "inference.predictor": ("EnsemblePredictor", "Predictions", "Predictor"),
    "outputs.crossval_report": ("CrossvalReport",),
    "outputs.evaluation_report": ("EvaluationReport",),
    "outputs.label_issues": ("LabelIssue", "LabelIssueReport", "read_label_issues"),
    "outputs.predictions_table": ("PredictionSummary",),
    "outputs.report.build": ("report",),
    "outputs.train_report": ("TrainReport",),
}


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module 'pixelplay' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pixelplay.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

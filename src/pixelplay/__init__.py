"""PixelPlay turns a folder of labelled images into an image classifier you can trust.

>>> import pixelplay
>>> report = pixelplay.train("photos", "runs/first")  # doctest: +SKIP
>>> predictions = pixelplay.Predictor("runs/first").predict("new_photos")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pixelplay.api import cross_validate as cross_validate
    from pixelplay.api import evaluate as evaluate
    from pixelplay.api import explain as explain
    from pixelplay.api import predict as predict
    from pixelplay.api import train as train
    from pixelplay.config import AugmentConfig as AugmentConfig
    from pixelplay.config import ComputeConfig as ComputeConfig
    from pixelplay.config import DataConfig as DataConfig
    from pixelplay.config import FinetuneConfig as FinetuneConfig
    from pixelplay.config import TrainConfig as TrainConfig
    from pixelplay.config import UncertaintyConfig as UncertaintyConfig
    from pixelplay.config import original_recipe as original_recipe
    from pixelplay.data.audit import Audit as Audit
    from pixelplay.data.dataset import ImageDataset as ImageDataset
    from pixelplay.dataset_scan import scan as scan
    from pixelplay.errors import BundleError as BundleError
    from pixelplay.errors import ConfigError as ConfigError
    from pixelplay.errors import DataError as DataError
    from pixelplay.errors import ImageError as ImageError
    from pixelplay.errors import MissingExtraError as MissingExtraError
    from pixelplay.errors import PixelPlayError as PixelPlayError
    from pixelplay.evaluation.evaluate import Evaluation as Evaluation
    from pixelplay.exporting.export import ExportReport as ExportReport
    from pixelplay.exporting.export import check_export as check_export
    from pixelplay.exporting.export import export as export
    from pixelplay.exporting.parity import ParityReport as ParityReport
    from pixelplay.inference.explain import Explainer as Explainer
    from pixelplay.inference.explain import Explanation as Explanation
    from pixelplay.inference.predictor import EnsemblePredictor as EnsemblePredictor
    from pixelplay.inference.predictor import Predictions as Predictions
    from pixelplay.inference.predictor import Predictor as Predictor
    from pixelplay.outputs.corrected_table import CorrectedTable as CorrectedTable
    from pixelplay.outputs.corrected_table import export_corrected as export_corrected
    from pixelplay.outputs.evaluation_report import EvaluationReport as EvaluationReport
    from pixelplay.outputs.label_issues import LabelIssue as LabelIssue
    from pixelplay.outputs.label_issues import LabelIssueReport as LabelIssueReport
    from pixelplay.outputs.label_issues import read_label_issues as read_label_issues
    from pixelplay.outputs.metrics_json import RunReport as RunReport
    from pixelplay.outputs.predictions_table import PredictionSummary as PredictionSummary
    from pixelplay.outputs.report.build import report as report

# imported on first use, so that `import pixelplay` and `pixelplay --help` load no PyTorch
_MODULES = {
    "api": "cross_validate evaluate explain predict train",
    "config": "AugmentConfig ComputeConfig DataConfig FinetuneConfig TrainConfig UncertaintyConfig "
    "original_recipe",
    "data.audit": "Audit",
    "data.dataset": "ImageDataset",
    "dataset_scan": "scan",
    "errors": "BundleError ConfigError DataError ImageError MissingExtraError PixelPlayError",
    "evaluation.evaluate": "Evaluation",
    "exporting.export": "ExportReport check_export export",
    "exporting.parity": "ParityReport",
    "inference.explain": "Explainer Explanation",
    "inference.predictor": "EnsemblePredictor Predictions Predictor",
    "outputs.corrected_table": "CorrectedTable export_corrected",
    "outputs.evaluation_report": "EvaluationReport",
    "outputs.label_issues": "LabelIssue LabelIssueReport read_label_issues",
    "outputs.metrics_json": "RunReport",
    "outputs.predictions_table": "PredictionSummary",
    "outputs.report.build": "report",
}
__all__ = [name for names in _MODULES.values() for name in names.split()]


def __getattr__(name: str) -> Any:
    module = next((module for module, names in _MODULES.items() if name in names.split()), None)
    if module is None:
        raise AttributeError(f"module 'pixelplay' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"pixelplay.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)

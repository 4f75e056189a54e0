"""PixelPlay turns a folder of labelled images into an image classifier one can trust.

>>> import pixelplay
>>> report = pixelplay.train("photos", "runs/first")  # doctest: +SKIP
>>> predictions = pixelplay.Predictor("runs/first").predict("new_photos")  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# public name → module that defines it; imported on first use, so that `import pixelplay` is instant
_HOMES = {
    "AugmentConfig": "pixelplay.config",
    "BundleError": "pixelplay.errors",
    "UncertaintyConfig": "pixelplay.config",
    "ComputeConfig": "pixelplay.config",
    "ConfigError": "pixelplay.errors",
    "DataConfig": "pixelplay.config",
    "DataError": "pixelplay.errors",
    "FinetuneConfig": "pixelplay.config",
    "ImageError": "pixelplay.errors",
    "MissingExtraError": "pixelplay.errors",
    "PixelPlayError": "pixelplay.errors",
    "Predictions": "pixelplay.inference.predictor",
    "Predictor": "pixelplay.inference.predictor",
    "TrainConfig": "pixelplay.config",
    "cross_validate": "pixelplay.api",
    "evaluate": "pixelplay.api",
    "explain": "pixelplay.api",
    "original_recipe": "pixelplay.config",
    "predict": "pixelplay.api",
    "read_label_issues": "pixelplay.outputs.label_issues",
    "report": "pixelplay.outputs.report.build",
    "scan": "pixelplay.dataset_scan",
    "train": "pixelplay.api",
}

__all__ = [
    "AugmentConfig",
    "BundleError",
    "ComputeConfig",
    "ConfigError",
    "DataConfig",
    "DataError",
    "FinetuneConfig",
    "ImageError",
    "MissingExtraError",
    "PixelPlayError",
    "Predictions",
    "Predictor",
    "TrainConfig",
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
    from pixelplay.dataset_scan import scan
    from pixelplay.errors import (
        BundleError,
        ConfigError,
        DataError,
        ImageError,
        MissingExtraError,
        PixelPlayError,
    )
    from pixelplay.inference.predictor import Predictions, Predictor
    from pixelplay.outputs.label_issues import read_label_issues
    from pixelplay.outputs.report.build import report


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pixelplay' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

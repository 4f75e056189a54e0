"""Prediction sets and abstention for predictions."""

from dataclasses import replace

import numpy as np

from pixelplay.config import UncertaintyConfig
from pixelplay.errors import DataError
from pixelplay.evaluation.conformal import HeldOutScores, fit_conformal_threshold, prediction_sets
from pixelplay.evaluation.selective import fit_confidence_threshold
from pixelplay.inference.predictor import Predictions
from pixelplay.text import percent


class Uncertainty:
    """Adds prediction sets and abstention, with thresholds from held-out images.

    An ensemble has no scores of held-out images. `notes` has a sentence about the basis of each threshold.

    Raises:
        DataError: too few held-out images for a requested coverage or accuracy.
    """

    def __init__(self, config: UncertaintyConfig, held_out: HeldOutScores | None) -> None:
        self._method = config.conformal_score
        self._set_threshold: float | None = None
        self._min_confidence = config.min_confidence
        self.notes: list[str] = []
        if held_out is None:
            requested = {"coverage": config.coverage, "target_accuracy": config.target_accuracy}
            if names := [name for name, value in requested.items() if value is not None]:
                raise DataError(
                    f"{names[0]} needs scores of held-out images, which ensembles and models with another "
                    "--tta than in training do not have; remove --ensemble-with and --tta"
                )
            return
        if config.coverage is not None:
            scores = held_out.lac if config.conformal_score == "lac" else held_out.aps
            self._set_threshold = fit_conformal_threshold(scores, config.coverage)
            self.notes.append(f"prediction sets are based on {_describe(held_out)}")
        if config.target_accuracy is not None:
            self._min_confidence, coverage, accuracy, bound = fit_confidence_threshold(
                held_out.confidence, held_out.is_right, config.target_accuracy
            )
            self.notes.append(
                f"the model abstains below a probability of {self._min_confidence:.3f}: above it are "
                f"{percent(coverage)} of the held-out images with accuracy {accuracy:.3f} (at least "
                f"{bound:.3f} with 95 % confidence), based on {_describe(held_out)}"
            )

    def apply(self, predictions: Predictions) -> Predictions:
        """Return predictions with `abstained` and `sets` as configured."""
        probs, pred = predictions.probs, predictions.pred
        abstained = sets = None
        if self._min_confidence is not None:
            confidence = probs[np.arange(len(pred)), np.maximum(pred, 0)]
            abstained = (pred < 0) | ~(confidence >= self._min_confidence)
        if self._set_threshold is not None:
            sets = prediction_sets(probs, self._set_threshold, self._method)
        return replace(predictions, abstained=abstained, sets=sets)


def _describe(held_out: HeldOutScores) -> str:
    """Describe the held-out images and their limits."""
    limits = {
        "oof": "predicted by the classifiers of their folds",
        "val": "also used to choose the epoch and the temperature",
    }[held_out.split]
    return (
        f"{len(held_out.lac):,} held-out images, {limits}; the guarantee is approximate and holds only for "
        "images like these"
    )

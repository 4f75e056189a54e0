"""Predictions → what they say about their own worth."""

from dataclasses import replace

import numpy as np

from pixelplay.config import UncertaintyConfig
from pixelplay.errors import DataError
from pixelplay.evaluation.conformal import HeldOutScores, fit_threshold, prediction_sets
from pixelplay.evaluation.selective import fit_confidence_threshold
from pixelplay.inference.predictor import Predictions


class Uncertainty:
    """Decides which predictions are answers, and which classes stand beside them.

    Args:
        config: what is asked for.
        held_out: the model's scores of images that it had not learned from; None where there are
            none, as of several models together.

    Attributes:
        notes: what rests on what, one sentence each.

    Raises:
        DataError: the held-out images cannot support what is asked for.
    """

    def __init__(self, config: UncertaintyConfig, held_out: HeldOutScores | None) -> None:
        self._method = config.conformal_score
        self._set_threshold: float | None = None
        self._cut = config.min_confidence
        self.notes: list[str] = []
        if held_out is None:
            asked = {"coverage": config.coverage, "target_accuracy": config.target_accuracy}
            if names := [name for name, value in asked.items() if value is not None]:
                raise DataError(
                    f"{names[0]} rests on held-out images, and several models together, or other views "
                    "than a model was learned with, have none; leave --ensemble-with and --tta out"
                )
            return
        if config.coverage is not None:
            self._set_threshold = fit_threshold(held_out.set_scores(config.conformal_score), config.coverage)
            self.notes.append(f"prediction sets rest on {_basis(held_out)}")
        if config.target_accuracy is not None:
            threshold, coverage, accuracy, bound = fit_confidence_threshold(
                held_out.confidence, held_out.is_right, config.target_accuracy
            )
            self._cut = threshold
            self.notes.append(
                f"answers from a probability of {threshold:.3f}: {coverage:.1%} of the held-out "
                f"images, {accuracy:.3f} of them right, at least {bound:.3f} with 95 % "
                f"confidence, by {_basis(held_out)}"
            )

    def apply(self, predictions: Predictions) -> Predictions:
        """Add what was asked for."""
        probs, pred = predictions.probs, predictions.pred
        answered = sets = None
        if self._cut is not None:
            rows = np.arange(len(pred))
            answered = (pred >= 0) & (probs[rows, np.maximum(pred, 0)] >= self._cut)
        if self._set_threshold is not None:
            sets = prediction_sets(probs, self._set_threshold, self._method)
        return replace(predictions, answered=answered, sets=sets)


def _basis(held_out: HeldOutScores) -> str:
    """What a promise rests on, and how far it goes."""
    why = {
        "oof": "they were predicted by the classifiers of their folds",
        "val": "they have also chosen the epoch and the temperature",
    }[held_out.split]
    return (
        f"{len(held_out.lac)} held-out images, approximately, for {why}; "
        "for images unlike those it promises nothing"
    )

"""Two answers to the same photographs → which is better, and how sure that is."""

from dataclasses import dataclass

import numpy as np

from pixelplay.config import Metric
from pixelplay.evaluation.intervals import IntArray, bootstrap_weights
from pixelplay.evaluation.weighted import LABEL_METRICS, count_labels

N_RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of two answers, photograph by photograph.

    Attributes:
        values: of the first and of the second.
        standard_error: of their difference, by bootstrap of groups.
    """

    values: tuple[float, float]
    standard_error: float

    @property
    def difference(self) -> float:
        """The second less the first."""
        return self.values[1] - self.values[0]


def compare_preds(
    preds: tuple[IntArray, IntArray],
    labels: IntArray,
    groups: IntArray,
    n_classes: int,
    *,
    metric: Metric,
    seed: int,
) -> Comparison:
    """Compare predicted classes on the same images.

    Args:
        preds: (N,) each, below K.
        labels: (N,) in [0, K).
        groups: (N,) equal for images that are not independent.
        n_classes: K.
        seed: of the bootstrap.
    """
    measure = LABEL_METRICS[metric]
    first, second = (float(measure(count_labels(pred, labels, n_classes))) for pred in preds)
    samples = []
    for times in bootstrap_weights(groups, len(labels), N_RESAMPLES, seed):
        drawn = [measure(count_labels(pred, labels, n_classes, times)) for pred in preds]
        samples.append(drawn[1] - drawn[0])
    return Comparison(values=(first, second), standard_error=float(np.std(np.concatenate(samples), ddof=1)))

"""Feature weights: how much each group of features counts in the linear probe, by empirical Bayes."""

from collections.abc import Mapping

import numpy as np

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.model.classifier import feature_scale

ROUNDS = 10  # of the fixed point; later ones change held-out NLL by less than 0.1 %
MAX_IMAGES = 1000  # the time grows with their cube
MIN_NOISE = 1e-6  # variance; features that fit all labels exactly would make the covariance singular
PRIOR_DOF = 10.0  # effective parameters of the common variance; pulls the weights together on few images


def fit_group_weights(
    features: Float32Array, labels: IntArray, groups: Mapping[str, slice], seed: int
) -> dict[str, float]:
    """Fit the prior variance of the coefficients of each feature group, relative to their mean.

    The centred one-hot labels are modelled as y = Σ_g X_g b_g + noise with b_g ~ N(0, w_g). Each variance w_g
    is the squared norm of its coefficients divided by their effective number (MacKay's fixed point), pulled
    towards the variance that all groups share. The weighted features have the total variance of the equally
    weighted ones, so C means the same for both.

    Args:
        features: (N, D).
        labels: (N,) in [0, K).
        groups: name → columns; together all D.
        seed: draws MAX_IMAGES of more images.

    Source: MacKay, "Bayesian interpolation", Neural Computation 4 (1992), section 4.
    """
    mean, scale = feature_scale(features)
    kept = np.random.default_rng(seed).permutation(len(labels))[:MAX_IMAGES]
    rows, labels = (features[kept] - mean) / scale, labels[kept]
    n, n_contrasts = len(labels), int(labels.max())  # K − 1
    onehot = np.eye(n_contrasts + 1)[labels]
    onehot -= onehot.mean(0)  # (n, K)
    grams = [(rows[:, columns] @ rows[:, columns].T).astype(np.float64) for columns in groups.values()]
    traces = np.array([np.trace(gram) for gram in grams])  # (G,)
    if (traces > 0).sum() < 2:
        return dict.fromkeys(groups, 1.0)
    noise = (onehot**2).sum() / n / n_contrasts / 2  # at first half of the variance of the labels
    w = np.full(len(grams), noise * n / traces.sum())  # and half from the features, equally weighted
    for _ in range(ROUNDS):
        precision = np.linalg.inv(
            sum(each * gram for each, gram in zip(w, grams, strict=True)) + noise * np.eye(n)
        )
        sums = precision.sum(0)
        precision -= np.outer(sums, sums) / sums.sum()  # the mean of the labels is free
        dual = precision @ onehot  # (n, K)
        norms = w**2 * np.array([(dual * (gram @ dual)).sum() for gram in grams])  # (G,) of the coefficients
        dof = w * np.array([(precision * gram).sum() for gram in grams]) * n_contrasts  # (G,)
        w = (norms + PRIOR_DOF * norms.sum() / dof.sum()) / (dof + PRIOR_DOF)
        noise *= (dual**2).sum() / (np.trace(precision) * n_contrasts)
        noise = max(noise, MIN_NOISE)
    w *= traces.sum() / (w @ traces)
    return {name: float(value) for name, value in zip(groups, w, strict=True)}


def column_factors(groups: Mapping[str, slice], weights: Mapping[str, float]) -> Float32Array:
    """Return the factor (D,) on each scaled feature: the square root of the weight of its group."""
    widths = [columns.stop - columns.start for columns in groups.values()]
    return np.repeat(np.sqrt([weights[name] for name in groups]), widths).astype(np.float32)

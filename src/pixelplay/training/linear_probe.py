"""Linear probe: frozen features → logistic regression, C selected by cross-validation."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from pixelplay.array_types import BoolArray, Float32Array, Float64Array, IntArray
from pixelplay.data.splits import NEVER_HELD_OUT
from pixelplay.evaluation.calibration import log_softmax
from pixelplay.model.classifier import LinearHead, feature_scale

# Inverse regularisation strengths, strongest regularisation first: the search stops once NLL has risen twice.
C_GRID = tuple(float(f"{10 ** (exponent / 2):.2g}") for exponent in range(-6, 5))
MAX_RISES = 2
MAX_ITERATIONS = 1000
# Relative decrease of the objective at which L-BFGS stops. The search only has to rank values of C. At the
# selected one the final head is within 1e-3 of scikit-learn's probabilities; the heads of the folds,
# which take most of the time, are within a few hundredths where features outnumber images.
SEARCH_TOLERANCE = 1e-4
FOLDS_TOLERANCE = 1e-7
TOLERANCE = 1e-8
MIN_EIGENVALUE = 1e-7  # relative to the largest; smaller ones are rounding errors in float32
MIN_VARIANCE = 1e-3  # of a class indicator, times K: the start may fit its images exactly
MIN_SOFT_C, SOFT_STEP = 1e-6, 10**0.25  # values of C that `fit_softer_head` tries, smallest first
# Heads of all folds with more weights than this are fitted one by one, which bounds the memory, and two folds
# select C, which bounds the time: 1,000 classes with 2 images each would take ten minutes.
MANY_WEIGHTS = 2_000_000
N_SEARCH_FOLDS = 2
MEMORY = 5  # corrections kept by L-BFGS; with more, the solver takes longer than the objective

Weighting = Literal["none", "class_weights"]


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """A fitted linear head and the evidence for its settings."""

    head: LinearHead  # fitted on all images; its logits have natural priors
    factors: Float32Array | None  # (D,) on the scaled features; None for 1
    C: float  # inverse regularisation strength as in scikit-learn, on scaled features
    nll_by_C: dict[float, float]  # C → mean out-of-fold NLL in the search, nats, weighted as in the fit
    oof_logits: Float32Array  # (N, K) from the head fitted without the image; NaN where there is none
    weighting: Weighting = "none"
    evidence: Mapping[str, Any] = field(default_factory=dict)  # JSON-ready reasons for the weighting
    feature_evidence: Mapping[str, Any] = field(default_factory=dict)  # the same for `factors`
    seconds: float = 0.0  # that the fit took

    @property
    def was_compared(self) -> bool:
        """True if held-out images selected the weighting."""
        return "difference" in self.evidence


def fit_probe(
    features: Float32Array,
    labels: IntArray,
    folds: IntArray,
    *,
    factors: Float32Array | None = None,
    weights: Float32Array | None = None,
    oof_tolerance: float = FOLDS_TOLERANCE,
    on_progress: Callable[[int], object] = lambda n: None,
) -> LinearProbe:
    """Select C by out-of-fold NLL, then fit once on all images.

    Args:
        features: (N, D), finite.
        labels: (N,) in [0, K), every class present outside every fold.
        folds: (N,) fold in which an image is held out, -1 for never.
        factors: (D,) on the scaled features (see `column_factors`).
        weights: (N,) positive, for the fits and the NLL; only ratios matter, so C means the same as without.
        oof_tolerance: SEARCH_TOLERANCE saves most of the time where `oof_logits` need not be precise.
        on_progress: called with 1 for each value of C tried.
    """
    scaled = _Scaled(features, factors)
    # divided by the largest, equal weights are exactly 1: bit-identical to a fit without weights
    image_weights = np.ones(len(labels)) if weights is None else weights.astype(np.float64) / weights.max()
    shares = _fold_masks(folds) * image_weights[:, None]  # (N, F)
    searched = folds_to_search(features, labels, folds)
    search_shares = _fold_masks(searched) * image_weights[:, None]  # (N, S)
    nll_by_C: dict[float, float] = {}
    heads: Float32Array | None = None
    for C in C_GRID:
        # a warm start: from one C to the next the heads change little
        heads = _fit_heads(scaled.rows, labels, search_shares, C, heads, SEARCH_TOLERANCE)  # (S, D+1, K)
        held_out = _predict_held_out(scaled.rows, heads, searched)
        nll_by_C[C] = out_of_fold_nll(held_out, labels, searched, image_weights)
        on_progress(1)
        if nll_by_C[C] == min(nll_by_C.values()):
            best_heads = heads
        nlls = list(nll_by_C.values())
        if len(nlls) > MAX_RISES and min(nlls[-MAX_RISES:]) > min(nlls[:-MAX_RISES]):
            break
    C = min(nll_by_C, key=lambda c: nll_by_C[c])
    if (n := len(best_heads)) < shares.shape[1]:
        # from zero: the other heads were fitted on images that these hold out
        rest = _fit_heads(scaled.rows, labels, shares[:, n:], C, None, SEARCH_TOLERANCE)
        best_heads = np.concatenate([best_heads, rest])
    elif oof_tolerance < SEARCH_TOLERANCE:
        best_heads = _fit_heads(scaled.rows, labels, shares, C, best_heads, oof_tolerance)
    oof = _predict_held_out(scaled.rows, best_heads, folds)
    start = best_heads.mean(0, keepdims=True)  # (1, D+1, K)
    final = _fit_heads(scaled.rows, labels, image_weights[:, None], C, start, TOLERANCE)[0]  # (D+1, K)
    return LinearProbe(head=scaled.undo(final), factors=factors, C=C, nll_by_C=nll_by_C, oof_logits=oof)


def fit_head(
    features: Float32Array,
    labels: IntArray,
    C: float,
    *,
    factors: Float32Array | None = None,
    weights: Float32Array | None = None,
) -> LinearHead:
    """Fit a head with a known C; the arguments are those of `fit_probe`."""
    scaled = _Scaled(features, factors)
    shares = np.ones(len(labels)) if weights is None else weights.astype(np.float64) / weights.max()
    return scaled.undo(_fit_heads(scaled.rows, labels, shares[:, None], C, None, TOLERANCE)[0])


def fit_softer_head(
    features: Float32Array,
    labels: IntArray,
    probe: LinearProbe,
    *,
    weights: Float32Array | None = None,
) -> LinearHead:
    """Fit a head that is as uncertain of the images it is fitted on as a probe is of new ones.

    C is the largest, up to the probe's, at which the NLL in the sample is not below the probe's out of fold.

    Args:
        features: (N, D).
        labels: (N,) in [0, K).
        weights: (N,) as in `fit_probe`.
    """
    scaled, C = _Scaled(features, probe.factors), MIN_SOFT_C
    image_weights = np.ones(len(labels)) if weights is None else weights.astype(np.float64) / weights.max()
    in_sample = np.zeros(len(labels), np.int64)  # each image is predicted by the head fitted on all
    head: Float32Array | None = None
    while True:
        softer, C = head, min(SOFT_STEP * C, probe.C)
        head = _fit_heads(
            scaled.rows, labels, image_weights[:, None], C, softer, SEARCH_TOLERANCE
        )  # (1, D+1, K)
        logits = _predict_held_out(scaled.rows, head, in_sample)
        if out_of_fold_nll(logits, labels, in_sample, image_weights) < probe.nll_by_C[probe.C]:
            return scaled.undo((head if softer is None else softer)[0])
        if C == probe.C:
            return scaled.undo(head[0])


def fit_subset(
    features: Float32Array,
    labels: IntArray,
    folds: IntArray,
    C: float,
    is_fitted: BoolArray,
    *,
    factors: Float32Array | None = None,
    weights: Float32Array | None = None,
) -> Float32Array:
    """Return out-of-fold logits (N, K) of heads with a known C, fitted on a subset of the rows.

    Args:
        is_fitted: (N,) rows to fit on. The other arguments are those of `fit_probe`; a class may be missing
            outside a fold.
    """
    scaled, masks = _Scaled(features, factors), _fold_masks(folds)
    image_weights = np.ones(len(labels)) if weights is None else weights.astype(np.float64) / weights.max()
    shares = (masks & is_fitted[:, None]) * image_weights[:, None]  # (N, F)
    return _predict_held_out(
        scaled.rows, _fit_heads(scaled.rows, labels, shares, C, None, SEARCH_TOLERANCE), folds
    )


def folds_to_search(features: Float32Array, labels: IntArray, folds: IntArray) -> IntArray:
    """Return the folds (N,) by which settings are selected: of many classes only some, the others −1."""
    n_weights = min(features.shape) * (int(labels.max()) + 1) * (int(folds.max()) + 1)
    return folds if n_weights <= MANY_WEIGHTS else np.where(folds < N_SEARCH_FOLDS, folds, NEVER_HELD_OUT)


def _fold_masks(folds: IntArray) -> BoolArray:
    """Return the rows (N, F) outside each fold."""
    return np.stack([folds != fold for fold in range(int(folds.max()) + 1)], axis=1)


class _Scaled:
    """Standardised features with a column of ones, and the inverse transform of a head.

    The scale uses no labels, so held-out rows may contribute to it. With more features than images the rows
    are rotated into their own span, which changes no inner product: the fit is the same and takes less time.
    """

    def __init__(self, features: Float32Array, factors: Float32Array | None) -> None:
        self._mean, self._scale = feature_scale(features)  # (D,) each
        if factors is not None:
            self._scale = self._scale / factors
        rows = (features - self._mean) / self._scale  # (N, D)
        self._basis: Float32Array | None = None
        if len(rows) < rows.shape[1]:
            values, vectors = np.linalg.eigh((rows @ rows.T).astype(np.float64))
            kept = values > values[-1] * MIN_EIGENVALUE
            lengths = np.sqrt(values[kept])  # (R,)
            self._basis = rows.T @ (vectors[:, kept] / lengths).astype(np.float32)  # (D, R)
            rows = (vectors[:, kept] * lengths).astype(np.float32)  # (N, R)
        self.rows = np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1)

    def undo(self, head: Float32Array) -> LinearHead:
        """Turn a head (R+1, K) on the rows into a head on raw features."""
        scaled = head[:-1] if self._basis is None else self._basis @ head[:-1]  # (D, K)
        weight = scaled.T.astype(np.float64) / self._scale  # (K, D)
        bias = head[-1] - weight @ self._mean  # (K,)
        return LinearHead(weight=weight.astype(np.float32), bias=bias.astype(np.float32))


def _fit_heads(
    rows: Float32Array,
    labels: IntArray,
    shares: Float64Array,
    C: float,
    start: Float32Array | None,
    tolerance: float,
) -> Float32Array:
    """Fit F logistic regressions on subsets of the same rows in one optimisation.

    For each subset the objective is C times the sum of its negative log-likelihoods, with weights scaled
    to mean 1, plus half the squared norm of the head, as in scikit-learn's LogisticRegression (the bias
    is not regularised). Sharing every pass over the rows makes five folds take a quarter of the time of
    five fits. Each variable is divided by the root of its approximate second derivative.

    Args:
        rows: (N, D+1) scaled features and a column of ones.
        shares: (N, F) >= 0, weight of each row in each regression; 0 leaves the row out.
        start: (F, D+1, K) initial heads; None for zeros.

    Returns:
        (F, D+1, K) float32; the last row holds the biases.
    """
    from scipy.optimize import minimize

    n_classes = int(labels.max()) + 1
    if shares.shape[1] > 1 and shares.shape[1] * rows.shape[1] * n_classes > MANY_WEIGHTS:
        heads = [
            _fit_heads(rows, labels, share, C, None if start is None else start[[i]], tolerance)
            for i, share in enumerate(np.split(shares, shares.shape[1], axis=1))
        ]
        return np.concatenate(heads)
    shape = (shares.shape[1], rows.shape[1], n_classes)  # (F, D+1, K)
    # scikit-learn's two-class model has one weight vector, the difference of our two
    strength = (2.0 if n_classes == 2 else 1.0) / (C * (shares > 0).sum(0))  # (F,)
    shrink = np.repeat(strength[:, None], rows.shape[1], axis=1)[:, :, None]  # (F, D+1, 1)
    shrink[:, -1] = 0
    each = np.arange(len(labels))
    share = (shares / shares.sum(0)).astype(np.float32)[:, :, None]  # (N, F, 1)
    first = np.zeros(shape) if start is None else start.astype(np.float64)
    curvature = np.einsum("nd,nd->d", rows, rows)[:, None] / len(rows)  # (D+1, 1), times p(1 − p):
    root = np.sqrt(curvature * _mean_variance(rows, first[0]) + shrink)  # (F, D+1, 1)

    def objective(flat: Float64Array) -> tuple[float, Float64Array]:
        heads = flat.reshape(shape) / root
        wide = heads.astype(np.float32).swapaxes(0, 1).reshape(shape[1], -1)  # (D+1, F*K)
        log_probs = log_softmax((rows @ wide).reshape(-1, shape[0], n_classes))  # (N, F, K)
        loss = -float((log_probs[each, :, labels] * share[:, :, 0]).sum(dtype=np.float64))
        residual = np.exp(log_probs, out=log_probs)  # (N, F, K)
        residual[each, :, labels] -= 1
        residual *= share
        gradient = rows.T @ residual.reshape(len(rows), -1)  # (D+1, F*K)
        pull = shrink * heads  # (F, D+1, K)
        loss += float((pull * heads).sum()) / 2
        total = gradient.reshape(shape[1], shape[0], n_classes).swapaxes(0, 1) + pull
        return loss, (total / root).ravel()

    limits = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "maxcor": MEMORY}
    options = {"ftol": tolerance, "gtol": 1e-8, **limits}
    found = minimize(objective, (first * root).ravel(), jac=True, method="L-BFGS-B", options=options)
    return np.asarray(found.x.reshape(shape) / root, dtype=np.float32)


def _mean_variance(rows: Float32Array, head: Float64Array) -> float:
    """Return the mean of p(1 − p) over rows (N, D+1) and classes under a head (D+1, K)."""
    probs: Float32Array = np.exp(log_softmax(rows @ head.astype(np.float32)))  # (N, K)
    return float(max(np.mean(probs * (1 - probs)), MIN_VARIANCE / head.shape[1]))


def _predict_held_out(rows: Float32Array, heads: Float32Array, folds: IntArray) -> Float32Array:
    """Return logits (N, K) of each row from the head fitted without it; NaN for fold -1."""
    oof = np.full((len(rows), heads.shape[2]), np.nan, np.float32)
    for fold, head in enumerate(heads):
        oof[folds == fold] = rows[folds == fold] @ head
    return oof


def out_of_fold_nll(
    oof: Float32Array, labels: IntArray, folds: IntArray, weights: Float32Array | Float64Array | None
) -> float:
    """Return the weighted mean NLL, nats, of the rows (N, K) that a fold held out."""
    held_out = folds != NEVER_HELD_OUT
    log_probs = log_softmax(oof[held_out].astype(np.float64))
    true = log_probs[np.arange(len(log_probs)), labels[held_out]]  # (n,)
    return float(-np.average(true, weights=np.ones(len(true)) if weights is None else weights[held_out]))

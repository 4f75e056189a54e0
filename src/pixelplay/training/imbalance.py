"""Class imbalance with frozen features: fit the plain or the class-weighted linear probe.

With frozen features, a convex loss and an unregularised bias, the usual corrections coincide. Balanced
softmax and the logit-adjusted loss only shift the bias of the plain fit, which natural priors undo.
Weighted sampling, class weights and classifier re-training fit the same weighted loss. That leaves two
candidates, the plain and the class-weighted head, both with natural-prior logits.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from pixelplay.array_types import BoolArray, Float32Array, Float64Array, IntArray
from pixelplay.config import Imbalance, TrainConfig
from pixelplay.data.sampling import HINT_RATIO, class_priors, class_weights, imbalance_ratio, natural_offset
from pixelplay.data.splits import assign_folds, check_any_held_out
from pixelplay.evaluation.comparison import N_RESAMPLES
from pixelplay.evaluation.decision_rule import compare_logits
from pixelplay.model.classifier import LinearHead
from pixelplay.training.feature_weights import column_factors, fit_group_weights
from pixelplay.training.linear_probe import (
    FOLDS_TOLERANCE,
    SEARCH_TOLERANCE,
    LinearProbe,
    Weighting,
    fit_head,
    fit_probe,
    fit_softer_head,
    fit_subset,
    folds_to_search,
    out_of_fold_nll,
)
from pixelplay.training.run_context import RunContext
from pixelplay.training.training_data import TrainingData


def fit_probe_for_imbalance(
    features: Float32Array,
    labels: IntArray,
    groups: IntArray,
    folds: IntArray,
    config: TrainConfig,
    *,
    feature_groups: Mapping[str, slice] | None = None,
    head_only: bool = False,
    on_progress: Callable[[int], object] = lambda n: None,
) -> LinearProbe:
    """Fit the linear probe with weighted feature groups and what `config.imbalance` implies.

    Feature weights are used if they lower the out-of-fold NLL at the C that was selected with them.

    With auto and a class ratio above 5:1, the class-weighted probe is selected if the metric of its
    decisions is better out of fold by more than one standard error of the paired difference.

    Args:
        groups: (N,) resampled as a whole by the bootstrap behind the standard error.
        feature_groups: name → columns of the features; None weights all features equally.
        head_only: `oof_logits` only serve for selection, so they may be imprecise.
        on_progress: as in `fit_probe`, like the other arguments.
    """
    start, counts = time.monotonic(), np.bincount(labels)
    ratio, tolerance = imbalance_ratio(counts), SEARCH_TOLERANCE if head_only else FOLDS_TOLERANCE
    evidence: dict[str, Any] = {"requested": config.imbalance, "ratio": ratio}
    factors, group_weights = None, {}
    if feature_groups:
        group_weights = fit_group_weights(features, labels, feature_groups, config.seed)
        factors = column_factors(feature_groups, group_weights)

    def fit(weighting: Weighting) -> LinearProbe:
        weights, offset = _weights_and_offset(weighting, labels, counts)
        search = partial(fit_probe, features, labels, folds, weights=weights, oof_tolerance=tolerance)
        probe, nlls = search(factors=factors, on_progress=on_progress), {}
        if factors is not None:
            everything, searched = np.ones(len(labels), np.bool_), folds_to_search(features, labels, folds)
            equal = fit_subset(features, labels, searched, probe.C, everything, weights=weights)
            nlls["by_group"] = probe.nll_by_C[probe.C]
            nlls["equal"] = out_of_fold_nll(equal, labels, searched, weights)
            if nlls["equal"] < nlls["by_group"]:
                probe = search(on_progress=on_progress)
        value = "equal" if probe.factors is None else "by_group"
        return replace(
            probe,
            head=probe.head.shifted(offset),
            oof_logits=(probe.oof_logits + offset).astype(np.float32),  # (N, K)
            weighting=weighting,
            feature_evidence={"value": value, "nll_by_value": nlls, "weights": group_weights},
        )

    if config.imbalance == "auto" and ratio > HINT_RATIO:
        plain, weighted = fit("none"), fit("class_weights")
        evidence |= _compare(plain, weighted, labels, groups, config)
        probe = weighted if evidence["difference"] > evidence["standard_error"] else plain
    else:
        is_weighted = config.imbalance in ("sampler", "class_weights")
        probe = fit("class_weights" if is_weighted else "none")
    evidence = {"value": probe.weighting, **evidence}
    return replace(probe, evidence=evidence, seconds=time.monotonic() - start)


def fit_probe_on_rows(
    data: TrainingData, rows: IntArray, ctx: RunContext, *, head_only: bool = False, title: str
) -> tuple[LinearProbe, IntArray]:
    """Fit the linear probe on some images; also return the fold (n,) in which each was held out.

    Raises:
        DataError: no image can be held out.
    """
    labels, groups, config = data.labels[rows], data.split.groups[rows], ctx.config
    folds = assign_folds(labels, groups, config.n_folds, config.seed)
    check_any_held_out(folds, data.dataset.source)
    with ctx.log.progress(title, None, "values of C") as bar:
        fit = partial(
            fit_probe_for_imbalance,
            feature_groups=data.feature_groups,
            head_only=head_only,
            on_progress=bar.update,
        )
        return fit(data.features[rows], labels, groups, folds, config), folds


def note_on_imbalance(imbalance: Imbalance) -> str | None:
    """Explain what an imbalance setting means for a linear probe; None where it means what it says."""
    if imbalance == "focal":
        return "--imbalance focal is ignored with --finetune none: it needs trained layers"
    if imbalance in ("balanced_softmax", "logit_adjusted"):
        return (
            f"--imbalance {imbalance} has no effect with --finetune none; use --metric to favour rare classes"
        )
    if imbalance == "sampler":
        return f"--imbalance {imbalance} is class_weights with --finetune none"
    return None


def refit_probe_head(probe: LinearProbe, features: Float32Array, labels: IntArray) -> LinearHead:
    """Fit a probe's head on other images with the same C, feature weights and weighting."""
    weights, offset = _weights_and_offset(probe.weighting, labels, np.bincount(labels))
    return fit_head(features, labels, probe.C, factors=probe.factors, weights=weights).shifted(offset)


def fit_initial_head(probe: LinearProbe, features: Float32Array, labels: IntArray) -> LinearHead:
    """Fit the natural-prior head that fine-tuning of some images starts from; see `fit_softer_head`."""
    weights, offset = _weights_and_offset(probe.weighting, labels, np.bincount(labels))
    return fit_softer_head(features, labels, probe, weights=weights).shifted(offset)


def fit_probe_on_subset(
    weighting: Weighting,
    features: Float32Array,
    labels: IntArray,
    folds: IntArray,
    C: float,
    is_fitted: BoolArray,
    factors: Float32Array | None = None,
) -> Float32Array:
    """Return natural-prior out-of-fold logits (N, K) of probes fitted on a subset (N,) of the rows."""
    weights, offset = _weights_and_offset(weighting, labels, np.bincount(labels[is_fitted]))
    logits = fit_subset(features, labels, folds, C, is_fitted, factors=factors, weights=weights)
    return np.asarray(logits + offset, dtype=np.float32)


def _weights_and_offset(
    weighting: Weighting, labels: IntArray, counts: IntArray
) -> tuple[Float32Array | None, Float64Array]:
    """Return the sample weights (N,) of a fit, and what gives its logits natural priors, (K,).

    The offset is right for every fold too: whatever its class sizes n, log n − log(weight·n) is the same.
    """
    if weighting == "none":
        return None, np.zeros(len(counts))
    return class_weights(counts)[labels].astype(np.float32), natural_offset(counts, weighting, None, 0.0)


def _compare(
    plain: LinearProbe, weighted: LinearProbe, labels: IntArray, groups: IntArray, config: TrainConfig
) -> dict[str, Any]:
    """Compare the out-of-fold decisions of both weightings."""
    priors = class_priors(np.bincount(labels))
    held_out = ~np.isnan(plain.oof_logits).any(1)
    labels, groups = labels[held_out], groups[held_out]
    logits = plain.oof_logits[held_out], weighted.oof_logits[held_out]
    values, standard_error = compare_logits(
        logits, labels, groups, priors, metric=config.metric, seed=config.seed
    )
    return {
        "metric": config.metric,
        "metric_by_value": dict(zip(("none", "class_weights"), values, strict=True)),
        "difference": values[1] - values[0],
        "standard_error": standard_error,
        "n": len(labels),
        "n_resamples": N_RESAMPLES,
    }

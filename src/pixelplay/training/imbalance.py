"""Frozen features with unequal classes → the head that serves the declared metric best.

With frozen features, a convex loss and a free bias, ways of helping rare classes coincide. Balanced
Softmax and the logit-adjusted loss only shift the bias of the natural fit, which natural priors take
back. Sampling, class weights and classifier re-training fit the same weighted loss. So there are two
candidates: the natural and the class-weighted head, both made to answer with natural priors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from pixelplay.arrays import BoolArray, Float32Array, IntArray
from pixelplay.config import Imbalance, Metric, TrainConfig
from pixelplay.data.sampling import HINT_RATIO, class_priors, class_weights, imbalance_ratio, natural_offset
from pixelplay.evaluation.comparison import N_RESAMPLES
from pixelplay.evaluation.decision_rule import compare_logits
from pixelplay.model.classifier import LinearHead
from pixelplay.training.linear_probe import (
    FOLDS_TOLERANCE,
    SEARCH_TOLERANCE,
    ProbeFit,
    fit_head,
    fit_probe,
    fit_subset,
)

Candidate = Literal["none", "class_weights"]
CANDIDATE_OF: dict[Imbalance, Candidate] = {
    "auto": "none",  # where classes are even enough that nothing is compared
    "none": "none",
    "balanced_softmax": "none",
    "logit_adjusted": "none",
    "focal": "none",
    "sampler": "class_weights",
    "class_weights": "class_weights",
    "crt": "class_weights",
}
SHIFT_NOTE = (
    "imbalance={} changes nothing on frozen features: it shifts logits, and probabilities that keep the "
    "data's frequencies take that back; how far decisions lean towards rare classes is for --metric to say"
)
SAME_NOTE = "imbalance={} on frozen features is class_weights"
NOTES: dict[Imbalance, str] = {
    "focal": "imbalance={} needs trained layers; on frozen features the head is fitted without it",
    "balanced_softmax": SHIFT_NOTE,
    "logit_adjusted": SHIFT_NOTE,
    "sampler": SAME_NOTE,
    "crt": SAME_NOTE,
}


@dataclass(frozen=True, kw_only=True)
class ImbalanceProbe:
    """A fitted head with natural priors, and why it is this one.

    Attributes:
        probe: its head and `oof_logits` have natural priors, however they were fitted.
        imbalance: which candidate it is.
        evidence: plain values for metrics.json: what was asked, what was chosen, what that rests on.
        notes: what the user must know.
        seconds: that it took.
    """

    probe: ProbeFit
    imbalance: Candidate
    evidence: dict[str, Any]
    notes: list[str]
    seconds: float

    @property
    def was_compared(self) -> bool:
        """Whether held-out images had a say."""
        return "difference" in self.evidence


def fit_probe_for_imbalance(
    features: Float32Array,
    labels: IntArray,
    groups: IntArray,
    folds: IntArray,
    config: TrainConfig,
    *,
    head_only: bool = False,
    on_progress: Callable[[int], object] = lambda n: None,
) -> ImbalanceProbe:
    """Fit the candidate that is asked for, or with auto the one that is better out of fold.

    Up to 5:1 auto is the natural fit. Above it, the class-weighted one is taken where the declared
    metric of its decisions is better by more than one standard error of the paired difference.

    Args:
        features: (N, D) finite.
        labels: (N,) in [0, K), every class present outside every fold.
        groups: (N,) what the bootstrap behind the standard error keeps together.
        folds: (N,) fold in which an image is held out, -1 for never.
        is_head_only: `oof_logits` are only to choose by, so they may be coarse.
        on_progress: called with 1 for each strength tried, of either candidate.
    """
    start, ratio = time.monotonic(), imbalance_ratio(np.bincount(labels))
    tolerance = SEARCH_TOLERANCE if head_only else FOLDS_TOLERANCE
    evidence: dict[str, Any] = {"asked": config.imbalance, "ratio": ratio}
    if config.imbalance == "auto" and ratio > HINT_RATIO:
        probes: dict[Candidate, ProbeFit] = {
            name: _fit_candidate(name, features, labels, folds, tolerance, on_progress)
            for name in ("none", "class_weights")
        }
        evidence |= _compare(probes, labels, groups, config.metric, config.seed)
        is_better = evidence["difference"] > evidence["standard_error"]
        chosen: Candidate = "class_weights" if is_better else "none"
        probe = probes[chosen]
    else:
        chosen = CANDIDATE_OF[config.imbalance]
        probe = _fit_candidate(chosen, features, labels, folds, tolerance, on_progress)
    notes = [NOTES[config.imbalance].format(config.imbalance)] if config.imbalance in NOTES else []
    return ImbalanceProbe(
        probe=probe,
        imbalance=chosen,
        evidence={"value": chosen, **evidence},
        notes=notes,
        seconds=time.monotonic() - start,
    )


def refit_probe_head(fair: ImbalanceProbe, features: Float32Array, labels: IntArray) -> LinearHead:
    """Fit a probe's head on other images, the same candidate at the same strength."""
    if fair.imbalance == "none":
        return fit_head(features, labels, fair.probe.C)
    counts = np.bincount(labels)
    weights = class_weights(counts)[labels].astype(np.float32)  # (N,)
    head = fit_head(features, labels, fair.probe.C, weights=weights)
    return head.shifted(natural_offset(counts, fair.imbalance, None, 0.0))


def fit_probe_on_subset(
    imbalance: Candidate,
    features: Float32Array,
    labels: IntArray,
    folds: IntArray,
    C: float,
    learns: BoolArray,
) -> Float32Array:
    """Natural-prior logits (N, K) out of fold, of a candidate that learned from some rows (N,) only."""
    if imbalance == "none":
        return fit_subset(features, labels, folds, C, learns)
    counts = np.bincount(labels[learns])
    weights = class_weights(counts)[labels].astype(np.float32)  # (N,)
    logits = fit_subset(features, labels, folds, C, learns, weights=weights)
    return np.asarray(logits + natural_offset(counts, imbalance, None, 0.0), dtype=np.float32)


def _fit_candidate(
    name: Candidate,
    features: Float32Array,
    labels: IntArray,
    folds: IntArray,
    oof_tolerance: float,
    on_progress: Callable[[int], object],
) -> ProbeFit:
    """Fit one candidate and give its logits natural priors."""
    if name == "none":
        return fit_probe(features, labels, folds, oof_tolerance=oof_tolerance, on_progress=on_progress)
    counts = np.bincount(labels)
    weights = class_weights(counts)[labels].astype(np.float32)  # (N,)
    probe = fit_probe(
        features, labels, folds, weights=weights, oof_tolerance=oof_tolerance, on_progress=on_progress
    )
    # right for every fold too: whatever its class sizes n, log n − log(weight·n) is the same
    offset = natural_offset(counts, name, None, 0.0)  # (K,)
    oof_logits = (probe.oof_logits + offset).astype(np.float32)  # (N, K)
    return replace(probe, head=probe.head.shifted(offset), oof_logits=oof_logits)


def _compare(
    probes: dict[Candidate, ProbeFit], labels: IntArray, groups: IntArray, metric: Metric, seed: int
) -> dict[str, Any]:
    """Measure out-of-fold decisions of both candidates."""
    priors = class_priors(np.bincount(labels))
    held_out = ~np.isnan(probes["none"].oof_logits).any(1)
    labels, groups = labels[held_out], groups[held_out]
    logits = probes["none"].oof_logits[held_out], probes["class_weights"].oof_logits[held_out]
    found = compare_logits(logits, labels, groups, priors, metric=metric, seed=seed)
    return {
        "metric": metric,
        "metric_by_value": dict(zip(("none", "class_weights"), found.values, strict=True)),
        "difference": found.difference,
        "standard_error": found.standard_error,
        "n": len(labels),
        "n_resamples": N_RESAMPLES,
    }

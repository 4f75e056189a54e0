"""Tests of the plain and the class-weighted linear probe."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch.nn.functional import one_hot

from pixelplay.config import Imbalance, Metric, TrainConfig
from pixelplay.data.sampling import class_priors, class_weights, natural_offset
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.evaluation.metrics import label_metric
from pixelplay.model.classifier import feature_scale
from pixelplay.training.imbalance import fit_probe_for_imbalance, note_on_imbalance
from pixelplay.training.linear_probe import LinearProbe, fit_probe
from pixelplay.training.losses import make_loss

Data = tuple[NDArray[np.float32], NDArray[np.int64]]
METRICS: list[Metric] = ["accuracy", "balanced_accuracy", "macro_f1"]


def draw_gaussians(sizes: list[int], n_features: int = 2, gap: float = 2.0, seed: int = 0) -> Data:
    """Draw classes shifted along the first feature, for which a linear head is optimal."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    features = rng.normal(size=(len(labels), n_features))
    features[:, 0] += gap * labels
    return features.astype(np.float32), labels


def draw_outliers() -> Data:
    """Draw two classes, 50:1, where 1 % of the large one are outliers on the far side of the rare one.

    The plain fit follows the outliers and gives up the feature that separates the rare class from the
    other 99 %; with class weights they matter little.
    """
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [4000, 80])
    features = rng.normal(size=(len(labels), 2))
    features[labels == 1] += [3, 0.5]
    features[:40, 0] += 15
    return features.astype(np.float32), labels


def draw_folds(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    folds = np.empty(len(labels), np.int64)
    for k in np.unique(labels):
        rows = np.flatnonzero(labels == k)
        folds[rng.permutation(rows)] = np.arange(len(rows)) % 5
    return folds


def fit(data: Data, **settings: Any) -> LinearProbe:
    features, labels = data
    return fit_probe_for_imbalance(
        features, labels, np.arange(len(labels)), draw_folds(labels), TrainConfig(**settings)
    )


@pytest.mark.parametrize("imbalance", ["none", "class_weights"])
def test_plain_and_class_weights_fits_give_true_posterior_at_ratio_50(imbalance: Imbalance) -> None:
    counts = np.array([10_000, 200])
    data = draw_gaussians(counts.tolist())
    true = 1 / (1 + 50 * np.exp(-2 * (data[0][:, 0].astype(np.float64) - 1)))  # of the rare class
    found = fit(data, imbalance=imbalance)
    for logits in (found.head.logits(data[0]), found.oof_logits):
        assert np.abs(softmax(logits, axis=1)[:, 1] - true).mean() < 0.003
    assert found.weighting == imbalance
    if imbalance == "class_weights":
        without = found.oof_logits - natural_offset(counts, "class_weights", None, 1.0)
        assert np.abs(softmax(without, axis=1)[:, 1] - true).mean() > 0.1


def test_class_weights_fit_has_natural_priors() -> None:
    features, labels = draw_gaussians([120, 10, 30], n_features=5)
    counts = np.bincount(labels)
    weights = class_weights(counts)[labels].astype(np.float32)
    plain = fit_probe(features, labels, draw_folds(labels), weights=weights)
    found = fit((features, labels), imbalance="class_weights")
    offset = natural_offset(counts, "class_weights", None, 1.0)
    assert found.C == plain.C
    np.testing.assert_array_equal(found.head.weight, plain.head.weight)
    np.testing.assert_allclose(found.head.bias, plain.head.bias + offset, rtol=1e-5)
    np.testing.assert_allclose(found.oof_logits, plain.oof_logits + offset, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("imbalance", "equivalent"),
    [
        ("balanced_softmax", "none"),
        ("logit_adjusted", "none"),
        ("focal", "none"),
        ("sampler", "class_weights"),
    ],
)
def test_equivalent_imbalance_methods_give_the_same_probe(
    imbalance: Imbalance, equivalent: Imbalance
) -> None:
    data = draw_gaussians([120, 10], n_features=5)
    found, expected = fit(data, imbalance=imbalance), fit(data, imbalance=equivalent)
    np.testing.assert_array_equal(found.head.weight, expected.head.weight)
    np.testing.assert_array_equal(found.head.bias, expected.head.bias)
    assert found.weighting == equivalent
    assert found.evidence == {"value": equivalent, "requested": imbalance, "ratio": 12.0}
    assert f"--imbalance {imbalance} " in (note_on_imbalance(imbalance) or "")
    assert note_on_imbalance(equivalent) is None


def test_balanced_softmax_on_frozen_features_equals_plain_fit() -> None:
    # minimising its own loss gives the same probabilities
    features, labels = draw_gaussians([120, 10, 30], n_features=4)
    counts, probe = np.bincount(labels), fit((features, labels), imbalance="none")
    mean, scale = feature_scale(features)
    rows = torch.from_numpy((features - mean) / scale)
    weight, bias = torch.zeros(4, 3, requires_grad=True), torch.zeros(3, requires_grad=True)
    loss = make_loss("balanced_softmax", counts, logit_tau=1.0, focal_gamma=0.0, label_smoothing=0.0)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-7, tolerance_change=1e-10)

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        pull = weight.square().sum() / (2 * probe.C * len(labels))
        value = loss(rows @ weight + bias, one_hot(torch.from_numpy(labels), 3)) + pull
        value.backward()
        return value

    optimizer.step(objective)
    with torch.no_grad():
        fitted = (rows @ weight + bias).numpy()
    natural = fitted + natural_offset(counts, "balanced_softmax", None, 1.0)
    np.testing.assert_allclose(
        softmax(natural, axis=1), softmax(probe.head.logits(features), axis=1), atol=2e-3
    )


@pytest.mark.parametrize("metric", METRICS)
def test_auto_imbalance_keeps_plain_fit_without_clear_gain(metric: Metric) -> None:
    # the two are equally good here, and chance exceeds one standard error in a sixth of the draws
    found = [fit(draw_gaussians([300, 30], n_features=5, seed=seed), metric=metric) for seed in range(24)]
    assert sum(probe.weighting == "none" for probe in found) >= 16
    for probe in found:
        is_better = probe.evidence["difference"] > probe.evidence["standard_error"]
        assert probe.weighting == ("class_weights" if is_better else "none")


def test_auto_imbalance_selects_class_weights_with_clear_gain() -> None:
    data = draw_outliers()
    found = fit(data, metric="balanced_accuracy")
    assert found.weighting == "class_weights"
    assert found.evidence["difference"] > 3 * found.evidence["standard_error"]
    expected = fit(data, metric="balanced_accuracy", imbalance="class_weights")
    np.testing.assert_array_equal(found.head.bias, expected.head.bias)
    np.testing.assert_array_equal(found.oof_logits, expected.oof_logits)


def test_auto_imbalance_uses_the_declared_metric() -> None:
    # on the same images class weights lower accuracy
    found = fit(draw_outliers(), metric="accuracy")
    assert found.weighting == "none"
    assert found.evidence["difference"] < -found.evidence["standard_error"]
    assert found.evidence["metric"] == "accuracy"


def test_auto_imbalance_does_not_compare_up_to_ratio_5() -> None:
    data = draw_gaussians([100, 20])
    found = fit(data)
    assert found.evidence == {"value": "none", "requested": "auto", "ratio": 5.0}
    np.testing.assert_array_equal(found.oof_logits, fit(data, imbalance="none").oof_logits)


@pytest.mark.parametrize("metric", METRICS)
def test_imbalance_evidence_is_the_out_of_fold_metric(metric: Metric) -> None:
    data = draw_gaussians([300, 20, 60], n_features=6, gap=1.0)
    labels, evidence = data[1], fit(data, metric=metric, seed=3).evidence
    values = {}
    for name in ("none", "class_weights"):
        logits = fit(data, imbalance=name).oof_logits
        priors = class_priors(np.bincount(labels))
        rule = fit_decision_rule(logits, labels, np.arange(len(labels)), priors, metric=metric, seed=3)
        values[name] = label_metric(metric, rule.apply(logits)[1], labels)
    assert evidence["metric_by_value"] == pytest.approx(values)
    assert evidence["difference"] == pytest.approx(values["class_weights"] - values["none"])
    assert evidence["n"] == len(labels)
    assert json.loads(json.dumps(evidence)) == evidence


def test_imbalance_comparison_ignores_images_never_held_out() -> None:
    features, labels = draw_gaussians([200, 20])
    folds = draw_folds(labels)
    folds[::4] = -1
    found = fit_probe_for_imbalance(features, labels, np.arange(len(labels)), folds, TrainConfig())
    assert found.evidence["n"] == (folds >= 0).sum()
    np.testing.assert_array_equal(np.isnan(found.oof_logits).all(1), folds < 0)


def test_imbalance_standard_error_respects_groups() -> None:
    features, labels = draw_gaussians([300, 30], n_features=10, gap=1.0)
    rows = np.repeat(np.arange(len(labels)), 4)
    data, folds = (features[rows], labels[rows]), draw_folds(labels)[rows]
    config = TrainConfig(metric="balanced_accuracy")
    ungrouped, grouped = (
        fit_probe_for_imbalance(*data, groups, folds, config).evidence
        for groups in (np.arange(len(rows)), rows)
    )
    assert grouped["standard_error"] > 1.5 * ungrouped["standard_error"]


def test_imbalance_comparison_is_reproducible() -> None:
    data = draw_gaussians([300, 20], gap=1.0)
    first, second, other = (fit(data, metric="macro_f1", seed=seed).evidence for seed in (1, 1, 2))
    assert first == second
    assert first["standard_error"] != other["standard_error"]


def test_imbalance_progress_counts_values_of_C_of_both_fits() -> None:
    features, labels = draw_gaussians([200, 20])
    folds, calls = draw_folds(labels), {}
    for imbalance in ("none", "class_weights", "auto"):
        calls[imbalance] = []
        config = TrainConfig(imbalance=imbalance)
        groups, count = np.arange(len(labels)), calls[imbalance].append
        fit_probe_for_imbalance(features, labels, groups, folds, config, on_progress=count)
    assert calls["auto"] == calls["none"] + calls["class_weights"]
    assert set(calls["auto"]) == {1}

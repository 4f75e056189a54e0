"""Tests of the weights of feature groups in the linear probe."""

import numpy as np
import pytest

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.model.classifier import feature_scale
from pixelplay.training.feature_weights import column_factors, fit_group_weights
from pixelplay.training.imbalance import fit_probe_for_imbalance, refit_probe_head
from pixelplay.training.linear_probe import LinearProbe

GROUPS = {"signal": slice(0, 20), "noise": slice(20, 320)}


def draw_groups(n: int, signal: float, seed: int = 0) -> tuple[Float32Array, IntArray]:
    """Draw three classes that differ in the 20 features of the first group only."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = rng.normal(size=(n, 320))
    features[:, :20] += signal * rng.normal(size=(3, 20))[labels]
    return features.astype(np.float32), labels


def fit(features: Float32Array, labels: IntArray, groups: dict[str, slice] | None) -> LinearProbe:
    rows = np.arange(len(labels))
    config = TrainConfig(imbalance="none")
    return fit_probe_for_imbalance(features, labels, rows, rows % 5, config, feature_groups=groups)


def test_informative_group_has_the_larger_weight() -> None:
    features, labels = draw_groups(200, signal=0.8)
    weights = fit_group_weights(features, labels, GROUPS, 0)
    assert weights["signal"] > 4 * weights["noise"] > 0


def test_weights_keep_the_total_variance() -> None:
    features, labels = draw_groups(200, signal=0.8)
    factors = column_factors(GROUPS, fit_group_weights(features, labels, GROUPS, 0))
    assert factors.shape == (320,)
    mean, scale = feature_scale(features)
    variance = ((features - mean) / scale).var(0)  # (D,)
    assert (factors**2 * variance).sum() == pytest.approx(variance.sum(), rel=1e-4)


def test_few_images_leave_the_weights_close_to_equal() -> None:
    features, labels = draw_groups(9, signal=0.8)
    weights = fit_group_weights(features, labels, GROUPS, 0)
    assert 0.5 < weights["signal"] / weights["noise"] < 2


def test_constant_features_have_equal_weights() -> None:
    labels = np.arange(30) % 3
    assert fit_group_weights(np.ones((30, 320), np.float32), labels, GROUPS, 0) == {
        "signal": 1.0,
        "noise": 1.0,
    }


def test_group_weights_lower_the_log_loss_of_new_images() -> None:
    features, labels = draw_groups(400, signal=0.6)
    train, test = slice(0, 200), slice(200, 400)
    nlls = []
    for groups in (GROUPS, None):
        probe = fit(features[train], labels[train], groups)
        logits = probe.head.logits(features[test])
        shifted = logits - logits.max(1, keepdims=True)
        log_probs = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        nlls.append(-float(log_probs[np.arange(200), labels[test]].mean()))
    assert nlls[0] < 0.9 * nlls[1]


def test_out_of_fold_nll_decides_between_group_and_equal_weights() -> None:
    features, labels = draw_groups(200, signal=0.8)
    evidence = fit(features, labels, GROUPS).feature_evidence
    assert evidence["value"] == "by_group"
    assert evidence["nll_by_value"]["by_group"] < evidence["nll_by_value"]["equal"]
    random = np.random.default_rng(3).permutation(labels)  # nothing to learn
    probe = fit(features, random, GROUPS)
    nlls = probe.feature_evidence["nll_by_value"]
    assert probe.feature_evidence["value"] == min(nlls, key=lambda name: nlls[name])
    assert (probe.factors is None) == (probe.feature_evidence["value"] == "equal")


def test_refitted_head_has_the_same_feature_weights() -> None:
    features, labels = draw_groups(200, signal=0.8)
    probe = fit(features, labels, GROUPS)
    again = refit_probe_head(probe, features, labels)
    np.testing.assert_allclose(again.logits(features), probe.head.logits(features), atol=0.1)

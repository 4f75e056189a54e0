"""Tests of the learning curve."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conftest import draw_folder
from contexts import training_data_of
from pixelplay.config import TrainConfig
from pixelplay.data.splits import assign_folds
from pixelplay.evaluation.decision_rule import fit_decision_rule
from pixelplay.model.backbone import Backbone
from pixelplay.training.imbalance import fit_probe_for_imbalance, fit_probe_on_subset
from pixelplay.training.learning_curve import choose_fraction, measure_learning_curve
from pixelplay.training.linear_probe import fit_probe, fit_subset
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData


def test_learning_curve_fractions_are_stratified_and_nested() -> None:
    labels = np.repeat([0, 1, 2], [40, 10, 3])
    quarter, half = (choose_fraction(labels, frac, 3) for frac in (0.25, 0.5))
    assert np.bincount(labels[quarter]).tolist() == [10, 3, 1]
    assert np.bincount(labels[half]).tolist() == [20, 5, 2]
    assert (half | ~quarter).all()
    assert choose_fraction(labels, 1.0, 3).all()


def test_fit_on_all_rows_equals_the_probe() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    features = rng.normal(0, 1, (60, 8)).astype(np.float32) + labels[:, None]
    folds = assign_folds(labels, np.arange(60), 3, 0)
    probe = fit_probe(features, labels, folds)
    again = fit_subset(features, labels, folds, probe.C, np.ones(60, bool))
    np.testing.assert_allclose(again, probe.oof_logits, atol=0.05)
    some = fit_subset(features, labels, folds, probe.C, np.arange(60) % 3 == 0)
    assert np.abs(some - probe.oof_logits).max() > 0.2


def test_learning_curve_keeps_class_weights() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [60, 12])
    features = rng.normal(0, 1, (72, 8)).astype(np.float32) + labels[:, None]
    folds = assign_folds(labels, np.arange(72), 3, 0)
    config = TrainConfig(imbalance="class_weights")
    probe = fit_probe_for_imbalance(features, labels, np.arange(72), folds, config)
    all_rows = np.ones(72, bool)
    again = fit_probe_on_subset("class_weights", features, labels, folds, probe.C, all_rows)
    np.testing.assert_allclose(again, probe.oof_logits, atol=0.1)  # with a different tolerance
    plain = fit_probe_on_subset("none", features, labels, folds, probe.C, all_rows)
    assert np.abs(plain - probe.oof_logits).max() > 0.2


@pytest.fixture
def trained(tmp_path: Path) -> tuple[TrainingData, TrainedClassifier]:
    """A linear probe of classes that need many images: the signal is spread over many features."""
    data = training_data_of(
        draw_folder(tmp_path / "photos", {"bars": 60, "dots": 60, "rings": 5}), TrainConfig(test_frac=0)
    )
    rng = np.random.default_rng(0)
    centres = rng.normal(0, 0.18, (3, 150))
    features = (rng.normal(0, 1, (len(data.labels), 150)) + centres[data.labels]).astype(np.float32)
    data = replace(data, features=features)
    rows = data.fit_rows
    labels = data.labels[rows]
    folds = assign_folds(labels, np.arange(len(labels)), 3, 0)
    probe = fit_probe(features[rows], labels, folds)
    classifier = TrainedClassifier(
        finetune="none",
        backbone=Backbone.__new__(Backbone),
        head=probe.head,
        trained_on=rows,
        prior_rows=rows,
        held_out=rows,
        logits=probe.oof_logits,
        folds=folds,
        chosen={"C": {"value": probe.C}, "imbalance": {"value": "none"}, "features": {"value": "equal"}},
        history=[],
        plan=None,
    )
    return data, classifier


def test_learning_curve_gain_is_paired(trained: tuple[TrainingData, TrainedClassifier]) -> None:
    data, classifier = trained
    labels = data.labels[classifier.held_out]
    rule = fit_decision_rule(
        classifier.logits,
        labels,
        np.arange(len(labels)),
        np.bincount(labels) / len(labels),
        metric="accuracy",
        seed=0,
    )
    curve = measure_learning_curve(data, classifier, rule, 0)
    assert curve is not None
    points = curve["all"]["points"]
    assert [point["n_train"] for point in points] == [21, 42, 83]  # two of three folds of each fraction
    assert points[-1]["value"] == np.mean(rule.apply(classifier.logits)[1] == labels)
    assert points[0]["value"] < points[-1]["value"]
    assert curve["all"]["gain"]["value"] == pytest.approx(points[2]["value"] - points[1]["value"])
    assert set(curve["by_class"]) == {"bars", "dots"}  # the third has too few images
    assert measure_learning_curve(data, replace(classifier, finetune="partial"), rule, 0) is None

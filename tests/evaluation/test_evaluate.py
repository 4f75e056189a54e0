"""An evaluation equals scikit-learn's metrics; unknown classes count as errors; its JSON has no NaN."""

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn import metrics as reference

from pixelplay.errors import DataError
from pixelplay.evaluation.evaluate import average_evaluations, evaluate_probs, majority_baseline

METRICS = [
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "log_loss",
    "brier",
    "roc_auc",
    "average_precision",
]
NAMES = ("cardboard", "glass", "metal", "paper", "plastic", "trash")


def draw_model(
    n: int, n_classes: int, seed: int, decimals: int | None = None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return probabilities (rounded to make ties), their argmax and labels, all classes present."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.append(np.arange(n_classes), rng.integers(0, n_classes, n - n_classes)))
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), labels] += 1.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    if decimals is not None:
        probs = np.round(probs, decimals) + 1e-3
        probs /= probs.sum(axis=1, keepdims=True)
        probs = np.round(probs, 6)
    return probs, probs.argmax(axis=1), labels


def values(estimates: list[dict[str, Any] | None]) -> list[float | None]:
    """Return the values alone."""
    return [None if estimate is None else estimate["value"] for estimate in estimates]


@pytest.mark.parametrize("decimals", [None, 1])
def test_every_metric_equals_scikit_learn(decimals: int | None) -> None:
    probs, pred, labels = draw_model(300, 6, seed=0, decimals=decimals)
    got = evaluate_probs(probs, pred, labels, NAMES, n_known=6).to_json()
    onehot = np.eye(6)[labels]
    assert got["accuracy"]["value"] == pytest.approx(reference.accuracy_score(labels, pred))
    assert got["balanced_accuracy"]["value"] == pytest.approx(reference.balanced_accuracy_score(labels, pred))
    assert got["macro_f1"]["value"] == pytest.approx(
        reference.f1_score(labels, pred, average="macro", labels=np.unique(labels), zero_division=0)
    )
    normal = probs / probs.sum(axis=1, keepdims=True)
    assert got["log_loss"]["value"] == pytest.approx(reference.log_loss(labels, normal), abs=1e-5)
    assert got["brier"]["value"] == pytest.approx(
        reference.brier_score_loss(labels, normal, labels=range(6)), abs=1e-5
    )
    areas = [reference.roc_auc_score(onehot[:, k], probs[:, k]) for k in range(6)]
    precisions = [reference.average_precision_score(onehot[:, k], probs[:, k]) for k in range(6)]
    np.testing.assert_allclose(values([row["roc_auc"] for row in got["per_class"]]), areas)
    np.testing.assert_allclose(values([row["average_precision"] for row in got["per_class"]]), precisions)
    assert got["roc_auc"]["value"] == pytest.approx(np.mean(areas))
    assert got["average_precision"]["value"] == pytest.approx(np.mean(precisions))
    precision, recall, f1, support = reference.precision_recall_fscore_support(labels, pred, zero_division=0)
    np.testing.assert_allclose(values([row["precision"] for row in got["per_class"]]), precision)
    np.testing.assert_allclose(values([row["recall"] for row in got["per_class"]]), recall)
    np.testing.assert_allclose(values([row["f1"] for row in got["per_class"]]), f1)
    assert [row["n"] for row in got["per_class"]] == support.tolist()
    assert got["confusion"]["matrix"] == reference.confusion_matrix(labels, pred).tolist()


def test_two_class_brier_and_roc_auc_equal_scikit_learn() -> None:
    probs, pred, labels = draw_model(200, 2, seed=3)
    got = evaluate_probs(probs, pred, labels, ("good", "cracked"), n_known=2)
    assert got.brier is not None
    assert got.roc_auc is not None
    assert got.brier.value == pytest.approx(reference.brier_score_loss(labels, probs[:, 1]))
    assert got.roc_auc.value == pytest.approx(reference.roc_auc_score(labels, probs[:, 1]))


def test_log_loss_of_a_certain_error_equals_scikit_learn() -> None:
    probs = np.array([[1.0, 0.0], [1.0, 0.0], [0.25, 0.75]])
    labels = np.array([0, 1, 1])
    got = evaluate_probs(probs, probs.argmax(axis=1), labels, ("a", "b"), n_known=2)
    assert got.log_loss is not None
    assert got.log_loss.value == pytest.approx(reference.log_loss(labels, probs))


def test_images_of_unknown_classes_are_errors_and_excluded_in_known_only() -> None:
    """Two known classes, all 6 images correct, and 4 images of a class unknown to the model."""
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    pred = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1])
    probs = np.where(np.eye(2)[pred] == 1, 0.8, 0.2)
    got = evaluate_probs(probs, pred, labels, ("cat", "dog", "lynx"), n_known=2).to_json()
    assert got["accuracy"]["value"] == pytest.approx(0.6)
    assert got["balanced_accuracy"]["value"] == pytest.approx(2 / 3)
    assert got["balanced_accuracy"]["n_classes"] == 3
    assert got["macro_f1"]["value"] == pytest.approx((6 / 9 + 6 / 7 + 0) / 3)
    assert got["ece"]["value"] == pytest.approx(0.2)  # confidence 0.8, accuracy 0.6
    assert got["log_loss"]["n"] == got["brier"]["n"] == got["roc_auc"]["n"] == 6
    assert got["log_loss"]["value"] == pytest.approx(-np.log(0.8))
    assert got["confusion"]["matrix"] == [[3, 0, 0], [0, 3, 0], [3, 1, 0]]
    lynx = got["per_class"][2]
    assert (lynx["n"], lynx["precision"], lynx["recall"]["value"], lynx["f1"]["value"]) == (4, None, 0.0, 0.0)
    assert lynx["roc_auc"] is None
    known = got["known_only"]
    assert "known_only" not in known
    assert known["n"] == 6
    assert (
        known["accuracy"]["value"] == known["balanced_accuracy"]["value"] == known["macro_f1"]["value"] == 1
    )
    assert known["log_loss"] == got["log_loss"]
    assert known["confusion"] == {"classes": ["cat", "dog"], "matrix": [[3, 0], [0, 3]]}


def test_without_known_classes_probability_metrics_are_none() -> None:
    probs = np.full((12, 2), 0.5)
    got = evaluate_probs(probs, np.zeros(12, int), np.full(12, 2), ("a", "b", "c"), n_known=2).to_json()
    assert got["accuracy"]["value"] == 0
    assert got["log_loss"] is got["brier"] is got["roc_auc"] is got["known_only"] is None


def test_json_has_no_nan_where_metrics_are_undefined() -> None:
    """One class present, one never predicted, one absent, one unknown to the model."""
    probs, _, _ = draw_model(15, 3, seed=1)
    got = evaluate_probs(probs, np.zeros(15, int), np.zeros(15, int), ("a", "b", "c", "d"), n_known=3)
    record = got.to_json()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["roc_auc"] is None
    assert record["per_class"][1]["recall"] is record["per_class"][1]["f1"] is None
    assert record["macro_f1"]["n_classes"] == 1


def test_json_has_the_documented_keys() -> None:
    probs, pred, labels = draw_model(60, 2, seed=1)
    got = evaluate_probs(probs, pred, labels, ("a", "b"), n_known=2, at_precision=0.6).to_json()
    assert list(got) == [
        "n",
        *METRICS[:5],
        "ece",
        "aurc",
        "risk_coverage",
        *METRICS[5:],
        "per_class",
        "confusion",
        "known_only",
        "operating_point",
        "bootstrap",
    ]
    assert list(got["accuracy"]) == ["value", "low", "high", "n", "reliable", "method"]
    per_class = ["class", "n", "precision", "recall", "f1", "roc_auc", "average_precision"]
    assert list(got["per_class"][0]) == per_class
    assert got["bootstrap"] == {"n_resamples": 1000, "by": "image"}


def test_the_same_seed_gives_the_same_evaluation() -> None:
    probs, pred, labels = draw_model(80, 3, seed=4)
    first, again, other = (
        evaluate_probs(probs, pred, labels, NAMES[:3], n_known=3, seed=seed).to_json() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_averaged_evaluations_have_mean_metrics_and_summed_confusion() -> None:
    evaluations = []
    for seed in (1, 2):
        probs, pred, labels = draw_model(60, 3, seed=seed)
        evaluations.append(evaluate_probs(probs, pred, labels, NAMES[:3], n_known=3))
    got = average_evaluations(evaluations)
    for name in METRICS:
        first, second, mean = (getattr(each, name) for each in (*evaluations, got))
        assert mean.value == pytest.approx((first.value + second.value) / 2)
        assert mean.low == pytest.approx((first.low + second.low) / 2)
    assert got.confusion.sum() == 120
    assert got.n == 60
    assert average_evaluations(evaluations[:1]) is evaluations[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda probs, pred, labels: (probs[:0], pred[:0], labels[:0]), "0 images"),
        (
            lambda probs, pred, labels: (probs, pred, labels - 1),
            r"label -1 in row \d+ is outside the 3 classes",
        ),
        (lambda probs, pred, labels: (probs * np.nan, pred, labels), "row 0 "),
        (lambda probs, pred, labels: (probs, pred - 3, labels), "row 0 "),
    ],
)
def test_unusable_predictions_and_labels_are_rejected(change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_probs(*change(*draw_model(30, 3, seed=0)), NAMES[:3], n_known=3)


def test_majority_baseline_predicts_the_most_frequent_training_class() -> None:
    labels = np.array([0, 1, 1, 1, 2])
    got = majority_baseline(np.array([5, 40]), labels, ("a", "b", "c"))
    assert got["class"] == "b"
    assert got["accuracy"]["value"] == pytest.approx(0.6)
    assert got["accuracy"]["method"] == "wilson"
    assert got["balanced_accuracy"] == pytest.approx(1 / 3)
    assert got["macro_f1"] == pytest.approx((0 + 6 / 8 + 0) / 3)


def test_operating_point_can_be_of_the_first_class() -> None:
    probs, pred, labels = draw_model(80, 2, seed=4)
    got = evaluate_probs(
        probs, pred, labels, ("a", "b"), n_known=2, at_precision=0.7, positive="a", groups=np.arange(80) // 4
    ).operating_point
    assert got is not None
    assert got.threshold is not None
    accepted = probs[:, 0] >= got.threshold
    assert got.recall.value == pytest.approx(accepted[labels == 0].mean())
    assert got.recall.method == "bootstrap by group"


def test_an_operating_point_of_three_classes_is_rejected() -> None:
    with pytest.raises(DataError, match="the model has 3 classes but at_precision needs 2"):
        evaluate_probs(*draw_model(30, 3, seed=0), NAMES[:3], n_known=3, at_precision=0.9)

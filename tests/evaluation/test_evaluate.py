"""Figures equal scikit-learn's, unknown classes cost what they cost, and the JSON holds no NaN."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn import metrics as reference

from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.evaluate import evaluate_probs, majority_baseline
from pixelplay.evaluation.metrics import (
    accuracy,
    balanced_accuracy,
    count_labels,
    expect_labels,
    expected_calibration_error,
    macro_f1,
    rank,
)

FIGURES = [
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
def test_every_figure_equals_scikit_learn(decimals: int | None) -> None:
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


def test_classes_ranked_in_turn_have_the_figures_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, pred, labels = draw_model(300, 6, seed=0)
    at_once = evaluate_probs(probs, pred, labels, NAMES, n_known=6).to_json()
    monkeypatch.setattr("pixelplay.evaluation.estimates._RANKED_CELLS", 2 * 300)
    assert evaluate_probs(probs, pred, labels, NAMES, n_known=6).to_json() == at_once


def test_two_class_brier_and_auc_equal_scikit_learn() -> None:
    probs, pred, labels = draw_model(200, 2, seed=3)
    got = evaluate_probs(probs, pred, labels, ("good", "cracked"), n_known=2)
    assert got.brier is not None
    assert got.roc_auc is not None
    assert got.brier.value == pytest.approx(reference.brier_score_loss(labels, probs[:, 1]))
    assert got.roc_auc.value == pytest.approx(reference.roc_auc_score(labels, probs[:, 1]))


def test_log_loss_of_a_certain_error_is_scikit_learns() -> None:
    probs = np.array([[1.0, 0.0], [1.0, 0.0], [0.25, 0.75]])
    labels = np.array([0, 1, 1])
    got = evaluate_probs(probs, probs.argmax(axis=1), labels, ("a", "b"), n_known=2)
    assert got.log_loss is not None
    assert got.log_loss.value == pytest.approx(reference.log_loss(labels, probs))


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_label_metrics_equal_scikit_learn_whatever_classes_are_missing(pairs: list[tuple[int, int]]) -> None:
    pred, labels = (np.array(column) for column in zip(*pairs, strict=True))
    present = np.unique(labels)
    recalls = reference.recall_score(labels, pred, labels=present, average="macro", zero_division=0)
    f1 = reference.f1_score(labels, pred, labels=present, average="macro", zero_division=0)
    assert accuracy(pred, labels) == pytest.approx((pred == labels).mean())
    assert balanced_accuracy(pred, labels) == pytest.approx(recalls)
    assert macro_f1(pred, labels) == pytest.approx(f1)


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 3)), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_weighted_areas_equal_scikit_learn_with_ties(rows: list[tuple[int, bool, int]]) -> None:
    levels, is_positive, times = (np.array(column) for column in zip(*rows, strict=True))
    scores = levels / 4
    if not is_positive.any():
        return
    roc_auc, average_precision = rank(scores, is_positive).areas(times[:, None].astype(float))[:, 0]
    if not times[is_positive].any() or not times[~is_positive].any():
        assert np.isnan([roc_auc, average_precision]).all()
        return
    assert roc_auc == pytest.approx(reference.roc_auc_score(is_positive, scores, sample_weight=times))
    repeated, repeated_scores = np.repeat(is_positive, times), np.repeat(scores, times)
    assert average_precision == pytest.approx(reference.average_precision_score(repeated, repeated_scores))


def test_weighted_counts_equal_counting_copies() -> None:
    rng = np.random.default_rng(0)
    pred, labels = rng.integers(0, 5, 80), rng.integers(0, 5, 80)
    weights = rng.integers(0, 4, (7, 80))
    together = count_labels(pred, labels, 5, weights)
    for r in range(7):
        one = count_labels(np.repeat(pred, weights[r]), np.repeat(labels, weights[r]), 5)
        np.testing.assert_array_equal(np.stack(together)[:, r], np.stack(one))


def test_images_of_unknown_classes_are_errors_with_known_only_beside() -> None:
    """Two known classes answered perfectly on 6 images, 4 images of a class the model never saw."""
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    pred = np.array([0, 0, 0, 1, 1, 1, 0, 0, 0, 1])
    probs = np.where(np.eye(2)[pred] == 1, 0.8, 0.2)
    got = evaluate_probs(probs, pred, labels, ("cat", "dog", "lynx"), n_known=2).to_json()
    assert got["accuracy"]["value"] == pytest.approx(0.6)
    assert got["balanced_accuracy"]["value"] == pytest.approx(2 / 3)
    assert got["balanced_accuracy"]["n_classes"] == 3
    assert got["macro_f1"]["value"] == pytest.approx((6 / 9 + 6 / 7 + 0) / 3)
    assert got["ece"]["value"] == pytest.approx(0.2)  # confidence 0.8, right in 0.6
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


def test_only_images_of_unknown_classes_leave_probabilities_unjudged() -> None:
    probs = np.full((12, 2), 0.5)
    got = evaluate_probs(probs, np.zeros(12, int), np.full(12, 2), ("a", "b", "c"), n_known=2).to_json()
    assert got["accuracy"]["value"] == 0
    assert got["log_loss"] is got["brier"] is got["roc_auc"] is got["known_only"] is None


def test_json_of_an_awkward_case_has_no_nan() -> None:
    """One class present, one never answered, one never there, one unknown to the model."""
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
        *FIGURES[:5],
        "ece",
        "aurc",
        "risk_coverage",
        *FIGURES[5:],
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


def test_copies_in_groups_widen_every_interval() -> None:
    probs, pred, labels = draw_model(100, 4, seed=2)
    copied = [np.repeat(array, 5, axis=0) for array in (probs, pred, labels)]
    by_image = evaluate_probs(*copied, NAMES[:4], n_known=4).to_json()
    by_group = evaluate_probs(*copied, NAMES[:4], n_known=4, groups=np.repeat(np.arange(100), 5)).to_json()
    assert by_group["bootstrap"]["by"] == "group"
    assert by_group["accuracy"]["method"] == "bootstrap by group"
    for name in FIGURES:
        wide, narrow = by_group[name], by_image[name]
        assert wide["value"] == pytest.approx(narrow["value"])
        ratio = (wide["high"] - wide["low"]) / (narrow["high"] - narrow["low"])
        assert 1.8 < ratio < 2.7, name  # √5 = 2.24


def test_bootstrap_intervals_have_the_width_of_theory() -> None:
    """With equally many images per class, balanced accuracy is nearly a proportion."""
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    pred = np.where(rng.random(2000) < 0.8, labels, 1 - labels)
    probs = np.where(np.eye(2)[pred] == 1, 0.7, 0.3)
    theory = evaluate_probs(probs, pred, labels, ("a", "b"), n_known=2)
    drawn = evaluate_probs(probs, pred, labels, ("a", "b"), n_known=2, groups=np.arange(2000))
    for wilson, bootstrap in (
        (theory.accuracy, drawn.accuracy),
        (theory.balanced_accuracy, drawn.balanced_accuracy),
        (theory.macro_f1, drawn.macro_f1),
    ):
        assert bootstrap.low == pytest.approx(wilson.low, abs=0.003)
        assert bootstrap.high == pytest.approx(wilson.high, abs=0.003)


def test_perfect_answers_still_have_intervals_with_a_width() -> None:
    labels = np.repeat([0, 1], [40, 15])
    probs = np.where(np.eye(2)[labels] == 1, 0.9, 0.1)
    got = evaluate_probs(probs, labels, labels, ("a", "b"), n_known=2)
    for estimate in (got.balanced_accuracy, got.macro_f1):
        assert estimate.value == estimate.high == 1
        assert estimate.low < 0.95
        assert estimate.reliable
    assert got.roc_auc is not None
    assert not got.roc_auc.reliable  # all its resamples agree


def test_a_class_with_nine_images_makes_composites_unreliable() -> None:
    rng = np.random.default_rng(0)
    for rare, is_reliable in ((9, False), (10, True)):
        labels = np.append(np.zeros(100, int), np.ones(rare, int))
        probs = rng.dirichlet([1, 1], size=len(labels))
        got = evaluate_probs(probs, probs.argmax(axis=1), labels, ("a", "b"), n_known=2)
        assert got.balanced_accuracy.reliable is got.macro_f1.reliable is is_reliable
        assert got.accuracy.reliable


def test_the_same_seed_gives_the_same_record() -> None:
    probs, pred, labels = draw_model(80, 3, seed=4)
    first, again, other = (
        evaluate_probs(probs, pred, labels, NAMES[:3], n_known=3, seed=seed).to_json() for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_ece_by_hand() -> None:
    """Bin (0.8, 0.867]: two images at 0.85, one right; bin (0.533, 0.6]: one image at 0.6, right."""
    probs = np.array([[0.85, 0.15], [0.85, 0.15], [0.4, 0.6]])
    pred, labels = np.array([0, 0, 1]), np.array([0, 1, 1])
    assert expected_calibration_error(probs, pred, labels) == pytest.approx((2 * 0.35 + 0.4) / 3)


def test_ece_of_honest_probabilities_is_small() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([1, 1, 1], size=20_000)
    labels = (probs.cumsum(axis=1) > rng.random((20_000, 1))).argmax(axis=1)
    assert expected_calibration_error(probs, probs.argmax(axis=1), labels) < 0.015


def test_operating_point_is_the_smallest_threshold_that_is_precise_enough() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.7, 0.6, 0.5, 0.4])
    labels = np.array([1, 1, 0, 1, 1, 0, 0])
    probs = np.stack([1 - scores, scores], axis=1)
    got = evaluate_probs(
        probs, probs.argmax(axis=1), labels, ("good", "bad"), n_known=2, at_precision=0.8
    ).to_json()["operating_point"]
    assert (got["positive"], got["asked_precision"], got["threshold"]) == ("bad", 0.8, 0.6)
    assert got["precision"]["value"] == pytest.approx(0.8)
    assert got["recall"]["value"] == 1
    assert got["highest_precision"] == 1
    assert got["precision"]["method"] == "wilson"


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30), st.floats(0.05, 1))
@settings(max_examples=40, deadline=None)
def test_no_threshold_has_more_recall_at_the_asked_precision(
    rows: list[tuple[int, bool]], asked: float
) -> None:
    scores, labels = (np.array(column) for column in zip(*[(0.5, True), *rows], strict=True))
    scores, labels = scores / 6, labels.astype(int)
    probs = np.stack([1 - scores, scores], axis=1)
    got = evaluate_probs(
        probs, np.zeros(len(labels), int), labels, ("a", "b"), n_known=2, at_precision=asked
    ).operating_point
    assert got is not None
    tried = [scores >= threshold for threshold in np.unique(scores)]
    good = [labels[yes].sum() / labels.sum() for yes in tried if labels[yes].mean() >= asked]
    assert got.recall.value == pytest.approx(max(good, default=0))
    assert (got.threshold is None) == (not good)


def test_an_unreachable_precision_says_how_far_one_gets() -> None:
    scores = np.array([0.9, 0.8, 0.3])
    labels = np.array([0, 1, 1])
    probs = np.stack([1 - scores, scores], axis=1)
    got = evaluate_probs(
        probs, probs.argmax(axis=1), labels, ("good", "bad"), n_known=2, at_precision=0.95
    ).to_json()["operating_point"]
    assert got["threshold"] is got["precision"] is None
    assert got["recall"]["value"] == 0
    assert got["highest_precision"] == pytest.approx(2 / 3)


def test_operating_point_can_be_about_the_first_class() -> None:
    probs, pred, labels = draw_model(80, 2, seed=4)
    got = evaluate_probs(
        probs, pred, labels, ("a", "b"), n_known=2, at_precision=0.7, positive="a", groups=np.arange(80) // 4
    ).operating_point
    assert got is not None
    assert got.threshold is not None
    accepted = probs[:, 0] >= got.threshold
    assert got.recall.value == pytest.approx(accepted[labels == 0].mean())
    assert got.recall.method == "bootstrap by group"


@pytest.mark.parametrize(
    ("n_classes", "ask", "error", "message"),
    [
        (3, {"at_precision": 0.9}, DataError, "the model has 3 classes and a threshold needs 2"),
        (2, {"at_precision": 0.9, "positive": "owl"}, DataError, "positive class 'owl' is unknown"),
        (2, {"at_precision": 1.5}, ConfigError, "precision 1.5 was asked for; it must be above 0"),
    ],
)
def test_an_impossible_operating_point_is_refused(
    n_classes: int, ask: dict[str, Any], error: type[Exception], message: str
) -> None:
    probs, pred, labels = draw_model(30, n_classes, seed=0)
    with pytest.raises(error, match=message):
        evaluate_probs(probs, pred, labels, NAMES[:n_classes], n_known=n_classes, **ask)


def test_an_operating_point_without_positive_images_is_refused() -> None:
    with pytest.raises(DataError, match="class 'b' has 0 of the 3 images"):
        evaluate_probs(
            np.full((3, 2), 0.5), np.zeros(3, int), np.zeros(3, int), ("a", "b"), n_known=2, at_precision=0.9
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda probs, pred, labels: (probs[:0], pred[:0], labels[:0]), "0 images have labels"),
        (
            lambda probs, pred, labels: (probs, pred, labels - 1),
            r"label -1 in row \d+ is outside the 3 classes",
        ),
        (
            lambda probs, pred, labels: (probs[1:], pred, labels),
            r"probs \(29, 3\) and pred \(30,\) do not fit 30",
        ),
        (lambda probs, pred, labels: (probs * np.nan, pred, labels), "row 0 has no usable prediction"),
        (lambda probs, pred, labels: (probs, pred - 3, labels), "row 0 has no usable prediction"),
    ],
)
def test_unusable_input_is_refused(change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_probs(*change(*draw_model(30, 3, seed=0)), NAMES[:3], n_known=3)


def test_majority_baseline_answers_the_commonest_training_class() -> None:
    labels = np.array([0, 1, 1, 1, 2])
    got = majority_baseline(np.array([5, 40]), labels, ("a", "b", "c")).to_json()
    assert got["class"] == "b"
    assert got["accuracy"]["value"] == pytest.approx(0.6)
    assert got["accuracy"]["method"] == "wilson"
    assert got["balanced_accuracy"] == pytest.approx(1 / 3)
    assert got["macro_f1"] == pytest.approx((0 + 6 / 8 + 0) / 3)


def test_expected_counts_are_the_mean_over_labels_drawn_from_the_probabilities() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet([3, 1, 1], size=40)
    pred = rng.integers(0, 2, 40)  # the third class is never named
    drawn = (probs.cumsum(axis=1)[:, None] < rng.random((40, 4000, 1))).sum(axis=2)  # (N, R)
    means = np.mean([np.stack(count_labels(pred, labels, 3)) for labels in drawn.T], axis=0)
    np.testing.assert_allclose(np.stack(expect_labels(pred, probs)), means, atol=0.2)

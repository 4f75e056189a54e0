"""Intervals of metrics cover the truth, and groups never make them narrower."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pixelplay.evaluation.estimates import estimate_label_metrics, estimate_prob_metrics, estimate_rate
from pixelplay.evaluation.intervals import Bootstrap, wilson

LABEL_METRICS = ("accuracy", "balanced_accuracy", "macro_f1")


def draw_model(n: int, n_classes: int, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return probabilities, their argmax and labels, all classes present."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.append(np.arange(n_classes), rng.integers(0, n_classes, n - n_classes)))
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), labels] += 1.5
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return probs, probs.argmax(axis=1), labels


def bootstrap_of(n: int, groups: NDArray[Any] | None = None, n_resamples: int = 1000) -> Bootstrap:
    return Bootstrap(n=n, groups=groups, n_resamples=n_resamples, seed=0)


def test_roc_auc_does_not_depend_on_how_many_classes_are_ranked_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probs, _, labels = draw_model(300, 6, seed=0)
    at_once = estimate_prob_metrics(probs, labels, bootstrap_of(300))
    monkeypatch.setattr("pixelplay.evaluation.estimates._RANKED_CELLS", 2 * 300)
    assert estimate_prob_metrics(probs, labels, bootstrap_of(300)) == at_once


def test_duplicates_in_groups_widen_every_interval() -> None:
    probs, pred, labels = (np.repeat(array, 5, axis=0) for array in draw_model(100, 4, seed=2))
    by_image, by_group = (
        {
            **estimate_label_metrics(pred, labels, 4, bootstrap)[0],
            **estimate_prob_metrics(probs, labels, bootstrap)[0],
        }
        for bootstrap in (bootstrap_of(500), bootstrap_of(500, np.repeat(np.arange(100), 5)))
    )
    assert len(by_group) == 7
    for name, wide in by_group.items():
        narrow = by_image[name]
        assert wide is not None
        assert narrow is not None
        assert wide.method == "bootstrap by group"
        assert wide.value == pytest.approx(narrow.value)
        ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
        assert 1.8 < ratio < 2.7, name  # √5 = 2.24


def test_bootstrap_and_wilson_intervals_agree_for_balanced_classes() -> None:
    """With equally many images per class, balanced accuracy is nearly a proportion."""
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    pred = np.where(rng.random(2000) < 0.8, labels, 1 - labels)
    theory, _ = estimate_label_metrics(pred, labels, 2, bootstrap_of(2000))
    drawn, _ = estimate_label_metrics(pred, labels, 2, bootstrap_of(2000, np.arange(2000)))
    for name in LABEL_METRICS:
        assert drawn[name].low == pytest.approx(theory[name].low, abs=0.003)
        assert drawn[name].high == pytest.approx(theory[name].high, abs=0.003)


def test_perfect_predictions_still_have_intervals_with_a_width() -> None:
    labels = np.repeat([0, 1], [40, 15])
    overall, _ = estimate_label_metrics(labels, labels, 2, bootstrap_of(55))
    for name in ("balanced_accuracy", "macro_f1"):
        assert overall[name].value == overall[name].high == 1
        assert overall[name].low < 0.95
        assert overall[name].reliable
    of_probs, _ = estimate_prob_metrics(np.where(np.eye(2)[labels] == 1, 0.9, 0.1), labels, bootstrap_of(55))
    assert of_probs["roc_auc"] is not None
    assert not of_probs["roc_auc"].reliable  # all resamples agree


@pytest.mark.parametrize(("rare", "reliable"), [(9, False), (10, True)])
def test_a_class_with_nine_images_makes_macro_averages_unreliable(rare: int, reliable: bool) -> None:
    labels = np.append(np.zeros(100, int), np.ones(rare, int))
    pred = np.random.default_rng(0).integers(0, 2, len(labels))
    overall, _ = estimate_label_metrics(pred, labels, 2, bootstrap_of(len(labels)))
    assert overall["balanced_accuracy"].reliable is overall["macro_f1"].reliable is reliable
    assert overall["accuracy"].reliable


@pytest.mark.parametrize("recalls", [(0.95, 0.9, 0.8, 0.6), (0.99, 0.99, 0.98, 0.97)])
def test_intervals_cover_the_truth_of_imbalanced_classes(recalls: tuple[float, ...]) -> None:
    """Nominal 95 %; the rarest class has some 40 of 1000 images; the standard error of the coverage is 1.1 %.

    The plain bootstrap fails in the second case: most samples of a rare class then have no error.
    """
    rng = np.random.default_rng(2)
    mix = np.array([0.6, 0.3, 0.06, 0.04])
    joint = np.diag(mix * recalls)  # rows true, columns predicted
    joint[1:, 0] = mix[1:] * (1 - np.array(recalls[1:]))  # errors predict the most frequent class …
    joint[0, 1] = mix[0] * (1 - recalls[0])  # … and its own errors the second
    truths = (
        np.trace(joint),
        np.mean(recalls),
        np.mean(2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))),
    )
    covered = []
    for seed in range(400):
        cells = rng.choice(16, size=1000, p=joint.ravel())
        bootstrap = Bootstrap(n=1000, groups=None, n_resamples=100, seed=seed)
        overall, _ = estimate_label_metrics(cells % 4, cells // 4, 4, bootstrap)
        estimates = (overall[name] for name in LABEL_METRICS)
        covered.append([e.low <= truth <= e.high for e, truth in zip(estimates, truths, strict=True)])
    assert (np.mean(covered, axis=0) >= 0.93).all()


def test_groups_never_narrow_an_interval() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [60, 30, 12])
    pred = np.where(rng.random(102) < 0.95, labels, 0)
    independent, _ = estimate_label_metrics(pred, labels, 3, bootstrap_of(102, None, 200))
    grouped, _ = estimate_label_metrics(pred, labels, 3, bootstrap_of(102, np.arange(102), 200))
    for name in LABEL_METRICS:
        narrow, wide = independent[name], grouped[name]
        assert wide.low <= narrow.low <= narrow.high <= wide.high
        assert wide.method == "bootstrap by group"


def test_a_rate_has_the_wilson_interval_and_with_groups_a_wider_one() -> None:
    is_hit = np.arange(60) < 9
    single = estimate_rate(is_hit, None, 0)
    assert (single.value, single.low, single.high) == (0.15, wilson(9, 60).low, wilson(9, 60).high)
    grouped = estimate_rate(is_hit, np.arange(60) // 6, 0)  # the hits are in two of ten groups
    assert grouped.value == 0.15
    assert grouped.high - grouped.low > single.high - single.low
    assert grouped.method == "bootstrap by group"
    assert estimate_rate(np.zeros(5, np.bool_), None, 0).value == 0

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from pixelplay.data.splits import NEVER_HELD_OUT
from pixelplay.model.classifier import LinearHead
from pixelplay.training import linear_probe
from pixelplay.training.linear_probe import (
    C_GRID,
    LinearProbe,
    fit_probe,
    fit_softer_head,
    folds_to_search,
    out_of_fold_nll,
)

Data = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


def scale_rows(features: NDArray[np.float32]) -> NDArray[np.float64]:
    """Scale features (N, D) as the probe does: √(own² + median²) of the standard deviations is one."""
    std = features.astype(np.float64).std(0)
    return np.asarray((features - features.mean(0, dtype=np.float64)) / np.sqrt(std**2 + np.median(std) ** 2))


def draw_data(n: int, n_features: int, n_classes: int, seed: int = 0, gap: float = 0.8) -> Data:
    """Draw overlapping classes of unequal size, and five folds that each contain every class."""
    rng = np.random.default_rng(seed)
    share = np.arange(1, n_classes + 1) / np.arange(1, n_classes + 1).sum()
    rest = rng.choice(n_classes, n - 6 * n_classes, p=share)
    labels = np.sort(np.concatenate([np.repeat(np.arange(n_classes), 6), rest]))
    centres = rng.normal(size=(n_classes, n_features)) * gap / np.sqrt(n_features) * 3
    features = centres[labels] + rng.normal(size=(len(labels), n_features))
    features = features * rng.uniform(0.01, 10, n_features) + rng.normal(size=n_features) * 5
    folds = np.empty(len(labels), np.int64)
    for k in range(n_classes):  # so that every fold contains every class
        rows = np.flatnonzero(labels == k)
        folds[rng.permutation(rows)] = np.arange(len(rows)) % 5
    return features.astype(np.float32), labels.astype(np.int64), folds


def fit_scikit_learn(
    rows: NDArray[np.float64],
    labels: NDArray[np.int64],
    C: float,
    weights: NDArray[np.floating] | None = None,
) -> LogisticRegression:
    weights = None if weights is None else weights / weights.mean()
    return LogisticRegression(C=C, tol=1e-8, max_iter=10_000).fit(rows, labels, sample_weight=weights)


def draw_weights(n: int) -> NDArray[np.float32]:
    return np.random.default_rng(10).uniform(0.1, 10, n).astype(np.float32)


SHAPES = [(2, 120, 20), (2, 60, 200), (3, 150, 12), (3, 60, 300), (6, 240, 30), (6, 90, 250)]


@pytest.mark.parametrize(("n_classes", "n", "n_features"), SHAPES)
def test_probe_probabilities_equal_scikit_learn(n_classes: int, n: int, n_features: int) -> None:
    features, labels, folds = draw_data(n, n_features, n_classes)
    probe = fit_probe(features, labels, folds)
    assert probe.head.weight.shape == (n_classes, n_features)
    rows = scale_rows(features)
    expected = fit_scikit_learn(rows, labels, probe.C).predict_proba(rows)
    np.testing.assert_allclose(softmax(probe.head.logits(features), axis=1), expected, atol=1e-3)


@pytest.mark.parametrize(("n_classes", "n", "n_features"), SHAPES)
def test_oof_logits_come_from_heads_of_the_other_folds(n_classes: int, n: int, n_features: int) -> None:
    features, labels, folds = draw_data(n, n_features, n_classes, seed=1)
    probe = fit_probe(features, labels, folds)
    rows = scale_rows(features)
    expected = np.empty((len(labels), n_classes))
    for fold in range(5):
        held_out = folds == fold
        head = fit_scikit_learn(rows[~held_out], labels[~held_out], probe.C)
        expected[held_out] = head.predict_proba(rows[held_out])
    np.testing.assert_allclose(
        softmax(probe.oof_logits, axis=1), expected, atol=0.05 if n_features > n else 0.01
    )
    rows_ = np.arange(len(labels))
    nll, reference = (-np.log(p[rows_, labels]).mean() for p in (softmax(probe.oof_logits, axis=1), expected))
    assert nll == pytest.approx(reference, abs=5e-3)


def test_selected_C_has_the_lowest_nll() -> None:
    features, labels, folds = draw_data(150, 40, 3, seed=2)
    probe = fit_probe(features, labels, folds)
    assert list(probe.nll_by_C) == list(C_GRID[: len(probe.nll_by_C)])
    assert probe.nll_by_C[probe.C] == min(probe.nll_by_C.values())
    rows = scale_rows(features)
    for C, nll in probe.nll_by_C.items():
        probs = np.empty((len(labels), 3))
        for fold in range(5):
            held_out = folds == fold
            head = fit_scikit_learn(rows[~held_out], labels[~held_out], C)
            probs[held_out] = head.predict_proba(rows[held_out])
        assert nll == pytest.approx(-np.log(probs[np.arange(len(labels)), labels]).mean(), abs=5e-3)


def test_reported_nll_is_that_of_oof_logits() -> None:
    features, labels, folds = draw_data(150, 40, 3, seed=2)
    probe = fit_probe(features, labels, folds)
    nll = -np.log(softmax(probe.oof_logits, axis=1)[np.arange(len(labels)), labels]).mean()
    assert nll == pytest.approx(probe.nll_by_C[probe.C], abs=5e-3)


def test_search_for_C_stops_once_nll_has_risen_twice() -> None:
    features, labels, folds = draw_data(60, 300, 3, gap=0.3)
    calls: list[int] = []
    probe = fit_probe(features, labels, folds, on_progress=calls.append)
    nlls = list(probe.nll_by_C.values())
    assert calls == [1] * len(nlls)
    assert len(nlls) < len(C_GRID)
    assert min(nlls[-2:]) > min(nlls[:-2])


def test_probe_of_many_classes_searches_C_with_two_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, folds = draw_data(150, 40, 6)
    usual = fit_probe(features, labels, folds)
    monkeypatch.setattr(linear_probe, "MANY_WEIGHTS", 100)
    probe = fit_probe(features, labels, folds)
    two = np.where(folds < 2, folds, NEVER_HELD_OUT)
    assert folds_to_search(features, labels, folds).tolist() == two.tolist()
    assert probe.nll_by_C[probe.C] == pytest.approx(
        out_of_fold_nll(probe.oof_logits, labels, two, None), rel=0.01
    )
    at = [C_GRID.index(each.C) for each in (usual, probe)]
    assert abs(at[0] - at[1]) <= 1
    # the head and the logits of all folds are those of the selected C
    rows = scale_rows(features)
    expected = fit_scikit_learn(rows, labels, probe.C).predict_proba(rows)
    np.testing.assert_allclose(softmax(probe.head.logits(features), axis=1), expected, atol=1e-3)
    for fold in range(5):
        held_out = folds == fold
        head = fit_scikit_learn(rows[~held_out], labels[~held_out], probe.C)
        found = softmax(probe.oof_logits[held_out], axis=1)
        np.testing.assert_allclose(found, head.predict_proba(rows[held_out]), atol=0.05)


def test_probe_of_many_classes_predicts_random_labels_by_chance_out_of_fold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_probe, "MANY_WEIGHTS", 100)
    monkeypatch.setattr(linear_probe, "C_GRID", (100.0,))
    features, labels, folds = draw_data(200, 2000, 5, gap=0)  # images can be told apart, classes cannot
    oof = fit_probe(features, labels, folds).oof_logits
    is_right = oof.argmax(1) == labels
    for fold in range(5):
        assert is_right[folds == fold].mean() < 0.55, fold  # the largest class has a third; seen labels: 0.65


def test_images_never_held_out_have_nan_logits_and_are_trained_on() -> None:
    features, labels, folds = draw_data(120, 10, 3, seed=3)
    never = np.zeros(len(labels), dtype=np.bool_)
    never[::7] = True
    folds[never] = NEVER_HELD_OUT
    probe = fit_probe(features, labels, folds)
    is_nan = np.isnan(probe.oof_logits)
    np.testing.assert_array_equal(is_nan, np.repeat(never[:, None], 3, axis=1))
    rows = scale_rows(features)
    expected = np.empty((len(labels), 3))
    for fold in range(5):
        held_out = folds == fold
        expected[held_out] = fit_scikit_learn(rows[~held_out], labels[~held_out], probe.C).predict_proba(
            rows[held_out]
        )
    np.testing.assert_allclose(softmax(probe.oof_logits, axis=1)[~never], expected[~never], atol=0.01)


def test_only_image_of_a_class_is_trained_on() -> None:
    features, labels, folds = draw_data(90, 10, 2, seed=4)
    features = np.vstack([features, features.mean(0) + 30 * features.std(0)]).astype(np.float32)
    labels, folds = np.append(labels, 2), np.append(folds, NEVER_HELD_OUT)
    probe = fit_probe(features, labels, folds)
    assert probe.head.logits(features)[-1].argmax() == 2
    assert np.isfinite(probe.oof_logits[:-1]).all()


def test_constant_features_have_no_effect() -> None:
    features, labels, folds = draw_data(120, 10, 3, seed=5)
    constant = np.tile(np.float32([0, 1, -1e4, 3.3e-7]), (len(labels), 1))
    probe = fit_probe(np.hstack([features, constant]), labels, folds)
    plain = fit_probe(features, labels, folds)
    assert np.isfinite(probe.head.weight).all()
    np.testing.assert_allclose(probe.head.weight[:, 10:], 0, atol=1e-6)
    np.testing.assert_allclose(probe.oof_logits, plain.oof_logits, atol=1e-2)


def test_features_with_large_mean_keep_precision() -> None:
    # channel statistics of early stages have means of many standard deviations
    features, labels, folds = draw_data(150, 30, 3, seed=6)
    scaled = (features - features.mean(0)) / features.std(0)
    far = (scaled + 100).astype(np.float32)
    near = fit_probe(scaled, labels, folds)
    probe = fit_probe(far, labels, folds)
    np.testing.assert_allclose(
        softmax(probe.head.logits(far), axis=1), softmax(near.head.logits(scaled), axis=1), atol=2e-3
    )


@pytest.mark.parametrize("n_classes", [2, 5])
def test_separable_classes_are_classified_without_error(n_classes: int) -> None:
    features, labels, folds = draw_data(100, 20, n_classes, seed=7, gap=20)
    probe = fit_probe(features, labels, folds)
    np.testing.assert_array_equal(probe.head.logits(features).argmax(1), labels)
    np.testing.assert_array_equal(probe.oof_logits.argmax(1), labels)


def test_noise_features_give_class_frequencies() -> None:
    rng = np.random.default_rng(8)
    _, labels, folds = draw_data(400, 5, 3, seed=8)
    features = rng.normal(size=(len(labels), 5)).astype(np.float32)
    probs = softmax(fit_probe(features, labels, folds).head.logits(features), axis=1)
    np.testing.assert_allclose(probs.mean(0), np.bincount(labels) / len(labels), atol=1e-3)
    assert probs.std(0).max() < 0.05


def test_order_of_images_only_affects_rounding() -> None:
    features, labels, folds = draw_data(150, 30, 3, seed=9)
    order = np.random.default_rng(0).permutation(len(labels))
    first = fit_probe(features, labels, folds)
    second = fit_probe(features[order], labels[order], folds[order])
    assert second.C == first.C
    np.testing.assert_allclose(second.oof_logits, first.oof_logits[order], atol=0.02)
    np.testing.assert_allclose(
        softmax(second.head.logits(features), axis=1), softmax(first.head.logits(features), axis=1), atol=1e-3
    )


def test_probe_is_reproducible() -> None:
    data = draw_data(150, 30, 3, seed=9)
    fits: list[LinearProbe] = [fit_probe(*data) for _ in range(2)]
    np.testing.assert_array_equal(fits[0].head.weight, fits[1].head.weight)
    np.testing.assert_array_equal(fits[0].head.bias, fits[1].head.bias)
    np.testing.assert_array_equal(fits[0].oof_logits, fits[1].oof_logits)


def test_probe_does_not_modify_arguments() -> None:
    features, labels, folds = draw_data(100, 10, 3)
    weights = draw_weights(100)
    before = features.copy(), labels.copy(), folds.copy(), weights.copy()
    fit_probe(features, labels, folds, weights=weights)
    for value, expected in zip((features, labels, folds, weights), before, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(("n_classes", "n", "n_features"), SHAPES)
def test_weighted_probe_probabilities_equal_scikit_learn(n_classes: int, n: int, n_features: int) -> None:
    features, labels, folds = draw_data(n, n_features, n_classes)
    weights = draw_weights(n)
    probe = fit_probe(features, labels, folds, weights=weights)
    rows = scale_rows(features)
    expected = fit_scikit_learn(rows, labels, probe.C, weights).predict_proba(rows)
    np.testing.assert_allclose(softmax(probe.head.logits(features), axis=1), expected, atol=1e-3)


def test_sample_weights_apply_in_folds_and_in_selection_of_C() -> None:
    features, labels, folds = draw_data(150, 40, 3, seed=2)
    weights = draw_weights(150)
    probe = fit_probe(features, labels, folds, weights=weights)
    rows = scale_rows(features)
    assert probe.nll_by_C[probe.C] == min(probe.nll_by_C.values())
    for C, nll in probe.nll_by_C.items():
        probs = np.empty((len(labels), 3))
        for fold in range(5):
            held_out = folds == fold
            head = fit_scikit_learn(rows[~held_out], labels[~held_out], C, weights[~held_out])
            probs[held_out] = head.predict_proba(rows[held_out])
        expected = np.average(-np.log(probs[np.arange(len(labels)), labels]), weights=weights)
        assert nll == pytest.approx(expected, abs=5e-3)
        if C == probe.C:
            np.testing.assert_allclose(softmax(probe.oof_logits, axis=1), probs, atol=0.01)


@pytest.mark.parametrize("weight", [1.0, 0.37, 1e-6, 3e5])
def test_equal_sample_weights_are_bit_identical_to_none(weight: float) -> None:
    features, labels, folds = draw_data(150, 30, 3, seed=9)
    plain = fit_probe(features, labels, folds)
    weighted = fit_probe(features, labels, folds, weights=np.full(150, weight, np.float32))
    assert weighted.nll_by_C == plain.nll_by_C
    np.testing.assert_array_equal(weighted.head.weight, plain.head.weight)
    np.testing.assert_array_equal(weighted.head.bias, plain.head.bias)
    np.testing.assert_array_equal(weighted.oof_logits, plain.oof_logits)


def test_only_ratios_of_sample_weights_matter() -> None:
    features, labels, folds = draw_data(150, 30, 3, seed=9)
    weights = draw_weights(150)
    first = fit_probe(features, labels, folds, weights=weights)
    second = fit_probe(features, labels, folds, weights=weights * np.float32(7e4))
    assert second.C == first.C
    np.testing.assert_allclose(
        softmax(second.oof_logits, axis=1), softmax(first.oof_logits, axis=1), atol=1e-3
    )


# --- the head that fine-tuning starts from ---


def mean_nll_of(head: LinearHead, features: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    probs = softmax(head.logits(features), axis=1)
    return float(-np.log(probs[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize(("n_classes", "n", "n_features"), [(2, 60, 200), (3, 60, 300), (6, 90, 250)])
def test_initial_head_is_as_uncertain_of_its_images_as_the_probe_of_new_ones(
    n_classes: int, n: int, n_features: int
) -> None:
    features, labels, folds = draw_data(n, n_features, n_classes)
    probe = fit_probe(features, labels, folds)
    target = probe.nll_by_C[probe.C]
    assert mean_nll_of(probe.head, features, labels) < 0.5 * target  # it fits its images
    head = fit_softer_head(features, labels, probe)
    assert target <= mean_nll_of(head, features, labels) < 1.5 * target


def test_initial_head_is_that_of_the_probe_if_it_is_uncertain_already() -> None:
    features, labels, folds = draw_data(300, 4, 2, gap=0.1)
    probe = fit_probe(features, labels, folds)
    certain = replace(probe, nll_by_C={probe.C: 0.0})
    np.testing.assert_allclose(
        softmax(fit_softer_head(features, labels, certain).logits(features), axis=1),
        softmax(probe.head.logits(features), axis=1),
        atol=5e-3,
    )


def test_initial_head_with_weights_favours_heavy_images() -> None:
    features, labels, folds = draw_data(60, 200, 2)
    probe = fit_probe(features, labels, folds)
    plain = fit_softer_head(features, labels, probe)
    weights = np.where(labels == 0, 5, 1).astype(np.float32)
    weighted = fit_softer_head(features, labels, probe, weights=weights)
    gain = weighted.logits(features) - plain.logits(features)
    assert (gain[:, 0] - gain[:, 1]).mean() > 0.1

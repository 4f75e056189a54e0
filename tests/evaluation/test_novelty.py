"""Novelty is uniform for images like the training data and near 1 for all others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pixelplay.evaluation.novelty import Novelty, choose_references, fit_novelty, nearest_distances

N, D, K = 600, 12, 3


def images(n: int, seed: int, shift: float = 0.0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return features of three classes and logits that separate them; shifted ones belong to none."""
    rng = np.random.default_rng(seed)
    centres = 4 * np.eye(K, D)
    features = centres[rng.integers(K, size=n)] + rng.normal(0, 1, (n, D))
    features[:, -3:] += shift
    logits = features[:, :K] - 1.5 * shift * (shift > 0)
    return features.astype(np.float32), logits.astype(np.float32)


@pytest.fixture(scope="module")
def scale() -> Novelty:
    features, logits = images(N, 0)
    folds = np.arange(N) % 5
    return fit_novelty(features, folds, features, folds, logits)


def test_novelty_of_images_like_the_training_data_is_uniform(scale: Novelty) -> None:
    found = scale.measure(*images(4000, 1))
    assert ((found > 0) & (found < 1)).all()
    counts, _ = np.histogram(found, bins=10, range=(0, 1))
    np.testing.assert_allclose(counts / 4000, 0.1, atol=0.035)


def test_novelty_of_out_of_distribution_images_is_near_one(scale: Novelty) -> None:
    near, far, farther = (scale.measure(*images(200, 2, shift=shift)) for shift in (0.0, 4.0, 8.0))
    assert (far > 0.97).mean() > 0.95
    # the order continues beyond the most novel held-out image
    assert (farther > far).all()
    assert (farther < 1).any()
    assert near.mean() < 0.6


def test_distance_and_energy_each_raise_novelty(scale: Novelty) -> None:
    features, logits = images(200, 3)
    plain = scale.measure(features, logits)
    assert (scale.measure(features + np.float32(5), logits) > plain).all()
    assert (scale.measure(features, logits - np.float32(5)) > plain).all()


def test_novelty_ignores_features_beyond_the_compared_ones(scale: Novelty) -> None:
    features, logits = images(50, 4)
    more = np.hstack([features, np.full((50, 7), 99, np.float32)])
    np.testing.assert_array_equal(scale.measure(more, logits), scale.measure(features, logits))


def test_novelty_compares_images_with_other_folds_only() -> None:
    features, logits = images(N, 0)
    twice, both = np.concatenate([features, features]), np.concatenate([logits, logits])
    folds = np.tile(np.arange(N) % 5, 2)  # a duplicate is in the fold of its original
    doubled, single = (
        fit_novelty(twice, folds, twice, folds, both),
        fit_novelty(features, folds[:N], features, folds[:N], logits),
    )
    np.testing.assert_allclose(doubled.centre, single.centre, rtol=1e-3)
    np.testing.assert_allclose(doubled.scores[::2], single.scores, atol=0.02)


def test_a_validation_split_fits_novelty_without_folds() -> None:
    train, (features, logits) = images(N, 0)[0], images(100, 5)
    found = fit_novelty(train, np.ones(N, np.int64), features, np.zeros(100, np.int64), logits)
    assert len(found.scores) == 100
    assert found.measure(features, logits).mean() == pytest.approx(0.5, abs=0.01)


def test_novelty_of_one_image_or_constant_features_is_finite() -> None:
    ones = np.ones((2, D), np.float32)
    folds = np.arange(2)
    found = fit_novelty(ones, folds, ones, folds, np.zeros((2, K), np.float32))
    assert np.isfinite(found.measure(2 * ones, np.zeros((2, K), np.float32))).all()
    assert found.measure(ones[:0], np.zeros((0, K), np.float32)).shape == (0,)
    lone = fit_novelty(ones[:1], folds[:1], ones[:1], folds[1:], np.zeros((1, K), np.float32))
    assert np.isfinite(lone.measure(ones, np.zeros((2, K), np.float32))).all()


def test_nearest_distances_equal_a_brute_force_search() -> None:
    rng = np.random.default_rng(0)
    rows, references = rng.normal(size=(1500, 4)), rng.normal(size=(30, 4))
    expected = np.linalg.norm(rows[:, None] - references, axis=2).min(axis=1) / 2
    np.testing.assert_allclose(nearest_distances(rows, references), expected, rtol=1e-6)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(1, 90), st.integers(0, 3))
def test_references_are_balanced_over_the_classes(labels: list[int], n: int, seed: int) -> None:
    own = np.array(labels)
    chosen = choose_references(own, n, seed)
    assert len(chosen) == len(set(chosen)) == min(n, len(own))
    assert (np.diff(chosen) > 0).all()
    available, selected = np.bincount(own, minlength=5), np.bincount(own[chosen], minlength=5)
    # a class with images to spare has as many references as any other, or one fewer
    assert all(selected[k] >= selected.max() - 1 for k in range(5) if selected[k] < available[k])


@pytest.mark.parametrize("spread", [0.0, 1e-7, 1e-4])
def test_novelty_ignores_noise_in_a_nearly_constant_feature(spread: float) -> None:
    features, logits = images(N, 0)
    rng = np.random.default_rng(0)
    features[:, 0] = 0.3 + rng.normal(0, spread, N)
    folds = np.arange(N) % 5
    scale = fit_novelty(features, folds, features, folds, logits)
    new, new_logits = images(200, 1)
    new[:, 0] = 0.3
    moved = new.copy()
    moved[:, 0] += 1e-3
    np.testing.assert_allclose(scale.measure(moved, new_logits), scale.measure(new, new_logits), atol=0.02)


def test_features_that_hardly_vary_do_not_decide_the_novelty() -> None:
    features, logits = images(N, 0)
    features[:, 6:9] *= 0.02
    folds = np.arange(N) % 5
    scale = fit_novelty(features, folds, features, folds, logits)
    new, new_logits = images(200, 1)
    new[:, 6:9] *= 0.02
    moved = new.copy()
    moved[:, 6:9] += 0.1  # five of their standard deviations, a tenth of those of the others
    np.testing.assert_allclose(scale.measure(moved, new_logits), scale.measure(new, new_logits), atol=0.05)

"""Tests of pixelplay.data.sampling."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pixelplay.config import Imbalance
from pixelplay.data.sampling import (
    MAX_DRAWS,
    OversampleTo,
    class_priors,
    class_weights,
    draw_epoch,
    effective_prior,
    epoch_length,
    expected_draws,
    imbalance_ratio,
    natural_offset,
    round_draws,
)

COUNTS = np.array([40, 3, 10, 1])
LABELS = np.random.default_rng(5).permutation(np.repeat(np.arange(4), COUNTS))
WAYS: list[tuple[Imbalance, OversampleTo]] = [
    ("none", None),
    ("none", 7),
    ("none", "largest"),
    ("sampler", None),
    ("sampler", 7),
    ("sampler", "largest"),
]


def draw(imbalance: Imbalance, oversample_to: OversampleTo, seed: int = 0) -> NDArray[np.int64]:
    return draw_epoch(LABELS, imbalance, oversample_to, np.random.default_rng(seed))


def test_imbalance_ratio_ignores_empty_classes() -> None:
    for counts, ratio in [([14, 1], 14), ([10, 0, 4], 2.5), ([3], 1), ([0, 0], 1), ([], 1)]:
        assert imbalance_ratio(np.array(counts, dtype=np.int64)) == ratio


def test_class_priors_are_class_frequencies() -> None:
    np.testing.assert_array_equal(class_priors(np.array([6, 0, 2])), [0.75, 0, 0.25])


def test_class_weights_equalize_classes_and_have_mean_one() -> None:
    weights = class_weights(COUNTS)
    np.testing.assert_allclose(weights * COUNTS, COUNTS.sum() / 4)
    assert weights[LABELS].mean() == pytest.approx(1)


@pytest.mark.parametrize("imbalance", [way for way in get_args(Imbalance) if way not in ("sampler", "auto")])
def test_epoch_without_sampler_draws_every_image_once(imbalance: Imbalance) -> None:
    first, second = draw(imbalance, None, 0), draw(imbalance, None, 1)
    np.testing.assert_array_equal(np.sort(first), np.arange(len(LABELS)))
    assert (first != second).any()
    assert (first != np.arange(len(LABELS))).any()


def test_epoch_order_is_uniform() -> None:
    labels = np.array([0, 1, 0])
    rng = np.random.default_rng(0)
    orders = np.array([draw_epoch(labels, "none", None, rng) for _ in range(6000)])
    _, times = np.unique(orders, axis=0, return_counts=True)
    assert len(times) == 6
    np.testing.assert_allclose(times, 1000, atol=120)  # four standard deviations


def test_sampler_draws_classes_and_their_images_equally_often() -> None:
    drawn = draw("sampler", None)
    assert len(drawn) == len(LABELS)
    per_class = np.bincount(LABELS[drawn])
    assert per_class.max() - per_class.min() <= 1
    per_image = np.bincount(drawn, minlength=len(LABELS))
    for k in range(len(COUNTS)):
        assert np.ptp(per_image[np.equal(LABELS, k)]) <= 1


def test_sampler_favours_no_class_over_many_epochs() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 0, 0, 1, 2])  # seven draws for three classes
    epochs = [np.bincount(labels[draw_epoch(labels, "sampler", None, rng)]) for _ in range(3000)]
    np.testing.assert_allclose(np.mean(epochs, axis=0), 7 / 3, atol=0.04)


@pytest.mark.parametrize(
    ("oversample_to", "sizes"), [(1, COUNTS), (7, [40, 7, 10, 7]), (55, [55] * 4), ("largest", [40] * 4)]
)
def test_oversampling_reaches_exactly_the_requested_size(
    oversample_to: OversampleTo, sizes: list[int]
) -> None:
    np.testing.assert_array_equal(np.bincount(LABELS[draw("none", oversample_to)]), sizes)


def test_sampler_epoch_is_as_long_as_the_oversampled_classes() -> None:
    np.testing.assert_array_equal(np.bincount(LABELS[draw("sampler", "largest")]), [40] * 4)
    np.testing.assert_array_equal(np.bincount(LABELS[draw("sampler", 7)]), [16] * 4)


@pytest.mark.parametrize(("imbalance", "oversample_to"), WAYS)
def test_sampler_repeats_no_image_before_all_of_its_class_came(
    imbalance: Imbalance, oversample_to: OversampleTo
) -> None:
    drawn = draw(imbalance, oversample_to)
    for k, n in enumerate(COUNTS):
        images = drawn[LABELS[drawn] == k]
        for start in range(0, len(images), n):
            one_round = images[start : start + n]
            assert len(np.unique(one_round)) == len(one_round)


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    imbalance=st.sampled_from(["none", "sampler", "class_weights"]),
    oversample_to=st.one_of(st.none(), st.just("largest"), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_epoch_length_matches_the_sampler(
    counts: list[int], imbalance: Imbalance, oversample_to: OversampleTo, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    drawn = draw_epoch(labels, imbalance, oversample_to, np.random.default_rng(seed))
    assert len(drawn) == epoch_length(np.array(counts), imbalance, oversample_to)
    assert drawn.dtype == np.int64
    assert set(labels[drawn]) == set(labels)


@pytest.mark.parametrize(("imbalance", "oversample_to"), WAYS)
def test_same_seed_draws_the_same_epoch(imbalance: Imbalance, oversample_to: OversampleTo) -> None:
    np.testing.assert_array_equal(draw(imbalance, oversample_to, 3), draw(imbalance, oversample_to, 3))


@pytest.mark.parametrize(("imbalance", "oversample_to"), WAYS)
def test_effective_prior_is_the_class_mix_of_the_sampler(
    imbalance: Imbalance, oversample_to: OversampleTo
) -> None:
    mix = np.mean([np.bincount(LABELS[draw(imbalance, oversample_to, seed)]) for seed in range(200)], axis=0)
    expected = effective_prior(COUNTS, imbalance, oversample_to)
    np.testing.assert_allclose(mix / mix.sum(), expected, atol=0.005)
    assert expected.sum() == pytest.approx(1)


def test_effective_prior_of_class_weights_is_uniform() -> None:
    np.testing.assert_array_equal(effective_prior(COUNTS, "class_weights", None), [0.25] * 4)


@pytest.mark.parametrize(("imbalance", "oversample_to"), [*WAYS, ("class_weights", None), ("focal", None)])
def test_natural_offset_turns_the_effective_prior_into_class_priors(
    imbalance: Imbalance, oversample_to: OversampleTo
) -> None:
    fitted = np.log(effective_prior(COUNTS, imbalance, oversample_to))
    natural = np.exp(fitted + natural_offset(COUNTS, imbalance, oversample_to, 0.7))
    np.testing.assert_allclose(natural, class_priors(COUNTS))


@pytest.mark.parametrize("imbalance", ["none", "focal"])
def test_natural_offset_is_zero_for_natural_logits(imbalance: Imbalance) -> None:
    np.testing.assert_array_equal(natural_offset(COUNTS, imbalance, None, 1.0), np.zeros(4))


def test_natural_offset_of_adjusted_losses_is_their_adjustment() -> None:
    log_priors = np.log(class_priors(COUNTS))
    np.testing.assert_array_equal(natural_offset(COUNTS, "balanced_softmax", None, 0.3), log_priors)
    np.testing.assert_array_equal(natural_offset(COUNTS, "logit_adjusted", None, 0.3), 0.3 * log_priors)
    np.testing.assert_array_equal(natural_offset(COUNTS, "logit_adjusted", None, 0.0), np.zeros(4))


# Hard examples

ERRORS = st.lists(st.floats(0, 1), min_size=1, max_size=60).map(np.array)
FRACTIONS = st.floats(0, 0.99)


@given(errors=ERRORS, hard_example_frac=FRACTIONS)
def test_hard_example_draws_sum_up_and_stay_within_bounds(
    errors: np.ndarray, hard_example_frac: float
) -> None:
    draws = expected_draws(errors, hard_example_frac)
    assert draws.sum() == pytest.approx(len(errors))
    assert draws.min() >= 1 - hard_example_frac - 1e-9
    assert draws.max() <= MAX_DRAWS + 1e-9


@given(errors=ERRORS, hard_example_frac=FRACTIONS)
def test_hard_example_draws_increase_with_the_error(errors: np.ndarray, hard_example_frac: float) -> None:
    order = np.argsort(errors, kind="stable")
    assert (np.diff(expected_draws(errors, hard_example_frac)[order]) >= -1e-9).all()


@pytest.mark.parametrize("level", [0.0, 1e-9, 0.3, 1.0])
def test_hard_example_draws_are_uniform_for_equal_errors(level: float) -> None:
    np.testing.assert_allclose(expected_draws(np.full(7, level), 0.8), 1)


def test_hard_example_fraction_is_drawn_in_proportion_to_the_error() -> None:
    errors = np.array([0.1, 0.2, 0.3, 0.4])
    np.testing.assert_allclose(expected_draws(errors, 0.5), 0.5 + 0.5 * 4 * errors / errors.sum())


def test_draws_above_the_limit_go_to_other_hard_examples() -> None:
    draws = expected_draws(np.array([1.0, 0.02, 0.01, 0.01, 0.0, 0.0]), 0.5)
    assert draws[0] == MAX_DRAWS
    np.testing.assert_allclose(draws[1] - 0.5, 2 * (draws[2] - 0.5))  # proportional to their errors
    assert draws.sum() == pytest.approx(6)


@given(errors=ERRORS, hard_example_frac=FRACTIONS, seed=st.integers(0, 1000))
def test_rounded_draws_are_close_and_keep_their_sum(
    errors: np.ndarray, hard_example_frac: float, seed: int
) -> None:
    draws = expected_draws(errors, hard_example_frac)
    drawn = round_draws(draws, np.random.default_rng(seed))
    assert drawn.sum() == len(errors)
    assert (np.abs(drawn - draws) < 1 + 1e-9).all()


def test_rounded_draws_are_unbiased() -> None:
    draws = expected_draws(np.array([0.9, 0.01, 0.3, 0.02, 0.6, 0.05]), 0.6)
    rng = np.random.default_rng(0)
    mean = np.mean([round_draws(draws, rng) for _ in range(20_000)], axis=0)
    np.testing.assert_allclose(mean, draws, atol=0.015)

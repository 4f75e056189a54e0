"""What imbalance.py promises: what is drawn, what it counts, and the way back to natural priors."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pixelplay.config import Imbalance
from pixelplay.data.sampling import (
    OversampleTo,
    class_priors,
    class_weights,
    draw_epoch,
    effective_prior,
    epoch_length,
    imbalance_ratio,
    natural_offset,
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


def test_the_ratio_leaves_out_absent_classes() -> None:
    for counts, ratio in [([14, 1], 14), ([10, 0, 4], 2.5), ([3], 1), ([0, 0], 1), ([], 1)]:
        assert imbalance_ratio(np.array(counts, dtype=np.int64)) == ratio


def test_priors_are_the_shares_of_the_classes() -> None:
    np.testing.assert_array_equal(class_priors(np.array([6, 0, 2])), [0.75, 0, 0.25])


def test_class_weights_make_classes_equal_and_have_mean_one() -> None:
    weights = class_weights(COUNTS)
    np.testing.assert_allclose(weights * COUNTS, COUNTS.sum() / 4)
    assert weights[LABELS].mean() == pytest.approx(1)


@pytest.mark.parametrize("imbalance", [way for way in get_args(Imbalance) if way not in ("sampler", "auto")])
def test_natural_epochs_hold_every_image_once_in_random_order(imbalance: Imbalance) -> None:
    first, second = draw(imbalance, None, 0), draw(imbalance, None, 1)
    np.testing.assert_array_equal(np.sort(first), np.arange(len(LABELS)))
    assert (first != second).any()
    assert (first != np.arange(len(LABELS))).any()


def test_natural_epochs_put_every_image_everywhere_equally_often() -> None:
    labels = np.array([0, 1, 0])
    rng = np.random.default_rng(0)
    orders = np.array([draw_epoch(labels, "none", None, rng) for _ in range(6000)])
    _, times = np.unique(orders, axis=0, return_counts=True)
    assert len(times) == 6
    np.testing.assert_allclose(times, 1000, atol=120)  # four standard deviations


def test_the_sampler_draws_classes_and_their_images_equally_often() -> None:
    drawn = draw("sampler", None)
    assert len(drawn) == len(LABELS)
    per_class = np.bincount(LABELS[drawn])
    assert per_class.max() - per_class.min() <= 1
    per_image = np.bincount(drawn, minlength=len(LABELS))
    for k in range(len(COUNTS)):
        assert np.ptp(per_image[np.equal(LABELS, k)]) <= 1


def test_the_sampler_favours_no_class_over_many_epochs() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0, 0, 0, 0, 0, 1, 2])  # seven draws for three classes
    epochs = [np.bincount(labels[draw_epoch(labels, "sampler", None, rng)]) for _ in range(3000)]
    np.testing.assert_allclose(np.mean(epochs, axis=0), 7 / 3, atol=0.04)


@pytest.mark.parametrize(
    ("oversample_to", "raised"), [(1, COUNTS), (7, [40, 7, 10, 7]), (55, [55] * 4), ("largest", [40] * 4)]
)
def test_smaller_classes_are_raised_to_exactly_the_asked_size(
    oversample_to: OversampleTo, raised: list[int]
) -> None:
    np.testing.assert_array_equal(np.bincount(LABELS[draw("none", oversample_to)]), raised)


def test_the_samplers_epoch_is_as_long_as_the_raised_classes() -> None:
    np.testing.assert_array_equal(np.bincount(LABELS[draw("sampler", "largest")]), [40] * 4)
    np.testing.assert_array_equal(np.bincount(LABELS[draw("sampler", 7)]), [16] * 4)


@pytest.mark.parametrize(("imbalance", "oversample_to"), WAYS)
def test_no_image_comes_twice_before_every_one_of_its_class_came_once(
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
def test_epochs_are_as_long_as_announced_whatever_is_drawn(
    counts: list[int], imbalance: Imbalance, oversample_to: OversampleTo, seed: int
) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    drawn = draw_epoch(labels, imbalance, oversample_to, np.random.default_rng(seed))
    assert len(drawn) == epoch_length(np.array(counts), imbalance, oversample_to)
    assert drawn.dtype == np.int64
    assert set(labels[drawn]) == set(labels)


@pytest.mark.parametrize(("imbalance", "oversample_to"), WAYS)
def test_the_same_seed_draws_the_same_epoch(imbalance: Imbalance, oversample_to: OversampleTo) -> None:
    np.testing.assert_array_equal(draw(imbalance, oversample_to, 3), draw(imbalance, oversample_to, 3))


@pytest.mark.parametrize(("imbalance", "oversample_to"), WAYS)
def test_the_effective_prior_is_the_mix_that_is_drawn(
    imbalance: Imbalance, oversample_to: OversampleTo
) -> None:
    mix = np.mean([np.bincount(LABELS[draw(imbalance, oversample_to, seed)]) for seed in range(200)], axis=0)
    expected = effective_prior(COUNTS, imbalance, oversample_to)
    np.testing.assert_allclose(mix / mix.sum(), expected, atol=0.005)
    assert expected.sum() == pytest.approx(1)


@pytest.mark.parametrize("imbalance", ["class_weights", "crt"])
def test_weights_and_retraining_fit_equal_classes(imbalance: Imbalance) -> None:
    np.testing.assert_array_equal(effective_prior(COUNTS, imbalance, None), [0.25] * 4)


@pytest.mark.parametrize(
    ("imbalance", "oversample_to"), [*WAYS, ("class_weights", None), ("crt", None), ("focal", None)]
)
def test_the_offset_turns_the_effective_prior_into_the_datas(
    imbalance: Imbalance, oversample_to: OversampleTo
) -> None:
    fitted = np.log(effective_prior(COUNTS, imbalance, oversample_to))
    natural = np.exp(fitted + natural_offset(COUNTS, imbalance, oversample_to, 0.7))
    np.testing.assert_allclose(natural, class_priors(COUNTS))


@pytest.mark.parametrize("imbalance", ["none", "focal"])
def test_natural_logits_are_left_alone(imbalance: Imbalance) -> None:
    np.testing.assert_array_equal(natural_offset(COUNTS, imbalance, None, 1.0), np.zeros(4))


def test_the_offset_of_adjusted_losses_is_what_they_add() -> None:
    log_priors = np.log(class_priors(COUNTS))
    np.testing.assert_array_equal(natural_offset(COUNTS, "balanced_softmax", None, 0.3), log_priors)
    np.testing.assert_array_equal(natural_offset(COUNTS, "logit_adjusted", None, 0.3), 0.3 * log_priors)
    np.testing.assert_array_equal(natural_offset(COUNTS, "logit_adjusted", None, 0.0), np.zeros(4))

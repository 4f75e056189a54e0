"""Paired comparisons reproduce published examples, and their intervals cover planted differences."""

import numpy as np
import pytest
from numpy.typing import NDArray

from pixelplay.evaluation.comparison import PairedComparison, compare_models, mcnemar, newcombe

IntArray = NDArray[np.int64]


def _correct(both: int, only_first: int, only_second: int, neither: int) -> tuple[NDArray[np.bool_], ...]:
    times = [both, only_first, only_second, neither]
    return np.repeat([True, True, False, False], times), np.repeat([True, False, True, False], times)


def _compare(
    preds: tuple[IntArray, IntArray], labels: IntArray, groups: IntArray | None = None, n_classes: int = 3
) -> PairedComparison:
    probs = tuple(np.full((len(labels), n_classes), 0.1) for _ in preds)
    for p, pred in zip(probs, preds, strict=True):
        p[np.arange(len(labels)), pred] = 1.1 - 0.1 * n_classes
    known = np.ones(len(labels), dtype=np.bool_)
    return compare_models(preds, (probs[0], probs[1]), labels, groups, is_known=known)


def test_newcombe_interval_equals_published_examples() -> None:
    # Fagerland, Lydersen and Laake, Statistics in Medicine 33 (2014), airway hyper-responsiveness
    found = newcombe(*_correct(1, 1, 7, 12))
    assert (round(found.low, 3), round(found.high, 3)) == (-0.507, -0.026)
    # Newcombe 1998, with continuity correction of the correlation
    found = newcombe(*_correct(36, 12, 2, 0))
    assert (round(found.low, 4), round(found.high, 4)) == (0.0569, 0.3404)


def test_mcnemar_equals_the_sum_of_binomial_tails() -> None:
    assert mcnemar(1, 7) == pytest.approx(2 * 9 / 256 - 8 / 256)
    assert mcnemar(7, 1) == mcnemar(1, 7)
    assert mcnemar(0, 5) == pytest.approx(1 / 32)
    assert mcnemar(3, 3) == pytest.approx(1 - 20 / 64 / 2)
    assert mcnemar(0, 0) == 1


def test_swapping_the_models_flips_every_sign() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    first, second = (np.where(rng.random(200) < share, labels, 0) for share in (0.8, 0.6))
    there, back = _compare((first, second), labels), _compare((second, first), labels)
    assert there.n_only_first_right == back.n_only_second_right
    assert there.p_value == back.p_value
    for name, difference in there.differences.items():
        assert back.values[name] == there.values[name][::-1]
        other = back.differences[name]
        np.testing.assert_allclose(
            [difference.value, difference.low, difference.high], [-other.value, -other.high, -other.low]
        )


def test_equal_predictions_have_difference_zero_and_an_interval_with_a_width() -> None:
    labels = np.repeat([0, 1, 2], 20)
    found = _compare((labels, labels), labels)
    assert found.p_value == 1
    for difference in found.differences.values():
        assert difference.value == 0
        assert not difference.reliable
    accuracy = found.differences["accuracy"]
    assert accuracy.low < 0 < accuracy.high


@pytest.mark.parametrize(("n", "shares"), [(200, (0.9, 0.85)), (80, (0.97, 0.93)), (400, (0.7, 0.7))])
def test_newcombe_interval_has_its_nominal_coverage(n: int, shares: tuple[float, float]) -> None:
    rng, covered, repeats = np.random.default_rng(1), 0, 2000
    for _ in range(repeats):
        ease = rng.random(n)  # images easy for one model are mostly easy for the other
        first = np.where(rng.random(n) < 0.7, ease, rng.random(n)) < shares[0]
        second = np.where(rng.random(n) < 0.7, ease, rng.random(n)) < shares[1]
        found = newcombe(first, second)
        covered += found.low <= shares[0] - shares[1] <= found.high
    assert 0.935 <= covered / repeats <= 0.985


def test_groups_widen_the_interval_and_disable_mcnemar() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 300)
    groups = np.arange(300) // 15  # 20 bursts, each all correct or all wrong
    burst = rng.random(20)
    first = np.where(burst[groups] < 0.8, labels, (labels + 1) % 3)
    second = np.where(burst[groups] < 0.6, labels, (labels + 1) % 3)
    independent, grouped = _compare((first, second), labels), _compare((first, second), labels, groups)
    widths = [
        found.differences["accuracy"].high - found.differences["accuracy"].low
        for found in (independent, grouped)
    ]
    assert widths[1] > 1.5 * widths[0]
    assert grouped.p_value is None
    assert independent.p_value is not None


def test_few_images_of_a_class_make_macro_f1_unreliable() -> None:
    labels = np.array([0] * 60 + [1] * 5)
    first, second = labels.copy(), labels.copy()
    first[:10], second[10:20], second[62] = 1, 1, 0
    found = _compare((first, second), labels, n_classes=2)
    assert found.differences["accuracy"].reliable
    assert not found.differences["macro_f1"].reliable


def test_log_loss_is_compared_on_classes_known_to_both_models() -> None:
    labels = np.array([0, 1, 2, 2])
    probs = np.array([[0.8, 0.2, 0.0]] * 4), np.array([[0.5, 0.25, 0.25]] * 4)
    preds = probs[0].argmax(1), probs[1].argmax(1)
    found = compare_models(preds, probs, labels, None, is_known=labels < 2)
    assert found.differences["log_loss"].n == 2
    expected = -np.log([0.8, 0.2]).mean() + np.log([0.5, 0.25]).mean()
    assert found.differences["log_loss"].value == pytest.approx(expected)
    nothing = compare_models(preds, probs, labels, None, is_known=labels < 0)
    assert "log_loss" not in nothing.differences

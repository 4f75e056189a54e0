import numpy as np
import pytest

from pixelplay.model.head import LinearHead, feature_scale


@pytest.fixture(scope="module")
def head() -> LinearHead:
    rng = np.random.default_rng(0)
    return LinearHead(
        weight=rng.normal(size=(5, 700)).astype(np.float32), bias=rng.normal(size=5).astype(np.float32)
    )


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(60, 700)).astype(np.float32)


def test_logits_are_the_linear_map(head: LinearHead, features: np.ndarray) -> None:
    expected = features.astype(np.float64) @ head.weight.astype(np.float64).T + head.bias
    found = head.logits(features)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_neighbours_change_no_bit(head: LinearHead, features: np.ndarray) -> None:
    together = head.logits(features)
    for n in (1, 2, 7, 33):
        chunks = [head.logits(features[i : i + n]) for i in range(0, 60, n)]
        np.testing.assert_array_equal(np.concatenate(chunks), together)
    np.testing.assert_array_equal(head.logits(features[::-1])[::-1], together)


def test_the_layout_in_memory_changes_no_bit(head: LinearHead, features: np.ndarray) -> None:
    # a head as training makes it lies transposed; as the bundle stores it, it does not
    transposed = LinearHead(weight=np.asfortranarray(head.weight), bias=head.bias)
    np.testing.assert_array_equal(transposed.logits(features), head.logits(features))
    np.testing.assert_array_equal(head.logits(np.asfortranarray(features)), head.logits(features))


def test_a_row_of_nan_stays_alone(head: LinearHead, features: np.ndarray) -> None:
    holes = features.copy()
    holes[3] = np.nan
    found = head.logits(holes)
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(head.logits(features), 3, 0))


@pytest.mark.parametrize("n_shared", [0, 200])
def test_two_heads_joined_give_the_mean_of_their_logits(head: LinearHead, n_shared: int) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 60, 700)).astype(np.float32)
    second[:, :n_shared] = first[:, :n_shared]
    other = LinearHead(
        weight=rng.normal(size=(5, 700)).astype(np.float32), bias=np.arange(5, dtype=np.float32)
    )
    before = head.weight.copy()
    joined = head.averaged_with(other, n_shared)
    found = joined.logits(np.concatenate([first, second[:, n_shared:]], axis=1))
    np.testing.assert_allclose(found, (head.logits(first) + other.logits(second)) / 2, atol=1e-3)
    np.testing.assert_array_equal(head.weight, before)
    assert joined.bias.dtype == np.float32


def test_a_feature_counts_as_it_moves_up_to_the_median() -> None:
    rng = np.random.default_rng(0)
    std = np.array([1e-4, 0.5, 1.0, 2.0, 300.0, 0.0])  # the last never moves, and has no part in the median
    features = (rng.normal(size=(4000, 6)) * std + [0, 5, -5, 0, 1e4, 7]).astype(np.float32)
    mean, scale = feature_scale(features)
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scale, np.hypot(std, 1.0), rtol=0.05)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_features_of_which_none_moves_have_a_scale(value: float) -> None:
    mean, scale = feature_scale(np.full((5, 3), value, np.float32))
    np.testing.assert_array_equal(mean, value)
    np.testing.assert_array_equal(scale, 1)

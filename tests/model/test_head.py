import numpy as np
import pytest

from pixelplay.model.classifier import LinearHead, average_heads, feature_scale


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
    n_joint = 700 + 700 - n_shared
    own = np.concatenate([np.arange(n_shared), np.arange(700, n_joint)])
    joined = average_heads([head, other], [np.arange(700), own], n_joint)
    found = joined.logits(np.concatenate([first, second[:, n_shared:]], axis=1))
    np.testing.assert_allclose(found, (head.logits(first) + other.logits(second)) / 2, atol=1e-3)
    np.testing.assert_array_equal(head.weight, before)
    assert joined.bias.dtype == np.float32


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_a_mean_of_heads_answers_like_the_mean_of_their_cooled_logits(n_hidden: int | None) -> None:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    heads = [
        LinearHead(weight=draw(4, 30), bias=draw(4))
        if n_hidden is None
        else LinearHead(
            weight=draw(4, n_hidden),
            bias=draw(4),
            hidden_weight=draw(n_hidden, 30),
            hidden_bias=draw(n_hidden),
        )
        for _ in range(3)
    ]
    features, temperatures = draw(20, 30), [0.5, 1.0, 2.0]
    joined = average_heads(heads, [np.arange(30)] * 3, 30, temperatures)
    expected = np.mean([h.logits(features) / t for h, t in zip(heads, temperatures, strict=True)], axis=0)
    np.testing.assert_allclose(joined.logits(features), expected, atol=1e-4)
    assert joined.fits(30, 4)


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

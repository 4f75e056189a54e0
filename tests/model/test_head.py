import numpy as np
import pytest

from pixelplay.model.head import LinearHead


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

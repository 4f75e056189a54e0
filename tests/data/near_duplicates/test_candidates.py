"""Tests of pixelplay.data.near_duplicates.candidates."""

import numpy as np
import pytest
from numpy.typing import NDArray

from images import altered, scene
from pixelplay.array_types import UInt8Array
from pixelplay.data.decode import decode_image
from pixelplay.data.near_duplicates.candidates import (
    N_GROUPS,
    find_candidates,
    max_duplicates,
    nearest_pairs,
    unit_rows,
)
from pixelplay.data.near_duplicates.thumbnails import make_thumbnail
from pixelplay.run_log import RunLog


def thumbnails_with_duplicates(kind: str) -> UInt8Array:
    """Make thumbnails of 20 scenes and of near-duplicates of the first four."""
    duplicates = [decode_image(altered(scene(seed))[kind], path="duplicate") for seed in range(4)]
    return np.stack(
        [make_thumbnail(pixels) for pixels in [*(np.asarray(scene(i)) for i in range(20)), *duplicates]]
    )


def cosines_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    cosines = rows @ rows.T
    np.fill_diagonal(cosines, -2)
    return cosines


@pytest.mark.parametrize("kind", list(altered(scene(0))))
def test_every_near_duplicate_is_a_candidate_without_features(kind: str) -> None:
    found = find_candidates(thumbnails_with_duplicates(kind), None, RunLog(quiet=True))
    pairs = {(int(i), int(j)): bool(way) for (i, j), way in zip(found.pairs, found.is_mirrored, strict=True)}
    for i in range(4):
        assert pairs.get((i, 20 + i)) == (kind == "mirrored")


def test_candidates_with_similar_darker_halves_are_marked() -> None:
    thumbnails = thumbnails_with_duplicates("brightened")
    symmetric = np.concatenate([thumbnails[..., :32], thumbnails[..., 31::-1]], axis=2)  # similar both ways
    found = find_candidates(symmetric, None, RunLog(quiet=True))
    for i in range(4):
        rows = np.flatnonzero((found.pairs == (i, 20 + i)).all(1))
        marks = {bool(found.is_mirrored[row]): bool(found.is_dark[row]) for row in rows}
        assert marks == {False: True, True: False}
    assert not found.is_dark.all()


def test_features_find_candidates_that_fingerprints_miss() -> None:
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (40, 64, 64), np.uint8)
    features = rng.standard_normal((40, 600), dtype=np.float32)
    features[39] = features[0] + 0.2 * rng.standard_normal(600, dtype=np.float32)
    assert [0, 39] not in find_candidates(thumbnails, None, RunLog(quiet=True)).pairs.tolist()
    assert [0, 39] in find_candidates(thumbnails, features, RunLog(quiet=True)).pairs.tolist()


def test_neighbors_come_after_the_nearest_ten() -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32))
    *_, neighbors = nearest_pairs(rows, rows, 1)
    expected = np.argsort(-cosines_of(rows), axis=1)[:, 10:14]
    np.testing.assert_array_equal(np.sort(neighbors, axis=1), np.sort(expected, axis=1))


@pytest.mark.parametrize("k", [1, 3])
def test_nearest_pairs_are_closer_than_the_ratio(k: int) -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32))
    cosines = cosines_of(rows)
    distances = np.sqrt(2 - 2 * cosines)
    limit = np.sort(distances, axis=1)[:, 10]
    expected = {
        tuple(sorted((i, int(j))))
        for i in range(40)
        for j in np.argsort(-cosines[i])[:k]
        if distances[i, j] < 0.6 * limit[i]
    }
    assert 5 < len(expected) < 40 * k
    assert {(int(i), int(j)) for i, j in nearest_pairs(rows, rows, k, 0.6)[0]} == expected


def test_among_few_images_every_nearest_is_a_candidate() -> None:
    rows = unit_rows(np.random.default_rng(0).standard_normal((11, 8), dtype=np.float32))
    pairs, _, neighbors = nearest_pairs(rows, rows, 1)
    assert neighbors.shape == (11, 0)
    nearest = cosines_of(rows).argmax(1)
    assert {(int(i), int(j)) for i, j in pairs} == {tuple(sorted((i, int(j)))) for i, j in enumerate(nearest)}


def test_many_images_are_searched_in_groups() -> None:
    n = N_GROUPS + 100
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((n, 64), dtype=np.float32)
    rows[-50:] = rows[:50] + 0.3 * rng.standard_normal((50, 64), dtype=np.float32)
    pairs, _, neighbors = nearest_pairs(unit_rows(rows), unit_rows(rows), 1)
    assert {(i, n - 50 + i) for i in range(50)} <= {(int(i), int(j)) for i, j in pairs}
    assert neighbors.shape == (n, 4)
    assert ((neighbors >= 0) & (neighbors < n)).all()
    cosines = cosines_of(unit_rows(rows))
    rank = (cosines > np.take_along_axis(cosines, neighbors[:, :1], 1)).sum(1)
    assert (rank >= max_duplicates(n)).all()
    assert np.median(rank) < 2 * max_duplicates(n)

"""Tests of pixelplay.data.cache."""

import errno
import os
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from numpy.typing import NDArray

from pixelplay.data.cache import (
    SHARD_ROWS,
    ArrayCache,
    clear_cache,
    default_cache_dir,
    measure_cache,
    prune_cache,
)

Rows = NDArray[np.float32]

MANY = 10**9
N_FEATURES = 12


def digest(i: int) -> bytes:
    return i.to_bytes(16, "big")


def features(n: int, seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(size=(n, N_FEATURES)).astype(np.float32)


def fill(folder: Path, rows: Rows, first: int = 0, key: str = "k", max_bytes: int = MANY) -> None:
    """Cache rows under the digests from `first` on, as one run does."""
    cache = ArrayCache(str(folder), "features", key, max_bytes=max_bytes)
    for i, row in enumerate(rows):
        cache.add(digest(first + i), row)
    cache.flush()


def known(folder: Path, n: int, key: str = "k") -> list[int]:
    cache = ArrayCache(str(folder), "features", key, max_bytes=MANY)
    return [i for i in range(n) if digest(i) in cache]


def shards(folder: Path, kind: str) -> list[Path]:
    return sorted(folder.glob(f"features-*/*.{kind}.npy"))


def age(path: Path, seconds: float) -> None:
    """Move the time of last use of the files of a folder back."""
    for file in path.iterdir():
        status = file.stat()
        os.utime(file, (status.st_atime - seconds, status.st_mtime - seconds))


def test_cached_arrays_are_bit_identical(tmp_path: Path) -> None:
    rows = features(SHARD_ROWS + 100)
    rows[3, :4] = [np.nan, np.inf, -0.0, 1e-45]
    fill(tmp_path, rows)
    assert len(shards(tmp_path, "values")) == 2
    cache = ArrayCache(str(tmp_path), "features", "k", max_bytes=MANY)
    back = np.stack([cache.get(digest(i)) for i in range(len(rows))])
    np.testing.assert_array_equal(back.view(np.uint32), rows.view(np.uint32))
    assert digest(len(rows)) not in cache


def test_other_key_has_its_own_arrays(tmp_path: Path) -> None:
    fill(tmp_path, features(3), key="one")
    assert known(tmp_path, 3, "two") == []
    fill(tmp_path, features(2, seed=1), key="two")
    assert known(tmp_path, 3, "one") == [0, 1, 2]
    np.testing.assert_array_equal(
        ArrayCache(str(tmp_path), "features", "two", max_bytes=MANY).get(digest(1)),
        features(2, seed=1)[1],
    )


def test_full_shard_is_written_immediately(tmp_path: Path) -> None:
    cache = ArrayCache(str(tmp_path), "features", "k", max_bytes=MANY)
    for i, row in enumerate(features(SHARD_ROWS + 1)):
        cache.add(digest(i), row)
    assert known(tmp_path, SHARD_ROWS + 1) == list(range(SHARD_ROWS))


@pytest.mark.parametrize("kind", ["digests", "values"])
@pytest.mark.parametrize("left", [0, 30, -1, None])
def test_truncated_or_deleted_shard_is_skipped(kind: str, left: int | None, tmp_path: Path) -> None:
    fill(tmp_path, features(5))
    damaged = shards(tmp_path, kind)[0]
    fill(tmp_path, features(4), first=5)
    if left is None:
        damaged.unlink()
    else:
        damaged.write_bytes(damaged.read_bytes()[:left])
    assert known(tmp_path, 9) == [5, 6, 7, 8]
    fill(tmp_path, features(5))
    assert known(tmp_path, 9) == list(range(9))


def test_foreign_or_mismatched_shard_is_skipped(tmp_path: Path) -> None:
    fill(tmp_path, features(2))
    folder = tmp_path / "features-k"
    (folder / f"{'0' * 32}.digests.npy").write_bytes(b"no array")
    np.save(folder / f"{'1' * 32}.digests.npy", np.zeros((3, 16), np.uint8))
    np.save(folder / f"{'1' * 32}.values.npy", features(2))
    assert known(tmp_path, 2) == [0, 1]


def test_no_pickle_is_loaded(tmp_path: Path) -> None:
    fill(tmp_path, features(2))
    name = "features-k/" + "2" * 32
    np.save(tmp_path / f"{name}.digests.npy", np.array([digest(7)], dtype=object), allow_pickle=True)
    np.save(tmp_path / f"{name}.values.npy", features(1))
    assert known(tmp_path, 9) == [0, 1]


def test_least_recently_used_shards_are_deleted_above_the_limit(tmp_path: Path) -> None:
    size = 0
    for number, key in enumerate(["a", "b", "c"]):
        fill(tmp_path, features(50), key=key)
        size = measure_cache(str(tmp_path)).n_bytes // (number + 1)
        age(tmp_path / f"features-{key}", 100 * (3 - number))
    assert known(tmp_path, 1, "a") == [0]  # opening is use: now b is the oldest
    fill(tmp_path, features(50), key="d", max_bytes=3 * size)
    assert [bool(known(tmp_path, 1, key)) for key in "abcd"] == [True, False, True, True]
    assert measure_cache(str(tmp_path)).n_bytes <= 3 * size


def test_shard_above_the_limit_is_not_kept(tmp_path: Path) -> None:
    fill(tmp_path, features(100), max_bytes=1000)
    assert measure_cache(str(tmp_path)).n_bytes == 0


def test_leftovers_of_a_crash_are_counted_and_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "features-k"
    folder.mkdir()
    (folder / f"{'a' * 32}.values.npy").write_bytes(bytes(5000))
    (folder / f"{'b' * 32}.values.npy.tmp").write_bytes(bytes(5000))
    assert measure_cache(str(tmp_path)).n_bytes == 10_000
    age(folder, 100)
    fill(tmp_path, features(10), max_bytes=3000)
    assert sorted(path.name.partition(".")[2] for path in folder.iterdir()) == ["digests.npy", "values.npy"]
    assert known(tmp_path, 10) == list(range(10))


def test_cache_limit_zero_neither_reads_nor_writes(tmp_path: Path) -> None:
    fill(tmp_path, features(3))
    before = sorted(tmp_path.rglob("*"))
    cache = ArrayCache(str(tmp_path), "features", "k", max_bytes=0)
    assert digest(0) not in cache
    cache.add(digest(9), features(1)[0])
    cache.flush()
    assert sorted(tmp_path.rglob("*")) == before
    nowhere = tmp_path / "nowhere"
    fill(nowhere, features(3), max_bytes=0)
    assert not nowhere.exists()


def test_cache_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"mine")
    cache = ArrayCache(str(blocked), "features", "k", max_bytes=MANY)
    for i, row in enumerate(features(2 * SHARD_ROWS)):
        cache.add(digest(i), row)
    cache.flush()
    assert blocked.read_bytes() == b"mine"
    assert measure_cache(str(blocked)).n_files == 0
    clear_cache(str(blocked))


def test_read_only_cache_can_be_read(unprivileged: Path) -> None:
    fill(unprivileged, features(2))
    for path in (*unprivileged.glob("*/*"), unprivileged / "features-k"):
        path.chmod(0o500)
    fill(unprivileged, features(1), first=2)
    assert known(unprivileged, 3) == [0, 1]
    clear_cache(str(unprivileged))
    assert known(unprivileged, 3) == [0, 1]


def test_cache_of_another_user_can_be_read(unprivileged: Path) -> None:
    fill(unprivileged, features(2))
    user = os.geteuid()
    if os.getuid() != 0:
        pytest.skip("only root can play two users")
    os.seteuid(0)
    os.seteuid(65533)
    try:
        assert known(unprivileged, 2) == [0, 1]
    finally:
        os.seteuid(0)
        os.seteuid(user)


def test_clear_cache_keeps_other_files(tmp_path: Path) -> None:
    fill(tmp_path, features(2), key="one")
    fill(tmp_path, features(2), key="two")
    others = [
        "mine.txt",
        "features-mine/notes.txt",
        "features-mine/a.digests.npy",
        "features-two/mine",
        "features-x",
    ]
    for name in others:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    clear_cache(str(tmp_path))
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted(others)
    assert not (tmp_path / "features-one").exists()
    assert measure_cache(str(tmp_path)).n_files == 0


def test_measure_cache_counts_files_and_bytes(tmp_path: Path) -> None:
    fill(tmp_path, features(2))
    (tmp_path / "features-k/mine").write_bytes(bytes(999))
    files = [*shards(tmp_path, "digests"), *shards(tmp_path, "values")]
    use = measure_cache(str(tmp_path))
    assert (use.n_files, use.n_bytes) == (2, sum(path.stat().st_size for path in files))
    assert measure_cache(str(tmp_path / "nowhere")).n_files == 0


def test_prune_cache_deletes_both_files_of_a_shard(tmp_path: Path) -> None:
    fill(tmp_path, features(2))
    fill(tmp_path, features(2), first=2)
    prune_cache(str(tmp_path), measure_cache(str(tmp_path)).n_bytes - 1)
    assert len(shards(tmp_path, "digests")) == len(shards(tmp_path, "values")) == 1
    assert len(known(tmp_path, 4)) == 2


def test_open_cache_stays_readable_after_clear_cache(tmp_path: Path) -> None:
    rows = features(4)
    fill(tmp_path, rows)
    cache = ArrayCache(str(tmp_path), "features", "k", max_bytes=MANY)
    clear_cache(str(tmp_path))
    np.testing.assert_array_equal(np.stack([cache.get(digest(i)) for i in range(4)]), rows)


def test_default_cache_dir_follows_xdg_cache_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == str(tmp_path / "pixelplay")
    assert not (tmp_path / "pixelplay").exists()


def test_shard_that_cannot_be_read_back_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, **options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    cache = ArrayCache(str(tmp_path), "views", "key", max_bytes=10**9)
    cache.add(b"d" * 16, np.zeros(3))
    monkeypatch.setattr(np, "load", refuse)
    cache.flush()
    assert b"d" * 16 not in cache
    assert "cannot be read back" in cache.failure


def test_drop_deletes_one_key_and_stops_caching(tmp_path: Path) -> None:
    kept, dropped = (ArrayCache(str(tmp_path), "views", key, max_bytes=MANY) for key in ("ab", "cd"))
    for cache in (kept, dropped):
        cache.add(digest(1), np.zeros(3, np.float32))
        cache.flush()
    dropped.drop()
    dropped.add(digest(2), np.zeros(3, np.float32))
    dropped.flush()
    assert digest(1) not in dropped
    assert [folder.name for folder in tmp_path.iterdir()] == ["views-ab"]
    assert digest(1) in kept


def test_full_disk_leaves_no_partial_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(file: IO[bytes], array: Rows, **options: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", half)
    cache = ArrayCache(str(tmp_path), "views", "ab", max_bytes=MANY)
    cache.add(digest(1), np.zeros(3, np.float32))
    cache.flush()
    assert cache.failure.endswith("No space left on device")
    assert list((tmp_path / "views-ab").iterdir()) == []

"""Storage gives the bytes of regular files and zip members, and a typed error for everything else."""

import os
import socket
import struct
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_files import assert_words, pack
from pixelplay.data import file_access
from pixelplay.data.file_access import FolderStorage, ImageStorage, ZipStorage, is_unsafe_member
from pixelplay.errors import DataError, ImageError, ImageStatus


def failure(opened: ImageStorage, path: str) -> tuple[ImageStatus, str]:
    """Return the status and reason of the error that reading a path raises."""
    with pytest.raises(ImageError) as caught:
        opened.read(path)
    assert caught.value.path == path
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    return caught.value.status, caught.value.reason


def make_zip(root: Path, method: int = zipfile.ZIP_DEFLATED) -> ZipStorage:
    with zipfile.ZipFile(root / "z.zip", "w", method) as archive:
        archive.mkdir("a")
        archive.writestr("a/1", b"one" * 100)
        archive.writestr("empty", b"")
    return ZipStorage(str(root / "z.zip"))


def test_files_are_read_by_relative_and_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1").write_bytes(b"\0one\n\r")
    opened = FolderStorage(str(tmp_path))
    for path in ("a/1", str(tmp_path / "a/1")):
        assert opened.read(path) == b"\0one\n\r"
        assert opened.size(path) == 6
        assert path in opened


def test_reading_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "1"
    path.write_bytes(b"x")
    before = path.stat()
    FolderStorage(str(tmp_path)).read("1")
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ctime_ns) == (after.st_mtime_ns, after.st_ctime_ns)


@pytest.mark.parametrize(
    ("make", "status", "reason"),
    [
        (lambda path: None, "missing", "no such file"),
        (lambda path: path.symlink_to("nowhere"), "missing", "no such file"),
        (lambda path: path.mkdir(), "unreadable", "a folder"),
        (os.mkfifo, "unreadable", "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "unreadable", "not a regular file"),
        (lambda path: path.symlink_to(path), "unreadable", "Too many levels of symbolic links"),
    ],
    ids=["missing", "dangling", "folder", "pipe", "device", "loop"],
)
def test_paths_that_are_not_regular_files_are_refused_without_blocking(
    make: Callable[[Path], object], status: ImageStatus, reason: str, tmp_path: Path
) -> None:
    make(tmp_path / "x")
    opened = FolderStorage(str(tmp_path))
    assert failure(opened, "x") == (status, reason)
    assert "x" not in opened
    with pytest.raises(ImageError):
        opened.size("x")


def test_a_socket_is_not_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("x")
        assert failure(FolderStorage("."), "x") == ("unreadable", "not a regular file")


def test_a_file_without_permission_is_unreadable(unprivileged: Path) -> None:
    (unprivileged / "x").touch(mode=0)
    assert failure(FolderStorage(str(unprivileged)), "x") == ("unreadable", "Permission denied")


def test_impossible_names_are_image_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    opened = FolderStorage(str(tmp_path))
    assert failure(opened, "a\0b") == ("unreadable", "embedded null byte")
    assert failure(opened, "a" * 5000) == ("unreadable", "File name too long")
    assert failure(opened, "file/inside") == ("missing", "no such file")
    assert failure(opened, "") == ("unreadable", "a folder")


def test_a_file_over_the_size_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_access, "MAX_BYTES", 2000)
    (tmp_path / "x").write_bytes(bytes(2001))
    (tmp_path / "y").write_bytes(bytes(2000))
    opened = FolderStorage(str(tmp_path))
    assert failure(opened, "x") == ("too_large", "2,001 bytes; the limit is 2,000 bytes")
    assert len(opened.read("y")) == 2000


def test_display_path_includes_the_folder_or_archive(tmp_path: Path) -> None:
    assert FolderStorage("").display_path("a/1") == FolderStorage(".").display_path("a/1") == "a/1"
    assert FolderStorage("photos").display_path("a/1") == "photos/a/1"
    assert make_zip(tmp_path).display_path("a/1") == f"{tmp_path}/z.zip/a/1"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_members_are_read_in_place(method: int, tmp_path: Path) -> None:
    opened = make_zip(tmp_path, method)
    assert opened.names() == ["a/1", "empty"]
    assert (opened.read("a/1"), opened.size("a/1")) == (b"one" * 100, 300)
    assert opened.read("empty") == b""
    assert list(tmp_path.iterdir()) == [tmp_path / "z.zip"]


@pytest.mark.parametrize("path", ["b", "a", "a/", "../z.zip", "/etc/passwd"])
def test_only_zip_members_that_are_files_can_be_read(path: str, tmp_path: Path) -> None:
    opened = make_zip(tmp_path)
    assert failure(opened, path) == ("missing", "no such member in the zip archive")
    assert path not in opened


def test_a_zip_member_over_the_size_limit_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_access, "MAX_BYTES", 299)
    assert failure(make_zip(tmp_path, zipfile.ZIP_STORED), "a/1") == (
        "too_large",
        "unpacks to 300 bytes, 1 times its packed size; limits: 299 bytes, 200 times",
    )


def test_a_blank_bitmap_is_not_a_zip_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("white.bmp", bytes(3 << 20))
    assert len(ZipStorage(str(tmp_path / "z.zip")).read("white.bmp")) == 3 << 20


def test_threads_share_one_archive(tmp_path: Path) -> None:
    content = {f"{i}": bytes([i]) * 20_000 for i in range(40)}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    opened = ZipStorage(str(tmp_path / "z.zip"))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.read, content)) == list(content.values())


def test_files_that_are_not_archives_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "x.zip"
    other.write_bytes(b"no archive")
    for path, why in ((str(other), "File is not a zip file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(DataError) as caught:
            ZipStorage(path)
        assert_words(str(caught.value), path, why)


def declare(path: str, name: str, *, size: int | None = None, flags: int | None = None) -> None:
    """Overwrite the unpacked size or the flags of a zip member in both of its headers."""
    data = bytearray(Path(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        local = archive.getinfo(name).header_offset
    central = 0
    while True:
        central = data.index(b"PK\x01\x02", central + 1)
        if data[central + 46 :].startswith(name.encode()):
            break
    if size is not None:
        struct.pack_into("<I", data, local + 22, size)
        struct.pack_into("<I", data, central + 24, size)
    if flags is not None:
        struct.pack_into("<H", data, local + 6, flags)
        struct.pack_into("<H", data, central + 8, flags)
    Path(path).write_bytes(data)


def read_error(source: str, path: str) -> ImageError:
    archive = ZipStorage(source)
    with pytest.raises(ImageError) as caught:
        archive.read(path)
    assert archive.read("dog/1") == b"good"  # the others are still readable
    return caught.value


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    bomb = bytes(65 << 20)
    source = pack(tmp_path, {"cat/1": bomb, "dog/1": b"good"}, zipfile.ZIP_DEFLATED)
    error = read_error(source, "cat/1")
    assert error.status == "too_large"
    assert_words(error.reason, "68,157,440 bytes", "1,0", "limits: 1,073,741,824 bytes, 200 times")


@pytest.mark.parametrize("declared", [10, 2000, 5000])
def test_a_zip_member_with_a_wrong_declared_size_is_unreadable(declared: int, tmp_path: Path) -> None:
    content = {"cat/1": bytes(range(250)) * 16, "dog/1": b"good"}
    source = pack(tmp_path, content, zipfile.ZIP_DEFLATED)
    declare(source, "cat/1", size=declared)
    error = read_error(source, "cat/1")
    assert error.status == "unreadable"
    assert "damaged zip member" in error.reason


def test_a_zip_method_that_ignores_declared_sizes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("cat/1", bytes(10_000_000), zipfile.ZIP_BZIP2)
        archive.writestr("dog/1", b"good")
    source = str(tmp_path / "data.zip")
    declare(source, "cat/1", size=100)
    error = read_error(source, "cat/1")
    assert error.status == "unsupported"
    assert_words(error.reason, "method 12", "deflate")


def test_an_encrypted_zip_member_is_unsupported(tmp_path: Path) -> None:
    source = pack(tmp_path, {"cat/1": b"secret", "dog/1": b"good"})
    declare(source, "cat/1", flags=1)
    error = read_error(source, "cat/1")
    assert error.status == "unsupported"
    assert "encrypted" in error.reason


def test_a_damaged_zip_member_does_not_affect_the_others(tmp_path: Path) -> None:
    source = pack(tmp_path, {"cat/1": b"abcdefgh" * 50, "dog/1": b"good"})
    data = Path(source).read_bytes()
    Path(source).write_bytes(data.replace(b"abcdefgh", b"abcdXfgh", 1))
    error = read_error(source, "cat/1")
    assert error.status == "unreadable"
    assert "Bad CRC-32 for file 'cat/1'" in error.reason


@given(st.binary(max_size=300))
def test_a_mangled_archive_never_crashes(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    root = tmp_path_factory.mktemp("mangled")
    make_zip(root)
    data = bytearray((root / "z.zip").read_bytes())
    for place, value in zip(noise[::2], noise[1::2], strict=False):
        data[-1 - place % len(data)] = value
    (root / "m.zip").write_bytes(data)
    try:
        opened = ZipStorage(str(root / "m.zip"))
    except DataError:
        return
    for name in opened.names():
        try:
            opened.read(name)
        except ImageError:
            continue


@pytest.mark.parametrize(
    ("name", "is_unsafe"),
    [
        ("a/b.jpg", False),
        ("a..b/c", False),
        (".../a", False),
        ("x:y", True),
        ("../a", True),
        ("a/../../b", True),
        ("/a", True),
        ("\\a", True),
        ("a\\..\\b", True),
        ("C:/a", True),
        ("C:\\a", True),
        ("", False),
    ],
)
def test_member_names_that_point_outside_are_unsafe(name: str, is_unsafe: bool) -> None:
    assert is_unsafe_member(name) == is_unsafe

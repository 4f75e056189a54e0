"""What store.py promises: bytes of regular files, and a typed error for everything else."""

import os
import socket
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pixelplay.data import storage as storage
from pixelplay.data.file_listing import list_image_files
from pixelplay.data.sources import list_images
from pixelplay.data.storage import FolderStorage, ImageStorage, ZipStorage, is_unsafe_member
from pixelplay.errors import DataError, ImageError, ImageStatus


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """An empty folder, and the rights of an ordinary user; root may do everything."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield Path(name)
        finally:
            os.seteuid(user)


def failure(opened: ImageStorage, path: str) -> tuple[ImageStatus, str]:
    """Status and reason with which a path cannot be read."""
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


def test_a_file_is_read_whole_by_relative_and_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/1").write_bytes(b"\0one\n\r")
    opened = FolderStorage(str(tmp_path))
    for path in ("a/1", str(tmp_path / "a/1")):
        assert opened.read(path) == b"\0one\n\r"
        assert opened.size(path) == 6
        assert path in opened


def test_reading_changes_nothing(tmp_path: Path) -> None:
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
def test_what_is_no_file_is_named_and_never_waited_for(
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


def test_a_folder_without_permission_is_named_and_not_passed_over(unprivileged: Path) -> None:
    (unprivileged / "x").mkdir(mode=0)
    with pytest.raises(DataError) as caught:
        list_image_files(FolderStorage(str(unprivileged)))
    assert str(caught.value) == f"{unprivileged}/x cannot be read: Permission denied"


def test_a_missing_file_is_looked_for_past_folders_without_permission(unprivileged: Path) -> None:
    (unprivileged / "x").mkdir(mode=0)
    (unprivileged / "deep").mkdir()
    (unprivileged / "deep/1.jpg").write_bytes(b"x")
    (unprivileged / "list.csv").write_text("path\n1.jpg\n2.jpg\n")
    dataset = list_images(str(unprivileged / "list.csv"))
    assert dataset.paths == ("deep/1.jpg", "2.jpg")
    assert dataset.notes == ("1 folder cannot be read, and nothing is found there: x",)


def test_a_lost_and_found_that_nobody_may_read_is_passed_over(unprivileged: Path) -> None:
    (unprivileged / "lost+found").mkdir(mode=0)
    assert list_image_files(FolderStorage(str(unprivileged))).candidates == []


def test_names_that_no_system_takes_are_typed_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    opened = FolderStorage(str(tmp_path))
    assert failure(opened, "a\0b") == ("unreadable", "embedded null byte")
    assert failure(opened, "a" * 5000) == ("unreadable", "File name too long")
    assert failure(opened, "file/inside") == ("missing", "no such file")
    assert failure(opened, "") == ("unreadable", "a folder")


def test_a_file_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES", 2000)
    (tmp_path / "x").write_bytes(bytes(2001))
    (tmp_path / "y").write_bytes(bytes(2000))
    opened = FolderStorage(str(tmp_path))
    assert failure(opened, "x") == ("too_large", "2,001 bytes; the limit is 2,000 bytes")
    assert len(opened.read("y")) == 2000


def test_paths_are_shown_as_the_user_stands(tmp_path: Path) -> None:
    assert FolderStorage("").display_path("a/1") == FolderStorage(".").display_path("a/1") == "a/1"
    assert FolderStorage("photos").display_path("a/1") == "photos/a/1"
    assert make_zip(tmp_path).display_path("a/1") == f"{tmp_path}/z.zip/a/1"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_in_place(method: int, tmp_path: Path) -> None:
    opened = make_zip(tmp_path, method)
    assert opened.names() == ["a/1", "empty"]
    assert (opened.read("a/1"), opened.size("a/1")) == (b"one" * 100, 300)
    assert opened.read("empty") == b""
    assert list(tmp_path.iterdir()) == [tmp_path / "z.zip"]


@pytest.mark.parametrize("path", ["b", "a", "a/", "../z.zip", "/etc/passwd"])
def test_only_members_that_are_files_can_be_read(path: str, tmp_path: Path) -> None:
    opened = make_zip(tmp_path)
    assert failure(opened, path) == ("missing", "no such member in the zip archive")
    assert path not in opened


def test_a_member_over_the_limit_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES", 299)
    assert failure(make_zip(tmp_path, zipfile.ZIP_STORED), "a/1") == (
        "too_large",
        "unpacks to 300 bytes, 1 times its packed size; limits: 299 bytes, 200 times",
    )


def test_a_blank_bitmap_is_no_bomb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("white.bmp", bytes(3 << 20))
    assert len(ZipStorage(str(tmp_path / "z.zip")).read("white.bmp")) == 3 << 20


def test_threads_read_one_archive_together(tmp_path: Path) -> None:
    content = {f"{i}": bytes([i]) * 20_000 for i in range(40)}
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    opened = ZipStorage(str(tmp_path / "z.zip"))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(opened.read, content)) == list(content.values())


def test_what_is_no_archive_is_named(tmp_path: Path) -> None:
    other = tmp_path / "x.zip"
    other.write_bytes(b"no archive")
    for path, why in ((str(other), "File is not a zip file"), (str(tmp_path), "Is a directory")):
        with pytest.raises(DataError) as caught:
            ZipStorage(path)
        assert str(caught.value) == (
            f"{path} cannot be read as a zip archive: {why}; pack or download it again"
        )


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
def test_names_that_point_outside_are_told(name: str, is_unsafe: bool) -> None:
    assert is_unsafe_member(name) == is_unsafe

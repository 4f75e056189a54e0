"""List the files of a folder or archive that may be images, by name alone."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pixelplay.data.dataset import natural_key
from pixelplay.data.file_access import FileStorage, FolderStorage, is_unsafe_member
from pixelplay.errors import DataError
from pixelplay.text import EXAMPLES, counted, name_some

# Files that are never images. With any other extension, or none, the content decides.
OTHER_EXTENSIONS = frozenset([
    ".csv", ".tsv", ".parquet", ".pq", ".xlsx", ".xls", ".txt", ".md", ".rst", ".json", ".jsonl", ".xml",
    ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".r",
    ".m", ".sh", ".bat", ".docx", ".doc", ".zip", ".tar", ".gz", ".7z", ".rar", ".npy", ".npz", ".h5",
    ".hdf5", ".pkl", ".pt", ".pth", ".safetensors", ".onnx", ".db", ".sqlite", ".mp4", ".mov", ".avi", ".mkv",
    ".wav", ".mp3",
])  # fmt: skip
# files that together mark a folder as written by PixelPlay: a run, one being written, a model, explanations
WRITTEN_FILES: tuple[frozenset[str], ...] = (
    frozenset({"config.json", "metrics.json", "split.json"}),
    frozenset({".lock", "plan.json"}),
    frozenset({"bundle.json", "head.safetensors"}),
    frozenset({"explanations.csv"}),
)
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})


@dataclass(frozen=True, kw_only=True)
class FileListing:
    """Relative paths with forward slashes, in natural order."""

    candidates: list[str]  # files that may be images
    other_files: list[str]  # visible files that are not images, such as tables
    empty_folders: list[str]  # without a candidate in or below them
    skipped: dict[str, int]  # reason → number of files
    unreadable_folders: list[str]

    def notes(self) -> list[str]:
        """Return a note on folders that could not be read."""
        if not (closed := self.unreadable_folders):
            return []
        return [f"skipped {counted(len(closed), 'unreadable folder')}: {name_some(closed, EXAMPLES)}"]


def list_image_files(storage: FileStorage) -> FileListing:
    """Sort the files of a folder or archive into images and others by name.

    Links to folders are followed, except loops. Skipped are subfolders that cannot be read or that PixelPlay
    wrote (runs, explanations), and archive members that point outside the archive.

    Raises:
        DataError: the folder itself cannot be read.
    """
    unreadable: list[str] = []
    unsafe: dict[str, int] = {}
    if isinstance(storage, FolderStorage):
        names, folders = _walk(storage.root or ".", unreadable)
    else:
        members = storage.names()
        names = [name for name in members if not is_unsafe_member(name)]
        if n_unsafe := len(members) - len(names):
            unsafe["unsafe names in the archive"] = n_unsafe
        # most archives have no members for their folders
        inside = _parent_folders(names).union(storage.folders())
        folders = [name for name in inside if not is_unsafe_member(name)]

    written = _written_folders(names)
    candidates, others = [], []
    skipped: Counter[str] = Counter()
    for name in names:
        file = name.rpartition("/")[2].lower()
        extension = os.path.splitext(file)[1]
        if name.startswith(written):
            skipped["in folders that PixelPlay wrote"] += 1
        elif reason := _hidden(name):
            skipped[reason] += 1
        elif file in SYSTEM_FILES:
            skipped["system files"] += 1
        elif extension in OTHER_EXTENSIONS:
            skipped[f"{extension} files"] += 1
            others.append(name)
        else:
            candidates.append(name)
    filled = _parent_folders(candidates)
    with_written = _parent_folders(name for name in names if name.startswith(written))
    empty = {
        folder
        for folder in folders
        if folder not in filled and not _hidden(folder) and folder not in with_written
    }
    return FileListing(
        candidates=sorted(candidates, key=natural_key),
        other_files=sorted(others, key=natural_key),
        empty_folders=sorted(empty, key=natural_key),
        skipped=dict(sorted(skipped.items())) | unsafe,
        unreadable_folders=unreadable,
    )


def _hidden(name: str) -> str:
    """Return the reason to skip a path because of a hidden folder or file in it; "" if there is none."""
    parts = name.split("/")
    if "__MACOSX" in parts:
        return "__MACOSX"
    return "hidden" if any(part.startswith(".") for part in parts) else ""


def _written_folders(names: Iterable[str]) -> tuple[str, ...]:
    """Return the subfolders, each ending with "/", that hold a run, a model or explanations of PixelPlay."""
    files: dict[str, set[str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        files.setdefault(folder, set()).add(file)
    return tuple(
        f"{folder}/"
        for folder, inside in files.items()
        if folder and any(marks <= inside for marks in WRITTEN_FILES)
    )


def _parent_folders(names: Iterable[str]) -> set[str]:
    """Return all folders, at any depth, that contain these files."""
    folders: set[str] = set()
    for name in names:
        while (name := name.rpartition("/")[0]) and name not in folders:
            folders.add(name)
    return folders


def _walk(root: str, unreadable: list[str]) -> tuple[list[str], list[str]]:
    """List all files and folders below root; subfolders that cannot be read are appended to a list."""
    files, folders = [], []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, ancestors = pending.pop()
        full = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(full)
            entries = list(os.scandir(full))
        except OSError as error:
            if folder == "lost+found":  # at the root of a Linux file system, readable by root only
                continue
            if folder:
                unreadable.append(folder)
                continue
            raise DataError(f"{full} cannot be read: {error.strerror}") from None
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:  # a link back to a folder above
            continue
        if folder:
            folders.append(folder)
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                pending.append((name, ancestors | {identity}))
            else:
                files.append(name)
    return files, folders


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False

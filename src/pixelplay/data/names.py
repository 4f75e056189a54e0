"""Which files of a folder or an archive may be photographs, judged by name alone."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pixelplay.data.index import natural_key
from pixelplay.data.store import FolderStore, ZipStore, is_unsafe_member
from pixelplay.errors import DataError

# Files that are never photographs. Any other extension, or none, is judged by its content.
OTHER_EXTENSIONS = frozenset([
    ".csv", ".tsv", ".parquet", ".pq", ".xlsx", ".xls", ".txt", ".md", ".rst", ".json", ".jsonl", ".xml",
    ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".r",
    ".m", ".sh", ".bat", ".docx", ".doc", ".zip", ".tar", ".gz", ".7z", ".rar", ".npy", ".npz", ".h5",
    ".hdf5", ".pkl", ".pt", ".pth", ".safetensors", ".onnx", ".db", ".sqlite", ".mp4", ".mov", ".avi", ".mkv",
    ".wav", ".mp3",
])  # fmt: skip
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})


@dataclass(frozen=True, kw_only=True)
class Names:
    """Relative names with forward slashes, in natural order.

    Attributes:
        candidates: what may be a photograph.
        others: visible files that are not, such as tables beside the photographs.
        skipped: why → how many files were passed over.
    """

    candidates: list[str]
    others: list[str]
    skipped: dict[str, int]


def list_names(store: FolderStore | ZipStore) -> Names:
    """Name everything in a folder or archive.

    Links to folders are followed, loops are not. Members of an archive that point outside it are
    passed over.

    Raises:
        DataError: the folder, or one inside it, cannot be read.
    """
    if isinstance(store, FolderStore):
        return _sort_out(_walk(store.root or "."))
    names = store.names()
    safe = [name for name in names if not is_unsafe_member(name)]
    found = _sort_out(safe)
    if len(safe) < len(names):
        found.skipped["unsafe names in the archive"] = len(names) - len(safe)
    return found


def _sort_out(names: Iterable[str]) -> Names:
    candidates, others = [], []
    skipped: Counter[str] = Counter()
    for name in names:
        parts = name.split("/")
        if "__MACOSX" in parts:
            skipped["__MACOSX"] += 1
        elif any(part.startswith(".") for part in parts):
            skipped["hidden"] += 1
        elif parts[-1].lower() in SYSTEM_FILES:
            skipped["system files"] += 1
        elif (extension := os.path.splitext(parts[-1])[1].lower()) in OTHER_EXTENSIONS:
            skipped[f"{extension} files"] += 1
            others.append(name)
        else:
            candidates.append(name)
    candidates.sort(key=natural_key)
    others.sort(key=natural_key)
    return Names(candidates=candidates, others=others, skipped=dict(sorted(skipped.items())))


def _walk(root: str) -> Iterator[str]:
    """Relative names of all files below root, depth first."""
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while folders:
        folder, above = folders.pop()
        full = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(full)
            entries = list(os.scandir(full))
        except OSError as error:
            raise DataError(f"{full} cannot be read: {error.strerror}") from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link back to a folder that we are inside of
            continue
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                folders.append((name, above | {identity}))
            else:
                yield name


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False

"""Which files of a folder or an archive may be images, judged by name alone."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from pixelplay.data.dataset import natural_key
from pixelplay.data.storage import FolderStorage, ZipStorage, is_unsafe_member
from pixelplay.errors import DataError

# Files that are never images. Any other extension, or none, is judged by its content.
OTHER_EXTENSIONS = frozenset([
    ".csv", ".tsv", ".parquet", ".pq", ".xlsx", ".xls", ".txt", ".md", ".rst", ".json", ".jsonl", ".xml",
    ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".r",
    ".m", ".sh", ".bat", ".docx", ".doc", ".zip", ".tar", ".gz", ".7z", ".rar", ".npy", ".npz", ".h5",
    ".hdf5", ".pkl", ".pt", ".pth", ".safetensors", ".onnx", ".db", ".sqlite", ".mp4", ".mov", ".avi", ".mkv",
    ".wav", ".mp3",
])  # fmt: skip
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini", "ehthumbs.db"})


@dataclass(frozen=True, kw_only=True)
class FileListing:
    """Relative names with forward slashes, in natural order.

    Attributes:
        candidates: what may be an image.
        others: visible files that are not, such as tables beside the images.
        empty: folders without a candidate in or below them.
        skipped: why → how many files were passed over.
        closed: folders that could not be read.
    """

    candidates: list[str]
    others: list[str]
    empty: list[str]
    skipped: dict[str, int]
    closed: list[str] = field(default_factory=list)


def list_image_files(storage: FolderStorage | ZipStorage, *, is_lenient: bool = False) -> FileListing:
    """Name everything in a folder or archive.

    Links to folders are followed, loops are not. Members of an archive that point outside it are
    passed over.

    Args:
        is_lenient: folders inside that cannot be read are passed over.

    Raises:
        DataError: the folder, or one inside it, cannot be read.
    """
    if isinstance(storage, FolderStorage):
        folders: list[str] = []
        closed: list[str] = []
        found = _sort_out(_walk(storage.root or ".", folders, closed if is_lenient else None), folders)
        return replace(found, closed=closed)
    names = storage.names()
    safe = [name for name in names if not is_unsafe_member(name)]
    inside = _folders_of(safe) | {*storage.folders()}  # of which few archives name each
    found = _sort_out(safe, [name for name in inside if not is_unsafe_member(name)])
    if len(safe) < len(names):
        found.skipped["unsafe names in the archive"] = len(names) - len(safe)
    return found


def _sort_out(names: Iterable[str], folders: Sequence[str]) -> FileListing:
    """Tell what may be images; `folders` need be complete only once all names have been taken."""
    candidates, others = [], []
    skipped: Counter[str] = Counter()
    for name in names:
        parts = name.split("/")
        if reason := _passed_over(parts):
            skipped[reason] += 1
        elif parts[-1].lower() in SYSTEM_FILES:
            skipped["system files"] += 1
        elif (extension := os.path.splitext(parts[-1])[1].lower()) in OTHER_EXTENSIONS:
            skipped[f"{extension} files"] += 1
            others.append(name)
        else:
            candidates.append(name)
    candidates.sort(key=natural_key)
    others.sort(key=natural_key)
    filled = _folders_of(candidates)
    empty = {folder for folder in folders if folder not in filled and not _passed_over(folder.split("/"))}
    return FileListing(
        candidates=candidates,
        others=others,
        empty=sorted(empty, key=natural_key),
        skipped=dict(sorted(skipped.items())),
    )


def _passed_over(parts: Sequence[str]) -> str:
    """Why nothing of this name is looked at; "" where it is."""
    if "__MACOSX" in parts:
        return "__MACOSX"
    return "hidden" if any(split.startswith(".") for split in parts) else ""


def _folders_of(names: Iterable[str]) -> set[str]:
    """All folders that names lie in, at any depth."""
    nearest = {name.rpartition("/")[0] for name in names} - {""}
    parts = [folder.split("/") for folder in nearest]
    return {"/".join(each[:method]) for each in parts for method in range(1, len(each) + 1)}


def _walk(root: str, found: list[str], closed: list[str] | None) -> Iterator[str]:
    """Relative names of all files below root, depth first.

    Folders are put into `found`, and those that cannot be read into `closed`, or raise.
    """
    folders: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while folders:
        folder, above = folders.pop()
        full = os.path.join(root, folder) if folder else root
        try:
            status = os.stat(full)
            entries = list(os.scandir(full))
        except OSError as error:
            if folder == "lost+found":  # at the root of a Linux disk, for nobody to read
                continue
            if folder and closed is not None:
                closed.append(folder)
                continue
            raise DataError(f"{full} cannot be read: {error.strerror}") from None
        identity = (status.st_dev, status.st_ino)
        if identity in above:  # a link back to a folder that we are inside of
            continue
        if folder:
            found.append(folder)
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

"""Class folders → labels: `ROOT/<class>/**/photo` or `ROOT/{train,val,test}/<class>/**/photo`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pixelplay.config import SplitName
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some

PART_NAMES: Mapping[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, kw_only=True)
class FolderLabels:
    """What the folders say about each of N names.

    Attributes:
        names: (N,) those that lie inside the layout.
        labels: (N,) class name, None for an unlabelled one.
        parts: (N,) part, None where there are no part folders.
        subfolders: (N,) the folder that a name lies in, "" where that is its class folder itself.
        skipped: why → how many names are outside the layout.
        notes: what was assumed.
    """

    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    splits: list[SplitName | None] = field(default_factory=list)
    subfolders: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, name: str, label: str | None, split: SplitName | None) -> None:
        """Append one name; its class folder lies at the top or below its part folder."""
        self.names.append(name)
        self.labels.append(label)
        self.splits.append(split)
        is_deeper = name.count("/") > (1 if split is None else 2)
        self.subfolders.append(name.rpartition("/")[0] if is_deeper else "")


def labels_from_folders(names: Sequence[str]) -> FolderLabels:
    """Read class and part of each name from the folders it lies in.

    The first folder (below the part folder, if there are parts) is the class, whatever lies
    deeper, so `a/cat` and `b/cat` never merge. A test folder none of whose subfolders is named
    like a training class is unlabelled.
    """
    below = _folders_below(names)
    parts, has_classes_beside = _find_parts(below)
    found = FolderLabels()
    learned = {folder for top, split in parts.items() if split != "test" for folder in below[top]}
    if has_classes_beside:
        learned |= below.keys() - parts.keys()
    tested = {folder for top, split in parts.items() if split == "test" for folder in below[top]}
    is_test_labelled = bool(tested & learned) or not learned
    outside: Counter[str] = Counter()
    for name in names:
        top, _, rest = name.rpartition("/")[0].partition("/")
        split, label = parts.get(top), rest.partition("/")[0] or None
        if split == "test":
            found.add(name, label if is_test_labelled else None, split)
        elif split is not None and label is not None:
            found.add(name, label, split)
        elif split is None and top and has_classes_beside:
            found.add(name, top, None)
        else:
            outside[f"in {top}, outside" if top else "outside"] += 1
    found.skipped.update({f"{where} the class folders": n for where, n in outside.items()})
    _note_parts(found, parts, below, has_classes_beside, is_test_labelled)
    if not parts:
        _note_repeated_subfolders(found)
    return found


def _folders_below(names: Sequence[str]) -> dict[str, set[str]]:
    """Each top folder → the folders directly in it."""
    below: dict[str, set[str]] = {}
    for folder in {name.rpartition("/")[0] for name in names if "/" in name}:
        top, _, rest = folder.partition("/")
        inside = below.setdefault(top, set())
        if rest:
            inside.add(rest.partition("/")[0])
    return below


def _find_parts(below: Mapping[str, set[str]]) -> tuple[dict[str, SplitName], bool]:
    """Tell the part folders, and whether the other top folders are classes.

    A folder called train may be a class among vehicles. It is a part where nothing but part
    folders lies there, where two of them share a class folder, or where more class folders lie in
    it than beside it. Otherwise the top folders are classes; a val or test folder that repeats
    some of them is a part all the same, and so is a test folder without folders beside two others.
    """
    named = {top: split for top in below if (split := split_from_name(top)) is not None}
    others = below.keys() - named.keys()
    holders = Counter(folder for top in named for folder in below[top])
    most = max((len(below[top]) for top, split in named.items() if split != "test"), default=0)
    if not others or max(holders.values(), default=0) > 1 or most > max(1, len(others)):
        return named, False
    held_out: dict[str, SplitName] = {}
    for top, split in named.items():
        is_flat_test = split == "test" and not below[top] and len(below) > 2
        if split != "train" and (below[top] & others or is_flat_test):
            held_out[top] = split
    return held_out, True


def split_from_name(name: str) -> SplitName | None:
    """The part that a folder or a table's cell names; None for any other word."""
    return PART_NAMES.get(name.strip().lower())


def _note_parts(
    found: FolderLabels,
    parts: Mapping[str, SplitName],
    below: Mapping[str, set[str]],
    has_classes_beside: bool,
    is_test_labelled: bool,
) -> None:
    n_unlabelled = sum(split == "test" for split in found.splits)
    if n_unlabelled and not is_test_labelled:
        found.notes.append(
            f"no subfolder of test is named like a training class: it holds "
            f"{counted(n_unlabelled, 'unlabelled image')}, not scored"
        )
    if has_classes_beside and parts:
        found.notes.append(
            f"{name_some(sorted(parts))} is a part of the data, the folders beside it are classes"
        )
    classes = sorted(top for top in below if split_from_name(top) is not None and top not in parts)
    if classes:
        found.notes.append(f"{name_some(classes)} is read as a class, like the folders beside it")


def _note_repeated_subfolders(found: FolderLabels) -> None:
    classes_of: dict[str, set[str]] = {}
    for name in found.names:
        folders = name.split("/")[:-1]
        if len(folders) > 1:
            classes_of.setdefault(folders[1], set()).add(folders[0])
    repeated = sorted(folder for folder, classes in classes_of.items() if len(classes) > 1)
    if repeated:
        found.notes.append(
            f"subfolders named alike in several classes stay apart, the first folder is the class: "
            f"{name_some(repeated)}"
        )


def empty_class_folders(empty: Sequence[str]) -> list[str]:
    """Those that lie where class folders and part folders lie.

    Args:
        empty: all folders without an image.
    """
    tops = [name for name in empty if "/" not in name]
    inner = [name.partition("/") for name in empty if name.count("/") == 1]
    return tops + [f"{top}/{name}" for top, _, name in inner if split_from_name(top) and top not in tops]


def unwrap_single_folder(names: Sequence[str]) -> str:
    """Find the folders that wrap everything but a few strays, as archives often have: "photos/" or ""."""
    prefix = ""
    while True:
        inside = [name[len(prefix) :] for name in names if name.startswith(prefix)]
        tops = {name.split("/")[0] for name in inside if "/" in name}
        n_deeper = sum(name.count("/") > 1 for name in inside)
        # one class folder of images is no wrapper
        if len(tops) != 1 or split_from_name(min(tops)) is not None or 2 * n_deeper <= len(inside):
            return prefix
        prefix += f"{min(tops)}/"


def check_some_classes(
    found: FolderLabels, source: str, tables: Sequence[str], skipped: Mapping[str, int]
) -> None:
    """Raise where folders give no class at all, and say what would.

    Args:
        tables: those that lie there.
        skipped: why → how many files were passed over by name.

    Raises:
        DataError: no labelled image.
    """
    if any(label is not None for label in found.labels):
        return
    hint = ""
    if tables:
        lie = "lies" if len(tables) == 1 else "lie"
        hint = f"; {name_some(tables)} {lie} there: give a table instead of the folder"
    if not found.names and not found.skipped:
        passed = "".join(f", {n} {why}" for why, n in skipped.items())
        also = f" (passed over by name{passed})" if passed else ""
        raise DataError(f"{source} has no images{also}; expected {source}/<class>/photo.jpg or a table{hint}")
    raise DataError(
        f"{source} has images but no class folders; expected {source}/<class>/photo.jpg, "
        f"{source}/train/<class>/photo.jpg or a table with path and label; if this is one class, give the "
        f"folder above{hint}"
    )

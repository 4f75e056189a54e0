"""Labels from folder names: `ROOT/<class>/**/image` or `ROOT/{train,val,test}/<class>/**/image`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pixelplay.config import SplitName
from pixelplay.errors import DataError
from pixelplay.text import counted, name_some

SPLIT_NAMES: Mapping[str, SplitName] = {
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
    """Labels and splits of the N images inside the layout."""

    paths: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)  # None for an unlabelled image
    splits: list[SplitName | None] = field(default_factory=list)  # None where there are no split folders
    subfolders: list[str] = field(default_factory=list)  # folder; "" if that is the class folder itself
    skipped: dict[str, int] = field(default_factory=dict)  # reason → number of files outside the layout
    notes: list[str] = field(default_factory=list)


def split_from_name(name: str) -> SplitName | None:
    """Return the split that a folder or table cell names, None for any other word."""
    return SPLIT_NAMES.get(name.strip().lower())


def labels_from_folders(paths: Sequence[str], root: str = "") -> FolderLabels:
    """Read the label and split of each image from the folders it is in.

    The first folder below the root (and below a split folder) is the class, however deep the image lies, so
    `a/cat` and `b/cat` are never merged. Images in a test folder are unlabelled if none of its subfolders is
    named like a training class.

    Args:
        paths: relative, with forward slashes; all begin with `root`, which is "" or ends with "/".
    """
    inner = [path.removeprefix(root) for path in paths]
    subfolders = _list_subfolders(inner)
    split_of, has_classes_beside = _find_split_folders(subfolders)
    train_classes = {name for top, split in split_of.items() if split != "test" for name in subfolders[top]}
    if has_classes_beside:
        train_classes |= subfolders.keys() - split_of.keys()
    test_folders = {name for top, split in split_of.items() if split == "test" for name in subfolders[top]}
    is_test_labelled = bool(test_folders & train_classes) or not train_classes
    found = FolderLabels()
    outside: Counter[str] = Counter()
    for path, name in zip(paths, inner, strict=True):
        folder = name.rpartition("/")[0]
        top, _, rest = folder.partition("/")
        split, label = split_of.get(top), rest.partition("/")[0] or None
        if split is None and top and has_classes_beside:
            label = top
        elif split == "test":
            label = label if is_test_labelled else None
        elif split is None or label is None:
            outside[f"in {top}, outside" if top else "outside"] += 1
            continue
        found.paths.append(path)
        found.labels.append(label)
        found.splits.append(split)
        class_depth = 1 if split is None else 2
        found.subfolders.append(folder if name.count("/") > class_depth else "")
    found.skipped.update({f"{where} the class folders": n for where, n in outside.items()})
    n_test = found.splits.count("test")
    if n_test and not is_test_labelled:
        found.notes.append(
            f"the test split is unlabelled and not scored ({counted(n_test, 'image')}): "
            "none of its folders is named like a training class"
        )
    if has_classes_beside and split_of:
        found.notes.append(f"folders read as splits: {name_some(sorted(split_of))}; the others are classes")
    if classes := sorted(top for top in subfolders.keys() - split_of.keys() if split_from_name(top)):
        found.notes.append(f"folders read as classes, not as splits: {name_some(classes)}")
    if not split_of:
        found.notes.extend(_note_repeated_subfolders(inner))
    return found


def _list_subfolders(paths: Sequence[str]) -> dict[str, set[str]]:
    """Return top folder → names of the folders directly in it."""
    subfolders: dict[str, set[str]] = {}
    for folder in {path.rpartition("/")[0] for path in paths if "/" in path}:
        top, _, rest = folder.partition("/")
        names = subfolders.setdefault(top, set())
        if rest:
            names.add(rest.partition("/")[0])
    return subfolders


def _find_split_folders(subfolders: Mapping[str, set[str]]) -> tuple[dict[str, SplitName], bool]:
    """Find the split folders, and whether the other top folders are classes.

    A folder named train may also be a class of vehicles. It is a split if all top folders have names
    of splits, if two of those share a class folder, or if one of them has more subfolders than there
    are other top folders. Otherwise the top folders are classes, except a val or test folder that
    repeats some of them and a test folder without subfolders next to at least two other folders.
    """
    named = {top: split for top in subfolders if (split := split_from_name(top))}
    others = subfolders.keys() - named.keys()
    n_splits_with = Counter(name for top in named for name in subfolders[top])
    most = max((len(subfolders[top]) for top, split in named.items() if split != "test"), default=0)
    if not others or max(n_splits_with.values(), default=0) > 1 or most > max(1, len(others)):
        return named, False
    held_out: dict[str, SplitName] = {}
    for top, split in named.items():
        is_flat_test = split == "test" and not subfolders[top] and len(subfolders) > 2
        if is_flat_test or (split != "train" and subfolders[top] & others):
            held_out[top] = split
    return held_out, True


def _note_repeated_subfolders(paths: Sequence[str]) -> list[str]:
    classes_with: dict[str, set[str]] = {}
    for path in paths:
        class_name, *deeper = path.split("/")[:-1] or [""]
        if deeper:
            classes_with.setdefault(deeper[0], set()).add(class_name)
    repeated = sorted(name for name, classes in classes_with.items() if len(classes) > 1)
    note = "the first folder is the class; subfolders in several classes are not merged"
    return [f"{note}: {name_some(repeated)}"] if repeated else []


def empty_class_folders(empty: Sequence[str]) -> list[str]:
    """Select the class folders and split folders among all folders without an image."""
    tops = [name for name in empty if "/" not in name]
    inner = [(name, name.partition("/")[0]) for name in empty if name.count("/") == 1]
    return tops + [name for name, top in inner if split_from_name(top) and top not in tops]


def find_wrapper_folder(paths: Sequence[str]) -> str:
    """Find the folders that wrap nearly all images, as is common in archives: "photos/2024/" or ""."""
    prefix = ""
    while True:
        inside = [path[len(prefix) :] for path in paths if path.startswith(prefix)]
        tops = {path.split("/")[0] for path in inside if "/" in path}
        n_deeper = sum(path.count("/") > 1 for path in inside)
        # a single class folder of images is not a wrapper
        if len(tops) != 1 or split_from_name(min(tops)) is not None or 2 * n_deeper <= len(inside):
            return prefix
        prefix += f"{min(tops)}/"


def check_has_classes(
    found: FolderLabels, source: str, tables: Sequence[str], skipped: Mapping[str, int]
) -> None:
    """Raise DataError if no image is labelled.

    Args:
        tables: paths of the tables in the folder, to point to.
        skipped: reason → number of files skipped because of their names.
    """
    if any(label is not None for label in found.labels):
        return
    hint = f"; to use {name_some(tables)}, pass the table instead of the folder" if tables else ""
    if not found.paths and not found.skipped:
        listed = ", ".join(f"{n} {reason}" for reason, n in skipped.items())
        also = f" (skipped {listed})" if listed else ""
        raise DataError(f"{source} has no images{also}; expected {source}/<class>/photo.jpg or a table{hint}")
    raise DataError(
        f"{source} has images but no class folders; expected {source}/<class>/photo.jpg, "
        f"{source}/train/<class>/photo.jpg or a table with the columns path and label; "
        f"if this folder is one class, pass its parent folder{hint}"
    )

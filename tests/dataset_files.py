"""Small folders and archives of files to list, and what a dataset says about them."""

import os
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

from pixelplay.config import SPLITS, DataConfig
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sources import open_dataset
from pixelplay.errors import DataError

Maker = Callable[[Path, Iterable[str]], str]


def make_folder(root: Path, names: Iterable[str]) -> str:
    """Write small files, each with its name as content; returns the folder."""
    folder = root / "data"
    folder.mkdir(exist_ok=True)
    for name in names:
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(os.fsencode(name))
    return str(folder)


def make_zip(root: Path, names: Iterable[str]) -> str:
    """Write the same files into an archive; returns its path."""
    return pack(root, {name: name.encode() for name in names})


def pack(root: Path, members: Mapping[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
    """Write an archive with these members; returns its path."""
    path = root / "data.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def make_wrapped_zip(root: Path, names: Iterable[str]) -> str:
    """Write an archive whose files are all in `photos/2024`."""
    return make_zip(root, [f"photos/2024/{name}" for name in names])


BOTH = pytest.mark.parametrize("make", [make_folder, make_zip])
ALL = pytest.mark.parametrize("make", [make_folder, make_zip, make_wrapped_zip])


def rows(dataset: ImageDataset) -> list[tuple[str, str | None, str | None]]:
    """(path, class, split) of each image, in order, without a wrapper folder."""
    return [
        (
            path.removeprefix("photos/2024/"),
            dataset.classes[label] if label >= 0 else None,
            SPLITS[split] if split >= 0 else None,
        )
        for path, label, split in zip(dataset.paths, dataset.labels, dataset.splits, strict=True)
    ]


def assert_words(text: str, *words: str) -> None:
    """Check that a message is one line and contains these values, in this order."""
    assert "\n" not in text
    start = 0
    for word in words:
        start = text.find(word, start)
        assert start >= 0, f"no {word!r} (in this order) in: {text}"
        start += len(word)


def assert_refused(
    source: str, *words: str, config: DataConfig | None = None, classes: str | None = None
) -> None:
    """Check that a source raises a DataError that contains these values, in this order."""
    with pytest.raises(DataError) as caught:
        open_dataset(source, config, classes)
    assert_words(str(caught.value), *words)


def assert_notes(dataset: ImageDataset, *notes: tuple[str, ...]) -> None:
    """Check the values in each note of a dataset, and that there are no other notes."""
    assert len(dataset.notes) == len(notes), dataset.notes
    for text, words in zip(dataset.notes, notes, strict=True):
        assert_words(text, *words)

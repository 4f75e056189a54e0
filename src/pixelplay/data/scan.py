"""The story's first chapter: what is in there, and what is wrong with it.

It stands apart from `workflow.py` because it needs no network: a scan starts at once.
"""

import os
from collections.abc import Sequence

import numpy as np

from pixelplay.config import DataConfig, TrainConfig
from pixelplay.data.audit import Audit, audit_images
from pixelplay.data.formats import PHOTO_ENDINGS
from pixelplay.data.index import ImageIndex
from pixelplay.data.parts import check_learnable
from pixelplay.data.source import list_all, scan_source
from pixelplay.errors import DataError
from pixelplay.run_log import Journal

StrPath = str | os.PathLike[str]


def scan(
    source: StrPath,
    data: DataConfig | None = None,
    *,
    classes: str | None = None,
    is_decoded: bool = True,
    journal: Journal | None = None,
) -> tuple[ImageIndex, Audit]:
    """Say what is in there and what is wrong with it; nothing is changed.

    Args:
        classes: file of the classes that the test side expects.
        is_decoded: False opens only files that may be duplicates, and decodes none.

    Raises:
        DataError: nothing there, or no labelled photograph.
    """
    journal = journal or Journal()
    index = say_what_was_assumed(scan_source(os.fspath(source), data, classes), journal)
    with journal.progress("reading", len(index)) as bar:
        return index, audit_images(index, is_decoded=is_decoded, on_progress=bar.update)


def name_labelled(source: str, config: TrainConfig, journal: Journal) -> ImageIndex:
    """Name all labelled photographs, and check what names alone can show.

    Raises:
        DataError: nothing there, or not two classes to learn from.
    """
    index = say_what_was_assumed(scan_source(source, config.data, config.classes), journal)
    index = select_labelled(index, journal)
    check_learnable(index, np.ones(len(index), dtype=np.bool_))
    return index


def name_images(
    sources: StrPath | Sequence[StrPath], config: DataConfig, journal: Journal
) -> list[ImageIndex]:
    """Name all photographs to be answered about, in order, without labels.

    Raises:
        DataError: there are none, or the only source does not exist and does not look like a photograph.
    """
    names = [os.fspath(source) for source in as_several(sources)]
    if len(names) == 1 and not names[0].lower().endswith(PHOTO_ENDINGS) and not os.path.lexists(names[0]):
        raise DataError(f"{names[0]} does not exist; give folders, files, tables or zip archives")
    listed = list_all(names, config)
    return [say_what_was_assumed(index, journal) for index in listed]


def as_several(paths: StrPath | Sequence[StrPath]) -> Sequence[StrPath]:
    """One path as a sequence of one, which its letters are not."""
    return [paths] if isinstance(paths, str | os.PathLike) else paths


def select_labelled(index: ImageIndex, journal: Journal) -> ImageIndex:
    """Leave out photographs without a label, and say how many."""
    is_labelled = index.labels >= 0
    if not is_labelled.all():
        journal.note(f"{(~is_labelled).sum()} of {len(index)} photographs have no label and play no part")
    return index.select(is_labelled)


def say_what_was_assumed(index: ImageIndex, journal: Journal) -> ImageIndex:
    """Note what reading names has assumed and passed over; returns the index."""
    for note in index.notes:
        journal.note(note)
    if index.skipped:
        named = ", ".join(f"{n} {why}" for why, n in index.skipped.items())
        journal.note(f"{index.source}: passed over by name: {named}")
    return index

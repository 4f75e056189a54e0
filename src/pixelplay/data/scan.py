"""The story's first chapter: what is in there, and what is wrong with it.

It stands apart from `workflow.py` because it needs no network: a scan starts at once.
"""

import os

from pixelplay.config import DataConfig, StrPath
from pixelplay.data.audit import Audit, audit_images
from pixelplay.data.dataset import ImageIndex
from pixelplay.data.sources import say_what_was_assumed, scan_source
from pixelplay.run_log import Journal


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

"""Explanations → a folder of overlays, raw maps, contact sheets and one table, whole or not there at all."""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from pixelplay.atomic import bring_back, put_in_place
from pixelplay.data.tables import safe_label, safe_path
from pixelplay.errors import ConfigError, DataError
from pixelplay.inference.explain import ExplainedImage, Explanation
from pixelplay.outputs.contact import CELL_PX, ContactSheets
from pixelplay.outputs.overlay import overlay
from pixelplay.outputs.predictions_table import DECIMALS, csv_writer
from pixelplay.run_log import RunLog

OVERLAY_PX = 640  # long side
NAME_CHARS = 40  # of an image's and of a class's name in a file name
TABLE = "explanations.csv"
COLUMNS = (
    "path", "status", "error", "label", "probability", "explained", "explained_probability", "overlay", "map",
)  # fmt: skip
_OURS = re.compile(r"\d{4,}_.*\.(overlay\.png|map\.npy)|contact(_\d+)?\.png|explanations\.csv|\.DS_Store")


@contextmanager
def new_explanations_dir(out: str, *, force: bool) -> Iterator[str]:
    """Give the folder OUT.partial, which becomes `out` when the block ends without an error, or goes.

    Raises:
        ConfigError: `out` exists and is not forced, holds other files, or cannot be written.
    """
    out = os.path.realpath(out)  # a link stays, what it points to is replaced
    partial = f"{out}.partial"
    bring_back(partial, out, _is_ours)
    for taken in (out, partial):
        _check_target(taken, force=force)
    try:
        _remove(partial)
        os.makedirs(partial)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}; choose another --out") from None
    try:
        yield partial
        _check_target(out, force=force)  # someone else may have been quicker
        put_in_place(partial, out, _is_spare)
    except OSError as error:
        error.filename = error.filename or out  # a full disk names no file by itself
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_explanations(explained: Iterable[ExplainedImage], n_images: int, folder: str, log: RunLog) -> int:
    """Write each explanation as it comes, and a row for each image.

    Returns:
        The number of images that could not be explained.

    Raises:
        DataError: that is all of them.
    """
    bad, sheets, table = [], ContactSheets(folder), os.path.join(folder, TABLE)
    with (
        open(table, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        log.progress("explaining", n_images) as bar,
    ):
        writer = csv_writer(file)
        writer.writerow(COLUMNS)
        for number, look in enumerate(explained, start=1):
            writer.writerow(_write_one(look, number, folder, sheets))
            bad += [f"{look.path}: {look.error.reason}"] if look.error else []
            bar.update()
    if len(bad) == n_images:
        raise DataError(f"none of the {n_images} images can be read; last: {bad[-1]}")
    if bad:
        log.note(f"{len(bad)} of {n_images} images could not be read; their rows say why")
    sheets.close()
    return len(bad)


def file_stem(number: int, path: str, label: str) -> str:
    """A file name without ending that is safe whatever the image and the class are called.

    >>> file_stem(7, "../a b/cat's.jpg", "tabby/grey")
    '0007_cat_s_tabby_grey'
    """
    image = os.path.splitext(re.split(r"[/\\]", path)[-1])[0]
    return f"{number:04}_{_plain(image)}_{_plain(label)}"


def _plain(name: str) -> str:
    """Letters, digits, hyphens and underscores; cut by bytes, of which a file name has at most 255."""
    return re.sub(r"[^\w-]+", "_", name).encode()[: 2 * NAME_CHARS].decode(errors="ignore")[:NAME_CHARS]


def _write_one(look: ExplainedImage, number: int, folder: str, sheets: ContactSheets) -> list[str]:
    """Write the files of one image; returns its row."""
    explanation, name = look.explanation, look.path
    if explanation is None or look.error is not None:
        status, reason = (look.error.status, look.error.reason) if look.error else ("unreadable", "")
        sheets.add(None, [name, reason])
        return [safe_path(name), status, safe_label(reason), *[""] * (len(COLUMNS) - 3)]
    stem = file_stem(number, name, explanation.label)
    names = f"{stem}.overlay.png", f"{stem}.map.npy"
    picture = overlay(look.pixels, explanation.heat, max_px=OVERLAY_PX)
    Image.fromarray(picture).save(os.path.join(folder, names[0]), format="PNG")
    with open(os.path.join(folder, names[1]), "wb") as file:
        np.save(file, explanation.heat, allow_pickle=False)
    sheets.add(overlay(look.pixels, explanation.heat, max_px=CELL_PX), [name, *_caption(explanation)])
    shown: list[Any] = [safe_label(explanation.decided), f"{explanation.decided_probability:.{DECIMALS}f}"]
    shown += [safe_label(explanation.label), f"{explanation.probability:.{DECIMALS}f}"]
    return [safe_path(name), "ok", "", *shown, *names]


def _caption(explanation: Explanation) -> list[str]:
    shown = f"{explanation.label} {explanation.probability:.2f}"
    if explanation.label == explanation.decided:
        return [shown]
    return [shown, f"decided {explanation.decided} {explanation.decided_probability:.2f}"]


def _check_target(folder: str, *, force: bool) -> None:
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return
    if not os.path.isdir(folder) or not _is_ours(folder):
        raise ConfigError(
            f"{folder} exists and holds other things than explanations: it is never replaced; "
            "choose another --out"
        )
    if not force:
        raise ConfigError(f"{folder} exists; choose another --out, or replace it with --force")


def _is_ours(folder: str) -> bool:
    names = os.listdir(folder)
    return TABLE in names and all(map(_OURS.fullmatch, names))


def _is_spare(folder: str) -> bool:
    """Whether a folder is ours, or empty: any other stays, and is in the way."""
    return _is_ours(folder) or not os.listdir(folder)


def _remove(folder: str) -> None:
    if os.path.isdir(folder) and _is_spare(folder):
        shutil.rmtree(folder)

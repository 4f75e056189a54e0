"""Write explanations to a folder: overlays, raw maps and a table."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np
from PIL import Image, ImageEnhance

from pixelplay.array_types import Float32Array, UInt8Array
from pixelplay.atomic import replace_folder, restore_folder
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import decode_image, silence_pillow
from pixelplay.data.tables import csv_writer, escape_label, escape_path
from pixelplay.errors import ConfigError, DataError, ImageError
from pixelplay.inference.explain import Explainer
from pixelplay.inference.predictor import DECIMALS, EnsemblePredictor, Predictions, Predictor
from pixelplay.run_log import RunLog
from pixelplay.text import counted

OVERLAY_PX = 640  # long side
NAME_CHARS = 40  # of an image's and of a class's name in a file name
TABLE = "explanations.csv"
_OUR_FILES = re.compile(r"\d{4,}_.*\.(overlay\.png|map\.npy)|explanations\.csv|\.DS_Store")

# RGB from cold to hot. Lightness increases in even steps, so the order survives a grey print, and blue to
# yellow needs no distinction of red and green.
ANCHORS = (
    (28, 16, 98),
    (98, 22, 138),
    (168, 38, 126),
    (222, 76, 88),
    (248, 132, 52),
    (252, 190, 64),
    (255, 240, 150),
)
DESATURATION = 0.7  # of the image's colour, which could be mistaken for heat
MAX_OPACITY = 0.8  # at the hottest place, so that the image remains visible


@dataclass(frozen=True, kw_only=True)
class ExplainedImage:
    """One image that was explained, or could not be read: a row of explanations.csv.

    Attributes:
        status: "ok", "missing", "unreadable", "too_large" or "unsupported".
        error: why the image could not be read; "" otherwise.
        prediction: predicted class; None, like everything below, for an unreadable image.
        explained: class whose evidence is shown.
        overlay: file name of the overlay in the output folder.
        map: file name of the raw map (h, w) float32 in the output folder.
    """

    path: str
    status: str = "ok"
    error: str = ""
    prediction: str | None = None
    probability: float | None = None
    explained: str | None = None
    explained_probability: float | None = None
    overlay: str | None = None
    map: str | None = None


@contextmanager
def new_explanations_dir(out: str, *, force: bool) -> Iterator[str]:
    """Yield the folder OUT.partial, which becomes `out` if the block succeeds.

    Raises:
        ConfigError: `out` exists without `force`, contains other files, or cannot be written.
    """
    out = os.path.realpath(out)  # replaces the target of a link, not the link
    partial = f"{out}.partial"
    restore_folder(partial, out, _is_ours)
    for folder in (out, partial):
        _check_target(folder, force=force)
    try:
        if os.path.isdir(partial) and _is_ours_or_empty(partial):
            shutil.rmtree(partial)
        os.makedirs(partial)
    except OSError as error:
        raise ConfigError(f"could not write {out}: {error.strerror}; choose another --out") from None
    try:
        yield partial
        _check_target(out, force=force)  # another process may have created it meanwhile
        replace_folder(partial, out, _is_ours_or_empty)
    except OSError as error:
        error.filename = error.filename or out  # the error of a full disk has no file name
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_explanations(
    predictor: Predictor | EnsemblePredictor,
    explainer: Explainer,
    datasets: Sequence[ImageDataset],
    class_name: str | None,
    folder: str,
    log: RunLog,
) -> list[ExplainedImage]:
    """Explain images for a class, by default the predicted one; write overlays, maps and a table.

    Predictions and probabilities are those of `predictor`, so that an image has the same in all tables.

    Raises:
        ConfigError: unknown class.
        DataError: no image can be read.
    """
    if class_name is not None:
        explainer.check_class(class_name)
    columns = [field.name for field in fields(ExplainedImage)]
    explained: list[ExplainedImage] = []
    table = os.path.join(folder, TABLE)
    with (
        open(table, "w", encoding="utf-8", errors="surrogateescape", newline="") as file,
        log.progress("explaining", sum(map(len, datasets))) as bar,
    ):
        writer = csv_writer(file)
        writer.writerow(columns)
        for dataset in datasets:
            predicted = (
                _describe_prediction(chunk, i, class_name)
                for chunk in predictor.predict_stream(dataset)
                for i in range(len(chunk))
            )
            for path, image in zip(dataset.paths, predicted, strict=True):
                if image.explained is not None:
                    image = _explain_file(explainer, dataset, path, image, folder, len(explained) + 1)
                writer.writerow([_cell(name, getattr(image, name)) for name in columns])
                explained.append(image)
                bar.update()
    failed = [image for image in explained if image.status != "ok"]
    if failed and len(failed) == len(explained):
        last = f"{failed[-1].path}: {failed[-1].error}"
        raise DataError(f"could not read any of {counted(len(failed), 'image')}; last: {last}")
    if failed:
        log.note(f"could not read {len(failed):,} of {counted(len(explained), 'image')}; see {TABLE}")
    return explained


def _describe_prediction(predictions: Predictions, i: int, class_name: str | None) -> ExplainedImage:
    """Return what is known of an image before it is explained; without prediction if it is unreadable."""
    name, status, error = predictions.paths[i], predictions.status[i], predictions.errors[i]
    if (prediction := predictions.prediction[i]) is None:
        return ExplainedImage(path=name, status=status, error=error)
    probs, explained = predictions.probs[i], class_name or prediction
    return ExplainedImage(
        path=name,
        prediction=prediction,
        probability=float(probs[predictions.pred[i]]),
        explained=explained,
        explained_probability=float(probs[predictions.classes.index(explained)]),
    )


def _explain_file(
    explainer: Explainer, dataset: ImageDataset, path: str, image: ExplainedImage, folder: str, number: int
) -> ExplainedImage:
    """Write overlay and map of an image that has a prediction."""
    try:
        data = dataset.storage.read(path)
        with silence_pillow():
            pixels = decode_image(
                data, path=path, target_px=explainer.input_px, max_value=explainer.max_value
            )
    except ImageError as error:  # it has become unreadable
        return ExplainedImage(path=image.path, status=error.status, error=error.reason)
    heat = explainer.explain(pixels, image.explained).heat
    stem = file_stem(number, image.path, str(image.explained))
    overlay_name, map_name = f"{stem}.overlay.png", f"{stem}.map.npy"
    overlaid = overlay(pixels, heat, max_px=OVERLAY_PX)
    Image.fromarray(overlaid).save(os.path.join(folder, overlay_name), format="PNG")
    with open(os.path.join(folder, map_name), "wb") as file:
        np.save(file, heat, allow_pickle=False)
    return replace(image, overlay=overlay_name, map=map_name)


def _cell(column: str, value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{DECIMALS}f}"
    return escape_path(value) if column == "path" else escape_label(value)


def file_stem(number: int, path: str, class_name: str) -> str:
    """Build a file name without extension that is safe for any image and class name.

    >>> file_stem(7, "../a b/cat's.jpg", "tabby/grey")
    '0007_cat_s_tabby_grey'
    """
    image = os.path.splitext(re.split(r"[/\\]", path)[-1])[0]
    return f"{number:04}_{_plain(image)}_{_plain(class_name)}"


def _plain(name: str) -> str:
    """Replace all but letters, digits and hyphens; shorten to 80 bytes."""
    return re.sub(r"[^\w-]+", "_", name).encode()[: 2 * NAME_CHARS].decode(errors="ignore")[:NAME_CHARS]


def color(values: Float32Array) -> Float32Array:
    """Map values in [0, 1] to RGB colours (…, 3) in [0, 255]."""
    positions = np.linspace(0, 1, len(ANCHORS))
    channels = [np.interp(values, positions, channel) for channel in np.transpose(ANCHORS)]
    return np.stack(channels, axis=-1).astype(np.float32)


def overlay(pixels: UInt8Array, heat: Float32Array, *, max_px: int) -> UInt8Array:
    """Draw heat (h, w) >= 0 over a desaturated image (H, W, 3), more opaque where it is hotter.

    The result (H', W', 3) keeps the proportions; its long side is at most `max_px`.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, max_px / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    background = np.asarray(ImageEnhance.Color(small).enhance(1 - DESATURATION))
    resized = Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    values = np.asarray(resized) / max(float(heat.max()), np.finfo(np.float32).tiny)
    values = values.clip(0, 1)  # (H', W'); bicubic may overshoot
    opacity = MAX_OPACITY * values[..., None]
    mixed = (1 - opacity) * background + opacity * color(values)
    return np.asarray(mixed.round().astype(np.uint8))


def _check_target(folder: str, *, force: bool) -> None:
    if not os.path.lexists(folder) or (os.path.isdir(folder) and not os.listdir(folder)):
        return
    if not os.path.isdir(folder) or not _is_ours(folder):
        raise ConfigError(
            f"{folder} exists and contains other files than explanations; it is never replaced: "
            "choose another --out"
        )
    if not force:
        raise ConfigError(f"{folder} already exists; choose another --out or use --force to replace it")


def _is_ours(folder: str) -> bool:
    names = os.listdir(folder)
    return TABLE in names and all(map(_OUR_FILES.fullmatch, names))


def _is_ours_or_empty(folder: str) -> bool:
    return _is_ours(folder) or not os.listdir(folder)

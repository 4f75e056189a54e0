"""Compare an exported model with the predictor it was made from, on real and on drawn images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import compress, islice
from typing import Any, NamedTuple

import numpy as np

from pixelplay.array_types import BoolArray
from pixelplay.config import DataConfig
from pixelplay.data.decode import silence_pillow
from pixelplay.data.file_access import ImageStorage
from pixelplay.data.sources import list_images, open_dataset
from pixelplay.data.transforms import decode_for, eval_transform
from pixelplay.errors import ConfigError, DataError, ImageError, PixelPlayError
from pixelplay.exporting.difficult_images import draw_difficult_images
from pixelplay.exporting.exported_model import ExportedModel, ExportedOutputs
from pixelplay.exporting.metadata import read_preprocessing
from pixelplay.inference.predictor import EnsemblePredictor, Predictions, Predictor
from pixelplay.outputs.report.run_records import has_records, read_records
from pixelplay.run_log import RunLog
from pixelplay.text import EXAMPLES, counted, name_some

PROBABILITY_TOLERANCE = 1e-4
NOVELTY_TOLERANCE = 0.01  # it has steps where held-out images are equally novel
MAX_RUN_IMAGES = 500
CHUNK = 32


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Differences between an exported model and `Predictor` in fp32 on the same images.

    Attributes:
        engine: name and version of what ran the exported model.
        n_real, n_drawn: images compared: real ones, and difficult ones drawn for the comparison.
        n_unreadable: real images left out because they cannot be read.
        mismatches: images with another prediction.
        max_probability_difference, max_novelty_difference: largest absolute differences.
    """

    engine: str
    n_real: int
    n_drawn: int
    n_unreadable: int
    mismatches: tuple[str, ...]
    max_probability_difference: float
    max_novelty_difference: float

    @property
    def n(self) -> int:
        """Images compared."""
        return self.n_real + self.n_drawn

    @property
    def has_same_predictions(self) -> bool:
        """True if no prediction differs."""
        return not self.mismatches

    @property
    def is_equal(self) -> bool:
        """True if predictions are the same and all differences within the tolerances; false for NaN."""
        return (
            self.has_same_predictions
            and self.max_probability_difference <= PROBABILITY_TOLERANCE
            and self.max_novelty_difference <= NOVELTY_TOLERANCE
        )

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain values; a difference that is NaN is None."""
        plain = asdict(self) | {"mismatches": list(self.mismatches), "is_equal": self.is_equal}
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in plain.items()}

    def describe(self) -> str:
        """Describe the comparison in one sentence."""
        found = "same predictions" if self.has_same_predictions else self._describe_mismatches()
        unreadable = f", {self.n_unreadable:,} unreadable left out" if self.n_unreadable else ""
        return (
            f"{found} as pixelplay predict --precision fp32 on {counted(self.n, 'image')} "
            f"({self.n_real:,} real, {self.n_drawn} drawn{unreadable}); largest difference of a "
            f"probability {self.max_probability_difference:.1e}, of the novelty "
            f"{self.max_novelty_difference:.1e}"
        )

    def _describe_mismatches(self) -> str:
        named = name_some(self.mismatches, EXAMPLES)
        return f"not the same predictions ({len(self.mismatches):,} differ: {named})"


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Images to compare on: their paths, where to read them, and true classes if known."""

    paths: tuple[str, ...]
    storage: ImageStorage
    labels: tuple[str, ...] | None = None

    def limited(self, n: int) -> "RealImages":
        """Keep at most n images, evenly spaced."""
        kept = np.linspace(0, len(self.paths) - 1, min(n, len(self.paths))).round().astype(int).tolist()
        labels = None if self.labels is None else tuple(self.labels[i] for i in kept)
        return RealImages(paths=tuple(self.paths[i] for i in kept), storage=self.storage, labels=labels)


def find_real_images(run: str, data: str | None, log: RunLog) -> RealImages | None:
    """Find images to compare on: those of `data`, else the held-out ones of the run; None if they are gone.

    Raises:
        DataError: `data` does not exist or contains no images.
    """
    if data is not None:
        if not os.path.exists(data):
            raise DataError(f"{data} does not exist; pass a folder, table, zip archive or file of images")
        dataset = list_images(data)
        if not len(dataset):
            raise DataError(f"no images in {data}; pass a folder, table, zip archive or file of images")
        return RealImages(paths=dataset.paths, storage=dataset.storage)
    found = None if (folder := _find_records(run)) is None else _find_held_out_images(folder)
    if found is None:
        log.note("compared with drawn images only: the images of the run are gone; name others with --data")
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class PairedOutputs:
    """Outputs of the predictor and of an exported model for the same N readable images."""

    names: tuple[str, ...]
    is_real: BoolArray  # (N,); False for drawn images
    labels: tuple[str, ...] | None  # (N,) true classes, "" for drawn images; None if unknown
    n_unreadable: int  # real images left out
    expected: ExportedOutputs  # of the predictor
    exported: ExportedOutputs
    engine: str

    def compare(self) -> ParityReport:
        """Measure the differences."""
        differs = self.expected.pred != self.exported.pred
        return ParityReport(
            engine=self.engine,
            n_real=int(self.is_real.sum()),
            n_drawn=int((~self.is_real).sum()),
            n_unreadable=self.n_unreadable,
            mismatches=tuple(compress(self.names, differs)),
            max_probability_difference=float(np.abs(self.expected.probs - self.exported.probs).max()),
            max_novelty_difference=float(np.abs(self.expected.novelty - self.exported.novelty).max()),
        )


def classify_with_both(
    model: ExportedModel,
    predictor: Predictor | EnsemblePredictor,
    images: RealImages | None,
    log: RunLog,
) -> PairedOutputs:
    """Classify real images and the drawn ones with an exported model and with the predictor.

    Raises:
        PixelPlayError: the file has other classes, so it was exported from another model.
        DataError: none of the real images can be read.
    """
    if tuple(model.metadata["classes"]) != predictor.classes:
        raise PixelPlayError(
            f"the exported model knows {name_some(model.metadata['classes'])} but the run knows "
            f"{name_some(predictor.classes)}; it was exported from another run"
        )
    chunks: list[tuple[list[_File], Predictions, ExportedOutputs]] = []
    with log.progress("comparing", 0 if images is None else len(images.paths)) as bar, silence_pillow():
        for files in _read_files(images):
            chunks.append((files, *_classify_chunk(model, predictor, files)))
            bar.update(sum(file.is_real for file in files))
    is_ok = [predictions.pred >= 0 for _, predictions, _ in chunks]
    if images is not None and not any(ok.any() for ok in is_ok[1:]):  # the first are the drawn ones
        raise DataError(
            f"could not read any of {counted(len(images.paths), 'image')} to compare on; first: "
            f"{chunks[1][1].errors[0]}; name others with --data"
        )
    kept = [file for (files, *_), ok in zip(chunks, is_ok, strict=True) for file in compress(files, ok)]
    return PairedOutputs(
        names=tuple(file.name for file in kept),
        is_real=np.array([file.is_real for file in kept]),
        labels=None if images is None or images.labels is None else tuple(file.label for file in kept),
        n_unreadable=sum(len(files) for files, *_ in chunks) - len(kept),
        expected=_join(
            ExportedOutputs(each.probs[ok], each.pred[ok], np.asarray(each.novelty)[ok])
            for (_, each, _), ok in zip(chunks, is_ok, strict=True)
        ),
        exported=_join(outputs for *_, outputs in chunks),
        engine=model.engine,
    )


class _File(NamedTuple):
    """One image file; without bytes if it cannot be read."""

    name: str
    data: bytes
    is_real: bool
    label: str = ""


def _classify_chunk(
    model: ExportedModel, predictor: Predictor | EnsemblePredictor, files: Sequence[_File]
) -> tuple[Predictions, ExportedOutputs]:
    """Return predictions of all files, and exported outputs of the readable ones."""
    preprocessing = read_preprocessing(model.metadata)
    predictions = predictor.predict([file.data for file in files])
    pixels = [
        eval_transform(decode_for(file.data, preprocessing, path=file.name), preprocessing)
        for file in compress(files, predictions.pred >= 0)
    ]
    if pixels:
        return predictions, model(np.stack(pixels))
    nothing = np.empty(0)
    return predictions, ExportedOutputs(predictions.probs[:0], predictions.pred[:0], nothing)


def _join(outputs: Iterable[ExportedOutputs]) -> ExportedOutputs:
    probs, pred, novelty = zip(*((each.probs, each.pred, each.novelty) for each in outputs), strict=True)
    return ExportedOutputs(np.concatenate(probs), np.concatenate(pred), np.concatenate(novelty))


def _read_files(images: RealImages | None) -> Iterator[list[_File]]:
    """Yield the drawn images, then chunks of the real ones."""
    yield [_File(f"drawn image {name!r}", data, False) for name, data in draw_difficult_images().items()]
    if images is not None:
        labels = images.labels or [""] * len(images.paths)
        rows = zip(images.paths, labels, strict=True)
        while some := list(islice(rows, CHUNK)):
            yield [_File(path, _read(images.storage, path), True, label) for path, label in some]


def _read(storage: ImageStorage, path: str) -> bytes:
    try:
        return storage.read(path)
    except ImageError:
        return b""


def _find_records(run: str) -> str | None:
    """Return the run folder of RUN or RUN/model; None for a model without a run."""
    parent = os.path.dirname(os.path.abspath(run))
    return next((folder for folder in (run, parent) if has_records(folder)), None)


def _find_held_out_images(folder: str) -> RealImages | None:
    """List the images behind the run's headline metric that still exist; None if none does."""
    try:
        records = read_records(folder)
        if records.source is None or not os.path.exists(records.source):
            return None
        dataset = open_dataset(records.source, DataConfig(**records.config["reading"]))
    except (DataError, ConfigError, OSError, KeyError, TypeError):
        return None
    known = frozenset(dataset.paths)
    rows = [row for row in records.predictions if row.path in known]
    if not rows:
        return None
    return RealImages(
        paths=tuple(row.path for row in rows),
        storage=dataset.storage,
        labels=tuple(row.label for row in rows),
    )

"""Predictor and EnsemblePredictor: trained models + images → Predictions."""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress, islice
from typing import IO, Any, TypeGuard, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelplay.array_types import BoolArray, Float32Array, Float64Array, IntArray
from pixelplay.config import ComputeConfig, DataConfig, Tta, check_choice
from pixelplay.data.audit import digest_bytes
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import check_array, to_rgb
from pixelplay.data.sources import list_files, list_images
from pixelplay.data.transforms import decode_for, eval_transform
from pixelplay.errors import ConfigError, DataError, ImageError, MissingExtraError
from pixelplay.evaluation.calibration import temperature_softmax
from pixelplay.evaluation.conformal import HeldOutScores
from pixelplay.evaluation.decision_rule import adjusted_argmax
from pixelplay.model.bundle import ModelBundle, read_bundle
from pixelplay.model.device import resolve_device_name, resolve_precision
from pixelplay.model.features import FeatureExtractor, LoadedImage, extract_batch, stream_features
from pixelplay.run_log import RunLog
from pixelplay.text import counted, name_some

InMemoryImage = Image.Image | NDArray[Any] | bytes
AnyImage = str | os.PathLike[str] | InMemoryImage | bytearray | memoryview | IO[bytes]
Images = AnyImage | ImageDataset | Iterable[AnyImage]
DECIMALS = 6  # of novelty
SHOWN_ROWS = 5
EXPECTED = "pass a path, PIL image, array (H, W, 3), encoded bytes or binary stream, or a list of these"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Predictions:
    """One row per image, in the requested order.

    Attributes:
        paths: (N,) as requested, with folder or archive; an image in memory is named like "[3]".
        status: (N,) "ok", "missing", "unreadable", "too_large" or "unsupported".
        errors: (N,) why a row has no prediction; "" otherwise.
        probs: (N, K) float64 calibrated class probabilities; a row sums to 1, or is NaN without prediction.
        pred: (N,) int64 predicted class, -1 in a row without prediction. With tau > 0 it may differ from
            the most probable class.
        classes: (K,) names.
        digests: (N,) content hash of each file; b"" if it could not be read.
        label: (N,) true class names; None if unknown.
        novelty: (N,) in [0, 1], fraction of held-out images that are less unusual; NaN in a row without
            prediction, None if not measured.
        abstained: (N,) True where the model is not confident enough to predict; None if not requested.
        sets: (N, K) prediction sets, which contain the true class with the requested coverage; None if
            not requested.
    """

    paths: tuple[str, ...]
    status: tuple[str, ...]
    errors: tuple[str, ...]
    probs: Float64Array
    pred: IntArray
    classes: tuple[str, ...]
    digests: tuple[bytes, ...]
    label: tuple[str, ...] | None = None
    novelty: Float64Array | None = None
    abstained: BoolArray | None = None
    sets: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        rows = zip(
            self.paths, self.status, self.prediction, np.nanmax(self.probs, axis=1, initial=0), strict=True
        )
        shown = [
            f"  {path}: {status if label is None else f'{label} ({p:.3f})'}"
            for path, status, label, p in islice(rows, SHOWN_ROWS)
        ]
        more = [f"  … {len(self) - SHOWN_ROWS:,} more"] if len(self) > SHOWN_ROWS else []
        head = f"Predictions of {counted(len(self), 'image')}, classes {name_some(self.classes)}"
        return "\n".join([head, *shown, *more])

    @property
    def prediction(self) -> tuple[str | None, ...]:
        """(N,) predicted class names; None in a row without prediction."""
        return tuple(self.classes[k] if k >= 0 else None for k in self.pred)

    def columns(self) -> dict[str, Sequence[Any]]:
        """Return the columns of a table; those that need a prediction are None in rows without one."""
        columns: dict[str, Sequence[Any]] = {"path": self.paths, "status": self.status, "error": self.errors}
        if self.label is not None:
            columns["label"] = self.label
        predicted: dict[str, Iterable[Any]] = {
            "prediction": self.prediction,
            "probability": self.probs[np.arange(len(self)), self.pred],
            **{f"prob_{name}": self.probs[:, k] for k, name in enumerate(self.classes)},
        }
        if self.abstained is not None:
            predicted["abstained"] = self.abstained.tolist()
        if self.sets is not None:
            predicted["prediction_set"] = [list(compress(self.classes, row)) for row in self.sets]
        if self.novelty is not None:
            predicted["novelty"] = [round(float(x), DECIMALS) for x in self.novelty]
        is_ok = self.pred >= 0
        return columns | {
            name: [value if ok else None for value, ok in zip(values, is_ok, strict=True)]
            for name, values in predicted.items()
        }

    def to_arrow(self) -> Any:
        """Return a `pyarrow.Table` with the columns of `columns`."""
        import pyarrow as pa

        return pa.table({name: pa.array(list(values)) for name, values in self.columns().items()})

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with the columns of `columns`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise MissingExtraError("to_pandas needs pandas; pip install pandas") from None
        return pd.DataFrame(self.columns())


class Predictor:
    """A trained classifier, ready to use.

    Args:
        run: folder of a run, or of its model.
        tta: test-time augmentation: "none", or "flip" to average each image and its mirror image. None:
            as in training.

    Attributes:
        bundle: the model.
        bundles: a list of it, as of an ensemble.
        classes: (K,) class names.
        held_out: scores of held-out images; None with another `tta` than in training.

    Raises:
        BundleError: no bundle there, or a damaged one.
        ConfigError: "flip" with a model trained without mirror images.
    """

    def __init__(
        self,
        run: "str | os.PathLike[str]",
        compute: ComputeConfig | None = None,
        *,
        tta: Tta | None = None,
    ) -> None:
        compute = compute or ComputeConfig()
        self.bundle = read_bundle(os.fspath(run))
        self.bundles = [self.bundle]
        self.classes = self.bundle.classes
        if tta is not None:
            check_choice("tta", tta, get_args(Tta))
        is_as_trained = tta in (None, "flip" if self.bundle.hflip else "none")
        self.held_out: HeldOutScores | None = self.bundle.held_out if is_as_trained else None
        if tta == "flip" and not self.bundle.hflip:
            raise ConfigError(
                f"tta='flip' cannot be used with {os.fspath(run)}, which was trained with --no-hflip; "
                "use --tta none"
            )
        self._num_workers = compute.num_workers
        device = resolve_device_name(compute.device)
        requested = compute.precision
        if requested == "auto" and self.bundle.precision == "fp32":
            requested = "fp32"  # never lower than in training
        self._extractor = FeatureExtractor(
            self.bundle.backbone,
            self.bundle.preprocessing,
            hflip=self.bundle.hflip and tta != "none",
            device=device,
            precision=resolve_precision(requested, device),
            batch_size=compute.batch_size,
            training_precision=self.bundle.precision,
        )

    def predict(self, images: Images) -> Predictions:
        """Classify images: one row each, in order, whether or not they can be read.

        Args:
            images: a folder, table, zip archive or file; a PIL image, array (H, W, 3) uint8, or encoded bytes
                or binary stream; or a list of files and images.

        Raises:
            DataError: something else; nothing is read.
        """
        return join_predictions(list(self.predict_stream(images)), self.classes)

    def predict_stream(self, images: Images) -> Iterator[Predictions]:
        """Classify images in chunks, with constant memory."""
        return self.stream_listed(*list_any_images(images))

    def stream_listed(
        self, dataset: ImageDataset, in_memory: Mapping[int, InMemoryImage]
    ) -> Iterator[Predictions]:
        """Classify listed images in chunks; those in memory are given by position."""
        load = partial(self._load, dataset, in_memory)
        stream = stream_features(self._extractor, load, len(dataset), num_workers=self._num_workers)
        start = 0
        for chunk, features in stream:
            paths = dataset.paths[start : start + len(chunk)]
            start += len(chunk)
            yield self._classify(tuple(map(dataset.storage.display_path, paths)), chunk, features)

    @property
    def batch_size(self) -> int:
        """Images that the network processes at once."""
        return self._extractor.batch_size

    @property
    def device(self) -> str:
        """Device that the network runs on: "cuda", "mps" or "cpu"."""
        return self._extractor.device

    def load(self, data: bytes, name: str) -> LoadedImage:
        """Decode and preprocess one encoded image; a failure is stored in the result."""
        return self._load_image(lambda: data, name)

    def predict_batch(self, names: Sequence[str], images: Sequence[LoadedImage]) -> Predictions:
        """Classify at most `batch_size` loaded images in the calling thread.

        The rows are those of `predict`, whatever else is in the batch. It may be called in several threads.
        """
        return self._classify(tuple(names), images, extract_batch(self._extractor, images))

    def _classify(
        self, paths: tuple[str, ...], images: Sequence[LoadedImage], features: Float32Array
    ) -> Predictions:
        """Predict images from their features (N, D)."""
        bundle = self.bundle
        logits = bundle.head.logits(features)  # (N, K), NaN for unreadable images
        probs = temperature_softmax(logits, bundle.temperature)
        is_ok = np.array([image.error is None for image in images])
        novelty = np.full(len(logits), np.nan)
        novelty[is_ok] = bundle.novelty.measure(features[is_ok], logits[is_ok])
        return Predictions(
            paths=paths,
            status=tuple("ok" if image.error is None else image.error.status for image in images),
            errors=tuple("" if image.error is None else image.error.reason for image in images),
            probs=probs,
            pred=adjusted_argmax(probs, bundle.priors, bundle.tau),
            classes=bundle.classes,
            digests=tuple(image.digest for image in images),
            novelty=novelty,
        )

    def _load(self, dataset: ImageDataset, in_memory: Mapping[int, InMemoryImage], i: int) -> LoadedImage:
        """Read and preprocess an image."""
        path = dataset.paths[i]
        read = partial(dataset.storage.read, path)
        return self._load_image(lambda: in_memory[i] if i in in_memory else read(), path)

    def _load_image(self, read: Callable[[], InMemoryImage], path: str) -> LoadedImage:
        digest, preprocessing = b"", self.bundle.preprocessing
        try:
            image = read()
            if isinstance(image, bytes):
                digest = digest_bytes(image)
                pixels = decode_for(image, preprocessing, path=path)
            elif isinstance(image, Image.Image):
                pixels = to_rgb(image, path=path, max_value=preprocessing.max_value)
            else:
                pixels = check_array(image, path=path, max_value=preprocessing.max_value)
            return LoadedImage(digest=digest, pixels=eval_transform(pixels, preprocessing))
        except ImageError as error:
            return LoadedImage(digest=digest, error=error.detached())


def join_predictions(chunks: Sequence[Predictions], classes: tuple[str, ...]) -> Predictions:
    """Concatenate chunks of unlabelled predictions in order."""
    return Predictions(
        paths=tuple(path for chunk in chunks for path in chunk.paths),
        status=tuple(status for chunk in chunks for status in chunk.status),
        errors=tuple(error for chunk in chunks for error in chunk.errors),
        probs=np.concatenate([np.empty((0, len(classes))), *(chunk.probs for chunk in chunks)]),
        pred=np.concatenate([np.empty(0, np.int64), *(chunk.pred for chunk in chunks)]),
        classes=classes,
        digests=tuple(digest for chunk in chunks for digest in chunk.digests),
        novelty=_join([chunk.novelty for chunk in chunks]),
        abstained=_join([chunk.abstained for chunk in chunks]),
        sets=_join([chunk.sets for chunk in chunks]),
    )


def _join(columns: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Concatenate an optional column."""
    existing = [column for column in columns if column is not None]
    return np.concatenate(existing) if existing else None


def collect_predictions(predictor: Predictor, dataset: ImageDataset, log: RunLog) -> Predictions:
    """Classify images and show the progress."""
    chunks = []
    with log.progress("predicting", len(dataset)) as bar:
        for chunk in predictor.predict_stream(dataset):
            bar.update(len(chunk))
            chunks.append(chunk)
    return join_predictions(chunks, predictor.classes)


def list_any_images(images: Images) -> tuple[ImageDataset, dict[int, InMemoryImage]]:
    """List all images as a dataset, and those in memory by index."""
    if isinstance(images, ImageDataset):
        return images, {}
    if isinstance(images, str | os.PathLike):
        return list_images(os.fspath(images), DataConfig()), {}
    if _is_image(images) and not (isinstance(images, np.ndarray) and images.ndim == 4):
        images = [images]
    # a mapping has keys, a data frame column names, a text file lines, and a set no order
    elif (
        isinstance(images, Mapping | Set | io.TextIOBase)
        or hasattr(images, "columns")
        or not isinstance(images, Iterable)
    ):
        raise DataError(f"images is a {type(images).__name__}; {EXPECTED}")
    in_memory: dict[int, InMemoryImage] = {}
    names: list[str] = []
    for i, image in enumerate(images):
        if isinstance(image, str | os.PathLike):
            names.append(os.fspath(image))
            continue
        if not _is_image(image):
            raise DataError(f"images[{i}] is a {type(image).__name__}; {EXPECTED}")
        content = image.read() if hasattr(image, "read") else image
        in_memory[i] = bytes(content) if isinstance(content, bytearray | memoryview) else content
        names.append(f"[{i}]")
    return list_files(names), in_memory


def _is_image(value: object) -> TypeGuard[InMemoryImage | bytearray | memoryview | IO[bytes]]:
    """Return whether a value is one image in memory, or a binary stream with one."""
    is_stream = hasattr(value, "read") and not isinstance(value, io.TextIOBase)
    return is_stream or isinstance(value, Image.Image | np.ndarray | bytes | bytearray | memoryview)


class ClassAlignment:
    """Common class order and decision of an ensemble of M models.

    Args:
        names: (M,) names of the models in error messages.

    Attributes:
        classes: (K,) names in the order of the first model.
        orders: (M, K) int64, index of each class in each model.
        adjustment: (K,) mean logit adjustment, subtracted from the logarithm of the mean probabilities.

    Raises:
        ConfigError: the models have different classes.
    """

    def __init__(self, bundles: Sequence[ModelBundle], names: Sequence[str]) -> None:
        self.classes = bundles[0].classes
        for name, bundle in zip(names, bundles, strict=True):
            if different := sorted(set(bundle.classes) ^ set(self.classes)):
                raise ConfigError(
                    f"{names[0]} and {name} cannot form an ensemble: only one of them knows "
                    f"{name_some(different)}; use runs with the same classes"
                )
        self.orders = np.array([[b.classes.index(name) for name in self.classes] for b in bundles])
        pairs = zip(bundles, self.orders, strict=True)
        adjustments = [b.tau * np.log(b.priors[order]) for b, order in pairs]  # (M, K)
        self.adjustment = np.mean(adjustments, axis=0)

    def predict(self, probs: Sequence[Float64Array]) -> tuple[Float64Array, IntArray]:
        """Average probabilities (N, K) that are in each model's own order, and predict classes (N,)."""
        ordered = [p[:, order] for p, order in zip(probs, self.orders, strict=True)]
        mean = np.asarray(np.mean(ordered, axis=0))
        # dividing by the geometric mean of priors ** tau averages the logit adjustments too
        return mean, adjusted_argmax(mean, np.exp(self.adjustment), 1.0)


class EnsemblePredictor:
    """An ensemble of trained classifiers that averages their calibrated probabilities.

    Args:
        runs: folders of runs, or of their models; backbones and input sizes may differ.
        compute: as in `Predictor`.
        tta: as in `Predictor`.

    Attributes:
        bundles: the models.
        classes: (K,) class names in the order of the first run.
        held_out: None, as the members' scores of held-out images do not describe the ensemble.

    Raises:
        BundleError: no bundle in one of the folders, or a damaged one.
        ConfigError: the models have different classes.
    """

    def __init__(
        self,
        runs: Sequence["str | os.PathLike[str]"],
        compute: ComputeConfig | None = None,
        *,
        tta: Tta | None = None,
    ) -> None:
        self._predictors = [Predictor(run, compute, tta=tta) for run in runs]
        self.bundles = [predictor.bundle for predictor in self._predictors]
        self._alignment = ClassAlignment(self.bundles, [os.fspath(run) for run in runs])
        self.classes = self._alignment.classes
        self.held_out: HeldOutScores | None = None

    def predict(self, images: Images) -> Predictions:
        """Classify images like `Predictor.predict`; novelty is that of the first model."""
        return join_predictions(list(self.predict_stream(images)), self.classes)

    def predict_stream(self, images: Images) -> Iterator[Predictions]:
        """Classify images in chunks, with constant memory."""
        listed = list_any_images(images)  # once, as a stream can only be read once
        streams = [predictor.stream_listed(*listed) for predictor in self._predictors]
        for chunks in zip(*streams, strict=True):
            first = chunks[0]
            if len({len(chunk) for chunk in chunks}) > 1:
                raise DataError("images changed while they were read; predict again")
            # an image that one model could not read has no prediction
            failed = [next((c for c in chunks if c.status[i] != "ok"), first) for i in range(len(first))]
            probs, pred = self._alignment.predict([chunk.probs for chunk in chunks])
            assert first.novelty is not None
            yield replace(
                first,
                probs=probs,
                pred=pred,
                status=tuple(chunk.status[i] for i, chunk in enumerate(failed)),
                errors=tuple(chunk.errors[i] for i, chunk in enumerate(failed)),
                novelty=np.where(np.isnan(probs).any(axis=1), np.nan, first.novelty),
            )

"""Bundle + images → Predictions."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pixelplay.arrays import BoolArray, Float32Array, Float64Array, IntArray, UInt8Array
from pixelplay.config import ComputeConfig, DataConfig, Tta, check_choice
from pixelplay.data.audit import digest_bytes
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import check_array, decode_image, to_rgb
from pixelplay.data.sources import list_files, list_images
from pixelplay.data.transforms import eval_transform
from pixelplay.errors import ConfigError, DataError, ImageError
from pixelplay.evaluation.calibration import natural_probs
from pixelplay.evaluation.conformal import HeldOutScores
from pixelplay.evaluation.decision_rule import decide
from pixelplay.model.bundle import ModelBundle, read_bundle
from pixelplay.model.device import pick_device, pick_precision
from pixelplay.model.features import FeatureExtractor, LoadedImage, stream_features
from pixelplay.run_log import RunLog
from pixelplay.text import name_some

InMemoryImage = Image.Image | NDArray[Any] | bytes
Images = str | os.PathLike[str] | ImageDataset | Sequence[str | os.PathLike[str] | InMemoryImage]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """One row for each requested image, in the requested order.

    Attributes:
        paths: (N,) as requested, below its folder or archive; an image in memory is named "[3]".
        status: (N,) "ok", "missing", "unreadable", "too_large" or "unsupported".
        errors: (N,) why a row has no prediction; "" where it has one.
        probs: (N, K) float64 calibrated class probabilities; a row sums to 1, or is NaN with its error.
        pred: (N,) int64 decided class, -1 in a row without prediction. With tau > 0 it need not be
            the most probable one.
        classes: (K,) names.
        digests: (N,) content digest of each file, b"" where it could not be read.
        novelty: (N,) in [0, 1], share of held-out images that are less unlike what was learned from;
            NaN in a row without prediction, None for what was predicted in training.
        answered: (N,) whether the model is sure enough; None where nothing was asked.
        sets: (N, K) classes among which the true one is, as often as asked; None likewise.
    """

    paths: tuple[str, ...]
    status: tuple[str, ...]
    errors: tuple[str, ...]
    probs: Float64Array
    pred: IntArray
    classes: tuple[str, ...]
    digests: tuple[bytes, ...]
    novelty: Float64Array | None = None
    answered: BoolArray | None = None
    sets: BoolArray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def labels(self) -> tuple[str | None, ...]:
        """(N,) decided class names, None in a row without prediction."""
        return tuple(self.classes[k] if k >= 0 else None for k in self.pred)


class Predictor:
    """A trained classifier, ready to use.

    Args:
        run: folder of a run, or of its model.
        compute: device, precision, batch size, threads.
        tta: views of each image that are answered for together: "none", it alone; "flip", its mirror
            image too. None:
            as the model was learned.

    Raises:
        BundleError: no bundle there, or a damaged one.
        ConfigError: mirror images asked of a model to which they mean something else.
    """

    def __init__(
        self,
        run: "str | os.PathLike[str]",
        compute: ComputeConfig | None = None,
        *,
        tta: Tta | None = None,
    ) -> None:
        compute = compute or ComputeConfig()
        self._bundle = read_bundle(os.fspath(run))
        if tta is not None:
            check_choice("tta", tta, get_args(Tta))
        self._is_as_learned = tta in (None, "flip" if self._bundle.hflip else "none")
        if tta == "flip" and not self._bundle.hflip:
            raise ConfigError(
                f"tta='flip' mirrors images, and {os.fspath(run)} was trained with --no-hflip; use --tta none"
            )
        self._num_workers = compute.num_workers
        device = pick_device(compute.device)
        asked = compute.precision
        if asked == "auto" and self._bundle.precision == "fp32":
            asked = "fp32"  # never coarser than what the head was learned on
        self._extractor = FeatureExtractor(
            self._bundle.backbone,
            self._bundle.preprocessing,
            hflip=self._bundle.hflip and tta != "none",
            device=device,
            precision=pick_precision(asked, device),
            batch_size=compute.batch_size,
            learned_in=self._bundle.precision,
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """(K,) class names."""
        return self._bundle.classes

    @property
    def held_out(self) -> HeldOutScores | None:
        """Scores of images that the model had not learned from; None where it sees other views now."""
        return self._bundle.held_out if self._is_as_learned else None

    @property
    def bundle(self) -> ModelBundle:
        """The model behind the predictions."""
        return self._bundle

    def predict(self, images: Images) -> Predictions:
        """Classify images: one row each, in order, whatever is wrong with some of them.

        Args:
            images: a folder, table, zip archive or file; or a list of files, PIL images, arrays
                (H, W, 3) uint8 and encoded bytes.
        """
        return join_predictions(list(self.predict_stream(images)), self.classes)

    def predict_stream(self, images: Images) -> Iterator[Predictions]:
        """Classify images, a chunk at a time; memory stays flat however many there are."""
        dataset, in_memory = _gather(images)
        size = self._bundle.preprocessing.input_size

        def load(i: int) -> LoadedImage:
            digest = b""
            try:
                if i in in_memory and not isinstance(in_memory[i], bytes):
                    pixels = _pixels_of(in_memory[i], dataset.paths[i])
                else:
                    data = in_memory[i] if i in in_memory else dataset.storage.read(dataset.paths[i])
                    assert isinstance(data, bytes)
                    digest = digest_bytes(data)
                    pixels = decode_image(data, path=dataset.paths[i], target_px=size)
                return LoadedImage(digest=digest, pixels=eval_transform(pixels, self._bundle.preprocessing))
            except ImageError as error:
                return LoadedImage(digest=digest, error=error.detached())

        start = 0
        stream = stream_features(self._extractor, load, len(dataset), num_workers=self._num_workers)
        for chunk, features in stream:
            paths = [dataset.storage.display_path(path) for path in dataset.paths[start : start + len(chunk)]]
            yield self._decide(paths, chunk, features)
            start += len(chunk)

    def _decide(
        self, paths: Sequence[str], chunk: Sequence[LoadedImage], features: Float32Array
    ) -> Predictions:
        bundle = self._bundle
        logits = bundle.head.logits(features)  # (N, K), NaN where nothing was read
        probs = natural_probs(logits, bundle.temperature)
        is_ok = np.array([loaded.error is None for loaded in chunk])
        novelty = np.full(len(logits), np.nan)
        novelty[is_ok] = bundle.novelty.measure(features[is_ok], logits[is_ok])
        return Predictions(
            paths=tuple(paths),
            status=tuple("ok" if loaded.error is None else loaded.error.status for loaded in chunk),
            errors=tuple("" if loaded.error is None else loaded.error.reason for loaded in chunk),
            probs=probs,
            pred=decide(probs, bundle.priors, bundle.tau),
            classes=bundle.classes,
            digests=tuple(loaded.digest for loaded in chunk),
            novelty=novelty,
        )


def join_predictions(chunks: Sequence[Predictions], classes: tuple[str, ...]) -> Predictions:
    """Put chunks together in their order."""
    empty = np.empty((0, len(classes)))
    return Predictions(
        paths=tuple(path for chunk in chunks for path in chunk.paths),
        status=tuple(status for chunk in chunks for status in chunk.status),
        errors=tuple(error for chunk in chunks for error in chunk.errors),
        probs=np.concatenate([empty, *(chunk.probs for chunk in chunks)]),
        pred=np.concatenate([np.empty(0, np.int64), *(chunk.pred for chunk in chunks)]),
        classes=classes,
        digests=tuple(digest for chunk in chunks for digest in chunk.digests),
        novelty=_join([chunk.novelty for chunk in chunks]),
        answered=_join([chunk.answered for chunk in chunks]),
        sets=_join([chunk.sets for chunk in chunks]),
    )


def _join(parts: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """Put columns together; None where none was asked for."""
    there = [split for split in parts if split is not None]
    return np.concatenate(there) if there else None


def collect_predictions(predictor: Predictor, dataset: ImageDataset, log: RunLog) -> Predictions:
    """Classify images and show how far it is."""
    chunks = []
    with log.progress("predicting", len(dataset)) as bar:
        for chunk in predictor.predict_stream(dataset):
            bar.update(len(chunk))
            chunks.append(chunk)
    return join_predictions(chunks, predictor.classes)


def _gather(images: Images) -> tuple[ImageDataset, dict[int, InMemoryImage]]:
    """Name all images, and keep those that are in memory by position."""
    if isinstance(images, ImageDataset):
        return images, {}
    if isinstance(images, str | os.PathLike):
        return list_images(os.fspath(images), DataConfig()), {}
    if isinstance(images, Image.Image | np.ndarray | bytes):
        raise DataError(f"images is one {type(images).__name__}; give a list, even of one image")
    images = list(images)  # an iterator can be read only once
    in_memory = {i: image for i, image in enumerate(images) if not isinstance(image, str | os.PathLike)}
    names = [f"[{i}]" if i in in_memory else os.fspath(image) for i, image in enumerate(images)]  # type: ignore[arg-type]
    return list_files(names), in_memory


def _pixels_of(image: InMemoryImage, name: str) -> UInt8Array:
    if isinstance(image, Image.Image):
        return to_rgb(image, path=name)
    if isinstance(image, np.ndarray):
        return check_array(image, path=name)
    raise ImageError(
        name, "unsupported", f"{type(image).__name__} is no image; give a path, PIL image, array or bytes"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassAlignment:
    """How models that know the same classes answer as one: by the mean of their calibrated probabilities.

    Attributes:
        classes: (K,) names, as the first model orders them.
        orders: (M, K) int64, where each of them stands in each model.
        lean: (K,) > 0, what probabilities are divided by before the largest is taken: each model leans
            as its own tau says; together they lean as they do on average.
    """

    classes: tuple[str, ...]
    orders: IntArray
    lean: Float64Array

    def mean(self, probs: Sequence[Float64Array]) -> Float64Array:
        """Probabilities (N, K) of all models together, from those of each, (N, K) in its own order."""
        ordered = [p[:, order] for p, order in zip(probs, self.orders, strict=True)]
        return np.asarray(np.mean(ordered, axis=0))

    def decide(self, probs: Float64Array) -> IntArray:
        """Choose the class (N,) that is answered with probabilities (N, K)."""
        return decide(probs, self.lean, 1.0)


def align_classes(bundles: Sequence[ModelBundle], names: Sequence[str]) -> ClassAlignment:
    """Match models by their class names.

    Args:
        names: (M,) what a user calls the models.

    Raises:
        ConfigError: they know different classes.
    """
    classes = bundles[0].classes
    for name, bundle in zip(names, bundles, strict=True):
        if apart := sorted(set(bundle.classes) ^ set(classes)):
            raise ConfigError(
                f"{names[0]} and {name} cannot answer together, for only one of them "
                f"knows {name_some(apart)}; give runs with the same classes"
            )
    orders = np.array([[bundle.classes.index(name) for name in classes] for bundle in bundles])
    lean = [b.tau * np.log(b.priors[order]) for b, order in zip(bundles, orders, strict=True)]  # (M, K)
    return ClassAlignment(classes=classes, orders=orders, lean=np.exp(np.mean(lean, axis=0)))


class EnsemblePredictor:
    """Several trained classifiers that answer as one, by the mean of their calibrated probabilities.

    Args:
        runs: folders of runs, or of their models; each may have another backbone and image size.
        compute: device, precision, batch size, threads.
        tta: as of `Predictor`.

    Raises:
        BundleError: no bundle in one of them, or a damaged one.
        ConfigError: they know different classes.
    """

    def __init__(
        self,
        runs: Sequence["str | os.PathLike[str]"],
        compute: ComputeConfig | None = None,
        *,
        tta: Tta | None = None,
    ) -> None:
        self._predictors = [Predictor(run, compute, tta=tta) for run in runs]
        bundles = [predictor.bundle for predictor in self._predictors]
        self._alignment = align_classes(bundles, [os.fspath(run) for run in runs])
        self.classes = self._alignment.classes

    @property
    def held_out(self) -> None:
        """Nothing: what each model had not learned from says little about all of them together."""

    def predict(self, images: Images) -> Predictions:
        """Classify images as `Predictor.predict` does; how novel they are is said by the first model."""
        return join_predictions(list(self.predict_stream(images)), self.classes)

    def predict_stream(self, images: Images) -> Iterator[Predictions]:
        """Classify images, a chunk at a time."""
        if isinstance(images, Iterator):
            images = list(images)  # it can be read only once
        streams = [predictor.predict_stream(images) for predictor in self._predictors]
        for chunks in zip(*streams, strict=True):
            if len({len(chunk) for chunk in chunks}) > 1:
                raise DataError("images changed while they were read; predict again")
            n = len(chunks[0])
            # what one model could not read has no answer
            worst = [next((c for c in chunks if c.status[i] != "ok"), chunks[0]) for i in range(n)]
            probs = self._alignment.mean([chunk.probs for chunk in chunks])
            novelty = chunks[0].novelty
            if novelty is not None:
                novelty = np.where(np.isnan(probs).any(axis=1), np.nan, novelty)
            yield replace(
                chunks[0],
                probs=probs,
                pred=self._alignment.decide(probs),
                status=tuple(chunk.status[i] for i, chunk in enumerate(worst)),
                errors=tuple(chunk.errors[i] for i, chunk in enumerate(worst)),
                novelty=novelty,
            )

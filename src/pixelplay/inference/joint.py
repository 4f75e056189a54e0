"""Several bundles + images → Predictions, as if they were one."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.arrays import Float64Array, IntArray
from pixelplay.config import ComputeConfig, Tta
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.decision_rule import decide
from pixelplay.inference.predictor import Images, Predictions, Predictor, join_predictions
from pixelplay.model.bundle import Bundle
from pixelplay.text import name_some


@dataclass(frozen=True, kw_only=True, eq=False)
class Concord:
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


def bring_together(bundles: Sequence[Bundle], names: Sequence[str]) -> Concord:
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
    return Concord(classes=classes, orders=orders, lean=np.exp(np.mean(lean, axis=0)))


class JointPredictor:
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
        self._concord = bring_together(bundles, [os.fspath(run) for run in runs])
        self.classes = self._concord.classes

    @property
    def held_out(self) -> None:
        """Nothing: what each model had not learned from says little about all of them together."""

    def predict(self, images: Images) -> Predictions:
        """Classify photographs as `Predictor.predict` does; how novel they are is said by the first model."""
        return join_predictions(list(self.predict_stream(images)), self.classes)

    def predict_stream(self, images: Images) -> Iterator[Predictions]:
        """Classify photographs, a chunk at a time."""
        if isinstance(images, Iterator):
            images = list(images)  # it can be read only once
        streams = [predictor.predict_stream(images) for predictor in self._predictors]
        for chunks in zip(*streams, strict=True):
            if len({len(chunk) for chunk in chunks}) > 1:
                raise DataError("photographs changed while they were read; predict again")
            n = len(chunks[0])
            # what one model could not read has no answer
            worst = [next((c for c in chunks if c.status[i] != "ok"), chunks[0]) for i in range(n)]
            probs = self._concord.mean([chunk.probs for chunk in chunks])
            novelty = chunks[0].novelty
            if novelty is not None:
                novelty = np.where(np.isnan(probs).any(axis=1), np.nan, novelty)
            yield replace(
                chunks[0],
                probs=probs,
                pred=self._concord.decide(probs),
                status=tuple(chunk.status[i] for i, chunk in enumerate(worst)),
                errors=tuple(chunk.errors[i] for i, chunk in enumerate(worst)),
                novelty=novelty,
            )

"""Several bundles + images → Predictions, as if they were one."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from pixelplay.config import ComputeConfig, Tta
from pixelplay.errors import ConfigError, DataError, name_some
from pixelplay.evaluation.calibration import decide
from pixelplay.inference.predictor import Images, Predictions, Predictor, join_predictions


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
        self.classes = self._predictors[0].classes
        for run, predictor in zip(runs, self._predictors, strict=True):
            if apart := sorted(set(predictor.classes) ^ set(self.classes)):
                raise ConfigError(
                    f"{os.fspath(runs[0])} and {os.fspath(run)} cannot answer together, for only one of them "
                    f"knows {name_some(apart)}; give runs with the same classes"
                )
        # each leans as its own tau says; together they lean as they do on average
        lean = [p.bundle.tau * np.log(p.bundle.priors[self._order(p)]) for p in self._predictors]  # (M, K)
        self._lean = np.exp(np.mean(lean, axis=0))  # (K,)

    @property
    def held_out(self) -> None:
        """Nothing: what each model had not learned from says little about all of them together."""

    def predict(self, images: Images) -> Predictions:
        """Classify photographs as `Predictor.predict` does."""
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
            probs = np.mean(
                [chunk.probs[:, self._order(p)] for chunk, p in zip(chunks, self._predictors, strict=True)],
                axis=0,
            )
            pred = decide(probs, self._lean, 1.0)
            yield replace(
                chunks[0],
                probs=probs,
                pred=pred,
                novelty=np.mean([chunk.novelty for chunk in chunks], axis=0),
                status=tuple(chunk.status[i] for i, chunk in enumerate(worst)),
                errors=tuple(chunk.errors[i] for i, chunk in enumerate(worst)),
            )

    def _order(self, predictor: Predictor) -> NDArray[np.int64]:
        """Where each of our classes stands among those of one model."""
        return np.array([predictor.classes.index(name) for name in self.classes])

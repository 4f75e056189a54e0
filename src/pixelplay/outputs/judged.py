"""Logits of labelled photographs → figures, and rows that show them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixelplay.config import PARTS, Part, TrainConfig
from pixelplay.data.index import ImageIndex
from pixelplay.errors import DataError, name_some
from pixelplay.evaluation.comparison import PairedComparison, compare_models
from pixelplay.evaluation.decision import Decision
from pixelplay.evaluation.metrics import Evaluation, evaluate_probs
from pixelplay.inference.predictor import Predictions
from pixelplay.journal import Journal
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.bundle import Bundle, shorten_digest
from pixelplay.model.features import Device, make_extractor
from pixelplay.model.head import LinearHead
from pixelplay.training.bench import read_rows
from pixelplay.training.material import Material


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A part with its predictions, its given labels and what came of it.

    Attributes:
        positions: (N,) which photographs of the material.
        predictions: one row for each.
        given: (N,) given class names.
        evaluation: its figures.
    """

    positions: NDArray[np.int64]
    predictions: Predictions
    given: tuple[str, ...]
    evaluation: Evaluation


def judge(
    material: Material,
    positions: NDArray[np.int64],
    decided: tuple[NDArray[np.float64], NDArray[np.int64]],
    seed: int,
) -> Judged:
    """Measure decisions on photographs of the material.

    Args:
        positions: (N,) which photographs.
        decided: their probabilities (N, K) and classes (N,); -1 was never held out and is left out.
    """
    scored = decided[1] >= 0
    positions, probs, pred = positions[scored], decided[0][scored], decided[1][scored]
    labels, index = material.labels[positions], material.index
    predictions = Predictions(
        paths=tuple(index.paths[i] for i in positions),
        status=("ok",) * len(positions),
        errors=("",) * len(positions),
        probs=probs,
        pred=pred,
        classes=material.known_classes,
        digests=tuple(material.digests[i] for i in positions),
    )
    return Judged(
        positions=positions,
        predictions=predictions,
        given=tuple(material.classes[k] for k in labels),
        evaluation=evaluate_probs(
            probs,
            pred,
            labels,
            material.classes,
            n_known=material.n_known,
            groups=None if index.groups is None else index.groups[positions],
            seed=seed,
        ),
    )


def judge_test(
    answer: tuple[Backbone, LinearHead],
    decision: Decision,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
) -> Judged | None:
    """Measure the test part; None where there is none."""
    test, (backbone, head) = material.parts.split.test, answer
    if not len(test):
        return None
    features = material.features[test]
    if backbone is not loaded.backbone:
        features = read_rows(
            material, test, make_extractor(backbone, loaded.preprocessing, config, device), config
        )
    return judge(material, test, decision.apply(head.logits(features)), config.seed)


def judge_again(material: Material, judged: Judged, keep: NDArray[np.bool_], seed: int) -> Evaluation | None:
    """Measure again on a subset of the part, a mask (N,); None where nothing is left."""
    if not keep.any():
        return None
    kept = judged.predictions.probs[keep], judged.predictions.pred[keep]
    return judge(material, judged.positions[keep], kept, seed).evaluation


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What `evaluate` found.

    Attributes:
        evaluation: figures over the readable labelled photographs.
        part: the given part that was scored, or "all".
        n_unreadable: labelled photographs that could not be read and are not in the figures.
        n_trained_on: scored photographs that the model has learned from.
        unseen: the same figures without those; None where there are none, or nothing else.
        against: the difference to another model, if one was named.
    """

    evaluation: Evaluation
    part: str
    n_unreadable: int
    n_trained_on: int
    unseen: Evaluation | None
    against: "RunComparison | None" = None

    def to_json(self) -> dict[str, object]:
        """Return the figures at the top level, and what they rest on beside them."""
        return {
            **self.evaluation.to_json(),
            "part": self.part,
            "n_unreadable": self.n_unreadable,
            "n_trained_on": self.n_trained_on,
            "unseen": None if self.unseen is None else self.unseen.to_json(),
            "against": None if self.against is None else self.against.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """One model less another on the same photographs.

    Attributes:
        runs: the model that was measured, and the other.
        metric: what the first decides for.
        everything: all scored photographs.
        n_trained_on: photographs that either model has learned from.
        unseen: the same without those; None where there are none, or nothing else.
    """

    runs: tuple[str, str]
    metric: str
    everything: PairedComparison
    n_trained_on: int
    unseen: PairedComparison | None

    @property
    def fairest(self) -> PairedComparison:
        """Without photographs that either has learned from, where there are others."""
        return self.everything if self.unseen is None else self.unseen

    def to_json(self) -> dict[str, object]:
        """Return plain values."""
        return {
            "runs": list(self.runs),
            "metric": self.metric,
            **self.everything.to_json(),
            "n_trained_on": self.n_trained_on,
            "unseen": None if self.unseen is None else self.unseen.to_json(),
        }


def choose_scored(index: ImageIndex, part: Part | None) -> tuple[ImageIndex, str]:
    """Select the labelled photographs to score: the asked part, else test where given, else all.

    Raises:
        DataError: there are none.
    """
    is_labelled = index.labels >= 0
    chosen = part
    if chosen is None and (index.in_part("test") & is_labelled).any():
        chosen = "test"
    where = is_labelled if chosen is None else is_labelled & index.in_part(chosen)
    if not where.any():
        there = [name for name in PARTS if (index.in_part(name) & is_labelled).any()]
        has = f"; it has {', '.join(there)}" if there else ""
        raise DataError(
            f"{index.source} has no labelled photographs{f' in part {part}' if part else ''}{has}"
        )
    return index.select(where), chosen or "all"


def labels_among(classes: tuple[str, ...], index: ImageIndex) -> NDArray[np.int64]:
    """Labels (N,) as positions among a model's classes, -1 for a class that it does not know."""
    position = {name: k for k, name in enumerate(classes)}
    return np.array([position.get(index.classes[k], -1) for k in index.labels], dtype=np.int64)


def evaluate_predictions(
    predictions: Predictions,
    index: ImageIndex,
    bundle: Bundle,
    part: str,
    journal: Journal,
    *,
    at_precision: float | None = None,
    positive: str | None = None,
) -> EvaluationReport:
    """Measure predictions against the labels of their index, row by row.

    Raises:
        DataError: no photograph could be read.
    """
    is_ok = predictions.pred >= 0
    n_unreadable = int((~is_ok).sum())
    if n_unreadable == len(predictions):
        raise DataError(
            f"none of the {n_unreadable} labelled photographs could be read; first: {predictions.errors[0]}"
        )
    if n_unreadable:
        journal.note(f"{n_unreadable} labelled photographs could not be read and are not in the figures")
    classes = _all_names(bundle.classes, index.classes)
    labels = _renumbered(index.classes, classes)[index.labels]
    unknown = sorted({classes[k] for k in labels if k >= len(bundle.classes)})
    if unknown:
        journal.note(f"the model does not know {name_some(unknown)}: their photographs count as errors")

    def measure(keep: NDArray[np.bool_]) -> Evaluation:
        return evaluate_probs(
            predictions.probs[keep],
            predictions.pred[keep],
            labels[keep],
            classes,
            n_known=len(bundle.classes),
            groups=None if index.groups is None else index.groups[keep],
            at_precision=at_precision,
            positive=positive,
        )

    seen = _was_learned(predictions, bundle) & is_ok
    if seen.any():
        journal.note(
            f"{seen.sum()} of {is_ok.sum()} scored photographs were trained on: the figures are too good; "
            "those without them stand beside"
        )
    return EvaluationReport(
        evaluation=measure(is_ok),
        part=part,
        n_unreadable=n_unreadable,
        n_trained_on=int(seen.sum()),
        unseen=measure(is_ok & ~seen) if seen.any() and (is_ok & ~seen).any() else None,
    )


def compare_runs(
    answers: tuple[Predictions, Predictions],
    bundles: tuple[Bundle, Bundle],
    runs: tuple[str, str],
    index: ImageIndex,
    journal: Journal,
) -> RunComparison:
    """Measure one model less another, row by row of the same index, some of which could be read."""
    classes = _all_names(*(bundle.classes for bundle in bundles), index.classes)
    labels = _renumbered(index.classes, classes)[index.labels]
    places = [_renumbered(bundle.classes, classes) for bundle in bundles]  # (K of each,)
    for run, own, others in zip(runs, bundles, reversed(bundles), strict=True):
        if lacking := sorted(set(others.classes) - set(own.classes)):
            journal.note(f"{run} does not know {name_some(lacking)}, which the other model does")
    probs = [np.zeros((len(labels), len(classes))) for _ in answers]
    for wide, place, answer in zip(probs, places, answers, strict=True):
        wide[:, place] = answer.probs
    preds = [place[answer.pred] for place, answer in zip(places, answers, strict=True)]
    is_known = np.isin(labels, places[0]) & np.isin(labels, places[1])
    is_ok = (answers[0].pred >= 0) & (answers[1].pred >= 0)
    seen = [_was_learned(answer, bundle) for answer, bundle in zip(answers, bundles, strict=True)]
    is_seen = (seen[0] | seen[1]) & is_ok

    def measure(keep: NDArray[np.bool_]) -> PairedComparison:
        return compare_models(
            (preds[0][keep], preds[1][keep]),
            (probs[0][keep], probs[1][keep]),
            labels[keep],
            None if index.groups is None else index.groups[keep],
            is_known=is_known[keep],
        )

    if is_seen.any() and not is_seen[is_ok].all():
        journal.note(
            f"the difference is shown for the {(is_ok & ~is_seen).sum()} photographs that neither model has "
            "learned from"
        )
    return RunComparison(
        runs=runs,
        metric=bundles[0].metric,
        everything=measure(is_ok),
        n_trained_on=int(is_seen.sum()),
        unseen=measure(is_ok & ~is_seen) if is_seen.any() and (is_ok & ~is_seen).any() else None,
    )


def _all_names(*lists: tuple[str, ...]) -> tuple[str, ...]:
    """Every name once, in the order of the lists."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def _renumbered(names: tuple[str, ...], among: tuple[str, ...]) -> NDArray[np.int64]:
    """Positions (K,) of names in a longer list."""
    position = {name: k for k, name in enumerate(among)}
    return np.array([position[name] for name in names], dtype=np.int64)


def _was_learned(predictions: Predictions, bundle: Bundle) -> NDArray[np.bool_]:
    """Which rows (N,) a model has learned from."""
    return np.array([shorten_digest(digest) in bundle.trained_on for digest in predictions.digests])

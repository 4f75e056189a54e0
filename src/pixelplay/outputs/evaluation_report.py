"""Two runs on the same labelled images → how far they are apart, and whether that is real."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import BoolArray, Float32Array, Float64Array, IntArray
from pixelplay.config import SPLITS, SplitName, TrainConfig, check_choice
from pixelplay.data.dataset import ImageDataset
from pixelplay.errors import DataError
from pixelplay.evaluation.comparison import PairedComparison, compare_models
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.evaluate import Evaluation, evaluate_probs
from pixelplay.inference.predictor import Predictions
from pixelplay.model.backbone import Backbone, PretrainedBackbone
from pixelplay.model.bundle import ModelBundle, shorten_digest
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import Device
from pixelplay.outputs.predictions_table import write_predictions
from pixelplay.run_log import RunLog
from pixelplay.text import name_some
from pixelplay.training.finalize import features_of
from pixelplay.training.probe_or_finetune import TrainedClassifier
from pixelplay.training.training_data import TrainingData


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """One model less another on the same images.

    Attributes:
        runs: the model that was measured, and the other.
        metric: what the first decides for.
        everything: all scored images.
        n_trained_on: images that either model has learned from.
        unseen: the same without those; None where there are none, or nothing else.
    """

    runs: tuple[str, str]
    metric: str
    everything: PairedComparison
    n_trained_on: int
    unseen: PairedComparison | None

    @property
    def fairest(self) -> PairedComparison:
        """Without images that either has learned from, where there are others."""
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


def compare_runs(
    answers: tuple[Predictions, Predictions],
    bundles: tuple[ModelBundle, ModelBundle],
    runs: tuple[str, str],
    dataset: ImageDataset,
    log: RunLog,
) -> RunComparison:
    """Measure one model less another, row by row of the same index, some of which could be read."""
    classes = all_names(*(bundle.classes for bundle in bundles), dataset.classes)
    labels = renumbered(dataset.classes, classes)[dataset.labels]
    places = [renumbered(bundle.classes, classes) for bundle in bundles]  # (K of each,)
    for run, own, others in zip(runs, bundles, reversed(bundles), strict=True):
        if lacking := sorted(set(others.classes) - set(own.classes)):
            log.note(f"{run} does not know {name_some(lacking)}, which the other model does")
    probs = [np.zeros((len(labels), len(classes))) for _ in answers]
    for wide, place, answer in zip(probs, places, answers, strict=True):
        wide[:, place] = answer.probs
    preds = [place[answer.pred] for place, answer in zip(places, answers, strict=True)]
    is_known = np.isin(labels, places[0]) & np.isin(labels, places[1])
    is_ok = (answers[0].pred >= 0) & (answers[1].pred >= 0)
    seen = [was_learned(answer, bundle) for answer, bundle in zip(answers, bundles, strict=True)]
    is_seen = (seen[0] | seen[1]) & is_ok

    def measure(keep: BoolArray) -> PairedComparison:
        return compare_models(
            (preds[0][keep], preds[1][keep]),
            (probs[0][keep], probs[1][keep]),
            labels[keep],
            None if dataset.groups is None else dataset.groups[keep],
            is_known=is_known[keep],
        )

    n_unseen = int((is_ok & ~is_seen).sum())
    if is_seen.any() and n_unseen:
        log.note(f"the difference is shown for the {n_unseen} images that neither model has learned from")
    elif is_seen.any():
        learned = " and ".join(
            f"{run} from {(own & is_ok).sum()}" for run, own in zip(runs, seen, strict=True)
        )
        log.note(
            f"each of the {is_ok.sum()} images was learned from by a model ({learned}): the difference "
            "says little about new ones"
        )
    return RunComparison(
        runs=runs,
        metric=bundles[0].metric,
        everything=measure(is_ok),
        n_trained_on=int(is_seen.sum()),
        unseen=measure(is_ok & ~is_seen) if is_seen.any() and n_unseen else None,
    )


def all_names(*lists: tuple[str, ...]) -> tuple[str, ...]:
    """Every name once, in the order of the lists."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def renumbered(names: tuple[str, ...], among: tuple[str, ...]) -> IntArray:
    """Positions (K,) of names in a longer list."""
    position = {name: k for k, name in enumerate(among)}
    return np.array([position[name] for name in names], dtype=np.int64)


def was_learned(predictions: Predictions, bundle: ModelBundle) -> BoolArray:
    """Which rows (N,) a model has learned from."""
    return np.array([shorten_digest(digest) in bundle.trained_on for digest in predictions.digests])


Ask = Callable[[IntArray], Float32Array]  # positions (n,) to logits (n, K)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A part with its predictions, its given labels and what came of it.

    Attributes:
        positions: (N,) which images of the material.
        predictions: one row for each.
        given: (N,) given class names.
        evaluation: its figures, on the given labels.
        corrected: the same on the labels as the user has corrected them, without those that are to be
            left out; None where that is no difference.
    """

    positions: IntArray
    predictions: Predictions
    given: tuple[str, ...]
    evaluation: Evaluation
    corrected: Evaluation | None


def judge(
    data: TrainingData,
    positions: IntArray,
    decided: tuple[Float64Array, IntArray],
    seed: int,
) -> Judged:
    """Measure decisions on images of the material.

    Args:
        positions: (N,) which images.
        decided: their probabilities (N, K) and classes (N,); -1 was never held out and is left out.
    """
    scored = decided[1] >= 0
    positions, probs, pred = positions[scored], decided[0][scored], decided[1][scored]
    given, corrected = data.given_labels[positions], data.corrected_labels[positions]
    dataset = data.dataset
    predictions = Predictions(
        paths=tuple(dataset.paths[i] for i in positions),
        status=("ok",) * len(positions),
        errors=("",) * len(positions),
        probs=probs,
        pred=pred,
        classes=data.known_classes,
        digests=tuple(data.digests[i] for i in positions),
    )

    def measure(kept: BoolArray, labels: IntArray) -> Evaluation:
        return evaluate_probs(
            probs[kept],
            pred[kept],
            labels[kept],
            data.classes,
            n_known=data.n_known,
            groups=None if dataset.groups is None else dataset.groups[positions[kept]],
            seed=seed,
        )

    has_label = corrected >= 0
    is_changed = bool((corrected != given).any()) and bool(has_label.any())
    return Judged(
        positions=positions,
        predictions=predictions,
        given=tuple(data.classes[k] for k in given),
        evaluation=measure(np.ones(len(given), dtype=np.bool_), given),
        corrected=measure(has_label, corrected) if is_changed else None,
    )


def answer_rows(
    answer: tuple[Backbone, LinearHead],
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    device: Device,
    rows: IntArray,
) -> Float32Array:
    """Logits (n, K) of some images of the material from a finished network and its head."""
    backbone, head = answer
    if not len(rows):
        return np.empty((0, data.n_known), np.float32)
    return head.logits(features_of(backbone, data, loaded, config, device, rows))


def judge_held_out(
    data: TrainingData,
    learned: TrainedClassifier,
    decided: tuple[Float64Array, IntArray],
    ask: Ask,
    rule: DecisionRule,
    seed: int,
) -> Judged:
    """Measure the images that chose, and those of their part that were left out of learning.

    Without these the figures would be too good: they are what the user, or a classifier, found doubtful.

    Args:
        decided: probabilities (n, K) and classes (n,) of the images that chose.
        ask: positions to logits, by the finished classifier, which has not learned from what was left out.
    """
    if learned.split == "oof":
        excluded = np.union1d(data.excluded, data.dropped)
    else:  # what was dropped, or left out of train, is no part of a validation part
        excluded = data.excluded_from_val
    probs, pred = rule.apply(ask(excluded))
    positions = np.concatenate([learned.held_out, excluded])
    return judge(
        data, positions, (np.concatenate([decided[0], probs]), np.concatenate([decided[1], pred])), seed
    )


def judge_test(data: TrainingData, ask: Ask, rule: DecisionRule, seed: int) -> Judged | None:
    """Measure the test part; None where there is none."""
    test = data.split.test
    return judge(data, test, rule.apply(ask(test)), seed) if len(test) else None


def judge_without_copies(data: TrainingData, test: Judged | None, seed: int) -> Evaluation | None:
    """Measure the test part without images that had a copy in training; None where none had, or all."""
    if test is None or not len(data.split.duplicated):
        return None
    kept = ~np.isin(test.positions, data.split.duplicated)
    decided = test.predictions.probs[kept], test.predictions.pred[kept]
    return judge(data, test.positions[kept], decided, seed).evaluation if kept.any() else None


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What `evaluate` found.

    Attributes:
        evaluation: figures over the readable labelled images.
        part: the given part that was scored, or "all".
        unreadable: path, status and reason of labelled images that are not in the figures.
        n_trained_on: scored images that the model has learned from.
        unseen: the same figures without those; None where there are none, or nothing else.
        against: the difference to another model, if one was named.
    """

    evaluation: Evaluation
    split: str
    unreadable: Sequence[Mapping[str, str]]
    n_trained_on: int
    unseen: Evaluation | None
    against: RunComparison | None = None

    def to_json(self) -> dict[str, object]:
        """Return the figures at the top level, and what they rest on beside them."""
        return {
            **self.evaluation.to_json(),
            "split": self.split,
            "n_unreadable": len(self.unreadable),
            "unreadable": [dict(bad) for bad in self.unreadable],
            "n_trained_on": self.n_trained_on,
            "unseen": None if self.unseen is None else self.unseen.to_json(),
            "against": None if self.against is None else self.against.to_json(),
        }


def choose_scored(dataset: ImageDataset, split: SplitName | None, log: RunLog) -> tuple[ImageDataset, str]:
    """Select the labelled images to score: the asked part, else test where given, else all.

    Of a part without any label that was said as it was read; of others it is said here.

    Raises:
        ConfigError: no such part.
        DataError: there are none.
    """
    if split is not None:
        check_choice("split", split, SPLITS)
    is_labelled = dataset.labels >= 0
    chosen = split
    if chosen is None and (dataset.in_split("test") & is_labelled).any():
        chosen = "test"
    inside = ~dataset.in_split("test") if chosen is None else dataset.in_split(chosen)
    where = inside & is_labelled
    if n_without := int((inside & ~is_labelled).sum()):
        log.note(f"{n_without:,} of {inside.sum():,} images have no label and are not scored")
    if not where.any():
        there = [name for name in SPLITS if (dataset.in_split(name) & is_labelled).any()]
        has = f"; it has {', '.join(there)}" if there else ""
        raise DataError(f"{dataset.source} has no labelled images{f' in part {split}' if split else ''}{has}")
    return dataset.select(where), chosen or "all"


def labels_among(classes: tuple[str, ...], dataset: ImageDataset) -> IntArray:
    """Labels (N,) as positions among a model's classes, -1 for a class that it does not know."""
    position = {name: k for k, name in enumerate(classes)}
    return np.array([position.get(dataset.classes[k], -1) for k in dataset.labels], dtype=np.int64)


def write_judged(predictions: Predictions, dataset: ImageDataset, bundle: ModelBundle, path: str) -> None:
    """Write each prediction beside the class that was given, and whether it was learned from."""
    columns = {
        "given": [dataset.classes[k] for k in dataset.labels],
        "trained_on": ["true" if seen else "false" for seen in was_learned(predictions, bundle)],
    }
    write_predictions([predictions], predictions.classes, path, columns)


def evaluate_predictions(
    predictions: Predictions,
    dataset: ImageDataset,
    bundle: ModelBundle,
    split: str,
    log: RunLog,
    *,
    at_precision: float | None = None,
    positive: str | None = None,
) -> EvaluationReport:
    """Measure predictions against the labels of their index, row by row.

    Raises:
        DataError: no image could be read.
    """
    is_ok = predictions.pred >= 0
    unreadable = [
        {"path": predictions.paths[i], "status": predictions.status[i], "reason": predictions.errors[i]}
        for i in np.flatnonzero(~is_ok)
    ]
    named = name_some([f"{bad['path']}: {bad['reason']}" for bad in unreadable])
    if not is_ok.any():
        raise DataError(f"none of the {len(unreadable)} labelled images could be read: {named}")
    if unreadable:
        log.note(f"{len(unreadable)} labelled images could not be read and are not in the figures: {named}")
    classes = all_names(bundle.classes, dataset.classes)
    labels = renumbered(dataset.classes, classes)[dataset.labels]
    unknown = sorted({classes[k] for k in labels if k >= len(bundle.classes)})
    if unknown:
        log.note(f"the model does not know {name_some(unknown)}: their images count as errors")

    def measure(keep: BoolArray, precision: float | None) -> Evaluation:
        return evaluate_probs(
            predictions.probs[keep],
            predictions.pred[keep],
            labels[keep],
            classes,
            n_known=len(bundle.classes),
            groups=None if dataset.groups is None else dataset.groups[keep],
            at_precision=precision,
            positive=None if precision is None else positive,
        )

    seen = was_learned(predictions, bundle) & is_ok
    if seen.any():
        log.note(
            f"{seen.sum()} of {is_ok.sum()} scored images were trained on: the figures are too good; "
            "those without them stand beside"
        )
    rest = is_ok & ~seen
    unseen = None
    if seen.any() and rest.any():
        column = 1 if positive is None else bundle.classes.index(positive)
        unseen = measure(rest, at_precision if (labels[rest] == column).any() else None)
    return EvaluationReport(
        evaluation=measure(is_ok, at_precision),
        split=split,
        unreadable=unreadable,
        n_trained_on=int(seen.sum()),
        unseen=unseen,
    )

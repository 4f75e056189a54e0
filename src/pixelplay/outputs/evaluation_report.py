"""Evaluate a run's own splits, and any labelled images for `evaluate` and `evaluate --against`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pixelplay.array_types import BoolArray, Float64Array, IntArray
from pixelplay.config import SPLITS, SplitName, check_choice
from pixelplay.data.dataset import ImageDataset
from pixelplay.errors import DataError
from pixelplay.evaluation.comparison import PairedComparison, compare_models
from pixelplay.evaluation.decision_rule import DecisionRule
from pixelplay.evaluation.evaluate import Evaluation, evaluate_probs
from pixelplay.evaluation.novelty import Novelty
from pixelplay.inference.predictor import Predictions
from pixelplay.model.bundle import ModelBundle, shorten_digest
from pixelplay.outputs.predictions_table import write_predictions
from pixelplay.run_log import RunLog
from pixelplay.text import EXAMPLES, counted, name_some
from pixelplay.training.finalize import compute_features, predict_rows
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData


@dataclass(frozen=True, kw_only=True)
class EvaluatedSplit:
    """Predictions of a split and their metrics.

    Attributes:
        rows: (N,) positions of the images.
        evaluation: metrics on the original labels.
        corrected: metrics on the user's corrected labels, without excluded images; None where they are equal.
    """

    rows: IntArray
    predictions: Predictions
    evaluation: Evaluation
    corrected: Evaluation | None


def evaluate_rows(
    data: TrainingData,
    rows: IntArray,
    probs: Float64Array,
    pred: IntArray,
    seed: int,
    novelty: Float64Array | None = None,
) -> EvaluatedSplit:
    """Evaluate predictions (N,) and probabilities (N, K) of rows (N,); skip rows predicted as -1."""
    is_scored = pred >= 0
    novelty = None if novelty is None else novelty[is_scored]
    rows, probs, pred = rows[is_scored], probs[is_scored], pred[is_scored]
    labels, corrected = data.original_labels[rows], data.corrected_labels[rows]
    predictions = Predictions(
        paths=data.paths_of(rows),
        status=("ok",) * len(rows),
        errors=("",) * len(rows),
        probs=probs,
        pred=pred,
        classes=data.known_classes,
        digests=tuple(data.digests[i] for i in rows),
        label=tuple(data.classes[k] for k in labels),
        novelty=novelty,
    )
    kept, by_correction = corrected >= 0, None
    if kept.any() and (corrected != labels).any():
        by_correction = score_rows(data, rows[kept], probs[kept], pred[kept], corrected[kept], seed)
    evaluation = score_rows(data, rows, probs, pred, labels, seed)
    return EvaluatedSplit(rows=rows, predictions=predictions, evaluation=evaluation, corrected=by_correction)


def score_rows(
    data: TrainingData, rows: IntArray, probs: Float64Array, pred: IntArray, labels: IntArray, seed: int
) -> Evaluation:
    """Evaluate predictions (N,) and probabilities (N, K) of rows (N,) against labels (N,)."""
    groups = data.dataset.groups
    return evaluate_probs(
        probs,
        pred,
        labels,
        data.classes,
        n_known=data.n_known,
        groups=None if groups is None else groups[rows],
        seed=seed,
    )


def evaluate_held_out(
    classifier: TrainedClassifier, rule: DecisionRule, data: TrainingData, ctx: RunContext
) -> EvaluatedSplit:
    """Evaluate the images that selected settings, and those of their split that were not trained on.

    Without excluded and dropped images, which a user or a probe found doubtful, metrics would be optimistic.
    """
    others = data.excluded_from_val  # dropped images stay in a validation split
    if classifier.held_out_split == "oof":
        others = np.union1d(data.excluded, data.dropped)
    probs, pred = rule.apply(classifier.logits)
    other_probs, other_pred = rule.apply(predict_rows(classifier, data, ctx, others))
    rows = np.concatenate([classifier.held_out, others])
    probs, pred = np.concatenate([probs, other_probs]), np.concatenate([pred, other_pred])
    return evaluate_rows(data, rows, probs, pred, ctx.config.seed)


def evaluate_test(
    classifier: TrainedClassifier, rule: DecisionRule, novelty: Novelty, data: TrainingData, ctx: RunContext
) -> EvaluatedSplit | None:
    """Evaluate the test split, and measure its novelty; None where there is no test split."""
    test = data.split.test
    if not len(test):
        return None
    features = compute_features(classifier.backbone, data, ctx, test)
    logits = classifier.head.logits(features)
    measured = novelty.measure(features, logits)
    return evaluate_rows(data, test, *rule.apply(logits), ctx.config.seed, measured)


def evaluate_without_duplicates(
    data: TrainingData, test: EvaluatedSplit | None, seed: int
) -> Evaluation | None:
    """Evaluate the test images without a duplicate in training; None where that is all or none of them."""
    if test is None or not len(data.split.duplicated):
        return None
    kept = ~np.isin(test.rows, data.split.duplicated)
    if not kept.any():
        return None
    rows, predictions = test.rows[kept], test.predictions
    return score_rows(
        data, rows, predictions.probs[kept], predictions.pred[kept], data.original_labels[rows], seed
    )


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """One model minus another on the same images.

    Attributes:
        metric: selection metric of the first model.
        everything: all scored images.
        n_trained_on: images that either model was trained on.
        unseen: without those; None where there are none, or no others.
    """

    runs: tuple[str, str]
    metric: str
    everything: PairedComparison
    n_trained_on: int
    unseen: PairedComparison | None

    @property
    def fairest(self) -> PairedComparison:
        """Without images that either model was trained on, where there are others."""
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


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationReport:
    """The result of `evaluate`.

    Attributes:
        evaluation: metrics of all readable labelled images.
        split: predefined split that was evaluated, or "all".
        unreadable: path, status and reason of labelled images that were skipped.
        n_trained_on: scored images that the model was trained on.
        unseen: metrics without those; None where there are none, or no others.
    """

    evaluation: Evaluation
    split: str
    unreadable: Sequence[Mapping[str, str]]
    n_trained_on: int
    unseen: Evaluation | None
    against: RunComparison | None = None

    def __repr__(self) -> str:
        return f"EvaluationReport of {self.split!r}: {self.evaluation!r}"

    def to_json(self) -> dict[str, object]:
        """Return the metrics at the top level, with the counts of images they depend on."""
        return {
            **self.evaluation.to_json(),
            "split": self.split,
            "n_unreadable": len(self.unreadable),
            "unreadable": [dict(bad) for bad in self.unreadable],
            "n_trained_on": self.n_trained_on,
            "unseen": None if self.unseen is None else self.unseen.to_json(),
            "against": None if self.against is None else self.against.to_json(),
        }


def select_scored(dataset: ImageDataset, split: SplitName | None, log: RunLog) -> tuple[ImageDataset, str]:
    """Select the labelled images to score: the requested split, else test if there is one, else all.

    Raises:
        ConfigError: unknown split.
        DataError: no labelled image.
    """
    is_labelled, chosen = dataset.labels >= 0, split
    if split is not None:
        check_choice("split", split, SPLITS)
    elif (dataset.in_split("test") & is_labelled).any():
        chosen = "test"
    is_inside = ~dataset.in_split("test") if chosen is None else dataset.in_split(chosen)
    is_scored = is_inside & is_labelled
    if n_unlabelled := int((is_inside & ~is_labelled).sum()):
        log.note(f"skipped {n_unlabelled:,} of {is_inside.sum():,} images without a label")
    if not is_scored.any():
        present = [name for name in SPLITS if (dataset.in_split(name) & is_labelled).any()]
        hint = f"; it has {', '.join(present)}" if present else ""
        where = f" in split {split}" if split else ""
        raise DataError(f"{dataset.source} has no labelled images{where}{hint}")
    return dataset.select(is_scored), chosen or "all"


def check_shared_classes(dataset: ImageDataset, known: tuple[str, ...]) -> None:
    """Raise DataError unless some image has a class that the model knows."""
    present = [dataset.classes[k] for k in np.unique(dataset.labels)]
    if set(present).isdisjoint(known):
        raise DataError(
            f"{dataset.source} has no class of the model: it has {name_some(present, EXAMPLES)}; "
            f"the model has {name_some(known, EXAMPLES)}"
        )


def write_evaluated(predictions: Predictions, dataset: ImageDataset, bundle: ModelBundle, path: str) -> None:
    """Write each prediction with its label and the column `trained_on`."""
    labelled = replace(predictions, label=tuple(dataset.classes[k] for k in dataset.labels))
    columns = {"trained_on": ["true" if known else "false" for known in _was_trained_on(predictions, bundle)]}
    write_predictions([labelled], predictions.classes, path, columns)


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
    """Evaluate predictions against the labels of their dataset, row by row.

    Raises:
        DataError: no image could be read.
    """
    is_ok = predictions.pred >= 0
    unreadable = [
        {"path": predictions.paths[i], "status": predictions.status[i], "reason": predictions.errors[i]}
        for i in np.flatnonzero(~is_ok)
    ]
    named = name_some([f"{bad['path']}: {bad['reason']}" for bad in unreadable], EXAMPLES)
    if not is_ok.any():
        raise DataError(f"could not read any of the {len(unreadable)} labelled images: {named}")
    if unreadable:
        log.note(f"skipped {counted(len(unreadable), 'unreadable image')}: {named}")
    classes = _all_classes(bundle.classes, dataset.classes)
    labels = positions_in(dataset.classes, classes)[dataset.labels]
    if unknown := sorted({classes[k] for k in labels if k >= len(bundle.classes)}):
        log.note(f"images of classes unknown to the model count as errors: {name_some(unknown, EXAMPLES)}")

    def evaluate(keep: BoolArray, precision: float | None) -> Evaluation:
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

    is_trained_on = _was_trained_on(predictions, bundle) & is_ok
    if is_trained_on.any():
        log.note(
            f"the model was trained on {is_trained_on.sum()} of the {is_ok.sum()} scored images: metrics are "
            "optimistic; see `unseen` for metrics without them"
        )
    rest, unseen = is_ok & ~is_trained_on, None
    if is_trained_on.any() and rest.any():
        column = 1 if positive is None else bundle.classes.index(positive)
        unseen = evaluate(rest, at_precision if (labels[rest] == column).any() else None)
    return EvaluationReport(
        evaluation=evaluate(is_ok, at_precision),
        split=split,
        unreadable=unreadable,
        n_trained_on=int(is_trained_on.sum()),
        unseen=unseen,
    )


def compare_runs(
    predictions: tuple[Predictions, Predictions],
    bundles: tuple[ModelBundle, ModelBundle],
    runs: tuple[str, str],
    dataset: ImageDataset,
    log: RunLog,
) -> RunComparison:
    """Compare two models on the rows of a dataset that could be read."""
    classes = _all_classes(*(bundle.classes for bundle in bundles), dataset.classes)
    labels = positions_in(dataset.classes, classes)[dataset.labels]
    columns = [positions_in(bundle.classes, classes) for bundle in bundles]  # (K of each,)
    for run, own, other in zip(runs, bundles, reversed(bundles), strict=True):
        if missing := sorted(set(other.classes) - set(own.classes)):
            log.note(f"{run} does not know classes of the other model: {name_some(missing, EXAMPLES)}")
    probs = [np.zeros((len(labels), len(classes))) for _ in predictions]
    for wide, own_columns, each in zip(probs, columns, predictions, strict=True):
        wide[:, own_columns] = each.probs
    preds = [own_columns[each.pred] for own_columns, each in zip(columns, predictions, strict=True)]
    is_known = np.isin(labels, columns[0]) & np.isin(labels, columns[1])
    is_ok = (predictions[0].pred >= 0) & (predictions[1].pred >= 0)
    trained_on = [_was_trained_on(each, bundle) for each, bundle in zip(predictions, bundles, strict=True)]
    is_trained_on = (trained_on[0] | trained_on[1]) & is_ok

    def compare(keep: BoolArray) -> PairedComparison:
        return compare_models(
            (preds[0][keep], preds[1][keep]),
            (probs[0][keep], probs[1][keep]),
            labels[keep],
            None if dataset.groups is None else dataset.groups[keep],
            is_known=is_known[keep],
        )

    n_unseen = int((is_ok & ~is_trained_on).sum())
    if is_trained_on.any() and n_unseen:
        log.note(f"comparing on {counted(n_unseen, 'image')} that neither model was trained on")
    elif is_trained_on.any():
        trained = " and ".join(
            f"{run} on {(own & is_ok).sum()}" for run, own in zip(runs, trained_on, strict=True)
        )
        log.note(
            f"every image ({is_ok.sum()}) was used to train a model ({trained}): "
            "the difference may not hold for new images"
        )
    return RunComparison(
        runs=runs,
        metric=bundles[0].metric,
        everything=compare(is_ok),
        n_trained_on=int(is_trained_on.sum()),
        unseen=compare(is_ok & ~is_trained_on) if is_trained_on.any() and n_unseen else None,
    )


def _all_classes(*lists: tuple[str, ...]) -> tuple[str, ...]:
    """Merge lists of class names in order, without repetition."""
    return tuple(dict.fromkeys(name for names in lists for name in names))


def positions_in(names: tuple[str, ...], classes: tuple[str, ...]) -> IntArray:
    """Return the positions (K,) of names in a list of classes; -1 for unknown names."""
    position = {name: k for k, name in enumerate(classes)}
    return np.array([position.get(name, -1) for name in names], dtype=np.int64)


def _was_trained_on(predictions: Predictions, bundle: ModelBundle) -> BoolArray:
    """Mark the rows (N,) that a model was trained on."""
    return np.array([shorten_digest(digest) in bundle.trained_on for digest in predictions.digests])

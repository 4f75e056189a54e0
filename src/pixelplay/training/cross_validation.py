"""Cross-validation: one classifier per fold, each predicting the images it was not trained on."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.config import REPEATS, SPLITS, TrainConfig
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT, assign_folds, check_any_held_out, hold_out
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.calibration import fit_temperature
from pixelplay.evaluation.conformal import score_held_out
from pixelplay.evaluation.decision_rule import DecisionRule, cross_fit_rule, fit_decision_rule
from pixelplay.model.backbone import stage_modules
from pixelplay.model.bundle import MAX_BRANCHES, ModelBundle
from pixelplay.model.ensemble import average_members, ensemble_member
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.run_log import RunLog
from pixelplay.text import counted
from pixelplay.training.checkpoint import FOLD, FoldResult, has_checkpoint, read_fold, write_fold
from pixelplay.training.finalize import build_bundle
from pixelplay.training.label_cleaning import remove_label_issues
from pixelplay.training.plan_file import read_plan, write_plan
from pixelplay.training.prepare import read_rows
from pixelplay.training.probe_or_finetune import fit_probe_or_finetune
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData, count_groups


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossValidation:
    """All folds of all repetitions."""

    rows: IntArray  # (N,) positions of the images that take part, ascending
    folds: IntArray  # (R, N) fold in which each was held out; -1 for never
    logits: Float32Array  # (R, N, K) of the classifier that was not trained on the image; NaN for never
    probs: Float64Array  # (R, N, K) calibrated with the rule of the other folds; NaN for never
    pred: IntArray  # (R, N) predicted classes; -1 for never
    rules: Sequence[Mapping[int, DecisionRule]]  # (R) fold → the rule fitted on the other folds
    results: list[FoldResult]


def check_repeats(config: TrainConfig, repeats: int, *, single: bool) -> None:
    """Raise ConfigError if `repeats` is out of range, or a model cannot hold the networks of all folds."""
    REPEATS.check("repeats", repeats, whole=True)
    if config.finetune != "none" and not single and config.n_folds * repeats > MAX_BRANCHES:
        conflict = (
            f"{config.n_folds} folds × {repeats} repeats are more than the {MAX_BRANCHES} networks of a model"
        )
        raise ConfigError(f"{conflict}; lower --repeats, or use --single or --finetune none")


def without_test_split(config: TrainConfig, log: RunLog) -> TrainConfig:
    """Return settings that hold out no test split: every image is held out once, in its fold."""
    if config.test_frac != TrainConfig().test_frac:
        log.note("--test-frac is ignored in cross-validation: every image is held out in its fold")
    return replace(config, test_frac=0.0)


def without_val_split(dataset: ImageDataset, log: RunLog) -> ImageDataset:
    """Merge a predefined validation split into train; the folds treat both alike."""
    is_val = dataset.in_split("val")
    if is_val.any():
        log.note("the predefined val split is merged into train and assigned to folds")
    return replace(dataset, splits=np.where(is_val, np.int8(SPLITS.index("train")), dataset.splits))


def check_fold_sizes(dataset: ImageDataset, n_folds: int) -> None:
    """Raise DataError, before anything is decoded, if a class has fewer images or groups than folds."""
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    _check_class_sizes(dataset.labels, groups, dataset.classes, n_folds)


def train_folds(data: TrainingData, ctx: RunContext, repeats: int) -> CrossValidation:
    """Train a classifier without each fold of train and val in turn.

    Folds that an interrupted run has finished are read. The first fine-tuned fold makes a plan that the
    others repeat, so that all are trained alike. DataError where a class has too few images for the folds.
    """
    rows, config, log = data.fit_rows, ctx.config, ctx.log
    configs = [replace(config, seed=(config.seed + repeat) % 2**32) for repeat in range(repeats)]
    folds = np.stack([_assign_cv_folds(data, each) for each in configs])  # (R, N)
    if n_never := int((folds[0] == NEVER_HELD_OUT).sum()):
        log.note(f"{counted(n_never, 'image')} never held out: no other image of the class would be left")
    results: list[FoldResult] = []
    for repeat, fold in product(range(repeats), range(config.n_folds)):
        suffix = f", repeat {repeat + 1}/{repeats}" if repeats > 1 else ""
        with log.section(f"fold {fold + 1}/{config.n_folds}{suffix}"):
            held_out, own = rows[folds[repeat] == fold], ctx.derive(config=configs[repeat])
            results.append(_train_fold(data, held_out, own, (repeat, fold)))
    logits = np.full((repeats, len(rows), data.n_known), np.nan, np.float32)
    for result in results:
        logits[result.repeat, np.searchsorted(rows, result.rows)] = result.logits
    labels, groups, priors = data.labels[rows], data.split.groups[rows], class_priors(data.fit_counts)
    fits = [
        cross_fit_rule(each, labels, groups, of_each, priors, metric=config.metric, seed=config.seed)
        for each, of_each in zip(logits, folds, strict=True)
    ]
    probs, pred, rules = zip(*fits, strict=True)
    return CrossValidation(
        rows=rows,
        folds=folds,
        logits=logits,
        probs=np.stack(probs),  # (R, N, K)
        pred=np.stack(pred),  # (R, N)
        rules=rules,
        results=results,
    )


def train_single(validation: CrossValidation, data: TrainingData, ctx: RunContext) -> TrainedClassifier:
    """Train on everything, with the method and plan of most folds; held-out logits are those of the folds."""
    config, results = ctx.config, validation.results
    method = _most_common(result.finetune for result in results)
    settings, plan = config.finetuning, None
    if method != "none":
        averaged = (r.chosen["ensemble_probe"]["value"] for r in results if r.finetune == method)
        settings = replace(settings, ensemble_probe="on" if _most_common(averaged) else "off")
        plan = read_plan(os.path.join(ctx.run_dir, "plan.json"))
    defaults = TrainConfig()  # settings that did have an effect in the folds are not noted as ineffective
    alike = replace(
        config,
        finetune=method,
        finetuning=settings,
        oversample_to=config.oversample_to if method != "none" else None,  # a linear probe has no views
        time_budget=defaults.time_budget,
        val_frac=defaults.val_frac if method == "none" else config.val_frac,
    )
    own = ctx.derive(config=alike, started=time.monotonic(), plan=plan)
    with ctx.log.section("all images"):
        everything = _hold_out_fold(data, np.empty(0, dtype=np.int64), own)
        classifier = fit_probe_or_finetune(everything, own)
    return replace(
        classifier, held_out=validation.rows, logits=validation.logits[0], folds=validation.folds[0]
    )


def average_folds(
    validation: CrossValidation, data: TrainingData, ctx: RunContext
) -> tuple[TrainedClassifier, Float32Array]:
    """Average the classifiers of all folds, each with the temperature of the fold it was not trained on.

    Returns:
        The ensemble, and the logits (R, N, K) divided by the members' temperatures.
    """
    fits = [fit_temperature(result.logits, data.labels[result.rows]) for result in validation.results]
    fitted = [T for T, evidence in fits if not evidence["at_bound"]]
    default = float(np.median(fitted)) if fitted else 1.0  # for folds without errors
    temperatures = [default if evidence["at_bound"] else T for T, evidence in fits]
    if n_unfitted := len(fits) - len(fitted):
        reason = f"{counted(n_unfitted, 'fold')} all correct, or no better than chance"
        ctx.log.note(f"{reason}; using the temperature {default:.2f} of the others")
    scaled = validation.logits.copy()
    for result, temperature in zip(validation.results, temperatures, strict=True):
        scaled[result.repeat, np.searchsorted(validation.rows, result.rows)] /= np.float32(temperature)
    members = [result.member for result in validation.results]
    backbone, head = average_members(ctx.backbone.backbone, members, temperatures)
    by = "the fold that each member was not trained on"
    ensemble = TrainedClassifier(
        finetune=_most_common(result.finetune for result in validation.results),
        backbone=backbone,
        head=head,
        trained_on=data.fit_rows,
        prior_rows=data.fit_rows,
        held_out=validation.rows,
        logits=scaled[0],
        folds=validation.folds[0],
        chosen={"member_temperatures": {"value": temperatures, "chosen_on": by}},
    )
    return ensemble, scaled


def finalize_folds(
    classifier: TrainedClassifier,
    logits: Float32Array,
    validation: CrossValidation,
    data: TrainingData,
    ctx: RunContext,
) -> tuple[ModelBundle, DecisionRule]:
    """Fit the decision rule on the held-out logits (R, N, K) of all folds and build the model bundle."""
    rows, repeats = validation.rows, len(logits)
    rule = fit_decision_rule(
        logits.reshape(-1, logits.shape[2]),
        np.tile(data.labels[rows], repeats),
        np.tile(data.split.groups[rows], repeats),
        class_priors(data.fit_counts),
        metric=ctx.config.metric,
        seed=ctx.config.seed,
    )
    # repeated predictions of an image count as one image
    evidence = {name: {**each, "n": each["n"] // repeats} for name, each in rule.evidence.items()}
    rule = replace(rule, evidence=evidence)
    # scores of the first repetition: repeated images are no further evidence
    probs, pred = validation.probs[0], validation.pred[0]
    scores = score_held_out(probs, pred, data.labels[rows], data.split.groups[rows], "oof")
    return build_bundle(classifier, rule, scores, data, ctx), rule


def with_excluded(
    validation: CrossValidation, excluded: IntArray, logits: Float32Array, rule: DecisionRule
) -> CrossValidation:
    """Add the images (n,) that no fold was trained on, with the deployed model's logits (n, K)."""
    if not len(excluded):
        return validation
    rows = np.union1d(validation.rows, excluded)
    old, new = np.searchsorted(rows, validation.rows), np.searchsorted(rows, excluded)
    repeats, n_classes = len(validation.folds), logits.shape[1]
    folds = np.full((repeats, len(rows)), NEVER_HELD_OUT)
    folds[:, old] = validation.folds
    all_logits = np.empty((repeats, len(rows), n_classes), np.float32)
    all_logits[:, old], all_logits[:, new] = validation.logits, logits
    probs, pred = np.empty(all_logits.shape), np.empty(folds.shape, np.int64)
    probs[:, old], pred[:, old] = validation.probs, validation.pred
    probs[:, new], pred[:, new] = rule.apply(logits)
    return replace(validation, rows=rows, folds=folds, logits=all_logits, probs=probs, pred=pred)


def _assign_cv_folds(data: TrainingData, config: TrainConfig) -> IntArray:
    """Assign each image that takes part to a fold, (N,); -1 for a class's only image."""
    rows, n_folds = data.fit_rows, config.n_folds
    labels, groups = data.labels[rows], data.split.groups[rows]
    _check_class_sizes(labels, groups, data.known_classes, n_folds)
    folds = assign_folds(labels, groups, n_folds, config.seed)
    check_any_held_out(folds, data.dataset.source)
    if n_empty := n_folds - len(np.intersect1d(folds, np.arange(n_folds))):
        remedy = f"use --n-folds {max(2, n_folds - n_empty)} or smaller groups"
        raise DataError(f"groups leave {n_empty} of {n_folds} folds empty; {remedy}")
    for fold in range(n_folds):
        left = np.bincount(labels[folds != fold], minlength=data.n_known)
        if (left == 0).any():
            name = data.classes[int((left == 0).argmax())]
            raise DataError(
                f"groups put class {name!r} in one of {n_folds} folds; lower --n-folds or use smaller groups"
            )
    return folds


def _check_class_sizes(labels: IntArray, groups: IntArray, classes: Sequence[str], n_folds: int) -> None:
    """Check classes by labels (N,) and groups (N,); a class of one image is in no fold."""
    n_groups = count_groups(labels, groups, len(classes))  # (K,)
    short = np.flatnonzero((n_groups > 1) & (n_groups < n_folds))
    if n_folds == 2 and n_groups.max() == 2:  # one held out leaves no image to select on
        raise DataError("no class has 3 images or groups but --n-folds 2 needs one; add images")
    if not len(short):
        return
    k = int(short[n_groups[short].argmin()])
    n = int((labels == k).sum())
    grouped = "" if n == n_groups[k] else f" in {n_groups[k]} groups"
    raise DataError(
        f"class {classes[k]!r} has {n} images{grouped} but {n_folds} folds need {n_folds}; add images or use "
        f"--n-folds {n_groups[k]}"
    )


def _train_fold(
    data: TrainingData, held_out: IntArray, ctx: RunContext, place: tuple[int, int]
) -> FoldResult:
    """Train without one fold and predict it; read the result where an interrupted run has finished it."""
    folder = os.path.join(ctx.checkpoint_dir, f"fold-{place[0]:02}-{place[1]:02}")
    if has_checkpoint(folder, FOLD):
        _copy_plan(folder, ctx.run_dir)
        finished = read_fold(folder, held_out, place, ctx.backbone.backbone)
        ctx.log.replay(finished.notes)
        return finished
    os.makedirs(folder, exist_ok=True)
    _copy_plan(ctx.run_dir, folder)
    n_notes = len(ctx.log.notes)
    own = ctx.derive(run_dir=folder, started=time.monotonic())
    rest = _hold_out_fold(data, held_out, own)
    classifier = fit_probe_or_finetune(rest, own, needs_oof=False)
    features = data.features[held_out]
    if classifier.finetune != "none":
        with ctx.log.progress("predicting", len(held_out)) as bar:
            extractor = own.extractor(classifier.backbone)
            features = read_rows(data, held_out, extractor, ctx.config, on_progress=bar.update)
    chosen = dict(classifier.chosen)
    if ctx.config.drop_label_issues:
        chosen["dropped_label_issues"] = {"value": len(rest.dropped), "chosen_on": "the other folds"}
    result = FoldResult(
        repeat=place[0],
        fold=place[1],
        rows=held_out,
        logits=classifier.head.logits(features),
        member=ensemble_member(classifier.backbone, classifier.head, _n_frozen(classifier)),
        finetune=classifier.finetune,
        chosen=chosen,
        history=classifier.history,
        notes=ctx.log.notes[n_notes:],
    )
    write_fold(folder, result)
    _copy_plan(folder, ctx.run_dir)
    shutil.rmtree(own.checkpoint_dir, ignore_errors=True)  # the fold is finished
    return result


def _hold_out_fold(data: TrainingData, held_out: IntArray, ctx: RunContext) -> TrainingData:
    """Put one fold in place of the test split; val and label issues are chosen from the rest."""
    rest, config = np.setdiff1d(data.fit_rows, held_out), ctx.config
    is_val = np.zeros(len(rest), dtype=np.bool_)
    if config.finetune != "none" and (frac := config.validation_frac(len(rest))):
        is_val = hold_out(data.labels[rest], data.split.groups[rest], frac, config.seed)
    split = replace(data.split, train=rest[~is_val], val=rest[is_val], test=held_out)
    without = replace(data, split=split, fit_rows=rest)
    return remove_label_issues(without, ctx) if config.drop_label_issues else without


def _copy_plan(source: str, target: str) -> None:
    """Copy a plan to a folder that has none."""
    plan, copied = os.path.join(source, "plan.json"), os.path.join(target, "plan.json")
    if os.path.isfile(plan) and not os.path.isfile(copied):
        write_plan(read_plan(plan), copied)


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _n_frozen(classifier: TrainedClassifier) -> int | None:
    """Return the number of stages in front of the trained ones; None where none was replaced."""
    plan, backbone = classifier.plan, classifier.backbone
    if plan is None or isinstance(backbone, BranchedBackbone):
        return None
    return len(stage_modules(backbone.network)) - plan.unfreeze_stages if plan.unfreeze_stages else 0

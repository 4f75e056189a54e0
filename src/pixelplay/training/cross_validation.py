"""Cross-validation: as many classifiers as folds, each asked about what it has not seen."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.config import REPEATS, SPLITS, TrainConfig
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT, assign_folds, check_some_held_out, hold_out
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.calibration import fit_temperature
from pixelplay.evaluation.conformal import HeldOutScores, score_held_out
from pixelplay.evaluation.decision_rule import (
    CrossFittedRule,
    DecisionRule,
    cross_fit_rule,
    fit_decision_rule,
)
from pixelplay.model.backbone import PretrainedBackbone, stage_modules
from pixelplay.model.bundle import MAX_BRANCHES
from pixelplay.model.ensemble import ensemble_member
from pixelplay.model.features import make_extractor
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.run_log import RunLog
from pixelplay.text import counted
from pixelplay.training.bench import read_rows
from pixelplay.training.checkpoint import Fold, has_fold, read_fold, write_fold
from pixelplay.training.label_cleaning import remove_label_issues
from pixelplay.training.plan import read_plan
from pixelplay.training.probe_or_finetune import TrainedClassifier, learn
from pixelplay.training.run_context import Workplace
from pixelplay.training.training_data import TrainingData


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossValidation:
    """All folds of all repeats.

    Attributes:
        rows: (N,) positions in the material that take part, ascending.
        folds: (R, N) in which each was held out; -1 for never.
        logits: (R, N, K) from the classifier that had not seen it; NaN for never.
        fits: (R) decisions, each fold's by what the others have chosen.
        parts: the folds, repeat by repeat.
    """

    rows: IntArray
    folds: IntArray
    logits: Float32Array
    fits: list[CrossFittedRule]
    results: list[Fold]


def learn_folds(
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    repeats: int,
    log: RunLog,
) -> CrossValidation:
    """Learn a classifier without each fold in turn, as deep as the settings say.

    What a killed process has finished is taken over. The first tuned fold makes a plan, and all others
    repeat it, so that they are trained alike.

    Args:
        material: its train and val parts take part; its test part does not.

    Raises:
        DataError: a class has fewer images or groups than there are folds.
    """
    rows, n_folds = data.fit_rows, config.n_folds
    seeds = [replace(config, seed=(config.seed + repeat) % 2**32) for repeat in range(repeats)]
    dealt = np.stack([assign_cv_folds(data, seeded) for seeded in seeds])  # (R, N)
    if n_never := int((dealt[0] == NEVER_HELD_OUT).sum()):
        log.note(f"{counted(n_never, 'image')} in no fold, as nothing else would be left of a class")
    results: list[Fold] = []
    for repeat, seeded in enumerate(seeds):
        for fold in range(n_folds):
            name = f"fold {fold + 1} of {n_folds}"
            if repeats > 1:
                name += f", repeat {repeat + 1} of {repeats}"
            with log.chapter(name):
                held_out = rows[dealt[repeat] == fold]
                results.append(_learn_fold(data, held_out, loaded, seeded, workplace, (repeat, fold), log))
    logits = np.full((repeats, len(rows), data.n_known), np.nan, np.float32)
    for part in results:
        logits[part.repeat, np.searchsorted(rows, part.rows)] = part.logits
    labels, groups = data.labels[rows], data.split.groups[rows]
    priors = class_priors(data.fit_counts)
    fits = [
        cross_fit_rule(each, labels, groups, folds, priors, metric=config.metric, seed=config.seed)
        for each, folds in zip(logits, dealt, strict=True)
    ]
    return CrossValidation(rows=rows, folds=dealt, logits=logits, fits=fits, results=results)


def check_repeats(config: TrainConfig, repeats: int, *, single: bool) -> None:
    """Raise ConfigError unless images can be dealt so often, and all folds be deployed."""
    REPEATS.check("repeats", repeats, whole=True)
    n_members = config.n_folds * repeats
    if config.finetune != "none" and not single and n_members > MAX_BRANCHES:
        raise ConfigError(
            f"{config.n_folds} folds, {repeats} times, are {n_members} networks, and a model holds "
            f"{MAX_BRANCHES}; lower --repeats, or use --single or --finetune none"
        )


def without_test(config: TrainConfig, log: RunLog) -> TrainConfig:
    """Settings under which no test part is made: every image is held out once, in its fold."""
    if config.test_frac != TrainConfig().test_frac:
        log.note(f"--test-frac {config.test_frac} does not count: every image is held out in its fold")
    return replace(config, test_frac=0.0)


def without_val(dataset: ImageDataset, log: RunLog) -> ImageDataset:
    """The images without a given validation part: its own learn and measure like all others."""
    val = dataset.in_split("val")
    if val.any():
        log.note("the given val part is dealt into the folds like train")
    splits = np.where(val, np.int8(SPLITS.index("train")), dataset.splits)
    return replace(dataset, splits=splits)


def learn_alone(
    validation: CrossValidation,
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    log: RunLog,
) -> TrainedClassifier:
    """Learn one more classifier, from everything, as most folds were: their depth, plan and way to answer.

    Raises:
        ConfigError: training failed.
    """
    method = _commonest([part.finetune for part in validation.results])
    settings = config.finetuning
    plan = None
    if method != "none":
        ways = [
            part.chosen["ensemble_probe"]["value"] for part in validation.results if part.finetune == method
        ]
        settings = replace(settings, ensemble_probe="on" if _commonest(ways) else "off")
        plan = read_plan(os.path.join(workplace.folder, "plan.json"))
    raised = config.oversample_to if method != "none" else None  # a probe has no views to raise classes by
    usual = TrainConfig()  # what did count in the folds is not said to be of no use
    val_frac = usual.val_frac if method == "none" else config.val_frac
    alike = replace(
        config,
        finetune=method,
        finetuning=settings,
        oversample_to=raised,
        time_budget=usual.time_budget,
        val_frac=val_frac,
    )
    place = replace(workplace, started=time.monotonic(), plan=plan)
    with log.chapter("everything"):
        everything = _set_apart(data, np.empty(0, dtype=np.int64), alike, log)
        return learn(everything, loaded, alike, place, log)


def _commonest(values: Sequence[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def decide_together(
    validation: CrossValidation, data: TrainingData, config: TrainConfig, log: RunLog
) -> tuple[list[float], Float32Array, DecisionRule]:
    """How the mean of all M members decides: their temperatures, then T and tau of what is cooled by them.

    What is cooled comes in between, (R, N, K).

    Each of the M temperatures comes from the fold that its member has not seen.
    """
    fits = [fit_temperature(part.logits, data.labels[part.rows]) for part in validation.results]
    fixed = [fit.temperature for fit in fits if not fit.at_bound]
    usual = float(np.median(fixed)) if fixed else 1.0  # a fold that is all right fixes none
    temperatures = [usual if fit.at_bound else fit.temperature for fit in fits]
    if n_free := len(fits) - len(fixed):
        log.note(
            f"{counted(n_free, 'fold')} all right, or no better than chance, which fixes no temperature: "
            f"T = {usual:.2f}, as the others have it"
        )
    cooled = validation.logits.copy()
    for part, T in zip(validation.results, temperatures, strict=True):
        cooled[part.repeat, np.searchsorted(validation.rows, part.rows)] /= np.float32(T)
    return temperatures, cooled, _decide(cooled, validation.rows, data, config)


def with_excluded(
    validation: CrossValidation, excluded: IntArray, logits: Float32Array, rule: DecisionRule
) -> CrossValidation:
    """Add what no fold has learned from, as the deployed model sees and decides it; it is in no fold.

    Args:
        left_out: (n,) positions in the material.
        logits: (n, K).
    """
    if not len(excluded):
        return validation
    rows = np.union1d(validation.rows, excluded)
    old, new = np.searchsorted(rows, validation.rows), np.searchsorted(rows, excluded)
    repeats, n_classes = len(validation.folds), logits.shape[1]
    folds = np.full((repeats, len(rows)), NEVER_HELD_OUT)
    folds[:, old] = validation.folds
    every = np.empty((repeats, len(rows), n_classes), np.float32)
    every[:, old], every[:, new] = validation.logits, logits
    probs, pred = rule.apply(logits)
    fits = []
    for fit in validation.fits:
        all_probs, all_pred = np.empty((len(rows), n_classes)), np.empty(len(rows), np.int64)
        all_probs[old], all_probs[new] = fit.probs, probs
        all_pred[old], all_pred[new] = fit.pred, pred
        fits.append(replace(fit, probs=all_probs, pred=all_pred))
    return replace(validation, rows=rows, folds=folds, logits=every, fits=fits)


def score_folds(validation: CrossValidation, data: TrainingData) -> HeldOutScores:
    """What the held-out images teach, each decided by what the other folds say.

    Those of the first repeat: another time the same images are no further evidence.
    """
    rows, fit = validation.rows, validation.fits[0]
    return score_held_out(fit.probs, fit.pred, data.labels[rows], data.split.groups[rows], "oof")


def decide_alone(validation: CrossValidation, data: TrainingData, config: TrainConfig) -> DecisionRule:
    """How one classifier decides that was learned as the folds were."""
    return _decide(validation.logits, validation.rows, data, config)


def _decide(logits: Float32Array, rows: IntArray, data: TrainingData, config: TrainConfig) -> DecisionRule:
    repeats = len(logits)
    found = fit_decision_rule(
        logits.reshape(-1, logits.shape[2]),
        np.tile(data.labels[rows], repeats),
        np.tile(data.split.groups[rows], repeats),
        class_priors(data.fit_counts),
        metric=config.metric,
        seed=config.seed,
    )
    # an image that is seen again is no other image
    temperature = replace(found.temperature, n=found.temperature.n // repeats)
    return replace(found, temperature=temperature, tau=replace(found.tau, n=found.tau.n // repeats))


def _learn_fold(
    data: TrainingData,
    held_out: IntArray,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    place: tuple[int, int],
    log: RunLog,
) -> Fold:
    folder = os.path.join(workplace.checkpoints, f"fold-{place[0]:02}-{place[1]:02}")
    if has_fold(folder):
        _share_plan(folder, workplace.folder)
        kept = read_fold(folder, held_out, place, loaded.backbone)
        log.replay(kept.notes)
        return kept
    os.makedirs(folder, exist_ok=True)
    _share_plan(workplace.folder, folder)
    n_notes = len(log.notes)
    own = replace(workplace, folder=folder, started=time.monotonic())
    rest = _set_apart(data, held_out, config, log)
    learned = learn(rest, loaded, config, own, log, is_fold=True)
    features = data.features[held_out]
    if learned.finetune != "none":
        extractor = make_extractor(learned.backbone, loaded.preprocessing, config, workplace.device)
        with log.progress("predicting", len(held_out)) as bar:
            features = read_rows(data, held_out, extractor, config, on_progress=bar.update)
    chosen = dict(learned.chosen)
    if config.drop_label_issues:
        chosen["dropped_suspects"] = {"value": len(rest.dropped), "chosen_on": "the other folds"}
    found = Fold(
        repeat=place[0],
        fold=place[1],
        rows=held_out,
        logits=learned.head.logits(features),
        member=ensemble_member(learned.backbone, learned.head, _n_front(learned)),
        finetune=learned.finetune,
        chosen=chosen,
        history=learned.history,
        notes=log.notes[n_notes:],
    )
    write_fold(folder, found)
    _share_plan(folder, workplace.folder)
    shutil.rmtree(own.checkpoints, ignore_errors=True)  # the training is over
    return found


def _share_plan(source: str, target: str) -> None:
    """Copy a plan to where there is none yet."""
    there, here = os.path.join(source, "plan.json"), os.path.join(target, "plan.json")
    if os.path.isfile(there) and not os.path.isfile(here):
        shutil.copyfile(there, f"{here}.tmp")
        os.replace(f"{here}.tmp", here)


def _set_apart(data: TrainingData, held_out: IntArray, config: TrainConfig, log: RunLog) -> TrainingData:
    """The material with one fold in the place of the test part, and a validation part of the rest.

    Which labels look wrong is judged without the fold too.
    """
    rest = np.setdiff1d(data.fit_rows, held_out)
    is_val = np.zeros(len(rest), dtype=np.bool_)
    if config.finetune != "none":
        is_val = hold_out(data.labels[rest], data.split.groups[rest], config.val_frac, config.seed)
    split = replace(data.split, train=rest[~is_val], val=rest[is_val], test=held_out)
    apart = replace(data, split=split, fit_rows=rest)
    return remove_label_issues(apart, config, log) if config.drop_label_issues else apart


def _n_front(learned: TrainedClassifier) -> int | None:
    """Stages in front of tuned ones that stand in the place of the frozen ones; None where none do."""
    if learned.plan is None or isinstance(learned.backbone, BranchedBackbone):
        return None
    if learned.plan.unfreeze_stages is None:
        return 0
    return len(stage_modules(learned.backbone.network)) - learned.plan.unfreeze_stages


def check_enough(dataset: ImageDataset, n_folds: int) -> None:
    """Raise where names show that classes have too few images for every fold.

    Args:
        index: N labelled images that take part.

    Raises:
        DataError: a class has fewer than folds: it and the largest possible number of folds are named; or two
            folds leave nothing to choose on.
    """
    groups = np.arange(len(dataset)) if dataset.groups is None else dataset.groups
    _check_each_class(dataset.labels, groups, dataset.classes, n_folds)


def _check_each_class(labels: IntArray, groups: IntArray, classes: Sequence[str], n_folds: int) -> None:
    """The same by labels (N,) and groups (N,); a class of one is in no fold and needs none."""
    pairs = np.unique(np.stack([labels, groups], axis=1), axis=0)
    n_groups = np.bincount(pairs[:, 0], minlength=len(classes))  # (K,)
    short = np.flatnonzero((n_groups > 1) & (n_groups < n_folds))
    if not len(short):
        if n_folds == 2 and n_groups.max() == 2:  # one is held out, and of one nothing can choose
            raise DataError(
                "no class has more than 2 images or groups, but n_folds=2 needs a class of 3: without "
                "a fold, strength and temperature are chosen on others; add some"
            )
        return
    k = int(short[n_groups[short].argmin()])
    n = int((labels == k).sum())
    together = "" if n == n_groups[k] else f" in {n_groups[k]} groups that stay together"
    raise DataError(
        f"class {classes[k]!r} has {n} images{together} but n_folds={n_folds} needs {n_folds}; "
        f"add some or use --n-folds {n_groups[k]}"
    )


def assign_cv_folds(data: TrainingData, config: TrainConfig) -> IntArray:
    """Fold (N,) of each image that takes part; -1 for the only one of its class.

    Raises:
        DataError: a class has fewer images or groups than folds, or groups leave a fold without
            one of the classes to learn from.
    """
    rows, n_folds = data.fit_rows, config.n_folds
    labels, groups = data.labels[rows], data.split.groups[rows]
    _check_each_class(labels, groups, data.known_classes, n_folds)
    folds = assign_folds(labels, groups, n_folds, config.seed)
    check_some_held_out(folds, data.dataset.source)
    if empty := [fold for fold in range(n_folds) if not (folds == fold).any()]:
        raise DataError(
            f"groups leave {counted(len(empty), 'fold')} of {n_folds} without an image to hold out; "
            f"use --n-folds {max(2, n_folds - len(empty))} or smaller groups"
        )
    for fold in range(n_folds):
        left = np.bincount(labels[folds != fold], minlength=data.n_known)
        if (left == 0).any():
            name = data.classes[int((left == 0).argmax())]
            raise DataError(
                f"groups put every image of class {name!r} into one fold of {n_folds}, so that "
                "nothing is left to learn it from; use fewer folds or smaller groups"
            )
    return folds

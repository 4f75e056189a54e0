"""Material → one classifier: how deep to train, and what the choice rests on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT, assign_folds, check_some_held_out
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.decision_rule import compare_logits, held_out_score
from pixelplay.model.backbone import Backbone, PretrainedBackbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import TooLittleMemoryError
from pixelplay.model.split_backbone import BackboneSplitError
from pixelplay.run_log import RunLog
from pixelplay.text import counted, name_some
from pixelplay.training.bench import Bench, may_answer_together
from pixelplay.training.compatibility import TrainedMethod, may_repeat_hard_examples, unused_settings
from pixelplay.training.finetune import Tuned, finish, starts_at_probe, tune
from pixelplay.training.imbalance import ImbalanceProbe, fit_probe_for_imbalance
from pixelplay.training.plan import FinetunePlan
from pixelplay.training.run_context import Workplace
from pixelplay.training.time_budget import TimeBudgetError
from pixelplay.training.training_data import TrainingData

CLEAR = 2  # standard errors by which one depth is better whatever its held-out score
ENOUGH_VAL = 30  # validation images, for auto to choose a depth on


@dataclass(frozen=True, kw_only=True)
class TrainedClassifier:
    """A classifier, and the held-out logits that its temperature and tau are fitted on.

    Attributes:
        finetune: how deep it was trained.
        backbone: the network, its trained layers in their places.
        head: features → natural-prior logits.
        learned_from: positions in the material.
        prior_from: positions whose class mix the logits have.
        held_out: (n,) positions that chose.
        logits: (n, K) of those, natural; NaN where none could be held out.
        folds: (n,) fold that each was held out in; None where they are a validation part.
        chosen: setting → its value and the evidence for it.
        history: rows of history.csv, empty where nothing was tuned; for a probe those of a tuning that was
            not better.
        plan: what the training did; None for a probe.
    """

    finetune: TrainedMethod
    backbone: Backbone
    head: LinearHead
    learned_from: IntArray
    prior_from: IntArray
    held_out: IntArray
    logits: Float32Array
    folds: IntArray | None
    chosen: dict[str, dict[str, Any]]
    history: list[dict[str, float]]
    plan: FinetunePlan | None

    @property
    def split(self) -> str:
        """The part behind `logits`: "oof" or "val"."""
        return "val" if self.folds is None else "oof"


def learn(
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    log: RunLog,
    *,
    is_fold: bool = False,
) -> TrainedClassifier:
    """Train as deep as is asked for; with auto, as deep as time allows and held-out images approve.

    Args:
        is_fold: what is learned is measured elsewhere, so that a probe's `logits` may be coarse.

    Raises:
        ConfigError: the time budget is too short for the depth that is asked for.
        DataError: nothing to choose on.
    """
    probe_instead = partial(learn_probe, data, loaded.backbone, config, log, is_fold=is_fold)
    method = _pick_depth(config, workplace, data, log)
    _say_what_does_not_count(method, config, workplace, log)
    if method == "none":
        return probe_instead()
    train, val = data.train_without_val_duplicates(), data.split.val
    if reason := _why_nothing_can_choose(data, train):
        raise DataError(f"{reason}; add some or use --finetune none")
    if n_copies := len(data.split.train) - len(train):
        log.note(
            f"{counted(n_copies, 'training image')} must wait until val has chosen, as copies of val images"
        )
    probe, _ = _fit_probe(data, train, config, log, head_only=True)
    bench = Bench(data, loaded, probe, config, workplace)
    try:
        tuned = tune(bench, method, log)
    except (TimeBudgetError, BackboneSplitError, TooLittleMemoryError) as error:
        if config.finetune != "auto":
            raise ConfigError(str(error)) from None
        log.note(f"{error}; a probe is fitted")
        _say_what_a_probe_leaves_out(config, log)
        return probe_instead()
    if not tuned.best_epoch and starts_at_probe(config):  # its weights are those of the probe
        log.note(
            f"no epoch of {method} tuning was better than the probe on {len(val)} held-out images"
            f"{_tell_scores(tuned)}; the probe is taken"
        )
        return _after_tuning(probe_instead(), tuned, {})
    probe_logits = probe.probe.head.logits(data.features[val])  # (n, K)
    verdict = compare_depths(probe_logits, tuned.logits, data, config)
    log.note(verdict.sentence.format(finetune=method))
    if config.finetune == "auto" and not verdict.is_tuned_better:
        return _after_tuning(probe_instead(), tuned, verdict.evidence)
    return _learn_on(tuned, verdict, log)


def _learn_on(tuned: Tuned, verdict: "Verdict", log: RunLog) -> TrainedClassifier:
    """Learn from the validation part too, which has chosen, and put down what the choices rest on."""
    bench, config, finished = tuned.bench, tuned.bench.config, finish(tuned, log)
    probe = bench.probe
    by_val = {"chosen_on": "val", "n": len(bench.val)}
    asked = {"chosen_on": None}
    has_ways = may_answer_together(config) and config.finetuning.ensemble_probe == "auto"
    method = tuned.plan.finetune
    return TrainedClassifier(
        finetune=method,
        backbone=finished.backbone,
        head=finished.head,
        learned_from=finished.learned_from,
        prior_from=bench.train,
        held_out=bench.val,
        logits=tuned.logits,
        folds=None,
        chosen={
            "finetune": {
                "value": method,
                **(by_val if config.finetune == "auto" else asked),
                **verdict.evidence,
                "auto_takes": method if verdict.is_tuned_better else "none",
            },
            "epoch": {"value": tuned.best_epoch, **by_val},
            "ensemble_probe": {"value": tuned.ensemble_probe, **(by_val if has_ways else asked)},
            "refit_epochs": {"value": finished.refit_epochs, **asked},
            "imbalance": {
                **probe.evidence,
                "value": config.imbalance,
                "chosen_on": "train, out of fold" if probe.was_compared else None,
            },
        },
        history=finished.history,
        plan=tuned.plan,
    )


def learn_probe(
    data: TrainingData, backbone: Backbone, config: TrainConfig, log: RunLog, *, is_fold: bool = False
) -> TrainedClassifier:
    """Fit a head on frozen features; folds of train and val choose everything."""
    rows = data.fit_rows
    if len(data.split.val):
        n = len(data.split.val)
        log.note(f"the probe chooses by folds, so the {n} val images are learned from too")
    fair, folds = _fit_probe(data, rows, config, log, head_only=is_fold)
    notes = list(fair.notes)
    if config.oversample_to is not None:
        notes.append("oversample_to needs augmented views, and a probe has none: it is left out")
    for note in notes:
        log.note(note)
    fit = fair.probe
    evidence = {"chosen_on": "train+val, out of fold", "n": int((folds >= 0).sum())}
    return TrainedClassifier(
        finetune="none",
        backbone=backbone,
        head=fit.head,
        learned_from=rows,
        prior_from=rows,
        held_out=rows,
        logits=fit.oof_logits,
        folds=folds,
        chosen={
            "C": {
                "value": fit.C,
                **evidence,
                "nll_by_value": {str(c): nll for c, nll in fit.nll_by_C.items()},
            },
            "imbalance": {**fair.evidence, **(evidence if fair.was_compared else {"chosen_on": None})},
        },
        history=[],
        plan=None,
    )


def _say_what_does_not_count(
    method: TrainedMethod, config: TrainConfig, workplace: Workplace, log: RunLog
) -> None:
    """Note settings that training as deep, or as long, has no use for."""
    usual, settings = TrainConfig(), config.finetuning
    is_budget_given = config.time_budget != usual.time_budget
    if method == "none":
        if is_budget_given:
            log.note_for_all(f"--time-budget {config.time_budget} does not count: a probe has no use for it")
        if config.finetune == "none" and config.val_frac != usual.val_frac:
            log.note_for_all(f"--val-frac {config.val_frac} does not count: a probe has no use for it")
        _say_what_a_probe_leaves_out(config, log)
        return
    if settings.hard_example_frac and not may_repeat_hard_examples(config):
        log.note_for_all("--hard-example-frac makes way for mixup, cutmix or an mlp head: it does not count")
    if settings.deterministic and workplace.device.name == "mps":
        log.note_for_all("--deterministic does not count: Apple's GPUs promise no such thing")
    if config.finetune == "auto" and (unused := unused_settings(method, config)):
        log.note_for_all(f"{method} tuning has no use for {', '.join(unused)}")
    is_long_as_asked = workplace.plan is not None or settings.epochs is not None
    if is_long_as_asked and is_budget_given:
        log.note_for_all(
            f"--time-budget {config.time_budget} does not count, as the number of epochs is given"
        )


def _say_what_a_probe_leaves_out(config: TrainConfig, log: RunLog) -> None:
    if unused := unused_settings("none", config):
        log.note_for_all(f"a probe has no use for {', '.join(unused)}")


def _after_tuning(probe: TrainedClassifier, tuned: Tuned, evidence: Mapping[str, float]) -> TrainedClassifier:
    """A probe that was taken instead of a tuned network, with the record of that."""
    method = {"value": "none", "chosen_on": "val", "n": len(tuned.bench.val), **evidence}
    return replace(probe, history=tuned.history, chosen={"finetune": method, **probe.chosen})


def _tell_scores(tuned: Tuned) -> str:
    """The lowest score of an epoch, by which epochs are chosen, and that before the first."""
    before, *scores = [row["val_score"] for row in tuned.history]
    return f" (score {min(scores):.3f} at best, {before:.3f} before; lower is better)" if scores else ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Which of two depths is better on the validation part, and why."""

    is_tuned_better: bool
    evidence: dict[str, float]
    sentence: str


def compare_depths(
    probe: Float32Array, tuned: Float32Array, data: TrainingData, config: TrainConfig
) -> Verdict:
    """Compare the declared metric of both; where that is not clear, their held-out score.

    Args:
        probe: (n, K) logits of the validation part from the probe that learned from train only.
        tuned: (n, K) likewise.
    """
    val = data.split.val
    labels, groups = data.labels[val], data.split.groups[val]
    priors = class_priors(data.counts_of(data.train_without_val_duplicates()))
    found = compare_logits((probe, tuned), labels, groups, priors, metric=config.metric, seed=config.seed)
    values, error = found.values, found.standard_error
    scores = [held_out_score(logits, labels, priors, config.metric) for logits in (probe, tuned)]
    is_clear = abs(found.difference) > CLEAR * error
    is_better = found.difference > 0 if is_clear else scores[1] < scores[0]
    name = config.metric.replace("_", " ").replace(" f1", "-F1")
    if is_better:
        verdict = "{depth} is taken"
    else:
        verdict = (
            "the probe is taken" if config.finetune == "auto" else "--finetune auto would take the probe"
        )
    sentence = (
        f"on {len(val)} held-out images, seen as in prediction, {{depth}} has {name} {values[1]:.3f} "
        f"(loss {scores[1]:.3f}), the probe {values[0]:.3f} ({scores[0]:.3f}): {verdict}"
    )
    return Verdict(
        is_tuned_better=is_better,
        evidence={
            f"probe_{config.metric}": values[0],
            f"tuned_{config.metric}": values[1],
            "probe_score": scores[0],
            "tuned_score": scores[1],
            "standard_error": error,
        },
        sentence=sentence,
    )


def _fit_probe(
    data: TrainingData, rows: IntArray, config: TrainConfig, log: RunLog, *, head_only: bool
) -> tuple[ImbalanceProbe, IntArray]:
    labels, groups = data.labels[rows], data.split.groups[rows]
    folds = assign_folds(labels, groups, config.n_folds, config.seed)
    check_some_held_out(folds, data.dataset.source)
    with log.progress("fitting", None, "strengths tried") as bar:
        fair = fit_probe_for_imbalance(
            data.features[rows],
            labels,
            groups,
            folds,
            config,
            head_only=head_only,
            on_progress=bar.update,
        )
    return fair, folds


def _pick_depth(config: TrainConfig, workplace: Workplace, data: TrainingData, log: RunLog) -> TrainedMethod:
    if workplace.plan is not None:
        return workplace.plan.finetune
    if config.finetune != "auto":
        return config.finetune
    if reason := _why_nothing_can_choose(data, data.train_without_val_duplicates()):
        log.note(f"{reason}; a probe is fitted")
        return "none"
    n_val = len(data.split.val)
    if n_val < ENOUGH_VAL:
        log.note(
            f"{n_val} validation images cannot tell which depth is better, {ENOUGH_VAL} could; "
            "a probe is fitted (--finetune partial trains all the same)"
        )
        return "none"
    return "partial" if workplace.device.name == "cpu" else "full"


def _why_nothing_can_choose(data: TrainingData, train: IntArray) -> str:
    """What stands against choosing on the validation part; "" where nothing does."""
    if not len(data.split.val):
        return "tuning needs validation images, and no class has 2 images or groups to hold one out"
    labels, groups = data.labels[train], data.split.groups[train]
    if (assign_folds(labels, groups, 2, seed=0) == NEVER_HELD_OUT).all():
        return "tuning needs a class with 2 images or groups to learn from beside those that are held out"
    absent = [data.classes[k] for k in np.flatnonzero(data.counts_of(train) == 0)]
    if absent:
        return f"tuning needs training images of every class; only the val part has {name_some(absent)}"
    return ""

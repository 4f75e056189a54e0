"""Linear probe or fine-tuning: train the configured method, or the better one on held-out images."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.data.splits import NEVER_HELD_OUT, assign_folds
from pixelplay.errors import ConfigError, DataError
from pixelplay.evaluation.decision_rule import calibrated_nll, compare_logits
from pixelplay.model.device import InsufficientMemoryError
from pixelplay.model.split_backbone import BackboneSplitError
from pixelplay.text import counted, name_some
from pixelplay.training.finetune import Finetuned, finetune, refit, starts_at_probe
from pixelplay.training.finetune_folds import N_FOLDS, finetune_folds
from pixelplay.training.finetune_task import FinetuneTask, can_average_with_probe
from pixelplay.training.imbalance import fit_probe_on_rows, note_on_imbalance
from pixelplay.training.linear_probe import LinearProbe
from pixelplay.training.run_context import RunContext
from pixelplay.training.settings_conflicts import (
    FinetunedMethod,
    TrainedMethod,
    can_repeat_hard_examples,
    unused_settings,
)
from pixelplay.training.time_budget import TimeBudgetError
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData

CLEAR_DIFFERENCE = 2  # standard errors of the metric beyond which the selection loss is ignored
ENOUGH_VAL = 30  # validation images that auto needs to compare the two
ENOUGH_ERRORS = 6  # of the probe out of fold; with fewer, not even a perfect network is clearly better


def fit_probe_or_finetune(
    data: TrainingData, ctx: RunContext, *, needs_oof: bool = True
) -> TrainedClassifier:
    """Train with the configured method; with auto, fine-tune if time allows and keep it if it is better.

    Args:
        needs_oof: the out-of-fold logits of a linear probe must be precise.

    Raises:
        ConfigError: the time budget is too short for the configured method.
        DataError: no images to select on.
    """
    config, log = ctx.config, ctx.log
    method = _choose_method(data, ctx)
    _note_ineffective_settings(method, ctx)
    if method == "none":
        return _train_linear_probe(data, ctx, needs_oof=needs_oof)[1]
    if not len(data.split.val):
        if config.finetuning.refit_epochs != TrainConfig().finetuning.refit_epochs:
            log.note_for_run("--refit-epochs has no effect without a validation split; see --val-frac")
        return _finetune_out_of_fold(data, ctx, method, needs_oof=needs_oof)
    train, val = data.train_without_val_duplicates(), data.split.val
    if reason := _obstacle_to_finetuning(data, train):
        raise DataError(f"{reason}; add images or use --finetune none")
    if n_duplicates := len(data.split.train) - len(train):
        n = counted(n_duplicates, "training image")
        log.note(f"{n} not used until the refit, as duplicates of validation images")
    probe, _ = fit_probe_on_rows(data, train, ctx, head_only=True, title="linear probe")
    task = FinetuneTask(data, probe, ctx)
    try:
        finetuned = finetune(task, method)
    except (TimeBudgetError, BackboneSplitError, InsufficientMemoryError) as error:
        if config.finetune != "auto":
            raise ConfigError(str(error)) from None
        log.note(f"{error}; using the linear probe")
        _note_unused_by_probe(ctx)
        return _train_linear_probe(data, ctx, needs_oof=needs_oof)[1]
    if not finetuned.best_epoch and starts_at_probe(task):  # the weights are those of the probe
        initial, *losses = [row["val_selection_loss"] for row in finetuned.history]
        best = f" (selection loss {min(losses):.3f}, before {initial:.3f})" if losses else ""
        n_val = counted(len(val), "validation image")
        log.note(f"selected the linear probe: no epoch improved on it on {n_val}{best}")
        probe_only = _train_linear_probe(data, ctx, needs_oof=needs_oof)[1]
        return _keep_probe(probe_only, finetuned.history, {"chosen_on": "val", "n": len(val)})
    is_better, evidence = compare_methods(
        probe.head.logits(data.features[val]), finetuned.logits, data, config
    )
    _note_comparison(method, is_better, evidence, len(val), ctx)
    if config.finetune == "auto" and not is_better:
        probe_only = _train_linear_probe(data, ctx, needs_oof=needs_oof)[1]
        by_val = {"chosen_on": "val", "n": len(val), **evidence}
        return _keep_probe(probe_only, finetuned.history, by_val)
    return _finish(task, finetuned, {**evidence, "auto_selects": method if is_better else "none"})


def _finetune_out_of_fold(
    data: TrainingData, ctx: RunContext, method: FinetunedMethod, *, needs_oof: bool
) -> TrainedClassifier:
    """Fine-tune without a validation split; with auto, keep the probe unless it is clearly worse."""
    config, log = ctx.config, ctx.log
    probe, probe_only = _train_linear_probe(data, ctx, needs_oof=needs_oof)
    held_out = np.isfinite(probe.oof_logits).all(1)
    pred = probe.oof_logits[held_out].argmax(1)
    n, n_errors = len(pred), int((pred != data.labels[data.fit_rows][held_out]).sum())
    if config.finetune == "auto" and n_errors < ENOUGH_ERRORS:
        log.note(
            f"selected the linear probe: {counted(n_errors, 'error')} on {n:,} images out of fold, too few "
            "to show that fine-tuning is better"
        )
        return probe_only
    started = time.monotonic()
    try:
        trained, evidence, history = finetune_folds(data, probe, ctx, method)
    except (TimeBudgetError, BackboneSplitError, InsufficientMemoryError) as error:
        if config.finetune != "auto":
            raise ConfigError(str(error)) from None
        log.note(f"{error}; using the linear probe")
        _note_unused_by_probe(ctx)
        return probe_only
    if not evidence:
        log.note("selected the linear probe: fine-tuning failed")
        return _keep_probe(probe_only, history, {"chosen_on": None})
    metric = config.metric
    metrics, scores = (
        [evidence[f"{model}_{name}"] for model in ("finetuned", "probe")] for name in (metric, "loss")
    )
    result = (
        f"{metric} on {evidence['n']:,} images out of fold {metrics[0]:.3f} ({method}) vs {metrics[1]:.3f} "
        f"(linear probe), log loss {scores[0]:.3f} vs {scores[1]:.3f} (standard error of the difference "
        f"{evidence['standard_error']:.3f})"
    )
    if trained is None:
        seconds = round(time.monotonic() - started)
        log.note(f"selected the linear probe after {seconds} s; fine-tuning is not clearly better: {result}")
        return _keep_probe(probe_only, history, {"chosen_on": "train+val, out of fold", **evidence})
    hint = "; --finetune auto would select the probe" if evidence["auto_selects"] == "none" else ""
    log.note(f"selected the fine-tuned network: {result}{hint}")
    return trained


def _train_linear_probe(
    data: TrainingData, ctx: RunContext, *, needs_oof: bool
) -> tuple[LinearProbe, TrainedClassifier]:
    """Fit a linear head on frozen features; folds of train and val select its settings."""
    rows, log = data.fit_rows, ctx.log
    if n := len(data.split.val):
        images = counted(n, "validation image")
        log.note(f"the linear probe selects by cross-validation; {images} added to training")
    probe, folds = fit_probe_on_rows(data, rows, ctx, head_only=not needs_oof, title="linear probe")
    if note := note_on_imbalance(ctx.config.imbalance):
        log.note(note)
    if ctx.config.oversample_to is not None:
        log.note("--oversample-to is ignored by the linear probe: it needs augmented views")
    selected = {"chosen_on": "train+val, out of fold", "n": int((folds >= 0).sum())}
    nll_by_value = {str(C): nll for C, nll in probe.nll_by_C.items()}
    weighting = selected if probe.was_compared else {"chosen_on": None}
    return probe, TrainedClassifier(
        finetune="none",
        backbone=ctx.backbone.backbone,
        head=probe.head,
        trained_on=rows,
        prior_rows=rows,
        held_out=rows,
        logits=probe.oof_logits,
        folds=folds,
        chosen={
            "C": {"value": probe.C, **selected, "nll_by_value": nll_by_value},
            "features": {**probe.feature_evidence, **selected},
            "imbalance": {**probe.evidence, **weighting},
        },
    )


def compare_methods(
    probe: Float32Array, finetuned: Float32Array, data: TrainingData, config: TrainConfig
) -> tuple[bool, dict[str, Any]]:
    """Compare the metric of two logits (n, K) on val, and where it is not clear their selection loss.

    Returns:
        True where the fine-tuned network is better, and the evidence.
    """
    val = data.split.val
    labels, groups = data.labels[val], data.split.groups[val]
    priors = class_priors(data.counts_of(data.train_without_val_duplicates()))
    values, standard_error = compare_logits(
        (probe, finetuned), labels, groups, priors, metric=config.metric, seed=config.seed
    )
    difference = values[1] - values[0]
    losses = [calibrated_nll(logits, labels, priors, config.metric) for logits in (probe, finetuned)]
    is_clear = abs(difference) > CLEAR_DIFFERENCE * standard_error
    is_better = difference > 0 if is_clear else losses[1] < losses[0]
    return is_better, {
        f"probe_{config.metric}": values[0],
        f"finetuned_{config.metric}": values[1],
        "probe_loss": losses[0],
        "finetuned_loss": losses[1],
        "decided_by": config.metric if is_clear else "selection_loss",
        "standard_error": standard_error,
    }


def _finish(task: FinetuneTask, finetuned: Finetuned, evidence: Mapping[str, object]) -> TrainedClassifier:
    """Refit on train and val, and record how each setting was selected."""
    config = task.ctx.config
    finetuned, refit_epochs = refit(task, finetuned)
    by_val, fixed = {"chosen_on": "val", "n": len(task.val)}, {"chosen_on": None}
    is_auto = can_average_with_probe(config) and config.finetuning.ensemble_probe == "auto"
    method = finetuned.plan.finetune
    imbalance_by = "train, out of fold" if task.probe.was_compared else None
    return TrainedClassifier(
        finetune=method,
        backbone=finetuned.backbone,
        head=finetuned.head,
        trained_on=task.data.fit_rows if refit_epochs else task.train,
        prior_rows=task.train,
        held_out=task.val,
        logits=finetuned.logits,
        folds=None,
        chosen={
            "finetune": {"value": method, **(by_val if config.finetune == "auto" else fixed), **evidence},
            "epoch": {"value": finetuned.best_epoch, **by_val},
            "ensemble_probe": {"value": finetuned.ensemble_probe, **(by_val if is_auto else fixed)},
            "refit_epochs": {"value": refit_epochs, **fixed},
            "imbalance": {**task.probe.evidence, "value": config.imbalance, "chosen_on": imbalance_by},
        },
        history=finetuned.history,
        plan=finetuned.plan,
    )


def _keep_probe(
    probe: TrainedClassifier, history: list[dict[str, float]], evidence: Mapping[str, Any]
) -> TrainedClassifier:
    """Record that the linear probe was selected over a fine-tuned network."""
    return replace(probe, history=history, chosen={"finetune": {"value": "none", **evidence}, **probe.chosen})


def _choose_method(data: TrainingData, ctx: RunContext) -> TrainedMethod:
    """Resolve auto: fine-tune where enough validation images can tell whether that is better."""
    if ctx.plan is not None:
        return ctx.plan.finetune
    if ctx.config.finetune != "auto":
        return ctx.config.finetune
    if reason := _obstacle_to_finetuning(data, data.train_without_val_duplicates()):
        ctx.log.note(f"{reason}; using the linear probe")
        return "none"
    if 0 < (n_val := len(data.split.val)) < ENOUGH_VAL:
        ctx.log.note(
            f"{counted(n_val, 'validation image')} cannot show whether fine-tuning is better "
            f"({ENOUGH_VAL} could); using the linear probe (--finetune partial fine-tunes anyway)"
        )
        return "none"
    return "partial" if ctx.device.name == "cpu" else "full"


def _obstacle_to_finetuning(data: TrainingData, train: IntArray) -> str:
    """Return why nothing can be selected on held-out images; "" where it can."""
    labels, groups = data.labels[train], data.split.groups[train]
    if not len(data.split.val):
        folds = assign_folds(labels, groups, N_FOLDS, seed=0)
        is_enough = len(np.unique(folds[folds != NEVER_HELD_OUT])) == N_FOLDS
        return "" if is_enough else f"fine-tuning needs classes with {N_FOLDS} images or groups together"
    if (assign_folds(labels, groups, 2, seed=0) == NEVER_HELD_OUT).all():
        return "fine-tuning needs a class with 2 training images or groups besides the validation images"
    if absent := [data.classes[k] for k in np.flatnonzero(data.counts_of(train) == 0)]:
        return f"fine-tuning needs training images of every class; only val has {name_some(absent)}"
    return ""


def _note_comparison(
    method: TrainedMethod, is_better: bool, evidence: Mapping[str, Any], n_val: int, ctx: RunContext
) -> None:
    """Say which of the two is better on the validation images, and what is selected."""
    metric, images = ctx.config.metric, counted(n_val, "validation image")
    selected = "fine-tuned network" if is_better or ctx.config.finetune != "auto" else "linear probe"
    hint = "" if is_better or ctx.config.finetune == "auto" else "; --finetune auto would select the probe"
    metrics, losses = (
        [evidence[f"{model}_{name}"] for model in ("finetuned", "probe")] for name in (metric, "loss")
    )
    by_loss = f"selection loss {losses[0]:.3f} vs {losses[1]:.3f} (lower is better)"
    decided = f", {by_loss}"
    if evidence["decided_by"] == "selection_loss":
        decided = f", no clear difference; the {by_loss} decides"
    ctx.log.note(
        f"selected the {selected}: {metric} on {images} {metrics[0]:.3f} ({method}) vs {metrics[1]:.3f} "
        f"(linear probe){decided}{hint}"
    )


def _note_ineffective_settings(method: TrainedMethod, ctx: RunContext) -> None:
    """Note settings that have no effect with the chosen method."""
    config, log, defaults = ctx.config, ctx.log, TrainConfig()
    settings, has_budget = config.finetuning, config.time_budget != defaults.time_budget
    if method == "none":
        if has_budget:
            log.note_for_run("--time-budget is ignored with --finetune none")
        if config.finetune == "none" and config.val_frac != defaults.val_frac:
            log.note_for_run("--val-frac is ignored with --finetune none")
        _note_unused_by_probe(ctx)
        return
    if settings.hard_example_frac and not can_repeat_hard_examples(config):
        log.note_for_run("--hard-example-frac is ignored with mixup, cutmix and --head mlp")
    if settings.deterministic and ctx.device.name == "mps":
        log.note_for_run("--deterministic has no effect on Apple GPUs")
    if config.finetune == "auto" and (unused := unused_settings(method, config)):
        log.note_for_run(f"no effect with {method} fine-tuning: {', '.join(unused)}")
    if has_budget and (ctx.plan is not None or settings.epochs is not None):
        log.note_for_run("--time-budget is ignored with --epochs or --plan")


def _note_unused_by_probe(ctx: RunContext) -> None:
    if unused := unused_settings("none", ctx.config):
        ctx.log.note_for_run(f"no effect with a linear probe: {', '.join(unused)}")

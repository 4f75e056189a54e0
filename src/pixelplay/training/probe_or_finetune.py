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
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import TooLittleMemoryError
from pixelplay.model.split_backbone import UncuttableError
from pixelplay.run_log import Journal
from pixelplay.text import counted, name_some
from pixelplay.training.bench import Bench, may_answer_together, train_apart
from pixelplay.training.compatibility import Depth, may_focus, unused_settings
from pixelplay.training.finetune import Tuned, finish, starts_at_probe, tune
from pixelplay.training.imbalance import FairProbe, fit_fair_probe
from pixelplay.training.plan import Plan
from pixelplay.training.run_context import Workplace
from pixelplay.training.time_budget import NoPlanError
from pixelplay.training.training_data import Material

CLEAR = 2  # standard errors by which one depth is better whatever its held-out score


ENOUGH_VAL = 30  # validation photographs, for auto to choose a depth on


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A classifier, and the held-out logits that its temperature and tau are fitted on.

    Attributes:
        depth: how deep it was trained.
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

    depth: Depth
    backbone: Backbone
    head: LinearHead
    learned_from: IntArray
    prior_from: IntArray
    held_out: IntArray
    logits: Float32Array
    folds: IntArray | None
    chosen: dict[str, dict[str, Any]]
    history: list[dict[str, float]]
    plan: Plan | None

    @property
    def part(self) -> str:
        """The part behind `logits`: "oof" or "val"."""
        return "val" if self.folds is None else "oof"


def learn(
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    journal: Journal,
    *,
    is_fold: bool = False,
) -> Learned:
    """Train as deep as is asked for; with auto, as deep as time allows and held-out photographs approve.

    Args:
        is_fold: what is learned is measured elsewhere, so that a probe's `logits` may be coarse.

    Raises:
        ConfigError: the time budget is too short for the depth that is asked for.
        DataError: nothing to choose on.
    """
    probe_instead = partial(learn_probe, material, loaded.backbone, config, journal, is_fold=is_fold)
    depth = _pick_depth(config, workplace, material, journal)
    _say_what_does_not_count(depth, config, workplace, journal)
    if depth == "probe":
        return probe_instead()
    train, val = train_apart(material), material.parts.split.val
    if reason := _why_nothing_can_choose(material, train):
        raise DataError(f"{reason}; add some or use --tune probe")
    if n_copies := len(material.parts.split.train) - len(train):
        journal.note(
            f"{counted(n_copies, 'training photograph')} must wait until val has chosen, "
            "as copies of val photographs"
        )
    probe, _ = _fit_probe(material, train, config, journal, is_head_only=True)
    bench = Bench(material, loaded, probe, config, workplace)
    try:
        tuned = tune(bench, depth, journal)
    except (NoPlanError, UncuttableError, TooLittleMemoryError) as error:
        if config.tune != "auto":
            raise ConfigError(str(error)) from None
        journal.note(f"{error}; a probe is fitted")
        _say_what_a_probe_leaves_out(config, journal)
        return probe_instead()
    if not tuned.best_epoch and starts_at_probe(config):  # its weights are those of the probe
        journal.note(
            f"no epoch of {depth} tuning was better than the probe on {len(val)} held-out photographs"
            f"{_tell_scores(tuned)}; the probe is taken"
        )
        return _after_tuning(probe_instead(), tuned, {})
    probe_logits = probe.probe.head.logits(material.features[val])  # (n, K)
    verdict = compare_depths(probe_logits, tuned.logits, material, config)
    journal.note(verdict.sentence.format(depth=depth))
    if config.tune == "auto" and not verdict.is_tuned_better:
        return _after_tuning(probe_instead(), tuned, verdict.evidence)
    return _learn_on(tuned, verdict, journal)


def _learn_on(tuned: Tuned, verdict: "Verdict", journal: Journal) -> Learned:
    """Learn from the validation part too, which has chosen, and put down what the choices rest on."""
    bench, config, finished = tuned.bench, tuned.bench.config, finish(tuned, journal)
    probe = bench.probe
    by_val = {"chosen_on": "val", "n": len(bench.val)}
    asked = {"chosen_on": None}
    has_ways = may_answer_together(config) and config.finetune.with_probe == "auto"
    depth = tuned.plan.depth
    return Learned(
        depth=depth,
        backbone=finished.backbone,
        head=finished.head,
        learned_from=finished.learned_from,
        prior_from=bench.train,
        held_out=bench.val,
        logits=tuned.logits,
        folds=None,
        chosen={
            "depth": {
                "value": depth,
                **(by_val if config.tune == "auto" else asked),
                **verdict.evidence,
                "auto_takes": depth if verdict.is_tuned_better else "probe",
            },
            "epoch": {"value": tuned.best_epoch, **by_val},
            "with_probe": {"value": tuned.is_with_probe, **(by_val if has_ways else asked)},
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
    material: Material, backbone: Backbone, config: TrainConfig, journal: Journal, *, is_fold: bool = False
) -> Learned:
    """Fit a head on frozen features; folds of train and val choose everything."""
    rows = material.learn
    if len(material.parts.split.val):
        n = len(material.parts.split.val)
        journal.note(f"the probe chooses by folds, so the {n} val photographs are learned from too")
    fair, folds = _fit_probe(material, rows, config, journal, is_head_only=is_fold)
    notes = list(fair.notes)
    if config.min_per_class is not None:
        notes.append("min_per_class needs augmented views, and a probe has none: it is left out")
    for note in notes:
        journal.note(note)
    fit = fair.probe
    evidence = {"chosen_on": "train+val, out of fold", "n": int((folds >= 0).sum())}
    return Learned(
        depth="probe",
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
    depth: Depth, config: TrainConfig, workplace: Workplace, journal: Journal
) -> None:
    """Note settings that training as deep, or as long, has no use for."""
    usual, settings = TrainConfig(), config.finetune
    is_budget_given = config.time_budget != usual.time_budget
    if depth == "probe":
        if is_budget_given:
            journal.note_for_all(
                f"--time-budget {config.time_budget} does not count: a probe has no use for it"
            )
        if config.tune == "probe" and config.val_frac != usual.val_frac:
            journal.note_for_all(f"--val-frac {config.val_frac} does not count: a probe has no use for it")
        _say_what_a_probe_leaves_out(config, journal)
        return
    if settings.focus and not may_focus(config):
        journal.note_for_all("--focus makes way for mixup, cutmix or an mlp head: it does not count")
    if settings.deterministic and workplace.device.name == "mps":
        journal.note_for_all("--deterministic does not count: Apple's GPUs promise no such thing")
    if config.tune == "auto" and (unused := unused_settings(depth, config)):
        journal.note_for_all(f"{depth} tuning has no use for {', '.join(unused)}")
    is_long_as_asked = workplace.plan is not None or settings.epochs is not None
    if is_long_as_asked and is_budget_given:
        journal.note_for_all(
            f"--time-budget {config.time_budget} does not count, as the number of epochs is given"
        )


def _say_what_a_probe_leaves_out(config: TrainConfig, journal: Journal) -> None:
    if unused := unused_settings("probe", config):
        journal.note_for_all(f"a probe has no use for {', '.join(unused)}")


def _after_tuning(probe: Learned, tuned: Tuned, evidence: Mapping[str, float]) -> Learned:
    """A probe that was taken instead of a tuned network, with the record of that."""
    depth = {"value": "probe", "chosen_on": "val", "n": len(tuned.bench.val), **evidence}
    return replace(probe, history=tuned.history, chosen={"depth": depth, **probe.chosen})


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
    probe: Float32Array, tuned: Float32Array, material: Material, config: TrainConfig
) -> Verdict:
    """Compare the declared metric of both; where that is not clear, their held-out score.

    Args:
        probe: (n, K) logits of the validation part from the probe that learned from train only.
        tuned: (n, K) likewise.
    """
    val = material.parts.split.val
    labels, groups = material.labels[val], material.parts.groups[val]
    priors = class_priors(material.counts_of(train_apart(material)))
    found = compare_logits((probe, tuned), labels, groups, priors, metric=config.metric, seed=config.seed)
    values, error = found.values, found.standard_error
    scores = [held_out_score(logits, labels, priors, config.metric) for logits in (probe, tuned)]
    is_clear = abs(found.difference) > CLEAR * error
    is_better = found.difference > 0 if is_clear else scores[1] < scores[0]
    name = config.metric.replace("_", " ").replace(" f1", "-F1")
    if is_better:
        verdict = "{depth} is taken"
    else:
        verdict = "the probe is taken" if config.tune == "auto" else "--tune auto would take the probe"
    sentence = (
        f"on {len(val)} held-out photographs, seen as in prediction, {{depth}} has {name} {values[1]:.3f} "
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
    material: Material, rows: IntArray, config: TrainConfig, journal: Journal, *, is_head_only: bool
) -> tuple[FairProbe, IntArray]:
    labels, groups = material.labels[rows], material.parts.groups[rows]
    folds = assign_folds(labels, groups, config.n_folds, config.seed)
    check_some_held_out(folds, material.index.source)
    with journal.progress("fitting", None, "strengths tried") as bar:
        fair = fit_fair_probe(
            material.features[rows],
            labels,
            groups,
            folds,
            config,
            is_head_only=is_head_only,
            on_progress=bar.update,
        )
    return fair, folds


def _pick_depth(config: TrainConfig, workplace: Workplace, material: Material, journal: Journal) -> Depth:
    if workplace.plan is not None:
        return workplace.plan.depth
    if config.tune != "auto":
        return config.tune
    if reason := _why_nothing_can_choose(material, train_apart(material)):
        journal.note(f"{reason}; a probe is fitted")
        return "probe"
    n_val = len(material.parts.split.val)
    if n_val < ENOUGH_VAL:
        journal.note(
            f"{n_val} validation photographs cannot tell which depth is better, {ENOUGH_VAL} could; "
            "a probe is fitted (--tune partial trains all the same)"
        )
        return "probe"
    return "partial" if workplace.device.name == "cpu" else "full"


def _why_nothing_can_choose(material: Material, train: IntArray) -> str:
    """What stands against choosing on the validation part; "" where nothing does."""
    if not len(material.parts.split.val):
        return "tuning needs validation photographs, and no class has 2 photographs or groups to hold one out"
    labels, groups = material.labels[train], material.parts.groups[train]
    if (assign_folds(labels, groups, 2, seed=0) == NEVER_HELD_OUT).all():
        return (
            "tuning needs a class with 2 photographs or groups to learn from beside those that are held out"
        )
    absent = [material.classes[k] for k in np.flatnonzero(material.counts_of(train) == 0)]
    if absent:
        return f"tuning needs training photographs of every class; only the val part has {name_some(absent)}"
    return ""

"""What was learned → how it decides, and the bundle that carries it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixelplay import __version__
from pixelplay.arrays import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.evaluation.conformal import HeldOut, score_held_out
from pixelplay.evaluation.decision_rule import Decision, fit_decision
from pixelplay.evaluation.novelty import MAX_REFERENCES, Novelty, choose_references, fit_novelty
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.bundle import Bundle, shorten_digest
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import Device
from pixelplay.model.ensemble import join_members
from pixelplay.model.features import make_extractor
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.run_log import Journal
from pixelplay.training.bench import read_rows, train_apart
from pixelplay.training.cross_validation import (
    CrossValidation,
    decide_alone,
    decide_together,
    learn_alone,
    score_folds,
)
from pixelplay.training.probe_or_finetune import Learned
from pixelplay.training.run_context import Workplace
from pixelplay.training.training_data import Material


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployed:
    """What predicts from now on.

    Attributes:
        answer: network, and the head on its features.
        decision: how it decides.
        learned_from: positions in the material.
        held_out: scores of photographs that it, or classifiers like it, had not learned from.
        novelty: how unlike what it learned from a photograph is, on a scale that those have set.
    """

    answer: tuple[Backbone, LinearHead]
    decision: Decision
    learned_from: IntArray
    held_out: HeldOut
    novelty: Novelty


@dataclass(frozen=True, kw_only=True, eq=False)
class DeployedFolds(Deployed):
    """What a cross-validation leaves behind to predict with.

    Attributes:
        temperatures: of the M members of an ensemble; none where there is no ensemble.
        alone: the classifier that learned from everything, in the ensemble's place.
    """

    temperatures: Sequence[float] = ()
    alone: Learned | None = None


def deploy_learned(
    learned: Learned,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
    journal: Journal,
) -> Deployed:
    """Let the photographs that were held out decide how one classifier answers."""
    rows = learned.held_out
    labels, groups = material.labels[rows], material.parts.groups[rows]
    priors = class_priors(material.counts_of(learned.prior_from))
    decision = fit_decision(learned.logits, labels, groups, priors, metric=config.metric, seed=config.seed)
    _say_unfixed(decision, journal)
    held_out_logits = rows, learned.logits, learned.folds
    return Deployed(
        answer=(learned.backbone, learned.head),
        decision=decision,
        learned_from=learned.learned_from,
        held_out=score_held_out(*decision.apply(learned.logits), labels, groups, learned.part),
        novelty=make_novelty(learned.backbone, material, loaded, config, device, held_out_logits),
    )


def deploy_folds(
    validation: CrossValidation,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    journal: Journal,
    *,
    is_single: bool,
) -> DeployedFolds:
    """The mean of all folds' classifiers, or one more that learns from everything as they did.

    Raises:
        ConfigError: that one cannot be trained.
    """
    alone: Learned | None = None
    temperatures: Sequence[float] = ()
    logits = validation.logits  # (R, N, K)
    if is_single:
        alone = learn_alone(validation, material, loaded, config, workplace, journal)
        answer, decision = (alone.backbone, alone.head), decide_alone(validation, material, config)
    else:
        temperatures, logits, decision = decide_together(validation, material, config, journal)
        answer = join_members(loaded.backbone, [part.member for part in validation.parts], temperatures)
    _say_unfixed(decision, journal)
    held_out_logits = validation.rows, logits[0], validation.folds[0]
    return DeployedFolds(
        answer=answer,
        decision=decision,
        learned_from=material.learn if alone is None else alone.learned_from,
        held_out=score_folds(validation, material),
        novelty=make_novelty(answer[0], material, loaded, config, workplace.device, held_out_logits),
        temperatures=temperatures,
        alone=alone,
    )


def make_bundle(
    deployed: Deployed, material: Material, loaded: LoadedBackbone, config: TrainConfig, device: Device
) -> Bundle:
    """Put together all that prediction needs."""
    decision = deployed.decision
    backbone, head = deployed.answer
    return Bundle(
        backbone=backbone,
        classes=material.known_classes,
        preprocessing=loaded.preprocessing,
        hflip=config.hflip,
        precision=device.precision,
        temperature=decision.temperature.temperature,
        tau=decision.tau.tau,
        priors=decision.priors,
        metric=config.metric,
        trained_on=frozenset(shorten_digest(material.digests[i]) for i in deployed.learned_from),
        head=head,
        made_by=_made_by(loaded),
        held_out=deployed.held_out,
        novelty=deployed.novelty,
    )


def _say_unfixed(decision: Decision, journal: Journal) -> None:
    if decision.temperature.at_bound:
        journal.note(
            "held-out photographs are all right, or no better than chance, and fix no temperature: T = 1"
        )


def _made_by(loaded: LoadedBackbone) -> Mapping[str, str]:
    return {"pixelplay": __version__, "weights": loaded.origin, "weights_sha256": loaded.weights_id}


MAX_READ = 300  # photographs of either kind, where tuning has changed all features and they are read anew


def see_rows(
    backbone: Backbone,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
    rows: IntArray,
) -> Float32Array:
    """Features (n, D) of some photographs of the material under a finished network."""
    if backbone is loaded.backbone:
        return material.features[rows]
    return read_rows(material, rows, make_extractor(backbone, loaded.preprocessing, config, device), config)


def make_novelty(
    backbone: Backbone,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
    held_out: tuple[IntArray, Float32Array, IntArray | None],
) -> Novelty:
    """Set the scale of novelty by photographs that a classifier, or one like it, has not learned from.

    Where a tuned network answers alone, its features of them are those after it has learned from them too,
    for some short epochs: then what is new looks a little newer than it is.

    Args:
        backbone: of the finished classifier.
        held_out: positions (n,), ascending; their logits (n, K), NaN where one could not be held out; and
            their folds (n,), None where they are a validation part.
    """
    rows, logits, folds = held_out
    references = train_apart(material) if folds is None else rows
    kept = np.flatnonzero(np.isfinite(logits).all(axis=1))
    # beside its tails a network has its frozen features, and they come first
    is_frozen = backbone is loaded.backbone or isinstance(backbone, BranchedBackbone)
    if is_frozen:
        chosen = references[choose_references(material.labels[references], MAX_REFERENCES, config.seed)]
    else:
        kept = kept[choose_references(material.labels[rows[kept]], MAX_READ, config.seed)]
        chosen = references[choose_references(material.labels[references], MAX_READ, config.seed)]

    def see(wanted: IntArray) -> Float32Array:
        if is_frozen:
            return material.features[wanted]
        return see_rows(backbone, material, loaded, config, device, wanted)

    if folds is None:
        own, others = np.zeros(len(kept), dtype=np.int64), np.ones(len(chosen), dtype=np.int64)
    else:
        own, others = folds[kept], folds[np.searchsorted(rows, chosen)]
    return fit_novelty(see(chosen), others, see(rows[kept]), own, logits[kept])

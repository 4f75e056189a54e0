"""What was learned → how it decides, and the bundle that carries it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pixelplay import __version__
from pixelplay.arrays import IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.evaluation.conformal import HeldOut, score_held_out
from pixelplay.evaluation.decision_rule import Decision, fit_decision
from pixelplay.evaluation.novelty import Novelty
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.bundle import Bundle, shorten_digest
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import Device
from pixelplay.model.ensemble import join_members
from pixelplay.run_log import Journal
from pixelplay.training.bench import Workplace
from pixelplay.training.familiar import make_novelty
from pixelplay.training.folds import CrossValidation, decide_alone, decide_together, learn_alone, score_folds
from pixelplay.training.learn import Learned
from pixelplay.training.material import Material


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

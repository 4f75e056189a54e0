"""What was learned → how it decides, and the bundle that carries it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixelplay import __version__
from pixelplay.config import TrainConfig
from pixelplay.data.imbalance import class_priors
from pixelplay.evaluation.decision import Decision, fit_decision
from pixelplay.evaluation.held_out import HeldOut
from pixelplay.journal import Journal
from pixelplay.model.backbone import Backbone, LoadedBackbone
from pixelplay.model.bundle import Bundle, shorten_digest
from pixelplay.model.ensemble import join_members
from pixelplay.model.features import Device
from pixelplay.model.head import LinearHead
from pixelplay.training.bench import Workplace
from pixelplay.training.folds import CrossValidation, decide_alone, decide_together, learn_alone
from pixelplay.training.learn import Learned
from pixelplay.training.material import Material


def decide_by_held_out(
    learned: Learned, material: Material, config: TrainConfig, journal: Journal
) -> Decision:
    """Fit T and tau on the photographs that were held out."""
    decision = fit_decision(
        learned.logits,
        material.labels[learned.held_out],
        material.parts.groups[learned.held_out],
        class_priors(material.counts_of(learned.prior_from)),
        metric=config.metric,
        seed=config.seed,
    )
    if decision.temperature.at_bound:
        journal.note(
            "held-out photographs are all right, or no better than chance, and fix no temperature: T = 1"
        )
    return decision


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployed:
    """What a cross-validation leaves behind to predict with.

    Attributes:
        answer: network, and the head on its features.
        decision: how it decides.
        learned_from: positions in the material.
        temperatures: of the M members of an ensemble; none where there is no ensemble.
        alone: the classifier that learned from everything, in the ensemble's place.
    """

    answer: tuple[Backbone, LinearHead]
    decision: Decision
    learned_from: NDArray[np.int64]
    temperatures: Sequence[float] = ()
    alone: Learned | None = None


def deploy_folds(
    validation: CrossValidation,
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    journal: Journal,
    *,
    is_single: bool,
) -> Deployed:
    """The mean of all folds' classifiers, or one more that learns from everything as they did.

    Raises:
        ConfigError: that one cannot be trained.
    """
    if is_single:
        alone = learn_alone(validation, material, loaded, config, workplace, journal)
        return Deployed(
            answer=(alone.backbone, alone.head),
            decision=decide_alone(validation, material, config),
            learned_from=alone.learned_from,
            alone=alone,
        )
    temperatures, decision = decide_together(validation, material, config, journal)
    members = [part.member for part in validation.parts]
    return Deployed(
        answer=join_members(loaded.backbone, members, temperatures),
        decision=decision,
        learned_from=material.learn,
        temperatures=temperatures,
    )


def make_bundle(
    answer: tuple[Backbone, LinearHead],
    decision: Decision,
    held_out: HeldOut,
    learned_from: NDArray[np.int64],
    material: Material,
    loaded: LoadedBackbone,
    config: TrainConfig,
    device: Device,
) -> Bundle:
    """Put together all that prediction needs.

    Args:
        answer: network, and the head on its features.
        held_out: scores of the photographs that it, or classifiers like it, had not learned from.
        learned_from: positions in the material.
    """
    return Bundle(
        backbone=answer[0],
        classes=material.known_classes,
        preprocessing=loaded.preprocessing,
        hflip=config.hflip,
        precision=device.precision,
        temperature=decision.temperature.temperature,
        tau=decision.tau.tau,
        priors=decision.priors,
        metric=config.metric,
        trained_on=frozenset(shorten_digest(material.digests[i]) for i in learned_from),
        head=answer[1],
        made_by=_made_by(loaded),
        held_out=held_out,
    )


def _made_by(loaded: LoadedBackbone) -> Mapping[str, str]:
    return {"pixelplay": __version__, "weights": loaded.origin, "weights_sha256": loaded.weights_id}

"""What was learned → how it decides, and the bundle that carries it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pixelplay import __version__
from pixelplay.arrays import Float32Array, IntArray
from pixelplay.config import TrainConfig
from pixelplay.data.sampling import class_priors
from pixelplay.evaluation.conformal import HeldOutScores, score_held_out
from pixelplay.evaluation.decision_rule import DecisionRule, fit_decision_rule
from pixelplay.evaluation.novelty import MAX_REFERENCES, Novelty, choose_references, fit_novelty
from pixelplay.model.backbone import Backbone, PretrainedBackbone
from pixelplay.model.bundle import ModelBundle, shorten_digest
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import Device
from pixelplay.model.ensemble import average_members
from pixelplay.model.features import make_extractor
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.run_log import RunLog
from pixelplay.training.bench import read_rows
from pixelplay.training.cross_validation import (
    CrossValidation,
    decide_alone,
    decide_together,
    learn_alone,
    score_folds,
)
from pixelplay.training.probe_or_finetune import TrainedClassifier
from pixelplay.training.run_context import Workplace
from pixelplay.training.training_data import TrainingData


@dataclass(frozen=True, kw_only=True, eq=False)
class Deployed:
    """What predicts from now on.

    Attributes:
        answer: network, and the head on its features.
        decision: how it decides.
        learned_from: positions in the material.
        held_out: scores of images that it, or classifiers like it, had not learned from.
        novelty: how unlike what it learned from an image is, on a scale that those have set.
    """

    answer: tuple[Backbone, LinearHead]
    rule: DecisionRule
    learned_from: IntArray
    held_out: HeldOutScores
    novelty: Novelty


@dataclass(frozen=True, kw_only=True, eq=False)
class DeployedFolds(Deployed):
    """What a cross-validation leaves behind to predict with.

    Attributes:
        temperatures: of the M members of an ensemble; none where there is no ensemble.
        alone: the classifier that learned from everything, in the ensemble's place.
    """

    temperatures: Sequence[float] = ()
    alone: TrainedClassifier | None = None


def finalize(
    learned: TrainedClassifier,
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    device: Device,
    log: RunLog,
) -> Deployed:
    """Let the images that were held out decide how one classifier answers."""
    rows = learned.held_out
    labels, groups = data.labels[rows], data.split.groups[rows]
    priors = class_priors(data.counts_of(learned.prior_from))
    rule = fit_decision_rule(learned.logits, labels, groups, priors, metric=config.metric, seed=config.seed)
    _say_unfixed(rule, log)
    held_out_logits = rows, learned.logits, learned.folds
    return Deployed(
        answer=(learned.backbone, learned.head),
        rule=rule,
        learned_from=learned.learned_from,
        held_out=score_held_out(*rule.apply(learned.logits), labels, groups, learned.split),
        novelty=fit_novelty_of(learned.backbone, data, loaded, config, device, held_out_logits),
    )


def deploy_folds(
    validation: CrossValidation,
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    workplace: Workplace,
    log: RunLog,
    *,
    single: bool,
) -> DeployedFolds:
    """The mean of all folds' classifiers, or one more that learns from everything as they did.

    Raises:
        ConfigError: that one cannot be trained.
    """
    alone: TrainedClassifier | None = None
    temperatures: Sequence[float] = ()
    logits = validation.logits  # (R, N, K)
    if single:
        alone = learn_alone(validation, data, loaded, config, workplace, log)
        answer, rule = (alone.backbone, alone.head), decide_alone(validation, data, config)
    else:
        temperatures, logits, rule = decide_together(validation, data, config, log)
        answer = average_members(
            loaded.backbone, [split.member for split in validation.results], temperatures
        )
    _say_unfixed(rule, log)
    held_out_logits = validation.rows, logits[0], validation.folds[0]
    return DeployedFolds(
        answer=answer,
        rule=rule,
        learned_from=data.fit_rows if alone is None else alone.learned_from,
        held_out=score_folds(validation, data),
        novelty=fit_novelty_of(answer[0], data, loaded, config, workplace.device, held_out_logits),
        temperatures=temperatures,
        alone=alone,
    )


def make_bundle(
    deployed: Deployed, data: TrainingData, loaded: PretrainedBackbone, config: TrainConfig, device: Device
) -> ModelBundle:
    """Put together all that prediction needs."""
    rule = deployed.rule
    backbone, head = deployed.answer
    return ModelBundle(
        backbone=backbone,
        classes=data.known_classes,
        preprocessing=loaded.preprocessing,
        hflip=config.hflip,
        precision=device.precision,
        temperature=rule.temperature.temperature,
        tau=rule.tau.tau,
        priors=rule.priors,
        metric=config.metric,
        trained_on=frozenset(shorten_digest(data.digests[i]) for i in deployed.learned_from),
        head=head,
        made_by=_made_by(loaded),
        held_out=deployed.held_out,
        novelty=deployed.novelty,
    )


def _say_unfixed(rule: DecisionRule, log: RunLog) -> None:
    if rule.temperature.at_bound:
        log.note("held-out images are all right, or no better than chance, and fix no temperature: T = 1")


def _made_by(loaded: PretrainedBackbone) -> Mapping[str, str]:
    return {"pixelplay": __version__, "weights": loaded.origin, "weights_sha256": loaded.weights_id}


MAX_READ = 300  # images of either kind, where tuning has changed all features and they are read anew


def features_of(
    backbone: Backbone,
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    device: Device,
    rows: IntArray,
) -> Float32Array:
    """Features (n, D) of some images of the material under a finished network."""
    if backbone is loaded.backbone:
        return data.features[rows]
    return read_rows(data, rows, make_extractor(backbone, loaded.preprocessing, config, device), config)


def fit_novelty_of(
    backbone: Backbone,
    data: TrainingData,
    loaded: PretrainedBackbone,
    config: TrainConfig,
    device: Device,
    held_out: tuple[IntArray, Float32Array, IntArray | None],
) -> Novelty:
    """Set the scale of novelty by images that a classifier, or one like it, has not learned from.

    Where a tuned network answers alone, its features of them are those after it has learned from them too,
    for some short epochs: then what is new looks a little newer than it is.

    Args:
        backbone: of the finished classifier.
        held_out: positions (n,), ascending; their logits (n, K), NaN where one could not be held out; and
            their folds (n,), None where they are a validation part.
    """
    rows, logits, folds = held_out
    references = data.train_without_val_duplicates() if folds is None else rows
    kept = np.flatnonzero(np.isfinite(logits).all(axis=1))
    # beside its tails a network has its frozen features, and they come first
    is_frozen = backbone is loaded.backbone or isinstance(backbone, BranchedBackbone)
    if is_frozen:
        chosen = references[choose_references(data.labels[references], MAX_REFERENCES, config.seed)]
    else:
        kept = kept[choose_references(data.labels[rows[kept]], MAX_READ, config.seed)]
        chosen = references[choose_references(data.labels[references], MAX_READ, config.seed)]

    def see(wanted: IntArray) -> Float32Array:
        if is_frozen:
            return data.features[wanted]
        return features_of(backbone, data, loaded, config, device, wanted)

    if folds is None:
        own, others = np.zeros(len(kept), dtype=np.int64), np.ones(len(chosen), dtype=np.int64)
    else:
        own, others = folds[kept], folds[np.searchsorted(rows, chosen)]
    return fit_novelty(see(chosen), others, see(rows[kept]), own, logits[kept])

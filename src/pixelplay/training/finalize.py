"""Finalize: fit temperature and tau, the novelty scale and held-out scores; build the model bundle."""

from functools import partial

import numpy as np

from pixelplay import __version__
from pixelplay.array_types import Float32Array, IntArray
from pixelplay.data.sampling import class_priors
from pixelplay.evaluation.conformal import HeldOutScores, score_held_out
from pixelplay.evaluation.decision_rule import DecisionRule, fit_decision_rule
from pixelplay.evaluation.novelty import MAX_REFERENCES, Novelty, choose_references, fit_novelty
from pixelplay.model.backbone import Backbone
from pixelplay.model.bundle import ModelBundle, shorten_digest
from pixelplay.model.split_backbone import BranchedBackbone
from pixelplay.training.prepare import read_rows
from pixelplay.training.run_context import RunContext
from pixelplay.training.trained_classifier import TrainedClassifier
from pixelplay.training.training_data import TrainingData

MAX_NOVELTY_IMAGES = 300  # of each kind, where fine-tuning changed all features and they are computed again


def finalize(
    classifier: TrainedClassifier, data: TrainingData, ctx: RunContext
) -> tuple[ModelBundle, DecisionRule]:
    """Fit the decision rule on held-out logits and build the model bundle."""
    rows, config = classifier.held_out, ctx.config
    labels, groups = data.labels[rows], data.split.groups[rows]
    priors = class_priors(data.counts_of(classifier.prior_rows))
    rule = fit_decision_rule(
        classifier.logits, labels, groups, priors, metric=config.metric, seed=config.seed
    )
    scores = score_held_out(*rule.apply(classifier.logits), labels, groups, classifier.held_out_split)
    return build_bundle(classifier, rule, scores, data, ctx), rule


def build_bundle(
    classifier: TrainedClassifier,
    rule: DecisionRule,
    scores: HeldOutScores,
    data: TrainingData,
    ctx: RunContext,
) -> ModelBundle:
    """Collect everything that prediction needs; `scores` serve prediction sets and abstention."""
    if rule.evidence["temperature"]["at_bound"]:
        ctx.log.note("temperature is 1: held-out images are all correct, or no better than chance")
    pretrained = ctx.backbone
    return ModelBundle(
        backbone=classifier.backbone,
        classes=data.known_classes,
        preprocessing=pretrained.preprocessing,
        hflip=ctx.config.hflip,
        precision=ctx.device.precision,
        temperature=rule.temperature,
        tau=rule.tau,
        priors=rule.priors,
        metric=ctx.config.metric,
        trained_on=frozenset(shorten_digest(data.digests[i]) for i in classifier.trained_on),
        head=classifier.head,
        made_by={
            "pixelplay": __version__,
            "weights": pretrained.origin,
            "weights_sha256": pretrained.weights_id,
            "weights_licence": pretrained.licence,
        },
        held_out=scores,
        novelty=_fit_novelty(classifier, data, ctx),
    )


def compute_features(backbone: Backbone, data: TrainingData, ctx: RunContext, rows: IntArray) -> Float32Array:
    """Return features (n, D) of some images under a finished network."""
    if backbone is ctx.backbone.backbone:
        return data.features[rows]
    return read_rows(data, rows, ctx.extractor(backbone), ctx.config)


def predict_rows(
    classifier: TrainedClassifier, data: TrainingData, ctx: RunContext, rows: IntArray
) -> Float32Array:
    """Return natural-prior logits (n, K) of some images."""
    if not len(rows):
        return np.empty((0, data.n_known), np.float32)
    return classifier.head.logits(compute_features(classifier.backbone, data, ctx, rows))


def _fit_novelty(classifier: TrainedClassifier, data: TrainingData, ctx: RunContext) -> Novelty:
    """Fit the novelty scale on held-out images.

    Where a fine-tuned network predicts alone, its features of them are those after the refit, which has
    trained on them: novel images then look slightly more novel than they are.
    """
    rows, logits, folds, seed = classifier.held_out, classifier.logits, classifier.folds, ctx.config.seed
    references = data.train_without_val_duplicates() if folds is None else rows
    kept = np.flatnonzero(np.isfinite(logits).all(axis=1))
    # a network with additional branches keeps its frozen features, and they come first
    backbone = classifier.backbone
    is_frozen = backbone is ctx.backbone.backbone or isinstance(backbone, BranchedBackbone)
    limit = MAX_REFERENCES if is_frozen else MAX_NOVELTY_IMAGES
    if not is_frozen:
        kept = kept[choose_references(data.labels[rows[kept]], limit, seed)]
    chosen = references[choose_references(data.labels[references], limit, seed)]
    if folds is None:
        own, others = np.zeros(len(kept), dtype=np.int64), np.ones(len(chosen), dtype=np.int64)
    else:
        own, others = folds[kept], folds[np.searchsorted(rows, chosen)]
    features = data.features.__getitem__ if is_frozen else partial(compute_features, backbone, data, ctx)
    return fit_novelty(features(chosen), others, features(rows[kept]), own, logits[kept])

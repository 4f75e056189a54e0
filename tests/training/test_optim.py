"""AdamW: learning rates by stage and batch size, and weight decay."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from networks import shared_backbone
from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.split_backbone import TrainableStages
from pixelplay.training.optim import REFERENCE_BATCH, make_optimizer

N_STAGES = {"test_convnext": 4, "test_resnet": 5}


def make_classifier(name: str) -> Classifier:
    backbone = shared_backbone(name)
    n = backbone.n_features
    head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), 3, start=None, dropout=0)
    return Classifier(TrainableStages(backbone, 0), head)


def settings_by_name(
    classifier: Classifier, config: FinetuneConfig, images_per_step: int = REFERENCE_BATCH
) -> dict[str, tuple[float, float]]:
    """Return parameter → peak learning rate and weight decay."""
    optimizer = make_optimizer(classifier, config, images_per_step)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(value): name for name, value in classifier.named_parameters()}
    found = [
        (names[id(value)], (group["peak_lr"], group["weight_decay"]))
        for group in optimizer.param_groups
        for value in group["params"]
    ]
    assert len(found) == len(dict(found))  # none is in two groups
    return dict(found)


@pytest.mark.parametrize("name", N_STAGES)
def test_weight_decay_spares_norms_biases_and_layer_scales(name: str) -> None:
    classifier = make_classifier(name)
    layers = dict(classifier.named_modules())
    for key, (_, decay) in settings_by_name(classifier, FinetuneConfig(weight_decay=0.3)).items():
        layer, _, kind = key.rpartition(".")
        is_weight = kind == "weight" and isinstance(layers[layer], nn.Conv2d | nn.Linear)
        assert decay == (0.3 if is_weight else 0.0), key


def test_weight_decay_spares_a_layer_scale_shaped_like_a_feature_map() -> None:
    classifier = make_classifier("test_convnext")
    classifier.head.gamma = nn.Parameter(torch.ones(1, 7, 1, 1))
    assert settings_by_name(classifier, FinetuneConfig(weight_decay=0.3))["head.gamma"][1] == 0


@pytest.mark.parametrize("name", N_STAGES)
def test_layer_decay_lowers_the_learning_rate_per_stage(name: str) -> None:
    classifier = make_classifier(name)
    config = FinetuneConfig(lr=4e-3, head_lr=7e-4, layer_decay=0.5)
    found = settings_by_name(classifier, config)
    assert set(found) == {key for key, _ in classifier.named_parameters()}
    for key, _, distance in classifier.distances():
        expected = 7e-4 if key.startswith("head.") else 4e-3 * 0.5**distance
        assert found[key][0] == pytest.approx(expected, rel=1e-12), key
    stem = next(key for key in found if key.startswith("stages."))
    assert found[stem][0] == pytest.approx(4e-3 * 0.5 ** (N_STAGES[name] - 1), rel=1e-12)


@pytest.mark.parametrize("images_per_step", [8, 32, 128, 1000])
def test_learning_rates_scale_with_the_square_root_of_images_per_step(images_per_step: int) -> None:
    classifier, config = make_classifier("test_convnext"), FinetuneConfig(layer_decay=0.7)
    usual = settings_by_name(classifier, config)
    found = settings_by_name(classifier, config, images_per_step)
    factor = math.sqrt(images_per_step / 32)
    for key, (lr, decay) in usual.items():
        assert found[key] == (pytest.approx(lr * factor, rel=1e-12), decay)


def test_optimizer_leaves_out_frozen_weights() -> None:
    classifier = make_classifier("test_convnext")
    freeze_depthwise_filters(classifier.stages, (3, 64, 64), 0, fast=True)
    found = settings_by_name(classifier, FinetuneConfig())
    assert set(found) == {key for key, value in classifier.named_parameters() if value.requires_grad}
    assert len(found) < len(list(classifier.parameters()))


def test_optimizer_starts_with_a_learning_rate_of_zero() -> None:
    classifier = make_classifier("test_convnext")
    before = {key: value.detach().clone() for key, value in classifier.named_parameters()}
    optimizer = make_optimizer(classifier, FinetuneConfig(), 32)
    for value in classifier.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for key, value in classifier.named_parameters():
        assert torch.equal(value, before[key])

"""What optim.py promises: rates by stage and batch, decay where it belongs, a schedule, an average."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from networks import shared_backbone
from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.split_backbone import SplitBackbone, TrainableStages
from pixelplay.training.optim import RATES_BATCH, AveragedWeights, lr_factor, make_optimizer

N_STAGES = {"test_convnext": 4, "test_resnet": 5}


def make_classifier(name: str) -> Classifier:
    backbone = shared_backbone(name)
    n = backbone.n_features
    head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), 3, start=None, dropout=0)
    return Classifier(TrainableStages(backbone, 0), head)


def settings_by_name(
    classifier: Classifier, config: FinetuneConfig, images_per_step: int = RATES_BATCH
) -> dict[str, tuple[float, float]]:
    """Parameter → peak learning rate and decay, as the optimizer has them."""
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
def test_norms_biases_and_layer_scales_do_not_decay(name: str) -> None:
    classifier = make_classifier(name)
    layers = dict(classifier.named_modules())
    for key, (_, decay) in settings_by_name(classifier, FinetuneConfig(weight_decay=0.3)).items():
        layer, _, kind = key.rpartition(".")
        is_weight = kind == "weight" and isinstance(layers[layer], nn.Conv2d | nn.Linear)
        assert decay == (0.3 if is_weight else 0.0), key


def test_a_layer_scale_in_the_shape_of_a_map_does_not_decay() -> None:
    classifier = make_classifier("test_convnext")
    classifier.head.gamma = nn.Parameter(torch.ones(1, 7, 1, 1))
    assert settings_by_name(classifier, FinetuneConfig(weight_decay=0.3))["head.gamma"][1] == 0


@pytest.mark.parametrize("name", N_STAGES)
def test_each_stage_in_front_has_its_rate_times_the_layer_decay(name: str) -> None:
    classifier = make_classifier(name)
    config = FinetuneConfig(lr=4e-3, head_lr=7e-4, layer_decay=0.5)
    found = settings_by_name(classifier, config)
    assert set(found) == {key for key, _ in classifier.named_parameters()}
    for key, _, distance in classifier.distances():
        expected = 7e-4 if key.startswith("head.") else 4e-3 * 0.5**distance
        assert found[key][0] == pytest.approx(expected, rel=1e-12), key
    stem = next(key for key in found if key.startswith("tail."))
    assert found[stem][0] == pytest.approx(4e-3 * 0.5 ** (N_STAGES[name] - 1), rel=1e-12)


@pytest.mark.parametrize("images_per_step", [8, 32, 128, 1000])
def test_rates_go_with_the_root_of_the_photographs_a_step(images_per_step: int) -> None:
    classifier, config = make_classifier("test_convnext"), FinetuneConfig(layer_decay=0.7)
    usual = settings_by_name(classifier, config)
    found = settings_by_name(classifier, config, images_per_step)
    factor = math.sqrt(images_per_step / 32)
    for key, (lr, decay) in usual.items():
        assert found[key] == (pytest.approx(lr * factor, rel=1e-12), decay)


def test_frozen_weights_are_not_the_optimizers() -> None:
    classifier = make_classifier("test_convnext")
    stages = SplitBackbone(front=None, tail=classifier.tail, shape=(3, 64, 64), n_stats=0)
    freeze_depthwise_filters(stages, is_shortened=True)
    found = settings_by_name(classifier, FinetuneConfig())
    assert set(found) == {key for key, value in classifier.named_parameters() if value.requires_grad}
    assert len(found) < len(list(classifier.parameters()))


def test_nothing_moves_before_a_rate_is_set() -> None:
    classifier = make_classifier("test_convnext")
    before = {key: value.detach().clone() for key, value in classifier.named_parameters()}
    optimizer = make_optimizer(classifier, FinetuneConfig(), 32)
    for value in classifier.parameters():
        value.grad = torch.ones_like(value)
    optimizer.step()
    for key, value in classifier.named_parameters():
        assert torch.equal(value, before[key])


SCHEDULES = [(1, 0.1), (3, 0.5), (10, 0.1), (37, 0.25), (200, 0.1), (200, 0.0), (1, 0.0)]


@pytest.mark.parametrize(("n_steps", "warmup_frac"), SCHEDULES)
def test_rates_rise_once_then_fall_to_almost_nothing(n_steps: int, warmup_frac: float) -> None:
    factors = np.array([lr_factor(step, n_steps, warmup_frac) for step in range(n_steps)])
    assert ((factors > 0) & (factors <= 1)).all()
    n_warmup = round(warmup_frac * n_steps)
    assert (np.diff(factors[n_warmup:]) < 0).all()
    if warmup_frac <= 0.25:
        assert (np.diff(factors[:n_warmup]) > 0).all()
    if n_steps >= 10:
        assert factors[-1] < 0.04
    assert factors.max() == 1


@pytest.mark.parametrize("n_steps", [1, 7, 100])
def test_without_warm_up_the_rate_is_half_a_cosine_from_its_peak(n_steps: int) -> None:
    steps = np.arange(n_steps)
    found = [lr_factor(int(step), n_steps, 0.0) for step in steps]
    np.testing.assert_allclose(found, np.cos(np.pi / 2 * steps / n_steps) ** 2, atol=1e-12)
    assert found[0] == 1


def test_the_rise_is_linear_and_starts_above_nothing() -> None:
    n_steps = 10_000  # so that the cosine is still near 1
    found = [lr_factor(step, n_steps, 0.01) for step in range(100)]
    np.testing.assert_allclose(found, np.arange(1, 101) / 100, atol=1e-3)


def draw_layer(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(5, 3)


def values_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.named_parameters()}


def test_an_average_starts_as_the_weights() -> None:
    layer = draw_layer()
    averaged = AveragedWeights(layer, ["weight", "bias"], 10)
    assert all(torch.equal(averaged.values[name], value) for name, value in values_of(layer).items())
    with torch.no_grad():
        layer.weight.zero_()
    assert averaged.values["weight"].any()  # it is a copy


def test_two_swaps_change_nothing_and_one_exchanges() -> None:
    layer = draw_layer()
    averaged = AveragedWeights(layer, ["weight", "bias"], 10)
    with torch.no_grad():
        layer.weight.add_(1)
    live, mean = values_of(layer), {name: value.clone() for name, value in averaged.values.items()}
    averaged.swap()
    for name, value in layer.named_parameters():
        assert torch.equal(value, mean[name])
        assert torch.equal(averaged.values[name], live[name])
    averaged.swap()
    for name, value in layer.named_parameters():
        assert torch.equal(value, live[name])
        assert torch.equal(averaged.values[name], mean[name])


def test_an_average_converges_to_a_constant() -> None:
    layer = draw_layer()
    averaged = AveragedWeights(layer, ["weight", "bias"], 20)
    goal = draw_layer(1)
    layer.load_state_dict(goal.state_dict())
    for step in range(300):
        averaged.update(step)
    for name, value in goal.named_parameters():
        torch.testing.assert_close(averaged.values[name], value.detach(), atol=1e-5, rtol=0)


def test_names_that_are_not_given_are_left_alone() -> None:
    layer = draw_layer()
    averaged = AveragedWeights(layer, ["bias"], 5)
    assert list(averaged.values) == ["bias"]
    with torch.no_grad():
        layer.weight.add_(1)
        layer.bias.add_(1)
    live = values_of(layer)
    averaged.swap()
    assert torch.equal(layer.weight, live["weight"])
    assert not torch.equal(layer.bias, live["bias"])


def apply_plan(horizon: float, values: list[float]) -> list[float]:
    """What an average makes of a weight that takes these values, one a step."""
    layer = nn.Linear(1, 1, bias=False)
    averaged, found = AveragedWeights(layer, ["weight"], horizon), []
    for step, value in enumerate(values):
        with torch.no_grad():
            layer.weight.fill_(value)
        averaged.update(step)
        found.append(float(averaged.values["weight"]))
    return found


@pytest.mark.parametrize("horizon", [5, 40])
def test_after_a_jump_the_rest_decays_with_the_horizon(horizon: int) -> None:
    # long after the start: a jump from 0 to 1 is 1 - (1 - 1/h)^n taken in after n steps
    found = apply_plan(horizon, [0.0] * 500 + [1.0] * 100)[500:]
    expected = 1 - (1 - 1 / horizon) ** np.arange(1, 101)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("horizon", [0.0, 0.3, 1.0])
def test_a_horizon_of_one_step_is_the_last_weights(horizon: float) -> None:
    values = np.random.default_rng(0).normal(size=30).astype(np.float32).tolist()
    assert apply_plan(horizon, values) == values


@pytest.mark.parametrize("horizon", [20, 50, 99])
def test_an_average_within_its_horizon_is_the_plain_mean(horizon: int) -> None:
    values = np.random.default_rng(0).normal(size=horizon)
    expected = values.cumsum() / np.arange(1, horizon + 1)
    np.testing.assert_allclose(apply_plan(horizon, values.tolist()), expected, atol=1e-5)


def test_an_early_average_has_left_its_start_behind() -> None:
    # with a horizon of 1000 steps, ten are not enough to forget a start, were it not for the early rule
    assert apply_plan(1000, [1.0] * 10)[-1] == pytest.approx(1, abs=1e-4)

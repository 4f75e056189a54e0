"""Tests of the losses: equal to torch's cross entropy at neutral settings, and to the papers' formulas."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from pixelplay.config import Imbalance
from pixelplay.data.sampling import class_priors, class_weights, effective_prior, natural_offset
from pixelplay.errors import ConfigError
from pixelplay.training.losses import LossFunction, make_loss

COUNTS = np.array([60, 5, 20, 15])
LABELS = torch.from_numpy(np.repeat(np.arange(4), COUNTS))
WEIGHTS = torch.tensor(class_weights(COUNTS), dtype=torch.float32)
LOG_PRIORS = torch.tensor(np.log(class_priors(COUNTS)), dtype=torch.float32)
ALL: list[Imbalance] = [method for method in get_args(Imbalance) if method != "auto"]


def make(imbalance: Imbalance = "none", **settings: Any) -> LossFunction:
    return make_loss(
        imbalance, COUNTS, **{"logit_tau": 1.0, "focal_gamma": 2.0, "label_smoothing": 0.0, **settings}
    )


def draw_logits(scale: float = 2.0) -> Tensor:
    return torch.randn(len(LABELS), 4, generator=torch.Generator().manual_seed(0)) * scale


def hard() -> Tensor:
    return one_hot(LABELS, 4).float()


def mixed() -> Tensor:
    share = torch.rand(len(LABELS), 1, generator=torch.Generator().manual_seed(1))
    return share * hard() + (1 - share) * hard().flip(0)


@pytest.mark.parametrize(
    ("imbalance", "label_smoothing"), [("none", 0.0), ("sampler", 0.0), ("sampler", 0.1)]
)
def test_plain_losses_equal_torch_cross_entropy(imbalance: Imbalance, label_smoothing: float) -> None:
    loss, logits = make(imbalance, label_smoothing=label_smoothing), draw_logits()
    expected = cross_entropy(logits, LABELS, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss(logits, hard()), expected)
    expected = cross_entropy(logits, mixed(), label_smoothing=label_smoothing)
    torch.testing.assert_close(loss(logits, mixed()), expected)


def test_class_weights_equal_torch_divided_by_batch_size() -> None:
    loss, logits = make("class_weights"), draw_logits()
    expected = cross_entropy(logits, LABELS, weight=WEIGHTS, reduction="sum") / len(LABELS)
    torch.testing.assert_close(loss(logits, hard()), expected)
    torch.testing.assert_close(loss(logits, mixed()), cross_entropy(logits, mixed(), weight=WEIGHTS))


def test_class_weights_average_one() -> None:
    # with equal logits the loss of every image is ln K, and that of the batch ln K times the mean weight
    assert make("class_weights")(torch.zeros(100, 4), hard()) == pytest.approx(np.log(4))


def test_weighted_gradient_does_not_depend_on_the_batch() -> None:
    logits = draw_logits()[[70, 0, 64]].requires_grad_()
    gradients = []
    for rows in ([0, 1], [0, 2]):
        loss = make("class_weights")(logits[rows], hard()[[70, 0, 64]][rows])
        gradients.append(torch.autograd.grad(loss, logits)[0][0])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_class_weights_with_label_smoothing_equal_resampling() -> None:
    logits = draw_logits()
    times = torch.tensor([1, 12, 3, 4])  # 60 of each class
    often = times[LABELS]
    resampled = make("sampler", label_smoothing=0.2)(
        logits.repeat_interleave(often, 0), hard().repeat_interleave(often, 0)
    )
    torch.testing.assert_close(make("class_weights", label_smoothing=0.2)(logits, hard()), resampled)


@pytest.mark.parametrize("targets", [hard(), mixed()], ids=["hard", "mixed"])
def test_balanced_softmax_adds_log_priors_to_logits(targets: Tensor) -> None:
    logits = draw_logits()
    expected = cross_entropy(logits + LOG_PRIORS, targets)
    torch.testing.assert_close(make("balanced_softmax")(logits, targets), expected)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_balanced_softmax_equals_logit_adjusted_at_tau_one(label_smoothing: float) -> None:
    logits = draw_logits()
    balanced = make("balanced_softmax", logit_tau=0.4, label_smoothing=label_smoothing)
    adjusted = make("logit_adjusted", logit_tau=1.0, label_smoothing=label_smoothing)
    assert balanced(logits, mixed()) == adjusted(logits, mixed())


def test_logit_adjusted_at_tau_zero_equals_cross_entropy() -> None:
    logits = draw_logits()
    torch.testing.assert_close(
        make("logit_adjusted", logit_tau=0.0)(logits, hard()), cross_entropy(logits, LABELS)
    )


@pytest.mark.parametrize(
    ("imbalance", "label_smoothing"),
    [
        ("none", 0.0),
        ("none", 0.1),
        ("class_weights", 0.0),
        ("class_weights", 0.1),
        ("balanced_softmax", 0.0),
        ("balanced_softmax", 0.1),
        ("logit_adjusted", 0.1),
    ],
)
def test_best_constant_logits_have_natural_priors(imbalance: Imbalance, label_smoothing: float) -> None:
    # so natural_offset corrects exactly for the loss, with and without label smoothing
    offset = torch.tensor(natural_offset(COUNTS, imbalance, None, 0.6), dtype=torch.float32)
    constant = (LOG_PRIORS - offset).requires_grad_()
    loss = make(imbalance, logit_tau=0.6, label_smoothing=label_smoothing)
    (gradient,) = torch.autograd.grad(loss(constant.expand(100, 4), hard()), constant)
    torch.testing.assert_close(gradient, torch.zeros(4), atol=1e-6, rtol=0)


def test_label_smoothing_with_sampler_keeps_resampled_priors() -> None:
    balanced = torch.arange(4).repeat(5)
    constant = torch.tensor(np.log(effective_prior(COUNTS, "sampler", None)), dtype=torch.float32)
    constant.requires_grad_()
    loss = make("sampler", label_smoothing=0.3)(constant.expand(20, 4), one_hot(balanced, 4))
    torch.testing.assert_close(torch.autograd.grad(loss, constant)[0], torch.zeros(4), atol=1e-7, rtol=0)


def test_label_smoothing_with_oversampling_keeps_oversampled_priors() -> None:
    raised = torch.tensor(np.repeat(np.arange(4), np.maximum(COUNTS, 20)))
    constant = torch.tensor(np.log(effective_prior(COUNTS, "none", 20)), dtype=torch.float32)
    constant.requires_grad_()
    loss = make("none", label_smoothing=0.3, oversample_to=20)
    mean = loss(constant.expand(len(raised), 4), one_hot(raised, 4))
    torch.testing.assert_close(torch.autograd.grad(mean, constant)[0], torch.zeros(4), atol=1e-7, rtol=0)


def test_focal_at_gamma_zero_equals_cross_entropy() -> None:
    logits = draw_logits().requires_grad_()
    found, expected = make("focal", focal_gamma=0.0)(logits, hard()), cross_entropy(logits, LABELS)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0]
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_equals_the_formula(gamma: float) -> None:
    logits = draw_logits()
    p = logits.double().softmax(1)[torch.arange(100), LABELS]
    expected = -((1 - p) ** gamma * p.log()).mean()
    torch.testing.assert_close(make("focal", focal_gamma=gamma)(logits, hard()).double(), expected)


def test_focal_rejects_mixed_labels() -> None:
    with pytest.raises(ConfigError, match=r"--imbalance focal .*mixup.*cutmix.*label_smoothing"):
        make("focal")(draw_logits(), mixed())


def test_focal_rejects_label_smoothing() -> None:
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1 .*--imbalance focal"):
        make("focal", label_smoothing=0.1)


@pytest.mark.parametrize("imbalance", ALL)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("extreme", [0.0, 100.0, 1e4, 1e30])
def test_gradients_are_finite_at_extreme_logits(imbalance: Imbalance, gamma: float, extreme: float) -> None:
    logits = torch.tensor([[extreme, -extreme, 0, 0], [-extreme, extreme, 0, 0]]).requires_grad_()
    loss = make(imbalance, focal_gamma=gamma)(logits, one_hot(torch.tensor([0, 0]), 4))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("imbalance", ALL)
def test_loss_is_proportional_to_image_weight(imbalance: Imbalance, label_smoothing: float) -> None:
    loss = make(imbalance, label_smoothing=0.0 if imbalance == "focal" else label_smoothing)
    logits, weights = draw_logits(), torch.linspace(0.5, 2, len(LABELS))
    each = [loss(logits[i : i + 1], hard()[i : i + 1]) for i in range(len(LABELS))]
    expected = (torch.stack(each) * weights).mean()
    torch.testing.assert_close(loss(logits, hard() * weights[:, None]), expected)


@pytest.mark.parametrize("imbalance", ALL)
def test_half_precision_is_computed_in_float32(imbalance: Imbalance) -> None:
    logits = draw_logits().bfloat16()
    found = make(imbalance)(logits, hard().bfloat16())
    assert found.dtype == torch.float32
    assert found.shape == ()
    torch.testing.assert_close(found, make(imbalance)(logits.float(), hard()))

"""A step that is shared out among cores is the step of one core."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import shared_backbone
from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier, TrainedLinear, TrainedMlp
from pixelplay.model.features import Device
from pixelplay.model.tail import cut_backbone
from pixelplay.training.cores import forward_for_training

FP32 = Device(name="cpu", precision="fp32")
N_CLASSES = 3


@pytest.fixture(autouse=True)
def _four_threads() -> Iterator[None]:
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(1)


def make_classifier(head: str = "linear") -> tuple[Classifier, Tensor, Tensor]:
    """A tail of two stages, and a batch of 21 maps and moments for it."""
    torch.manual_seed(0)
    halves = cut_backbone(shared_backbone("test_convnext"), 2, 64)
    maps, moments = torch.randn(21, *halves.shape), torch.randn(21, halves.n_moments)
    n_features = halves.tail(maps[:1], moments[:1]).shape[1]
    linear = TrainedLinear(
        np.zeros(n_features, np.float32), np.ones(n_features, np.float32), N_CLASSES, start=None, dropout=0.0
    )
    torch.nn.init.normal_(linear.linear.weight)
    mlp = TrainedMlp(n_features, N_CLASSES, dropout=0.0)
    classifier = Classifier(halves.tail, linear if head == "linear" else mlp)
    classifier.train()
    return classifier, maps, moments


def gradients(classifier: Classifier) -> list[Tensor]:
    found = [value.grad.clone() for value in classifier.parameters() if value.grad is not None]
    classifier.zero_grad()
    return found


def test_logits_and_gradients_are_those_of_the_classifier() -> None:
    classifier, maps, moments = make_classifier()
    weights = torch.randn(21, N_CLASSES)
    found = []
    with forward_for_training(classifier, FP32, FinetuneConfig(), 21) as forward:
        assert forward is not classifier
        for run in (classifier, forward, forward):
            logits = run(maps, moments)
            (logits * weights).sum().backward()
            found.append((logits.detach(), gradients(classifier)))
    (logits, expected), *shared = found
    assert len(expected) > 10
    for other, values in shared:
        torch.testing.assert_close(other, logits)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(shared[0][0], shared[1][0])
    assert all(torch.equal(a, b) for a, b in zip(shared[0][1], shared[1][1], strict=True))


def test_gradients_of_several_batches_add_up() -> None:
    classifier, maps, moments = make_classifier()
    with forward_for_training(classifier, FP32, FinetuneConfig(), 21) as forward:
        forward(maps, moments).sum().backward()
        once = gradients(classifier)
        for _ in range(2):
            forward(maps, moments).sum().backward()
        twice = gradients(classifier)
    torch.testing.assert_close(twice, [2 * value for value in once])


def test_what_is_frozen_gets_no_gradient() -> None:
    classifier, maps, moments = make_classifier()
    frozen = next(classifier.tail.parameters())
    frozen.requires_grad_(False)
    with forward_for_training(classifier, FP32, FinetuneConfig(), 21) as forward:
        forward(maps, moments).sum().backward()
    assert frozen.grad is None
    assert classifier.head.linear.weight.grad is not None


@pytest.mark.parametrize(
    ("head", "change", "batch_size"),
    [
        ("mlp", {}, 32),  # its batch norm looks at the whole batch
        ("linear", {"dropout": 0.5}, 32),
        ("linear", {"drop_path": 0.1}, 32),
        ("linear", {}, 15),  # too few to share
    ],
)
def test_what_cannot_be_shared_is_not(head: str, change: dict[str, float], batch_size: int) -> None:
    classifier, _, _ = make_classifier(head)
    with forward_for_training(classifier, FP32, replace(FinetuneConfig(), **change), batch_size) as forward:
        assert forward is classifier


def test_threads_are_left_as_they_were() -> None:
    classifier, maps, moments = make_classifier()
    with forward_for_training(classifier, FP32, FinetuneConfig(), 21) as forward:
        forward(maps, moments)
    assert torch.get_num_threads() == 4


def test_an_error_in_a_share_comes_out() -> None:
    classifier, maps, _ = make_classifier()
    with (
        forward_for_training(classifier, FP32, FinetuneConfig(), 21) as forward,
        pytest.raises(RuntimeError),
    ):
        forward(maps, torch.randn(21, 999))

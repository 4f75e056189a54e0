"""Shards of a batch train like the whole batch."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from networks import shared_backbone
from pixelplay.model.backbone import Backbone, load_backbone
from pixelplay.model.classifier import Classifier, TrainableLinearHead, TrainableMlpHead
from pixelplay.model.device import Device
from pixelplay.model.split_backbone import split_backbone
from pixelplay.training.cpu_parallel import parallel_forward

FP32 = Device(name="cpu", precision="fp32")
N_CLASSES = 3
pytestmark = pytest.mark.usefixtures("four_threads")


def make_head(n_features: int, dropout: float = 0.0) -> TrainableLinearHead:
    mean, scale = np.zeros(n_features, np.float32), np.ones(n_features, np.float32)
    head = TrainableLinearHead(mean, scale, N_CLASSES, start=None, dropout=dropout)
    torch.nn.init.normal_(head.linear.weight)
    return head


def make_classifier(
    head: str = "linear", *, dropout: float = 0.0, drop_path: float = 0.0
) -> tuple[Classifier, Tensor, Tensor]:
    """Create a classifier of two trainable stages, and a batch of 21 inputs for it."""
    torch.manual_seed(0)
    frozen, trainable = split_backbone(shared_backbone("test_convnext"), 2, (64, 64))
    assert frozen is not None
    maps, stats = torch.randn(21, *frozen.map_shape), torch.randn(21, frozen.n_stats)
    n_features = trainable(maps[:1], stats[:1]).shape[1]
    mlp = TrainableMlpHead(n_features, N_CLASSES, dropout=0.0)
    classifier = Classifier(
        trainable, mlp if head == "mlp" else make_head(n_features, dropout), drop_path=drop_path
    )
    classifier.train()
    return classifier, maps, stats


def gradients(classifier: Classifier) -> list[Tensor]:
    found = [value.grad.clone() for value in classifier.parameters() if value.grad is not None]
    classifier.zero_grad()
    return found


def test_shards_give_the_logits_and_gradients_of_the_whole_batch() -> None:
    classifier, maps, stats = make_classifier()
    weights = torch.randn(21, N_CLASSES)
    found = []
    with parallel_forward(classifier, FP32, 21) as forward:
        assert forward is not classifier
        for run in (classifier, forward, forward):
            logits = run(maps, stats)
            (logits * weights).sum().backward()
            found.append((logits.detach(), gradients(classifier)))
    (logits, expected), *sharded = found
    assert len(expected) > 10
    for other, values in sharded:
        torch.testing.assert_close(other, logits)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(sharded[0][0], sharded[1][0])
    assert all(torch.equal(a, b) for a, b in zip(sharded[0][1], sharded[1][1], strict=True))


def test_shards_accumulate_the_gradients_of_several_batches() -> None:
    classifier, maps, stats = make_classifier()
    with parallel_forward(classifier, FP32, 21) as forward:
        forward(maps, stats).sum().backward()
        once = gradients(classifier)
        for _ in range(2):
            forward(maps, stats).sum().backward()
        twice = gradients(classifier)
    torch.testing.assert_close(twice, [2 * value for value in once])


def test_shards_give_frozen_parameters_no_gradient() -> None:
    classifier, maps, stats = make_classifier()
    frozen = next(classifier.stages.parameters())
    frozen.requires_grad_(False)
    with parallel_forward(classifier, FP32, 21) as forward:
        forward(maps, stats).sum().backward()
    assert frozen.grad is None
    assert classifier.head.linear.weight.grad is not None


def test_shards_give_unused_parameters_no_gradient() -> None:
    classifier, maps, stats = make_classifier()
    classifier.extra = torch.nn.Parameter(torch.ones(2))
    with parallel_forward(classifier, FP32, 21) as forward:
        forward(maps, stats).sum().backward()
    assert classifier.extra.grad is None


def test_shards_of_bf16_equal_the_whole_batch() -> None:
    classifier, maps, stats = make_classifier()
    device = Device(name="cpu", precision="bf16")
    with device.autocast():
        logits = classifier(maps, stats)
    logits.sum().backward()
    expected = gradients(classifier)
    with parallel_forward(classifier, device, 21) as forward:
        with device.autocast():
            sharded = forward(maps, stats)
        sharded.sum().backward()
    torch.testing.assert_close(sharded, logits, rtol=0.05, atol=0.05)
    torch.testing.assert_close(gradients(classifier), expected, rtol=0.1, atol=0.1)


def test_default_backbone_is_split_into_shards() -> None:
    """It has no dropout; otherwise training would be slower without any visible reason."""
    _, trainable = split_backbone(load_backbone("lite0", None, offline=True).backbone, 2, (64, 64))
    with parallel_forward(Classifier(trainable, make_head(10)), FP32, 32) as forward:
        assert not isinstance(forward, Classifier)


@pytest.mark.parametrize("n_images", [1, 2, 5])
def test_shards_of_a_small_batch_equal_the_whole_batch(n_images: int) -> None:
    classifier, maps, stats = make_classifier()
    with parallel_forward(classifier, FP32, 32) as forward:
        found = forward(maps[:n_images], stats[:n_images])
    torch.testing.assert_close(found, classifier(maps[:n_images], stats[:n_images]))


@pytest.mark.parametrize(
    ("head", "dropout", "drop_path", "batch_size"),
    [
        ("mlp", 0.0, 0.0, 32),  # its batch norm depends on the whole batch
        ("linear", 0.5, 0.0, 32),
        ("linear", 0.0, 0.1, 32),
        ("linear", 0.0, 0.0, 15),  # too small to split
    ],
)
def test_no_shards_with_batch_norm_dropout_drop_path_or_a_small_batch(
    head: str, dropout: float, drop_path: float, batch_size: int
) -> None:
    classifier, _, _ = make_classifier(head, dropout=dropout, drop_path=drop_path)
    with parallel_forward(classifier, FP32, batch_size) as forward:
        assert forward is classifier


def test_no_shards_with_stochastic_depth_in_the_backbone() -> None:
    network = SwinTransformer(
        img_size=64,
        embed_dim=12,
        depths=(1, 2),
        num_heads=(2, 2),
        window_size=4,
        num_classes=0,
        drop_path_rate=0.1,
    )
    _, trainable = split_backbone(Backbone("swin", network), None, (64, 64))
    n_features = trainable(torch.zeros(1, 3, 64, 64), torch.zeros(1, 0)).shape[1]
    classifier = Classifier(trainable, make_head(n_features))
    with parallel_forward(classifier, FP32, 32) as forward:
        assert forward is classifier


def test_shards_use_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, maps, stats = make_classifier()
    seen: list[int] = []
    tail = classifier.stages.forward

    def watch(maps: Tensor, stats: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return tail(maps, stats)

    monkeypatch.setattr(classifier.stages, "forward", watch)
    with parallel_forward(classifier, FP32, 21) as forward:  # 21 images make two shards
        forward(maps, stats)
    assert seen == [2, 2]


def test_an_error_in_a_shard_is_raised_and_restores_the_threads() -> None:
    classifier, maps, _ = make_classifier()
    with pytest.raises(RuntimeError), parallel_forward(classifier, FP32, 21) as forward:
        forward(maps, torch.randn(21, 999))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4

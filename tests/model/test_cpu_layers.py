"""Depthwise filters are frozen, and fast layers have equal outputs and gradients."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from networks import shared_backbone
from pixelplay.config import ComputeConfig
from pixelplay.model import fusion
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.device import resolve_device
from pixelplay.model.split_backbone import TrainableStages, split_backbone
from pixelplay.training.cpu_parallel import parallel_forward

K, SIZE = 4, 64
NETWORKS = {  # → number of trained stages; more layers amplify rounding
    "test_efficientnet": None,
    "test_convnext": None,
    "test_resnet": None,
    "test_byobnet": None,
    "test_nfnet": None,  # its convolutions standardise their weights
    "test_vit": None,
    "mobilenetv3_small_050": None,  # squeeze-and-excite, hard swish
    "tf_efficientnet_lite0": 2,
}


Inputs = tuple[Tensor, Tensor]


def make_classifier(
    name: str, n_trainable: int | None = None, *, fast: bool | None, size: int = SIZE
) -> tuple[Classifier, Inputs]:
    """Make a seeded classifier in training, frozen unless `fast` is None, and its inputs."""
    backbone = shared_backbone(name)
    size = 160 if name == "test_vit" else size
    frozen, trainable = split_backbone(backbone, n_trainable, (size, size))
    map_shape, n_stats = ((3, size, size), 0) if frozen is None else (frozen.map_shape, frozen.n_stats)
    if fast is not None:
        freeze_depthwise_filters(trainable, map_shape, n_stats, fast=fast)
    n = backbone.n_features
    head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), K, start=None, dropout=0)
    nn.init.normal_(head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    inputs = draw_inputs(map_shape, n_stats)
    return Classifier(trainable, head).train(), inputs


def draw_inputs(map_shape: tuple[int, int, int], n_stats: int, n: int = 4) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *map_shape, generator=generator), torch.zeros(n, n_stats)


def depthwise(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            yield name, layer


def compute_gradients(classifier: Classifier, inputs: Inputs) -> dict[str, Tensor]:
    """Compute logits and the gradients of trainable parameters."""
    logits = classifier(*inputs)
    cross_entropy(logits, torch.arange(len(logits)) % K).backward()
    grads = {name: value.grad for name, value in classifier.named_parameters() if value.grad is not None}
    return {"logits": logits.detach(), **grads}


def is_fast(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("name", "n_filters", "has_norms"), [("test_convnext", 9, False), ("test_efficientnet", 2, True)]
)
def test_depthwise_filters_and_scales_are_frozen_and_everything_else_trains(
    name: str, n_filters: int, has_norms: bool, fast: bool
) -> None:
    classifier, inputs = make_classifier(name, fast=fast)
    filters = [name for name, _ in depthwise(classifier)]
    assert len(filters) == n_filters
    scales = [name.replace("conv_dw", "bn2") for name in filters] if has_norms else []
    frozen = {f"{name}.weight" for name in (*filters, *scales)}
    before = {key: value.detach().clone() for key, value in classifier.named_parameters()}
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.01, weight_decay=0.1)
    grads = set(compute_gradients(classifier, inputs)) - {"logits"}
    optimizer.step()
    moved = {key for key, value in classifier.named_parameters() if not torch.equal(value, before[key])}
    assert grads == moved == set(before) - frozen


@pytest.mark.parametrize("size", [64, 60])  # 60: strided convolutions have inputs with odd sides
@pytest.mark.parametrize("name", list(NETWORKS))
def test_fast_layers_have_equal_logits_and_gradients(name: str, size: int) -> None:
    found = []
    for fast in (True, False):
        classifier, inputs = make_classifier(name, NETWORKS[name], fast=fast, size=size)
        found.append(compute_gradients(classifier, inputs))
    found, expected = found
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert (found[key] - value).norm() <= 1e-3 * value.norm() + 1e-7, key


def test_fast_layers_give_gradients_of_their_input() -> None:
    found = []
    for fast in (True, False):
        classifier, inputs = make_classifier("tf_efficientnet_lite0", 3, fast=fast, size=96)
        maps, stats = inputs
        maps.requires_grad_()
        assert maps.shape[1] > 3
        compute_gradients(classifier, (maps, stats))
        assert maps.grad is not None
        found.append(maps.grad / maps.grad.abs().max())
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=0)


def test_every_convolution_of_lite0_is_fast() -> None:
    classifier, _ = make_classifier("tf_efficientnet_lite0", 5, fast=True, size=224)
    convs = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in classifier.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(convs) == len(norms) > 30
    assert all(map(is_fast, [*convs, *norms]))


@pytest.mark.parametrize(
    ("name", "n_fast"),
    [
        ("test_efficientnet", 13),  # all but squeeze-and-excite
        ("test_convnext", 9),  # its depthwise filters
        ("test_resnet", 15),  # all
        ("test_byobnet", 14),  # all but attention
        ("test_nfnet", 0),
        ("test_vit", 0),
        ("mobilenetv3_small_050", 34),  # all but squeeze-and-excite
    ],
)
def test_supported_layers_are_fast(name: str, n_fast: int) -> None:
    classifier, _ = make_classifier(name, fast=True)
    convs = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(map(is_fast, convs)) == n_fast


def test_layers_with_odd_sides_are_fast() -> None:
    classifier, _ = make_classifier("tf_efficientnet_lite2", 5, fast=True, size=260)
    filters = [layer for _, layer in depthwise(classifier)]
    assert {layer.stride for layer in filters} == {(1, 1), (2, 2)}
    assert all(map(is_fast, filters))


def test_fast_layers_are_idempotent() -> None:
    classifier, inputs = make_classifier("test_efficientnet", fast=True)
    before = [is_fast(layer) for layer in classifier.modules()]
    expected = classifier(*inputs)
    freeze_depthwise_filters(classifier.stages, (3, SIZE, SIZE), 0, fast=True)
    assert [is_fast(layer) for layer in classifier.modules()] == before
    assert torch.equal(classifier(*inputs), expected)
    freeze_depthwise_filters(classifier.stages, (3, SIZE, SIZE), 0, fast=False)
    assert not any(map(is_fast, classifier.modules()))


def test_fast_false_keeps_forward_passes() -> None:
    classifier, _ = make_classifier("test_efficientnet", fast=False)
    assert not any(map(is_fast, classifier.modules()))


@torch.no_grad()
def test_fast_layers_compute_in_bf16() -> None:
    classifier, inputs = make_classifier("tf_efficientnet_lite0", 4, fast=True, size=96)
    exact, _ = make_classifier("tf_efficientnet_lite0", 4, fast=None, size=96)
    dtypes = set()
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(*inputs)
    assert dtypes == {torch.bfloat16}
    assert logits.dtype == torch.float32
    expected = exact(*inputs)
    scale = expected.abs().max()
    torch.testing.assert_close(logits / scale, expected / scale, atol=0.1, rtol=0)


@pytest.mark.parametrize("has_fused_convolution", [True, False])
def test_fast_bf16_gradients_are_close_to_fp32(
    has_fused_convolution: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_fused_convolution:
        monkeypatch.setattr(fusion, "_has_fused_convolution", lambda dtype: False)
    found = []
    for fast, is_bf16 in ((True, True), (None, False)):
        classifier, inputs = make_classifier("tf_efficientnet_lite0", 3, fast=fast, size=96)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            logits = classifier(*inputs)
        cross_entropy(logits, torch.arange(4) % K).backward()
        found.append({name: value.grad for name, value in classifier.named_parameters()})
    coarse, exact = found
    for name, grad in coarse.items():
        value = exact[name]
        if grad is not None and value is not None:
            cosine = (grad * value).sum() / (grad.norm() * value.norm())
            assert cosine > 0.9, name


def test_threads_share_fast_layers() -> None:
    device = resolve_device(ComputeConfig(precision="fp32"))
    found = []
    for batch_size in (8, 16):  # one and two shards
        classifier, inputs = make_classifier("tf_efficientnet_lite0", 2, fast=True, size=64)
        inputs = inputs[0].repeat(4, 1, 1, 1), inputs[1].repeat(4, 1)
        torch.set_num_threads(2)
        with parallel_forward(classifier, device, batch_size) as forward:
            assert (forward is classifier) == (batch_size == 8)
            logits = forward(*inputs)
            cross_entropy(logits, torch.arange(16) % K).backward()
        torch.set_num_threads(1)
        found.append([value.grad for value in classifier.parameters() if value.grad is not None])
    for one, two in zip(*found, strict=True):
        assert (one - two).norm() <= 1e-3 * one.norm() + 1e-7


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_biases_and_norms_without_weights_are_folded(bias: bool, affine: bool) -> None:
    stages = Normed(bias=bias, affine=affine)
    found = []
    for fast in (False, True):
        freeze_depthwise_filters(cast(TrainableStages, stages), (3, 8, 8), 0, fast=fast)
        stages.zero_grad()
        stages(torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.zeros(2, 0)).square().sum().backward()
        found.append([value.grad for value in stages.parameters()])
    assert is_fast(stages.conv)
    assert all(grad is not None for grad in found[0])
    for actual, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


class Normed(nn.Module):
    """A dense convolution and a plain batch norm."""

    def __init__(self, *, bias: bool, affine: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 5, 3, bias=bias), nn.BatchNorm2d(5, affine=affine)
        self.norm.running_mean, self.norm.running_var = torch.randn(5), torch.rand(5) + 0.5

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        return torch.cat([stats, self.norm(self.conv(maps)).flatten(1)], dim=1)


@pytest.mark.parametrize("is_dropping", [True, False])
def test_dropout_and_activation_of_a_norm_are_applied(is_dropping: bool) -> None:
    stages = Normed(bias=True, affine=True)
    stages.norm = BatchNormAct2d(5, act_layer=nn.ReLU, drop_layer=Halve if is_dropping else None)
    inputs = torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.zeros(2, 0)
    with torch.no_grad():
        expected = stages.eval()(*inputs)
        freeze_depthwise_filters(cast(TrainableStages, stages), (3, 8, 8), 0, fast=True)
        torch.testing.assert_close(stages(*inputs), expected)
    assert is_fast(stages.norm)


class Halve(nn.Module):
    """A layer in place of dropout with a visible effect."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps / 2 - 0.1


def test_weights_loaded_later_are_used() -> None:
    classifier, inputs = make_classifier("test_efficientnet", fast=True)
    reference, _ = make_classifier("test_efficientnet", fast=None)
    generator = torch.Generator().manual_seed(2)
    state = {
        key: value + 0.1 * torch.rand(value.shape, generator=generator)
        for key, value in reference.state_dict().items()
        if value.is_floating_point()
    }
    for each in (classifier, reference):
        each.load_state_dict(state, strict=False)
    with torch.no_grad():
        found, expected = classifier(*inputs), reference(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


class Twice(nn.Module):
    """Uses the output of a convolution twice, so that its norm cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5)
        nn.init.constant_(self.norm.bias, 3.0)

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        output = self.conv(maps)
        return torch.cat([stats, (self.norm(output) + 2 * output).mean((2, 3))], dim=1)


def test_layers_with_wrong_fast_outputs_keep_their_forward_pass() -> None:
    stages = Twice()
    inputs = torch.randn(2, 3, 8, 8), torch.zeros(2, 0)
    with torch.no_grad():
        expected = stages.eval()(*inputs)
        freeze_depthwise_filters(cast(TrainableStages, stages), (3, 8, 8), 0, fast=True)
        assert torch.equal(stages(*inputs), expected)
    assert not any(map(is_fast, stages.modules()))


class Filters(nn.Module):
    """One depthwise filter of any kind."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, groups=3, **settings)

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        features: Tensor = torch.cat([stats, self.conv(maps).flatten(1)], dim=1)
        return features


@pytest.mark.parametrize("size", [8, 9, 11])
@pytest.mark.parametrize(
    ("settings", "is_replaced"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, True),
        ({"kernel_size": 5, "stride": 3, "padding": 0}, True),
        ({"kernel_size": 4, "stride": 4, "padding": 2}, True),
        ({"kernel_size": 3, "padding": 3}, False),  # the gradient would need negative padding
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, False),
        ({"kernel_size": 3, "padding": "same"}, False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
        ({"kernel_size": 3, "padding": 1, "out_channels": 6}, False),
    ],
)
def test_gradients_of_depthwise_filters_of_every_kind(
    settings: dict[str, Any], is_replaced: bool, size: int
) -> None:
    torch.manual_seed(0)
    stages = Filters(**{"out_channels": 3, **settings})
    maps = torch.randn(2, 3, size, size)
    found = []
    for fast in (False, True):
        freeze_depthwise_filters(cast(TrainableStages, stages), (3, size, size), 0, fast=fast)
        images = maps.clone().requires_grad_()
        output = stages(images, torch.zeros(2, 0))
        (output * torch.arange(output.numel()).view_as(output).sin()).sum().backward()
        assert images.grad is not None
        found += [output.detach(), images.grad]
    assert is_fast(stages.conv) == is_replaced
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[3], found[1])

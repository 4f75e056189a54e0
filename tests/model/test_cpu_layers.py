"""What layers.py promises: filters and their scales stay, and the short way leads to the same."""

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
from pixelplay.model import fusion as activated
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.device import find_device
from pixelplay.model.split_backbone import SplitBackbone, TrainableStages, split_backbone
from pixelplay.training.cpu_parallel import parallel_forward

K, SIZE = 4, 64
NETWORKS = {  # and the last stages that are trained: more layers make more of last digits
    "test_efficientnet": None,
    "test_convnext": None,
    "test_resnet": None,
    "test_byobnet": None,
    "test_nfnet": None,  # its convolutions standardise their weights
    "test_vit": None,
    "mobilenetv3_small_050": None,  # squeeze-and-excite, hard swish
    "tf_efficientnet_lite0": 2,
}


def make_classifier(
    name: str, n_tail: int | None = None, *, is_shortened: bool | None, size: int = SIZE
) -> tuple[Classifier, SplitBackbone]:
    """A seeded classifier in training; with `is_shortened` its spatial filters are frozen."""
    backbone = shared_backbone(name)
    size = 160 if name == "test_vit" else size
    stages = split_backbone(backbone, n_tail, size)
    if is_shortened is not None:
        freeze_depthwise_filters(stages, is_shortened=is_shortened)
    n = backbone.n_features
    head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), K, start=None, dropout=0)
    nn.init.normal_(head.linear.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return Classifier(stages.tail, head).train(), stages


def draw_inputs(stages: SplitBackbone, n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *stages.shape, generator=generator), torch.zeros(n, stages.n_stats)


def depthwise(module: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1:
            yield name, layer


def learn(classifier: Classifier, inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradients of what is trained."""
    logits = classifier(*inputs)
    cross_entropy(logits, torch.arange(len(logits)) % K).backward()
    grads = {name: value.grad for name, value in classifier.named_parameters() if value.grad is not None}
    return {"logits": logits.detach(), **grads}


def is_short(layer: nn.Module) -> bool:
    return "forward" in vars(layer)


@pytest.mark.parametrize("is_shortened", [True, False])
@pytest.mark.parametrize(
    ("name", "n_filters", "has_norms"), [("test_convnext", 9, False), ("test_efficientnet", 2, True)]
)
def test_filters_and_their_scales_stay_and_everything_else_moves(
    name: str, n_filters: int, has_norms: bool, is_shortened: bool
) -> None:
    classifier, stages = make_classifier(name, is_shortened=is_shortened)
    filters = [name for name, _ in depthwise(classifier)]
    assert len(filters) == n_filters
    scales = [name.replace("conv_dw", "bn2") for name in filters] if has_norms else []
    frozen = {f"{name}.weight" for name in (*filters, *scales)}
    before = {key: value.detach().clone() for key, value in classifier.named_parameters()}
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=0.01, weight_decay=0.1)
    grads = set(learn(classifier, draw_inputs(stages))) - {"logits"}
    optimizer.step()
    moved = {key for key, value in classifier.named_parameters() if not torch.equal(value, before[key])}
    assert grads == moved == set(before) - frozen


@pytest.mark.parametrize("size", [64, 60])  # 60: strided convolutions meet odd sides too
@pytest.mark.parametrize("name", list(NETWORKS))
def test_logits_and_gradients_are_those_of_the_long_way(name: str, size: int) -> None:
    found = []
    for is_shortened in (True, False):
        classifier, stages = make_classifier(name, NETWORKS[name], is_shortened=is_shortened, size=size)
        found.append(learn(classifier, draw_inputs(stages)))
    short, long = found
    assert list(short) == list(long)
    for key, value in long.items():
        assert (short[key] - value).norm() <= 1e-3 * value.norm() + 1e-7, key


def test_gradients_arrive_in_maps_that_want_them_and_at_a_cut() -> None:
    found = []
    for is_shortened in (True, False):
        classifier, stages = make_classifier("tf_efficientnet_lite0", 3, is_shortened=is_shortened, size=96)
        maps, stats = draw_inputs(stages)
        maps.requires_grad_()
        assert maps.shape[1] > 3
        learn(classifier, (maps, stats))
        assert maps.grad is not None
        found.append(maps.grad / maps.grad.abs().max())
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=0)


def test_every_convolution_of_the_embedded_network_takes_the_short_way() -> None:
    classifier, _ = make_classifier("tf_efficientnet_lite0", 5, is_shortened=True, size=224)
    convs = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in classifier.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(convs) == len(norms) > 30
    assert all(map(is_short, [*convs, *norms]))


@pytest.mark.parametrize(
    ("name", "n_short"),
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
def test_what_the_short_way_is_for_takes_it(name: str, n_short: int) -> None:
    classifier, _ = make_classifier(name, is_shortened=True)
    convs = [layer for layer in classifier.modules() if isinstance(layer, nn.Conv2d)]
    assert sum(map(is_short, convs)) == n_short


def test_odd_sides_take_the_short_way_too() -> None:
    classifier, _ = make_classifier("tf_efficientnet_lite2", 5, is_shortened=True, size=260)
    filters = [layer for _, layer in depthwise(classifier)]
    assert {layer.stride for layer in filters} == {(1, 1), (2, 2)}
    assert all(map(is_short, filters))


def test_shortening_twice_is_shortening_once() -> None:
    classifier, stages = make_classifier("test_efficientnet", is_shortened=True)
    short = [is_short(layer) for layer in classifier.modules()]
    inputs = draw_inputs(stages)
    expected = classifier(*inputs)
    freeze_depthwise_filters(stages, is_shortened=True)
    assert [is_short(layer) for layer in classifier.modules()] == short
    assert torch.equal(classifier(*inputs), expected)
    freeze_depthwise_filters(stages, is_shortened=False)
    assert not any(map(is_short, classifier.modules()))


def test_a_gpu_goes_the_long_way() -> None:
    classifier, _ = make_classifier("test_efficientnet", is_shortened=False)
    assert not any(map(is_short, classifier.modules()))


@torch.no_grad()
def test_in_bf16_layers_compute_in_bf16_and_logits_agree() -> None:
    classifier, stages = make_classifier("tf_efficientnet_lite0", 4, is_shortened=True, size=96)
    exact, _ = make_classifier("tf_efficientnet_lite0", 4, is_shortened=None, size=96)
    inputs = draw_inputs(stages)
    kinds = set()
    for layer in classifier.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, given, made: kinds.add(made.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = classifier(*inputs)
    assert kinds == {torch.bfloat16}
    assert logits.dtype == torch.float32
    expected = exact(*inputs)
    scale = expected.abs().max()
    torch.testing.assert_close(logits / scale, expected / scale, atol=0.1, rtol=0)


@pytest.mark.parametrize("has_one_pass", [True, False])
def test_in_bf16_gradients_are_nearly_those_of_fp32(
    has_one_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_one_pass:
        monkeypatch.setattr(activated, "_has_one_pass", lambda dtype: False)
    found = []
    for is_shortened, is_bf16 in ((True, True), (None, False)):
        classifier, stages = make_classifier("tf_efficientnet_lite0", 3, is_shortened=is_shortened, size=96)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            logits = classifier(*draw_inputs(stages))
        cross_entropy(logits, torch.arange(4) % K).backward()
        found.append({name: value.grad for name, value in classifier.named_parameters()})
    short, exact = found
    for name, grad in short.items():
        value = exact[name]
        if grad is not None and value is not None:
            cosine = (grad * value).sum() / (grad.norm() * value.norm())
            assert cosine > 0.9, name


def test_threads_share_short_layers() -> None:
    device = find_device(ComputeConfig(precision="fp32"))
    found = []
    for batch_size in (8, 16):  # one share, and two
        classifier, stages = make_classifier("tf_efficientnet_lite0", 2, is_shortened=True, size=64)
        inputs = draw_inputs(stages, 16)
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
def test_biases_and_norms_without_weights_are_folded_too(bias: bool, affine: bool) -> None:
    tail = Normed(bias=bias, affine=affine)
    found = []
    for is_shortened in (False, True):
        stages = SplitBackbone(front=None, tail=cast(TrainableStages, tail), shape=(3, 8, 8), n_stats=0)
        freeze_depthwise_filters(stages, is_shortened=is_shortened)
        tail.zero_grad()
        tail(torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.zeros(2, 0)).square().sum().backward()
        found.append([value.grad for value in tail.parameters()])
    assert is_short(tail.conv)
    assert all(grad is not None for grad in found[0])
    for short, long in zip(*reversed(found), strict=True):
        torch.testing.assert_close(short, long, atol=1e-3, rtol=1e-4)


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
def test_what_a_norm_drops_is_dropped_and_what_it_activates_activated(is_dropping: bool) -> None:
    tail = Normed(bias=True, affine=True)
    tail.norm = BatchNormAct2d(5, act_layer=nn.ReLU, drop_layer=Halve if is_dropping else None)
    stages = SplitBackbone(front=None, tail=cast(TrainableStages, tail), shape=(3, 8, 8), n_stats=0)
    inputs = torch.linspace(-1, 1, 384).view(2, 3, 8, 8), torch.zeros(2, 0)
    with torch.no_grad():
        expected = tail.eval()(*inputs)
        freeze_depthwise_filters(stages, is_shortened=True)
        torch.testing.assert_close(tail(*inputs), expected)
    assert is_short(tail.norm)


class Halve(nn.Module):
    """A layer in the place of dropout whose doing shows."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps / 2 - 0.1


def test_weights_that_are_loaded_later_count() -> None:
    classifier, stages = make_classifier("test_efficientnet", is_shortened=True)
    long, _ = make_classifier("test_efficientnet", is_shortened=None)
    generator = torch.Generator().manual_seed(2)
    state = {
        key: value + 0.1 * torch.rand(value.shape, generator=generator)
        for key, value in long.state_dict().items()
        if value.is_floating_point()
    }
    for each in (classifier, long):
        each.load_state_dict(state, strict=False)
    inputs = draw_inputs(stages)
    with torch.no_grad():
        found, expected = classifier(*inputs), long(*inputs)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


class Twice(nn.Module):
    """Uses what a convolution makes in front of its norm too, so that the two are not one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(5)
        nn.init.constant_(self.norm.bias, 3.0)

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        made = self.conv(maps)
        return torch.cat([stats, (self.norm(made) + 2 * made).mean((2, 3))], dim=1)


def test_layers_whose_short_way_leads_elsewhere_keep_their_own() -> None:
    tail = Twice()
    inputs = torch.randn(2, 3, 8, 8), torch.zeros(2, 0)
    with torch.no_grad():
        expected = tail.eval()(*inputs)
        freeze_depthwise_filters(
            SplitBackbone(front=None, tail=cast(TrainableStages, tail), shape=(3, 8, 8), n_stats=0),
            is_shortened=True,
        )
        assert torch.equal(tail(*inputs), expected)
    assert not any(map(is_short, tail.modules()))


class Filters(nn.Module):
    """One depthwise filter of any kind."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, groups=3, **settings)

    def forward(self, maps: Tensor, stats: Tensor) -> Tensor:
        made: Tensor = torch.cat([stats, self.conv(maps).flatten(1)], dim=1)
        return made


@pytest.mark.parametrize("size", [8, 9, 11])
@pytest.mark.parametrize(
    ("settings", "is_shorter"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, True),
        ({"kernel_size": 5, "stride": 3, "padding": 0}, True),
        ({"kernel_size": 4, "stride": 4, "padding": 2}, True),
        ({"kernel_size": 3, "padding": 3}, False),  # a slope of no padding's
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
        ({"kernel_size": (3, 5), "padding": (1, 2)}, False),
        ({"kernel_size": 3, "padding": "same"}, False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
        ({"kernel_size": 3, "padding": 1, "out_channels": 6}, False),
    ],
)
def test_slopes_behind_filters_of_every_kind(settings: dict[str, Any], is_shorter: bool, size: int) -> None:
    torch.manual_seed(0)
    tail = Filters(**{"out_channels": 3, **settings})
    maps = torch.randn(2, 3, size, size)
    found = []
    for is_shortened in (False, True):
        freeze_depthwise_filters(
            SplitBackbone(front=None, tail=cast(TrainableStages, tail), shape=(3, size, size), n_stats=0),
            is_shortened=is_shortened,
        )
        given = maps.clone().requires_grad_()
        made = tail(given, torch.zeros(2, 0))
        (made * torch.arange(made.numel()).view_as(made).sin()).sum().backward()
        assert given.grad is not None
        found += [made.detach(), given.grad]
    assert is_short(tail.conv) == is_shorter
    torch.testing.assert_close(found[2], found[0])
    torch.testing.assert_close(found[3], found[1])

import copy

import pytest
import torch
from torch import Tensor, nn

from pixelplay.model import fusion
from pixelplay.model.backbone import Backbone, create_network
from pixelplay.model.fusion import ActivatedConv2d, convolve, fuse_for_inference, is_fusible


def random_backbone(name: str) -> Backbone:
    """Draw a network with nontrivial batch norms."""
    generator = torch.Generator().manual_seed(0)
    network = create_network(name)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            n = layer.num_features
            layer.running_mean = torch.randn(n, generator=generator) * 0.3
            layer.running_var = torch.rand(n, generator=generator) + 0.5
            layer.weight.data = torch.rand(n, generator=generator) + 0.5
            layer.bias.data = torch.randn(n, generator=generator) * 0.3
    return Backbone(name, network).eval()


@pytest.mark.parametrize("name", ["test_efficientnet", "test_resnet", "tf_efficientnet_lite0"])
def test_fused_backbone_equals_unfused(name: str) -> None:
    torch.manual_seed(0)
    backbone = random_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(4, *backbone.network.pretrained_cfg["input_size"])
    with torch.inference_mode():
        expected = backbone(images)
        fused = fuse_for_inference(backbone, images.shape[-2:])
        found = fused(images)
    assert fused is not backbone
    assert count(fused, nn.BatchNorm2d) < count(backbone, nn.BatchNorm2d)
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)
    after = backbone.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def count(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(layer, kind) for layer in module.modules())


def test_fused_lite0_has_no_batch_norm_and_no_same_padding() -> None:
    from timm.layers.conv2d_same import Conv2dSame

    backbone = random_backbone("tf_efficientnet_lite0")
    fused = fuse_for_inference(backbone, (224, 224))
    assert count(backbone, nn.BatchNorm2d) == 49
    assert count(backbone, Conv2dSame) == 5
    assert count(fused, nn.BatchNorm2d) == count(fused, Conv2dSame) == 0


def test_fused_network_without_batch_norm_is_equal() -> None:
    torch.manual_seed(0)
    backbone = random_backbone("test_convnext")
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(fuse_for_inference(backbone, (160, 160))(images), backbone(images))


class Trap(nn.Module):
    """Changes the convolution's output in place before the batch norm, so that folding is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.pretrained_cfg = {"input_size": (3, 16, 16)}
        self.feature_info = [{"module": "norm"}]

    def forward_intermediates(self, images: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        maps = self.norm(self.conv(images).relu_())
        return maps, [maps]

    def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
        return maps.mean((2, 3))


def test_wrong_fusion_falls_back_to_a_plain_copy() -> None:
    torch.manual_seed(0)
    backbone = Backbone("trap", Trap()).eval()
    backbone.network.norm.running_mean = torch.tensor([1.0, -1.0, 0.5, 0.0])
    before = copy.deepcopy(backbone.state_dict())
    fused = fuse_for_inference(backbone, (16, 16))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fused(images), backbone(images))
    assert fused is not backbone  # it may be moved to another device
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_fused_lite0_fuses_every_activation() -> None:
    fused = fuse_for_inference(random_backbone("tf_efficientnet_lite0"), (224, 224))
    assert count(fused, ActivatedConv2d) == count(fused, nn.ReLU6) == 33


ACTIVATIONS = [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish()]


@pytest.fixture(params=[True, False])
def has_fused_convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Test with and without oneDNN's fused convolution."""
    if not request.param:
        monkeypatch.setattr(fusion, "_has_fused_convolution", lambda dtype: False)
    return bool(request.param)


def make_conv(kernel: int, stride: int, groups: int, *, bias: bool) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, kernel, stride, kernel // 2, groups=groups, bias=bias)
    nn.init.normal_(conv.weight, std=2.0)  # some outputs exceed 6
    return conv


def test_unknown_onednn_signature_disables_fused_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fusion._ONEDNN_NAMES, nn.ReLU6, ("a future name", []))
    fusion._has_fused_convolution.cache_clear()
    assert not fusion._has_fused_convolution(torch.float32)
    fusion._has_fused_convolution.cache_clear()


def test_fused_convolution_is_available_with_onednn() -> None:
    assert fusion._has_fused_convolution(torch.float32) == torch.backends.mkldnn.is_available()


@torch.no_grad()
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("kernel", "stride", "groups", "bias"), [(1, 1, 1, True), (3, 2, 8, False)])
def test_fused_convolution_equals_convolution_and_activation(
    activation: nn.Module, kernel: int, stride: int, groups: int, bias: bool, has_fused_convolution: bool
) -> None:
    conv = make_conv(kernel, stride, groups, bias=bias)
    images = torch.randn(2, 8, 11, 11)
    expected = activation(conv(images))
    assert is_fusible(activation)
    found = convolve(
        images,
        conv.weight,
        conv.bias,
        stride=(stride, stride),
        padding=(kernel // 2, kernel // 2),
        groups=groups,
        activation=activation,
    )
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ActivatedConv2d(conv, activation)(images), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
def test_fused_bf16_rectifier_is_bit_identical(activation: nn.Module, has_fused_convolution: bool) -> None:
    conv = make_conv(3, 1, 1, bias=True)
    images = torch.randn(2, 8, 11, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = activation(conv(images)), ActivatedConv2d(conv, activation)(images)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


def test_unsupported_activation_runs_after_the_convolution() -> None:
    conv, images = make_conv(1, 1, 1, bias=False), torch.randn(2, 8, 5, 5)
    sides = {"stride": (1, 1), "padding": (0, 0), "groups": 1}
    assert not is_fusible(nn.Tanh())
    assert not is_fusible(None)
    for activation in (nn.Tanh(), None):
        found = convolve(images, conv.weight, None, **sides, activation=activation)  # type: ignore[arg-type]
        expected = conv(images) if activation is None else activation(conv(images))
        torch.testing.assert_close(found, expected)

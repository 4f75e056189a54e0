import copy

import pytest
import torch
from torch import Tensor, nn

from pixelplay.model.backbone import Backbone, create_network
from pixelplay.model.fusion import ActivatedConv2d, fuse_for_inference


def random_backbone(name: str) -> Backbone:
    """A network whose batch norms have something to fold."""
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
def test_fused_equals_unfused(name: str) -> None:
    torch.manual_seed(0)
    backbone = random_backbone(name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    images = torch.randn(4, *backbone.network.pretrained_cfg["input_size"])
    with torch.inference_mode():
        expected = backbone(images)
        fused = fuse_for_inference(backbone, images.shape[-1])
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


def test_the_embedded_network_keeps_no_batch_norm_and_no_padding_copy() -> None:
    from timm.layers.conv2d_same import Conv2dSame

    backbone = random_backbone("tf_efficientnet_lite0")
    fused = fuse_for_inference(backbone, 224)
    assert count(backbone, nn.BatchNorm2d) == 49
    assert count(backbone, Conv2dSame) == 5
    assert count(fused, nn.BatchNorm2d) == count(fused, Conv2dSame) == 0


def test_networks_without_batch_norm_stay_equal() -> None:
    torch.manual_seed(0)
    backbone = random_backbone("test_convnext")
    images = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(fuse_for_inference(backbone, 160)(images), backbone(images))


class Trap(nn.Module):
    """Changes the convolution's output in place before the batch norm sees it: folding would be wrong."""

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


def test_a_wrong_fusion_falls_back_to_a_plain_copy() -> None:
    torch.manual_seed(0)
    backbone = Backbone("trap", Trap()).eval()
    backbone.network.norm.running_mean = torch.tensor([1.0, -1.0, 0.5, 0.0])
    before = copy.deepcopy(backbone.state_dict())
    fused = fuse_for_inference(backbone, 16)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fused(images), backbone(images))
    assert fused is not backbone  # it may be moved to another device
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_the_embedded_network_applies_every_activation_while_it_convolves() -> None:
    fused = fuse_for_inference(random_backbone("tf_efficientnet_lite0"), 224)
    assert count(fused, ActivatedConv2d) == count(fused, nn.ReLU6) == 33

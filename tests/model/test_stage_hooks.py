import pytest
import torch
from timm.models.swin_transformer import SwinTransformer

from networks import shared_backbone
from pixelplay.model.backbone import Backbone
from pixelplay.model.stage_hooks import StageHooks


@pytest.mark.parametrize("name", ["vit", "swin", "mambaout", "convnext"])
def test_stage_outputs_become_timms_feature_maps(name: str) -> None:
    if name == "swin":
        network = SwinTransformer(
            img_size=64, embed_dim=12, depths=(1, 1), num_heads=(2, 2), window_size=4, num_classes=0
        )
        backbone, size = Backbone("swin", network.eval()), 64
    else:
        backbone = shared_backbone(f"test_{name}")
        size = int(backbone.network.pretrained_cfg["input_size"][-1])  # type: ignore[union-attr, index]
    images = torch.randn(2, 3, size, size)
    hooks = StageHooks(backbone, 2, (size, size))
    with hooks() as outputs:
        _, expected = backbone.network.forward_intermediates(images, indices=2)  # type: ignore[operator]
    for found, wanted in zip(hooks.as_maps(outputs.values()), expected, strict=True):
        torch.testing.assert_close(found, wanted)

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from pixelplay.errors import ConfigError
from pixelplay.model.backbone import (
    Backbone,
    check_backbone_name,
    create_network,
    load_backbone,
    resolve_backbone_names,
)

FAMILIES = ["test_convnext", "test_efficientnet", "test_resnet", "test_vit"]


@pytest.mark.parametrize(
    ("typo", "nearest"),
    [
        ("convnext_tinny", "convnext_tiny"),
        ("lite1", "lite0"),
        ("resnet_50", "resnet50"),
        ("convnext_tiny.in12k_ft_in1", "convnext_tiny.in12k_ft_in1k"),
    ],
)
def test_unknown_backbone_suggests_similar_names(typo: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone '{typo}'; did you mean .*'{nearest}'"):
        check_backbone_name(typo)


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/convnext_tiny.in12k_ft_in1k",
        "hf_hub:timm/test_vit",
        "local-dir:/tmp",
        "local-dir:test_convnext",
        "timm/test_convnext",
        "../test_convnext",
        "/etc/passwd",
        "https://example.org/test_convnext",
        "test_convnext:x",
        "test_convnext.",
        "",
    ],
)
def test_backbone_name_that_is_an_address_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown backbone"):
        load_backbone(name, None, offline=True)


def test_auto_backbone_is_lite0_on_a_cpu_and_convnext_on_a_gpu() -> None:
    names = [resolve_backbone_names("auto", device)[0] for device in ("cpu", "cuda", "mps")]
    assert names == ["lite0", "convnext_tiny.in12k_ft_in1k", "convnext_tiny.in12k_ft_in1k"]
    assert resolve_backbone_names("resnet50", "cpu") == ("resnet50",)
    for name in {*names, "lite2"}:
        check_backbone_name(name)


def expected_channel_stats(stage: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = stage.double().numpy().reshape(*stage.shape[:2], -1)  # (B, C, H*W)
    mean = values.sum(2) / values.shape[2]
    return mean, np.sqrt(((values - mean[:, :, None]) ** 2).sum(2) / values.shape[2])


def test_features_are_channel_stats_of_each_stage_and_timms_pooled_features() -> None:
    torch.manual_seed(0)
    network = create_network("test_convnext")
    backbone = Backbone("test_convnext", network).eval()
    images = torch.randn(3, 3, 160, 160)
    with torch.inference_mode():
        features = backbone(images).numpy()
        pooled = network.forward_head(network.forward_features(images), pre_logits=True).numpy()
        stages = network.forward_intermediates(images, intermediates_only=True)
        assert torch.equal(network(images), torch.from_numpy(pooled))
    expected = np.concatenate(
        [*(m for stage in stages for m in expected_channel_stats(stage)), pooled], axis=1
    )
    assert len(stages) == 4
    assert features.shape == expected.shape == (3, backbone.n_features)
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_gives_finite_features(name: str) -> None:
    torch.manual_seed(0)
    network = create_network(name)
    backbone = Backbone(name, network).eval()
    images = torch.randn(2, *network.pretrained_cfg["input_size"])
    with torch.inference_mode():
        features = backbone(images)
        pooled = network(images)
    assert features.shape == (2, backbone.n_features)
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    # timm's pooled features come last, unchanged
    torch.testing.assert_close(features[:, -pooled.shape[1] :], pooled)


def test_a_constant_image_has_finite_gradients() -> None:
    # a constant channel has standard deviation 0, where the gradient of the root is infinite
    backbone = Backbone("test_resnet", create_network("test_resnet")).eval()
    images = torch.zeros(1, 3, 160, 160, requires_grad=True)
    backbone(images).sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


def test_n_features_does_not_update_batch_norm() -> None:
    network = create_network("test_efficientnet")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    backbone = Backbone("test_efficientnet", network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert backbone.training


def test_preprocessing_matches_the_weights(tiny_weights: Path) -> None:
    loaded = load_backbone("test_convnext", str(tiny_weights), offline=True)
    config = timm.create_model("test_convnext", pretrained=False).pretrained_cfg
    preprocessing = loaded.preprocessing
    assert (3, *preprocessing.input_size) == config["input_size"]
    assert (preprocessing.mean, preprocessing.std) == (config["mean"], config["std"])
    assert preprocessing.interpolation == config["interpolation"]
    assert loaded.origin == "tiny.safetensors"


def test_feature_groups_are_the_columns_of_each_stage_and_the_pooled_features() -> None:
    network = create_network("tf_efficientnet_lite0")
    groups = Backbone("tf_efficientnet_lite0", network).feature_groups
    assert list(groups) == [
        *(f"stage {stage} {name}" for stage in range(3, 8) for name in ("mean", "deviation")),
        "pooled",
    ]
    widths = [columns.stop - columns.start for columns in groups.values()]
    assert widths == [40, 40, 80, 80, 112, 112, 192, 192, 320, 320, 1280]
    assert Backbone("tf_efficientnet_lite0", network, "pooled").feature_groups == {"pooled": slice(0, 1280)}

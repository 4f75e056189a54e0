"""Frozen and trainable stages equal the whole backbone, and trained weights return to it."""

import copy

import pytest
import torch
from torch import Tensor, nn

from networks import draw_backbone, shared_backbone
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import Backbone, FeatureKind
from pixelplay.model.fusion import fuse_for_inference
from pixelplay.model.split_backbone import (
    BackboneSplitError,
    BranchedBackbone,
    FrozenStages,
    TrainableStages,
    split_backbone,
)

SIZE = 64
VIT_SIZE = 160  # the only size test_vit supports
N_STAGES = {"test_convnext": 4, "test_resnet": 5, "test_efficientnet": 5}
SPLITS = [(name, n_trainable) for name, n in N_STAGES.items() for n_trainable in range(1, n)]
KINDS: list[FeatureKind] = ["stages", "pooled"]


def draw_images(n: int, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def joined(frozen: FrozenStages | None, trainable: TrainableStages, images: Tensor) -> Tensor:
    assert frozen is not None
    return trainable.eval()(*frozen(images))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Compare with a tolerance of 1e-4 of the largest feature: folded batch norms change the last digits."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)


def change_weights(trainable: TrainableStages) -> None:
    """Change every weight and statistic."""
    torch.manual_seed(2)
    with torch.no_grad():
        for value in trainable.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand_like(value))


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize(("name", "n_trainable"), SPLITS)
def test_split_backbone_has_the_features_of_the_whole_backbone(
    name: str, n_trainable: int, features: FeatureKind
) -> None:
    backbone, images = shared_backbone(name, features), draw_images(3)
    frozen, trainable = split_backbone(backbone, n_trainable, (SIZE, SIZE))
    with torch.inference_mode():
        expected = backbone(images)
    assert expected.std(0).median() > 1e-3  # the images do differ
    assert_near(joined(frozen, trainable, images), expected)


@pytest.mark.parametrize(("name", "n_trainable"), SPLITS)
def test_frozen_stages_give_map_and_channel_stats(name: str, n_trainable: int) -> None:
    backbone, images = shared_backbone(name), draw_images(2)
    frozen, _ = split_backbone(backbone, n_trainable, (SIZE, SIZE))
    assert frozen is not None
    with torch.inference_mode():
        maps, stats = frozen(images)
        expected = backbone(images)
    assert maps.shape == (2, *frozen.map_shape)
    assert stats.shape == (2, frozen.n_stats)
    assert stats.dtype == torch.float32
    assert frozen.n_stats >= 2 * frozen.map_shape[0]  # the last frozen stage has channel statistics
    assert_near(stats, expected[:, : frozen.n_stats])


@pytest.mark.parametrize("name", N_STAGES)
def test_frozen_stages_of_pooled_features_have_no_channel_stats(name: str) -> None:
    frozen, _ = split_backbone(shared_backbone(name, "pooled"), 1, (SIZE, SIZE))
    assert frozen is not None
    with torch.inference_mode():
        maps, stats = frozen(draw_images(2))
    assert frozen.n_stats == 0
    assert stats.shape == (2, 0)
    assert maps.shape == (2, *frozen.map_shape)


def test_stages_before_the_last_five_have_no_channel_stats() -> None:
    # lite0 has seven stages; the last five have channel statistics
    backbone, images = draw_backbone("tf_efficientnet_lite0"), draw_images(1, 96)
    with torch.inference_mode():
        expected = backbone(images)
    n_stats = []
    for n_trainable in (6, 5, 4):
        frozen, trainable = split_backbone(backbone, n_trainable, (96, 96))
        n_stats.append(frozen.n_stats)
        assert_near(joined(frozen, trainable, images), expected)
    assert n_stats == [0, 0, 2 * 40]


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize("name", [*N_STAGES, "test_vit"])
def test_split_without_number_trains_the_whole_network(name: str, features: FeatureKind) -> None:
    size = VIT_SIZE if name == "test_vit" else SIZE
    backbone, images = shared_backbone(name, features), draw_images(2, size)
    frozen, trainable = split_backbone(backbone, None, (size, size))
    assert frozen is None
    with torch.inference_mode():
        found = trainable.eval()(images, images.new_empty(2, 0))
        torch.testing.assert_close(found, backbone(images), atol=0, rtol=0)


@pytest.mark.parametrize("name", N_STAGES)
def test_unfreeze_stages_out_of_range_is_refused(name: str) -> None:
    n_stages = N_STAGES[name]
    for n_trainable in (0, n_stages, n_stages + 3):
        expected = rf"unfreeze_stages={n_trainable} .* 1 to {n_stages - 1} of {name}; --finetune full"
        with pytest.raises(ConfigError, match=expected):
            split_backbone(shared_backbone(name), n_trainable, (SIZE, SIZE))


@pytest.mark.parametrize("n_trainable", [1, 5])
def test_network_that_cannot_be_split_is_refused(n_trainable: int) -> None:
    with pytest.raises(ConfigError, match=r"^test_vit .*; use --finetune full or none$") as caught:
        split_backbone(shared_backbone("test_vit"), n_trainable, (VIT_SIZE, VIT_SIZE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "mvitv2_tiny"])
def test_any_error_in_a_split_network_is_a_split_error(name: str) -> None:
    """Both unpack outputs of removed modules."""
    with pytest.raises(BackboneSplitError, match=rf"^{name} .*; use --finetune full or none$"):
        split_backbone(draw_backbone(name, "pooled"), 1, (224, 224))


class Doubling(nn.Module):
    """Doubles its images before the first stage, outside any module that could be removed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.pretrained_cfg = {"input_size": (3, 16, 16)}
        self.feature_info = [{"module": "first"}, {"module": "second"}]

    def forward_intermediates(self, images: Tensor, indices: list[int], **options: object) -> object:
        first = self.first(2 * images)
        maps = [first, self.second(first)]
        selected = [maps[i] for i in indices]
        return selected if options else (maps[-1], selected)

    def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
        return maps.mean((2, 3))


def test_split_with_different_features_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"doubling .* different features"):
        split_backbone(Backbone("doubling", Doubling()), 1, (16, 16))


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize(("name", "n_trainable"), SPLITS)
def test_write_into_restores_trained_weights(name: str, n_trainable: int, features: FeatureKind) -> None:
    backbone, images = shared_backbone(name, features), draw_images(3)
    before = copy.deepcopy(backbone.network.state_dict())
    frozen, trainable = split_backbone(backbone, n_trainable, (SIZE, SIZE))
    change_weights(trainable)
    trained = copy.deepcopy(backbone)
    trainable.write_into(trained)
    found, finetuned = trained.network.state_dict(), trainable.network.state_dict()
    unchanged = set(before) - set(finetuned)
    assert unchanged
    assert finetuned
    for key, value in found.items():
        torch.testing.assert_close(value, before[key] if key in unchanged else finetuned[key], atol=0, rtol=0)
    with torch.inference_mode():
        whole, untrained = trained(images), backbone(images)
    assert_near(joined(frozen, trainable, images), whole)
    assert (whole - untrained).abs().max() > 0.01 * untrained.abs().max()
    # neither split nor training changed the original network
    for key, value in backbone.network.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=0, rtol=0)


@pytest.mark.parametrize("name", N_STAGES)
def test_write_into_restores_a_whole_network(name: str) -> None:
    backbone, images = draw_backbone(name), draw_images(2)
    _, trainable = split_backbone(backbone, None, (SIZE, SIZE))
    change_weights(trainable)
    trainable.write_into(backbone)
    with torch.inference_mode():
        expected = trainable.eval()(images, images.new_empty(2, 0))
        torch.testing.assert_close(backbone(images), expected, atol=0, rtol=0)


def test_split_backbone_preserves_random_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    split_backbone(shared_backbone("test_resnet"), 2, (SIZE, SIZE))
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_every_trainable_weight() -> None:
    frozen, trainable = split_backbone(shared_backbone("test_efficientnet"), 2, (SIZE, SIZE))
    assert frozen is not None
    with torch.no_grad():
        inputs = frozen(draw_images(2))
    trainable.eval()(*inputs).square().sum().backward()
    grads = {name: value.grad for name, value in trainable.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize(("name", "n_frozen"), [(name, n) for name in N_STAGES for n in (0, 2)])
def test_branched_backbone_concatenates_frozen_and_fine_tuned_features(
    name: str, n_frozen: int, features: FeatureKind
) -> None:
    backbone, images = draw_backbone(name, features).eval(), draw_images(3)
    n_trainable = N_STAGES[name] - n_frozen if n_frozen else None
    frozen, trainable = split_backbone(backbone, n_trainable, (SIZE, SIZE))
    change_weights(trainable)
    finetuned = copy.deepcopy(backbone)
    trainable.write_into(finetuned)
    branched = BranchedBackbone(backbone, [trainable]).eval()
    with torch.inference_mode():
        first, second = backbone(images), finetuned(images)
        found, fused = branched(images), fuse_for_inference(branched, (SIZE, SIZE))(images)
    assert not torch.allclose(first, second)
    n_stats = 0 if frozen is None else frozen.n_stats
    expected = torch.cat([first, second[:, n_stats:]], dim=1)
    assert_near(found, expected)
    assert_near(fused, expected)
    assert branched.n_features == expected.shape[1]


def test_branches_run_shared_stages_once() -> None:
    frozen = draw_backbone("test_convnext")
    branched = BranchedBackbone(frozen, [TrainableStages(frozen, 2), TrainableStages(frozen, 3)]).eval()
    runs: list[str] = []
    for network in (branched.network, *(branch.network for branch in branched.branches)):
        for name in ("stages.0", "stages.3"):
            layer = network.get_submodule(name)
            if not isinstance(layer, nn.Identity):
                layer.register_forward_hook(lambda *_, name=name: runs.append(name))
    with torch.inference_mode():
        branched(draw_images(1))
    assert sorted(runs) == ["stages.0", "stages.3", "stages.3", "stages.3"]

"""What tail.py promises: two halves make the whole, and what is trained finds its way back."""

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
    SplitBackbone,
    TrainableStages,
    split_backbone,
)

SIZE = 64
VIT_SIZE = 160  # test_vit takes no other
N_STAGES = {"test_convnext": 4, "test_resnet": 5, "test_efficientnet": 5}
CUTS = [(name, n_tail) for name, unfreeze_stages in N_STAGES.items() for n_tail in range(1, unfreeze_stages)]
KINDS: list[FeatureKind] = ["stages", "pooled"]


def draw_images(n: int, size: int = SIZE) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def joined(stages: SplitBackbone, images: Tensor) -> Tensor:
    assert stages.front is not None
    return stages.tail.eval()(*stages.front(images))


def assert_near(found: Tensor, expected: Tensor) -> None:
    """To a ten-thousandth of the largest feature: folded batch norms change last digits."""
    scale = expected.abs().max()
    torch.testing.assert_close(found / scale, expected / scale, atol=1e-4, rtol=0)


def train_by_hand(stages: SplitBackbone) -> None:
    """Move every weight and statistic of the tail."""
    torch.manual_seed(2)
    with torch.no_grad():
        for value in stages.tail.state_dict().values():
            if value.is_floating_point():
                value.mul_(1 + 0.2 * torch.rand_like(value))


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize(("name", "n_tail"), CUTS)
def test_front_and_tail_give_the_features_of_the_whole(name: str, n_tail: int, features: FeatureKind) -> None:
    backbone, images = shared_backbone(name, features), draw_images(3)
    stages = split_backbone(backbone, n_tail, SIZE)
    with torch.inference_mode():
        expected = backbone(images)
    assert expected.std(0).median() > 1e-3  # the images do differ
    assert_near(joined(stages, images), expected)


@pytest.mark.parametrize(("name", "n_tail"), CUTS)
def test_the_front_gives_the_map_at_the_cut_and_its_own_moments(name: str, n_tail: int) -> None:
    backbone, images = shared_backbone(name), draw_images(2)
    stages = split_backbone(backbone, n_tail, SIZE)
    assert stages.front is not None
    with torch.inference_mode():
        maps, stats = stages.front(images)
        expected = backbone(images)
    assert maps.shape == (2, *stages.shape)
    assert stats.shape == (2, stages.n_stats)
    assert stats.dtype == torch.float32
    assert stages.n_stats >= 2 * stages.shape[0]  # those of the last stage in front, and more
    assert_near(stats, expected[:, : stages.n_stats])


@pytest.mark.parametrize("name", N_STAGES)
def test_a_front_of_pooled_features_has_no_moments(name: str) -> None:
    stages = split_backbone(shared_backbone(name, "pooled"), 1, SIZE)
    assert stages.front is not None
    with torch.inference_mode():
        maps, stats = stages.front(draw_images(2))
    assert stages.n_stats == 0
    assert stats.shape == (2, 0)
    assert maps.shape == (2, *stages.shape)


def test_stages_in_front_of_those_that_give_features_leave_no_moments() -> None:
    # lite0 has seven stages, of which the last five give features
    backbone, images = draw_backbone("tf_efficientnet_lite0"), draw_images(1, 96)
    with torch.inference_mode():
        expected = backbone(images)
    n_stats = []
    for n_tail in (6, 5, 4):
        stages = split_backbone(backbone, n_tail, 96)
        n_stats.append(stages.n_stats)
        assert_near(joined(stages, images), expected)
    assert n_stats == [0, 0, 2 * 40]


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize("name", [*N_STAGES, "test_vit"])
def test_without_a_number_the_tail_is_the_whole_network(name: str, features: FeatureKind) -> None:
    size = VIT_SIZE if name == "test_vit" else SIZE
    backbone, images = shared_backbone(name, features), draw_images(2, size)
    stages = split_backbone(backbone, None, size)
    assert stages.front is None
    assert (stages.shape, stages.n_stats) == ((3, size, size), 0)
    with torch.inference_mode():
        found = stages.tail.eval()(images, images.new_empty(2, 0))
        torch.testing.assert_close(found, backbone(images), atol=0, rtol=0)


@pytest.mark.parametrize("name", N_STAGES)
def test_a_number_out_of_range_is_refused_with_the_range(name: str) -> None:
    unfreeze_stages = N_STAGES[name]
    for n_tail in (0, unfreeze_stages, unfreeze_stages + 3):
        with pytest.raises(ConfigError) as caught:
            split_backbone(shared_backbone(name), n_tail, SIZE)
        assert str(caught.value) == (
            f"unfreeze_stages={n_tail} is outside 1 to {unfreeze_stages - 1}, what partial can train of {name}; "
            "--finetune full trains everything"
        )


@pytest.mark.parametrize("n_tail", [1, 5])
def test_a_network_that_cannot_be_cut_is_refused_with_the_ways_on(n_tail: int) -> None:
    with pytest.raises(
        ConfigError, match=r"^test_vit cannot be cut .*; use --finetune full or probe$"
    ) as caught:
        split_backbone(shared_backbone("test_vit"), n_tail, VIT_SIZE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "mvitv2_tiny"])
def test_whatever_goes_wrong_in_a_cut_network_is_said_in_the_same_words(name: str) -> None:
    """Both unpack what is no longer there."""
    with pytest.raises(BackboneSplitError, match=rf"^{name} cannot be cut .*; use --finetune full or probe$"):
        split_backbone(draw_backbone(name, "pooled"), 1, 224)


class Doubling(nn.Module):
    """Doubles its images in front of the first stage, where no module is that could be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)
        self.pretrained_cfg = {"input_size": (3, 16, 16)}
        self.feature_info = [{"module": "first"}, {"module": "second"}]

    def forward_intermediates(self, images: Tensor, indices: list[int], **options: object) -> object:
        first = self.first(2 * images)
        maps = [first, self.second(first)]
        chosen = [maps[i] for i in indices]
        return chosen if options else (maps[-1], chosen)

    def forward_head(self, maps: Tensor, pre_logits: bool) -> Tensor:
        return maps.mean((2, 3))


def test_halves_that_do_not_make_the_whole_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"doubling cannot be cut .* other features than the whole"):
        split_backbone(Backbone("doubling", Doubling()), 1, 16)


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize(("name", "n_tail"), CUTS)
def test_trained_weights_return_to_their_places(name: str, n_tail: int, features: FeatureKind) -> None:
    backbone, images = shared_backbone(name, features), draw_images(3)
    before = copy.deepcopy(backbone.network.state_dict())
    stages = split_backbone(backbone, n_tail, SIZE)
    train_by_hand(stages)
    trained = copy.deepcopy(backbone)
    stages.tail.write_into(trained)
    found, tail = trained.network.state_dict(), stages.tail.network.state_dict()
    in_front = set(before) - set(tail)
    assert in_front
    assert tail
    for key, value in found.items():
        torch.testing.assert_close(value, before[key] if key in in_front else tail[key], atol=0, rtol=0)
    with torch.inference_mode():
        whole, untrained = trained(images), backbone(images)
    assert_near(joined(stages, images), whole)
    assert (whole - untrained).abs().max() > 0.01 * untrained.abs().max()
    # neither the cut nor the training has touched the network that was cut
    for key, value in backbone.network.state_dict().items():
        torch.testing.assert_close(value, before[key], atol=0, rtol=0)


@pytest.mark.parametrize("name", N_STAGES)
def test_a_whole_network_returns_to_its_place(name: str) -> None:
    backbone, images = draw_backbone(name), draw_images(2)
    stages = split_backbone(backbone, None, SIZE)
    train_by_hand(stages)
    stages.tail.write_into(backbone)
    with torch.inference_mode():
        expected = stages.tail.eval()(images, images.new_empty(2, 0))
        torch.testing.assert_close(backbone(images), expected, atol=0, rtol=0)


def test_a_cut_draws_none_of_the_users_random_numbers() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    split_backbone(shared_backbone("test_resnet"), 2, SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradients_reach_every_weight_of_the_tail() -> None:
    stages = split_backbone(shared_backbone("test_efficientnet"), 2, SIZE)
    assert stages.front is not None
    with torch.no_grad():
        inputs = stages.front(draw_images(2))
    stages.tail.eval()(*inputs).square().sum().backward()
    grads = {name: value.grad for name, value in stages.tail.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.any()] == []


# --- a frozen and a tuned tail side by side ---


@pytest.mark.parametrize("features", KINDS)
@pytest.mark.parametrize(("name", "n_front"), [(name, n) for name in N_STAGES for n in (0, 2)])
def test_a_branch_gives_frozen_and_tuned_features(name: str, n_front: int, features: FeatureKind) -> None:
    frozen, images = draw_backbone(name, features).eval(), draw_images(3)
    n_tail = N_STAGES[name] - n_front if n_front else None
    stages = split_backbone(frozen, n_tail, SIZE)
    train_by_hand(stages)
    tuned = copy.deepcopy(frozen)
    stages.tail.write_into(tuned)
    twin = BranchedBackbone(frozen, [stages.tail]).eval()
    with torch.inference_mode():
        first, second = frozen(images), tuned(images)
        found, fused = twin(images), fuse_for_inference(twin, SIZE)(images)
    assert not torch.allclose(first, second)
    expected = torch.cat([first, second[:, stages.n_stats :]], dim=1)
    assert_near(found, expected)
    assert_near(fused, expected)
    assert twin.n_features == expected.shape[1]


def test_branches_run_what_they_share_once() -> None:
    frozen = draw_backbone("test_convnext")
    branched = BranchedBackbone(frozen, [TrainableStages(frozen, 2), TrainableStages(frozen, 3)]).eval()
    runs: list[str] = []
    for network in (branched.network, *(tail.network for tail in branched.tails)):
        for name in ("stages.0", "stages.3"):
            layer = network.get_submodule(name)
            if not isinstance(layer, nn.Identity):
                layer.register_forward_hook(lambda *_, name=name: runs.append(name))
    with torch.inference_mode():
        branched(draw_images(1))
    assert sorted(runs) == ["stages.0", "stages.3", "stages.3", "stages.3"]

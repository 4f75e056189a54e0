"""What classifier.py and head.py promise: one map before, during and after training, and who moves in it."""

import math
import re

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from networks import shared_backbone
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import stage_modules
from pixelplay.model.classifier import (
    HIDDEN,
    Classifier,
    LinearHead,
    TrainableLinearHead,
    TrainableMlpHead,
    feature_scale,
)
from pixelplay.model.split_backbone import TrainableStages

FloatArray = NDArray[np.float32]
SIZE = 64
D, K = 30, 4
NETWORKS = [
    "test_convnext",
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "test_nfnet",  # its first stage ends inside the stem
    "test_vit",  # parameters beside its layers
    "mobilenetv3_small_050",  # stages that are not all listed
]


def draw_features(n: int = 50, *, n_constant: int = 3) -> FloatArray:
    """Features of very different means and scales; the last ones never move."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(n, D)) * rng.uniform(0.01, 10, D) + rng.normal(size=D) * 5
    features[:, D - n_constant :] = [0, 1.5, -1000][:n_constant]
    return features.astype(np.float32)


def draw_head(n_hidden: int | None = None) -> LinearHead:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> FloatArray:
        return rng.normal(size=shape).astype(np.float32)

    if n_hidden is None:
        return LinearHead(weight=draw(K, D), bias=draw(K))
    return LinearHead(
        weight=draw(K, n_hidden), bias=draw(K), hidden_weight=draw(n_hidden, D), hidden_bias=draw(n_hidden)
    )


def make_linear(features: FloatArray, start: LinearHead | None, dropout: float = 0.0) -> TrainableLinearHead:
    return TrainableLinearHead(*feature_scale(features), K, start=start, dropout=dropout)


@torch.no_grad()
def logits_of(head: nn.Module, features: FloatArray) -> FloatArray:
    logits: Tensor = head.eval()(torch.from_numpy(features))
    return logits.numpy()


def make_classifier(name: str, *, n_front: int = 0, drop_path: float = 0.0) -> Classifier:
    backbone = shared_backbone(name)
    tail = TrainableStages(backbone, n_front)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        n = backbone.n_features
        head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), K, start=None, dropout=0)
        nn.init.normal_(head.linear.weight, std=0.1)
    return Classifier(tail, head, drop_path=drop_path)


def draw_inputs(name: str, n: int = 4) -> tuple[Tensor, Tensor]:
    size = 160 if name == "test_vit" else SIZE
    images = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images, images.new_empty(n, 0)


# --- heads


def test_a_head_that_starts_from_another_gives_its_logits() -> None:
    features, start = draw_features(), draw_head()
    found = logits_of(make_linear(features, start), features)
    scale = np.abs(start.logits(features)).max()
    np.testing.assert_allclose(found / scale, start.logits(features) / scale, atol=1e-6)


def test_a_head_that_starts_from_another_is_exported_as_that() -> None:
    features, start = draw_features(), draw_head()
    exported = make_linear(features, start).export()
    np.testing.assert_allclose(exported.weight, start.weight, rtol=1e-6)
    np.testing.assert_allclose(exported.bias, start.bias, atol=1e-2)  # beside -1000 times a weight
    np.testing.assert_allclose(exported.logits(features), start.logits(features), atol=1e-2)


@pytest.mark.parametrize("n_constant", [0, 3])
def test_a_linear_head_is_exported_as_it_stands(n_constant: int) -> None:
    features = draw_features(n_constant=n_constant)
    head = make_linear(features, None)
    torch.manual_seed(0)
    nn.init.normal_(head.linear.weight)
    nn.init.normal_(head.linear.bias)
    exported = head.export()
    assert exported.fits(D, K)
    assert {a.dtype for a in exported.arrays().values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(exported.logits(features), logits_of(head, features), atol=2e-3)


def test_a_feature_that_never_moved_keeps_weight_0() -> None:
    features = draw_features()
    head = make_linear(features, None)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1)
    labels = torch.arange(len(features)) % K
    for _ in range(10):
        cross_entropy(head(torch.from_numpy(features)), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    weight = head.export().weight
    np.testing.assert_array_equal(weight[:, -3:], 0)
    assert (weight[:, :-3] != 0).all()


def test_dropout_is_for_training_only() -> None:
    features = draw_features()
    head = make_linear(features, draw_head(), dropout=0.5)
    np.testing.assert_array_equal(
        logits_of(head, features), logits_of(make_linear(features, draw_head()), features)
    )
    head.train()
    torch.manual_seed(0)
    first, second = (head(torch.from_numpy(features)) for _ in range(2))
    assert not torch.equal(first, second)


def test_an_mlp_is_exported_as_it_predicts() -> None:
    features = draw_features()
    torch.manual_seed(0)
    head = TrainableMlpHead(D, K, dropout=0.3)
    nn.init.normal_(head.norm.weight)  # of either sign
    nn.init.normal_(head.norm.bias)
    for _ in range(5):  # the batch norm learns its statistics
        head.train()(torch.from_numpy(features))
    head.norm.running_var[::7] = 1e-6  # below the norm's own epsilon
    exported = head.export()
    assert exported.fits(D, K)
    assert exported.arrays()["hidden_weight"].shape == (HIDDEN, D)
    expected = logits_of(head, features)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(exported.logits(features) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_training_that_goes_on_leaves_an_exported_head_alone(kind: str) -> None:
    features = draw_features()
    head = TrainableMlpHead(D, K, dropout=0.0) if kind == "mlp" else make_linear(features, draw_head())
    exported = head.export()
    before = {name: value.copy() for name, value in exported.arrays().items()}
    with torch.no_grad():
        for value in (*head.parameters(), *head.buffers()):
            value.add_(1)
    assert {name: value.tolist() for name, value in exported.arrays().items()} == {
        name: value.tolist() for name, value in before.items()
    }


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_an_offset_is_added_to_the_logits(n_hidden: int | None) -> None:
    head, features, offset = draw_head(n_hidden), draw_features(), np.log([0.5, 0.3, 0.15, 0.05])
    shifted = head.shifted(offset)
    np.testing.assert_allclose(shifted.logits(features), head.logits(features) + offset, atol=1e-2)
    assert shifted.fits(D, K)
    assert {a.dtype for a in shifted.arrays().values()} == {np.dtype(np.float32)}
    back = shifted.shifted(-offset).arrays()
    for name, values in head.arrays().items():
        np.testing.assert_allclose(back[name], values, atol=1e-6)


def test_a_hidden_layer_follows_the_formula() -> None:
    head, features = draw_head(7), draw_features()
    arrays = {name: values.astype(np.float64) for name, values in head.arrays().items()}
    hidden = np.maximum(features @ arrays["hidden_weight"].T + arrays["hidden_bias"], 0)
    expected = hidden @ arrays["weight"].T + arrays["bias"]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(head.logits(features) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_a_head_is_its_arrays(n_hidden: int | None) -> None:
    head = draw_head(n_hidden)
    names = ["weight", "bias"] if n_hidden is None else ["weight", "bias", "hidden_weight", "hidden_bias"]
    assert list(head.arrays()) == names
    again, features = LinearHead(**head.arrays()), draw_features()
    np.testing.assert_array_equal(again.logits(features), head.logits(features))


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_a_head_fits_its_own_numbers_only(n_hidden: int | None) -> None:
    head = draw_head(n_hidden)
    assert head.fits(D, K)
    assert not head.fits(D + 1, K)
    assert not head.fits(D, K + 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bias": np.zeros(K + 1, np.float32)},
        {"weight": np.zeros((K, D), np.float32)},
        {"hidden_weight": np.zeros((8, D), np.float32)},
        {"hidden_weight": np.zeros((7, D + 1), np.float32)},
        {"hidden_bias": np.zeros(8, np.float32)},
        {"hidden_weight": np.zeros((0, D), np.float32)},
        {"hidden_weight": None},
        {"hidden_bias": None},
    ],
)
def test_arrays_that_do_not_fit_each_other_are_seen(wrong: dict[str, FloatArray | None]) -> None:
    assert not LinearHead(**{**draw_head(7).arrays(), **wrong}).fits(D, K)


# --- tail and head together


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_a_zeroed_head_has_loss_ln_k(name: str) -> None:
    classifier = make_classifier(name)
    with torch.no_grad():
        classifier.head.linear.weight.zero_()
        logits = classifier.train()(*draw_inputs(name))
    assert logits.dtype == torch.float32
    assert float(cross_entropy(logits, torch.arange(4) % K)) == pytest.approx(math.log(K), abs=1e-6)


def test_logits_are_those_of_the_heads_export_on_the_tails_features() -> None:
    classifier, inputs = make_classifier("test_resnet").eval(), draw_inputs("test_resnet")
    with torch.no_grad():
        features, logits = classifier.tail(*inputs), classifier(*inputs)
    found = classifier.head.export().logits(features.numpy())
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet", "test_byobnet"])
def test_norms_of_the_tail_keep_their_statistics_in_training(name: str) -> None:
    classifier, inputs = make_classifier(name), draw_inputs(name)
    before = {key: value.clone() for key, value in classifier.tail.named_buffers()}
    with torch.no_grad():
        evaluated = classifier.eval()(*inputs)
        trained = classifier.train()(*inputs)
    for key, value in classifier.tail.named_buffers():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-5)


def test_the_norm_of_an_mlp_does_learn_its_statistics() -> None:
    backbone = shared_backbone("test_resnet", "pooled")
    head = TrainableMlpHead(backbone.n_features, K, dropout=0)
    classifier, before = Classifier(TrainableStages(backbone, 0), head), head.norm.running_mean.clone()
    classifier.train()(*draw_inputs("test_resnet"))
    assert not torch.equal(head.norm.running_mean, before)
    mean = head.norm.running_mean.clone()
    classifier.eval()(*draw_inputs("test_resnet"))
    assert torch.equal(head.norm.running_mean, mean)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "tf_efficientnet_lite0", "test_vit"])
@torch.no_grad()
def test_stochastic_depth_works_in_training_only(name: str) -> None:
    plain, inputs = make_classifier(name).eval(), draw_inputs(name)
    classifier = make_classifier(name, drop_path=0.8)
    torch.testing.assert_close(classifier.eval()(*inputs), plain(*inputs), atol=0, rtol=0)
    classifier.train()
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(classifier(*inputs))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    # no block of the last two has a way around
    "name",
    ["densenet121", "test_efficientnet", "ese_vovnet19b_dw"],
)
def test_a_network_that_can_leave_nothing_out_says_so(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_classifier(name, drop_path=0.5)
    assert str(caught.value) == (
        "drop_path=0.5 says nothing here: what is trained of this backbone has no branch to be left out; "
        "leave it out"
    )


@pytest.mark.parametrize("name", ["mobileone_s0", "regnetz_b16"])
def test_a_block_without_a_way_around_is_never_left_out(name: str) -> None:
    layers = [
        layer for layer in make_classifier(name, drop_path=0.5).modules() if hasattr(layer, "drop_path")
    ]
    alone = [
        layer for layer in layers if None in (getattr(layer, "identity", 0), getattr(layer, "shortcut", 0))
    ]
    assert 0 < len(alone) < len(layers)
    assert not [
        layer for layer in alone if isinstance(layer.drop_path, DropPath) and layer.drop_path.drop_prob
    ]
    assert any(isinstance(layer.drop_path, DropPath) for layer in layers)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("tf_efficientnet_lite0", [n / 18 for n in range(1, 10)]),  # of blocks that have a way around
        ("test_resnet", [0.125, 0.25, 0.375, 0.5]),
        ("test_vit", [x / 12 for x in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)]),  # two branches in each block
    ],
)
def test_stochastic_depth_rises_linearly_to_its_share(name: str, rates: list[float]) -> None:
    layers = make_classifier(name, drop_path=0.5).modules()
    found = [layer.drop_prob for layer in layers if isinstance(layer, DropPath)]
    assert found == pytest.approx(rates)


# --- distances


def test_distances_of_a_convnext_count_stages_from_the_last() -> None:
    for name, _, distance in make_classifier("test_convnext").distances():
        stage = re.match(r"tail\.network\.stages\.(\d)\.", name)
        expected = 3 - int(stage[1]) if stage else 3 if ".stem." in name else 0
        assert distance == expected, name


def test_distances_of_a_resnet_count_stages_from_the_last() -> None:
    for name, _, distance in make_classifier("test_resnet").distances():
        layer = re.match(r"tail\.network\.layer(\d)\.", name)
        expected = 0 if name.startswith("head.") else 4 - int(layer[1]) if layer else 4
        assert distance == expected, name


@pytest.mark.parametrize("name", NETWORKS)
def test_the_first_parameter_is_farthest_the_head_nearest_and_none_is_left_out(name: str) -> None:
    classifier = make_classifier(name)
    found = list(classifier.distances())
    assert [key for key, _, _ in found] == [key for key, _ in classifier.named_parameters()]
    assert all(value is own for (_, value, _), own in zip(found, classifier.parameters(), strict=True))
    farthest = len(stage_modules(classifier.tail.network)) - 1
    assert found[0][2] == farthest
    assert {distance for key, _, distance in found if key.startswith("head.")} == {0}
    assert {distance for _, _, distance in found} == set(range(farthest + 1))
    in_order = [distance for _, _, distance in found]
    assert in_order == sorted(in_order, reverse=True)


def test_tokens_and_places_of_a_transformer_are_as_far_as_its_first_layer() -> None:
    found = {name: distance for name, _, distance in make_classifier("test_vit").distances()}
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert found[f"tail.network.{name}"] == 5
    for n in range(6):
        assert found[f"tail.network.blocks.{n}.attn.qkv.weight"] == 5 - n


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet"])
def test_a_tail_has_the_distances_of_the_whole_and_frozen_filters_none(name: str) -> None:
    whole = {key: distance for key, _, distance in make_classifier(name).distances()}
    unfreeze_stages = len(stage_modules(shared_backbone(name).network))
    for n_front in range(1, unfreeze_stages):
        classifier = make_classifier(name, n_front=n_front)
        for layer in classifier.tail.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.requires_grad_(False)
        found = {key: distance for key, _, distance in classifier.distances()}
        trained = [key for key, value in classifier.named_parameters() if value.requires_grad]
        assert list(found) == trained
        assert found == {key: whole[key] for key in trained}
        assert max(found.values()) == unfreeze_stages - 1 - n_front

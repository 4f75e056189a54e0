"""Heads give equal logits before, during and after training; trainable parameters and their stages."""

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
    average_heads,
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
    "test_vit",  # has parameters outside its layers
    "mobilenetv3_small_050",  # timm does not list all of its stages
]


def draw_features(n: int = 50, *, n_constant: int = 3) -> FloatArray:
    """Draw features with very different means and scales; the last ones are constant."""
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


def make_classifier(name: str, *, n_frozen: int = 0, drop_path: float = 0.0) -> Classifier:
    backbone = shared_backbone(name)
    stages = TrainableStages(backbone, n_frozen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        n = backbone.n_features
        head = TrainableLinearHead(np.zeros(n, np.float32), np.ones(n, np.float32), K, start=None, dropout=0)
        nn.init.normal_(head.linear.weight, std=0.1)
    return Classifier(stages, head, drop_path=drop_path)


def draw_inputs(name: str, n: int = 4) -> tuple[Tensor, Tensor]:
    size = 160 if name == "test_vit" else SIZE
    images = torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images, images.new_empty(n, 0)


def test_head_started_from_another_has_its_logits() -> None:
    features, start = draw_features(), draw_head()
    found = logits_of(make_linear(features, start), features)
    scale = np.abs(start.logits(features)).max()
    np.testing.assert_allclose(found / scale, start.logits(features) / scale, atol=1e-6)


def test_head_started_from_another_exports_an_equal_head() -> None:
    features, start = draw_features(), draw_head()
    exported = make_linear(features, start).export()
    np.testing.assert_allclose(exported.weight, start.weight, rtol=1e-6)
    np.testing.assert_allclose(exported.bias, start.bias, atol=1e-2)  # next to -1000 times a weight
    np.testing.assert_allclose(exported.logits(features), start.logits(features), atol=1e-2)


@pytest.mark.parametrize("n_constant", [0, 3])
def test_exported_linear_head_has_the_same_logits(n_constant: int) -> None:
    features = draw_features(n_constant=n_constant)
    head = make_linear(features, None)
    torch.manual_seed(0)
    nn.init.normal_(head.linear.weight)
    nn.init.normal_(head.linear.bias)
    exported = head.export()
    assert exported.fits(D, K)
    assert {a.dtype for a in exported.arrays().values()} == {np.dtype(np.float32)}
    np.testing.assert_allclose(exported.logits(features), logits_of(head, features), atol=2e-3)


def test_constant_feature_keeps_weight_0() -> None:
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


def test_dropout_is_active_in_training_only() -> None:
    features = draw_features()
    head = make_linear(features, draw_head(), dropout=0.5)
    np.testing.assert_array_equal(
        logits_of(head, features), logits_of(make_linear(features, draw_head()), features)
    )
    head.train()
    torch.manual_seed(0)
    first, second = (head(torch.from_numpy(features)) for _ in range(2))
    assert not torch.equal(first, second)


def test_exported_mlp_head_has_the_same_logits() -> None:
    features = draw_features()
    torch.manual_seed(0)
    head = TrainableMlpHead(D, K, dropout=0.3)
    nn.init.normal_(head.norm.weight)  # of either sign
    nn.init.normal_(head.norm.bias)
    for _ in range(5):  # the batch norm updates its statistics
        head.train()(torch.from_numpy(features))
    head.norm.running_var[::7] = 1e-6  # below the norm's own epsilon
    exported = head.export()
    assert exported.fits(D, K)
    assert exported.arrays()["hidden_weight"].shape == (HIDDEN, D)
    expected = logits_of(head, features)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(exported.logits(features) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_exported_head_is_independent_of_further_training(kind: str) -> None:
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
def test_shifted_head_adds_an_offset_to_the_logits(n_hidden: int | None) -> None:
    head, features, offset = draw_head(n_hidden), draw_features(), np.log([0.5, 0.3, 0.15, 0.05])
    shifted = head.shifted(offset)
    np.testing.assert_allclose(shifted.logits(features), head.logits(features) + offset, atol=1e-2)
    assert shifted.fits(D, K)
    assert {a.dtype for a in shifted.arrays().values()} == {np.dtype(np.float32)}
    back = shifted.shifted(-offset).arrays()
    for name, values in head.arrays().items():
        np.testing.assert_allclose(back[name], values, atol=1e-6)


def test_hidden_layer_equals_the_formula() -> None:
    head, features = draw_head(7), draw_features()
    arrays = {name: values.astype(np.float64) for name, values in head.arrays().items()}
    hidden = np.maximum(features @ arrays["hidden_weight"].T + arrays["hidden_bias"], 0)
    expected = hidden @ arrays["weight"].T + arrays["bias"]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(head.logits(features) / scale, expected / scale, atol=1e-5)


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_head_round_trips_through_its_arrays(n_hidden: int | None) -> None:
    head = draw_head(n_hidden)
    names = ["weight", "bias"] if n_hidden is None else ["weight", "bias", "hidden_weight", "hidden_bias"]
    assert list(head.arrays()) == names
    again, features = LinearHead(**head.arrays()), draw_features()
    np.testing.assert_array_equal(again.logits(features), head.logits(features))


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_head_fits_only_its_own_dimensions(n_hidden: int | None) -> None:
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
def test_head_with_inconsistent_arrays_does_not_fit(wrong: dict[str, FloatArray | None]) -> None:
    assert not LinearHead(**{**draw_head(7).arrays(), **wrong}).fits(D, K)


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_zero_head_has_loss_ln_k(name: str) -> None:
    classifier = make_classifier(name)
    with torch.no_grad():
        classifier.head.linear.weight.zero_()
        logits = classifier.train()(*draw_inputs(name))
    assert logits.dtype == torch.float32
    assert float(cross_entropy(logits, torch.arange(4) % K)) == pytest.approx(math.log(K), abs=1e-6)


def test_classifier_logits_equal_the_exported_head_on_the_features() -> None:
    classifier, inputs = make_classifier("test_resnet").eval(), draw_inputs("test_resnet")
    with torch.no_grad():
        features, logits = classifier.stages(*inputs), classifier(*inputs)
    found = classifier.head.export().logits(features.numpy())
    np.testing.assert_allclose(found, logits.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet", "test_byobnet"])
def test_batch_norms_keep_their_statistics_in_training(name: str) -> None:
    classifier, inputs = make_classifier(name), draw_inputs(name)
    before = {key: value.clone() for key, value in classifier.stages.named_buffers()}
    with torch.no_grad():
        evaluated = classifier.eval()(*inputs)
        trained = classifier.train()(*inputs)
    for key, value in classifier.stages.named_buffers():
        assert torch.equal(value, before[key]), key
    torch.testing.assert_close(trained, evaluated, atol=1e-5, rtol=1e-5)


def test_batch_norm_of_an_mlp_head_updates_its_statistics() -> None:
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
def test_drop_path_is_active_in_training_only(name: str) -> None:
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
    # no block of the last two stages has a skip connection
    "name",
    ["densenet121", "test_efficientnet", "ese_vovnet19b_dw"],
)
def test_drop_path_without_residual_branches_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"drop_path=0\.5 has no effect: "):
        make_classifier(name, drop_path=0.5)


@pytest.mark.parametrize("name", ["mobileone_s0", "regnetz_b16"])
def test_drop_path_skips_blocks_without_skip_connection(name: str) -> None:
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
        ("tf_efficientnet_lite0", [n / 18 for n in range(1, 10)]),  # of blocks with a skip connection
        ("test_resnet", [0.125, 0.25, 0.375, 0.5]),
        ("test_vit", [x / 12 for x in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6)]),  # two branches in each block
    ],
)
def test_drop_path_increases_linearly_to_its_rate(name: str, rates: list[float]) -> None:
    layers = make_classifier(name, drop_path=0.5).modules()
    found = [layer.drop_prob for layer in layers if isinstance(layer, DropPath)]
    assert found == pytest.approx(rates)


def test_distances_of_a_convnext_count_stages_from_the_last() -> None:
    for name, _, distance in make_classifier("test_convnext").distances():
        stage = re.match(r"\w+\.network\.stages\.(\d)\.", name)
        expected = 3 - int(stage[1]) if stage else 3 if ".stem." in name else 0
        assert distance == expected, name


def test_distances_of_a_resnet_count_stages_from_the_last() -> None:
    for name, _, distance in make_classifier("test_resnet").distances():
        layer = re.match(r"\w+\.network\.layer(\d)\.", name)
        expected = 0 if name.startswith("head.") else 4 - int(layer[1]) if layer else 4
        assert distance == expected, name


@pytest.mark.parametrize("name", NETWORKS)
def test_distances_cover_every_parameter_from_stem_to_head(name: str) -> None:
    classifier = make_classifier(name)
    found = list(classifier.distances())
    assert [key for key, _, _ in found] == [key for key, _ in classifier.named_parameters()]
    assert all(value is own for (_, value, _), own in zip(found, classifier.parameters(), strict=True))
    farthest = len(stage_modules(classifier.stages.network)) - 1
    assert found[0][2] == farthest
    assert {distance for key, _, distance in found if key.startswith("head.")} == {0}
    assert {distance for _, _, distance in found} == set(range(farthest + 1))
    in_order = [distance for _, _, distance in found]
    assert in_order == sorted(in_order, reverse=True)


def test_distances_of_tokens_and_positions_are_those_of_the_first_layer() -> None:
    found = {
        name.rpartition(".network.")[2]: distance
        for name, _, distance in make_classifier("test_vit").distances()
    }
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"):
        assert found[name] == 5
    for n in range(6):
        assert found[f"blocks.{n}.attn.qkv.weight"] == 5 - n


@pytest.mark.parametrize("name", ["test_convnext", "test_resnet", "test_efficientnet"])
def test_distances_of_trainable_stages_are_those_of_the_whole_network(name: str) -> None:
    whole = {key: distance for key, _, distance in make_classifier(name).distances()}
    n_stages = len(stage_modules(shared_backbone(name).network))
    for n_frozen in range(1, n_stages):
        classifier = make_classifier(name, n_frozen=n_frozen)
        for layer in classifier.stages.modules():
            if isinstance(layer, nn.Conv2d) and layer.groups > 1:
                layer.requires_grad_(False)
        found = {key: distance for key, _, distance in classifier.distances()}
        trained = [key for key, value in classifier.named_parameters() if value.requires_grad]
        assert list(found) == trained
        assert found == {key: whole[key] for key in trained}
        assert max(found.values()) == n_stages - 1 - n_frozen


@pytest.fixture(scope="module")
def head() -> LinearHead:
    rng = np.random.default_rng(0)
    return LinearHead(
        weight=rng.normal(size=(5, 700)).astype(np.float32), bias=rng.normal(size=5).astype(np.float32)
    )


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(60, 700)).astype(np.float32)


def test_head_logits_are_a_linear_map(head: LinearHead, features: np.ndarray) -> None:
    expected = features.astype(np.float64) @ head.weight.astype(np.float64).T + head.bias
    found = head.logits(features)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_head_logits_do_not_depend_on_other_rows(head: LinearHead, features: np.ndarray) -> None:
    together = head.logits(features)
    for n in (1, 2, 7, 33):
        chunks = [head.logits(features[i : i + n]) for i in range(0, 60, n)]
        np.testing.assert_array_equal(np.concatenate(chunks), together)
    np.testing.assert_array_equal(head.logits(features[::-1])[::-1], together)


def test_head_logits_do_not_depend_on_memory_layout(head: LinearHead, features: np.ndarray) -> None:
    # a head is transposed in memory after training, but not after reading a bundle
    transposed = LinearHead(weight=np.asfortranarray(head.weight), bias=head.bias)
    np.testing.assert_array_equal(transposed.logits(features), head.logits(features))
    np.testing.assert_array_equal(head.logits(np.asfortranarray(features)), head.logits(features))


def test_nan_row_does_not_affect_other_rows(head: LinearHead, features: np.ndarray) -> None:
    holes = features.copy()
    holes[3] = np.nan
    found = head.logits(holes)
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(np.delete(found, 3, 0), np.delete(head.logits(features), 3, 0))


@pytest.mark.parametrize("n_shared", [0, 200])
def test_average_heads_gives_the_mean_of_logits(head: LinearHead, n_shared: int) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(2, 60, 700)).astype(np.float32)
    second[:, :n_shared] = first[:, :n_shared]
    other = LinearHead(
        weight=rng.normal(size=(5, 700)).astype(np.float32), bias=np.arange(5, dtype=np.float32)
    )
    before = head.weight.copy()
    n_joint = 700 + 700 - n_shared
    own = np.concatenate([np.arange(n_shared), np.arange(700, n_joint)])
    joined = average_heads([head, other], [np.arange(700), own], n_joint)
    found = joined.logits(np.concatenate([first, second[:, n_shared:]], axis=1))
    np.testing.assert_allclose(found, (head.logits(first) + other.logits(second)) / 2, atol=1e-3)
    np.testing.assert_array_equal(head.weight, before)
    assert joined.bias.dtype == np.float32


@pytest.mark.parametrize("n_hidden", [None, 7])
def test_average_heads_divides_logits_by_temperature(n_hidden: int | None) -> None:
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    heads = [
        LinearHead(weight=draw(4, 30), bias=draw(4))
        if n_hidden is None
        else LinearHead(
            weight=draw(4, n_hidden),
            bias=draw(4),
            hidden_weight=draw(n_hidden, 30),
            hidden_bias=draw(n_hidden),
        )
        for _ in range(3)
    ]
    features, temperatures = draw(20, 30), [0.5, 1.0, 2.0]
    joined = average_heads(heads, [np.arange(30)] * 3, 30, temperatures)
    expected = np.mean([h.logits(features) / t for h, t in zip(heads, temperatures, strict=True)], axis=0)
    np.testing.assert_allclose(joined.logits(features), expected, atol=1e-4)
    assert joined.fits(30, 4)


def test_feature_scale_is_softened_by_the_median() -> None:
    rng = np.random.default_rng(0)
    std = np.array([1e-4, 0.5, 1.0, 2.0, 300.0, 0.0])  # the last is constant and does not count in the median
    features = (rng.normal(size=(4000, 6)) * std + [0, 5, -5, 0, 1e4, 7]).astype(np.float32)
    mean, scale = feature_scale(features)
    np.testing.assert_allclose(mean, features.mean(0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(scale, np.hypot(std, 1.0), rtol=0.05)


@pytest.mark.parametrize("value", [0.0, -3.0])
def test_feature_scale_of_constant_features_is_positive(value: float) -> None:
    mean, scale = feature_scale(np.full((5, 3), value, np.float32))
    np.testing.assert_array_equal(mean, value)
    np.testing.assert_array_equal(scale, 1)

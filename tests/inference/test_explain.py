"""Heat against hand-computed cases, planted objects and randomised weights."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from conftest import draw_of_class
from networks import draw_backbone, shared_backbone
from pixelplay.config import CamName, ComputeConfig
from pixelplay.data.transforms import Preprocessing
from pixelplay.errors import ConfigError
from pixelplay.inference.cam import sum_maps
from pixelplay.inference.explain import Explainer
from pixelplay.inference.predictor import Predictor
from pixelplay.model.backbone import Backbone
from pixelplay.model.bundle import ModelBundle, read_bundle
from pixelplay.model.classifier import LinearHead
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages

ON_CPU = ComputeConfig(device="cpu")
METHOD_NAMES: tuple[CamName, ...] = ("gradcam", "gradcam++", "layercam")


@pytest.fixture(scope="module")
def bundle(tiny_run: Path) -> ModelBundle:
    return read_bundle(str(tiny_run))


@pytest.fixture(scope="module")
def image() -> NDArray[np.uint8]:
    return np.asarray(draw_of_class("dots", 7, (96, 64)))


def with_backbone(bundle: ModelBundle, backbone: Backbone, size: int = 64) -> ModelBundle:
    """Put a bundle on another backbone, with a seeded random head."""
    images = torch.zeros(1, 3, size, size)
    n_features = backbone(images).shape[1]
    weight = np.random.default_rng(0).normal(size=(len(bundle.classes), n_features)).astype(np.float32)
    return replace(
        bundle,
        backbone=backbone,
        head=LinearHead(weight=weight, bias=np.zeros(len(weight), np.float32)),
        preprocessing=replace(bundle.preprocessing, input_size=(size, size)),
        temperature=1.0,  # not that of the run's head
    )


class OneConvolution(nn.Module):
    """A network of one 1 × 1 convolution, whose features are its pooled maps."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Conv2d(3, 2, 1, bias=False)
        self.stage.weight.data = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]).view(2, 3, 1, 1)
        self.feature_info = [{"module": "stage"}]
        self.pretrained_cfg = {"input_size": (3, 4, 4)}

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        maps = self.stage(x)
        return maps, [maps] * len(indices)

    def forward_head(self, x: Tensor, pre_logits: bool) -> Tensor:
        return x.mean(dim=(2, 3))


@pytest.fixture
def by_hand(bundle: ModelBundle) -> ModelBundle:
    """Red has weight 2 for the first class, green has weight -1."""
    head = LinearHead(
        weight=np.array([[2.0, -1.0], [0.5, 3.0]], np.float32), bias=np.array([0.3, 0.0], np.float32)
    )
    return replace(
        bundle,
        backbone=Backbone("by hand", OneConvolution(), "pooled"),
        classes=("red", "green"),
        priors=np.array([0.5, 0.5]),
        head=head,
        hflip=False,
        preprocessing=Preprocessing(input_size=(4, 4), mean=(0.0,) * 3, std=(1.0,) * 3),
    )


def test_gradcam_equals_a_hand_computed_map(by_hand: ModelBundle) -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 1] = (255, 0, 0)
    pixels[2, 3] = (102, 255, 0)
    explainer = Explainer(by_hand, compute=ON_CPU, method="gradcam")
    expected = np.zeros((4, 4), np.float32)
    expected[0, 1] = 2.0  # of [2, 3]: 2 · 0.4 − 1 < 0
    found = explainer.explain(pixels, "red")
    np.testing.assert_allclose(found.heat, expected / by_hand.temperature, atol=1e-6)
    expected[0, 1], expected[2, 3] = 0.5, 0.5 * 0.4 + 3
    found = explainer.explain(pixels, "green")
    np.testing.assert_allclose(found.heat, expected / by_hand.temperature, atol=1e-6)
    logits = np.array([0.3 + (2 * 1.4 - 1) / 16, (0.5 * 1.4 + 3) / 16]) / by_hand.temperature
    probs = np.exp(logits) / np.exp(logits).sum()
    assert (found.explained, found.explained_probability) == ("green", pytest.approx(probs[1], abs=1e-6))
    assert (found.prediction, found.probability) == ("red", pytest.approx(probs[0], abs=1e-6))


def test_explainer_is_deterministic_and_leaves_the_model_unchanged(
    bundle: ModelBundle, image: NDArray[np.uint8], tiny_run: Path
) -> None:
    explainer = Explainer(bundle, compute=ON_CPU)
    first = explainer.explain(image)
    second = explainer.explain(image)
    np.testing.assert_array_equal(first.heat, second.heat)
    predictor = Predictor(tiny_run, ComputeConfig(device="cpu", precision="fp32"))
    predictions = predictor.predict([image])
    assert first.explained == first.prediction == predictions.prediction[0]
    tolerance = 1e-3 if bundle.precision == "fp32" else 0.02
    assert first.probability == pytest.approx(predictions.probs[0].max(), abs=tolerance)
    assert all(p.grad is None for p in bundle.backbone.parameters())
    assert not any(module._forward_hooks for module in bundle.backbone.modules())


def hot_half(bundle: ModelBundle, place: str) -> tuple[float, float]:
    """Compute the fractions of heat in the left and right half of an image with a pattern in one."""
    pixels = np.full((64, 128, 3), 110, np.uint8)
    columns = slice(0, 48) if place == "left" else slice(80, 128)
    pixels[8:56, columns] = np.asarray(draw_of_class("dots", 3, (48, 48)))
    heat = Explainer(bundle, compute=ON_CPU).explain(pixels, "dots").heat
    middle, total = heat.shape[1] // 2, heat.sum()
    return heat[:, :middle].sum() / total, heat[:, middle:].sum() / total


def test_heat_is_on_a_planted_object(bundle: ModelBundle) -> None:
    assert hot_half(bundle, "left")[0] > 0.6
    assert hot_half(bundle, "right")[1] > 0.6


def similarity(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the correlation of two maps; 0 where only one of them has any heat."""
    if (first.max() > 0) != (second.max() > 0):
        return 0.0
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1])


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_heat_changes_with_randomised_weights(
    bundle: ModelBundle, image: NDArray[np.uint8], method: CamName
) -> None:
    rng = np.random.default_rng(0)
    heads = bundle.head, replace(bundle.head, weight=rng.permuted(bundle.head.weight, axis=1))
    maps = [
        Explainer(replace(bundle, head=head), compute=ON_CPU, method=method).explain(image, "dots").heat
        for head in heads
    ]
    assert maps[0].max() > 0 or method == "gradcam++"
    assert similarity(maps[0], maps[1]) < 0.9
    other = with_backbone(bundle, draw_backbone("test_convnext"), bundle.preprocessing.input_size[0])
    other = replace(other, head=bundle.head)
    found = Explainer(other, compute=ON_CPU, method=method).explain(image, "dots").heat
    assert similarity(maps[0], found) < 0.9


def test_heat_differs_between_classes(bundle: ModelBundle, image: NDArray[np.uint8]) -> None:
    explainer = Explainer(bundle, compute=ON_CPU)
    maps = [explainer.explain(image, name).heat for name in bundle.classes]
    assert all(not np.allclose(a, b) for a, b in pairwise(maps))
    probs = [explainer.explain(image, name).explained_probability for name in bundle.classes]
    assert sum(probs) == pytest.approx(1)


@pytest.mark.parametrize("features", ["stages", "pooled"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_mambaout"])
def test_every_kind_of_backbone_can_be_explained(
    bundle: ModelBundle, image: NDArray[np.uint8], name: str, features: str
) -> None:
    drawn = draw_backbone(name, features)  # type: ignore[arg-type]
    size = drawn.network.pretrained_cfg["input_size"][-1]  # type: ignore[union-attr, index]
    other = replace(with_backbone(bundle, drawn, int(size)), hflip=False)
    for method in METHOD_NAMES:
        explainer = Explainer(other, compute=ON_CPU, method=method)
        heats = np.stack([explainer.explain(image, label).heat for label in other.classes])
        assert heats.shape == (3, 64, 96)
        assert np.isfinite(heats).all()
        assert heats.min() >= 0
        assert heats.max() > 0  # for some class: with random weights others may have no heat


@pytest.mark.parametrize("name", ["test_convnext", "test_efficientnet"])
def test_every_branch_contributes_to_the_heat(
    bundle: ModelBundle, image: NDArray[np.uint8], name: str
) -> None:
    def show(bundle: ModelBundle) -> NDArray[np.float32]:
        explainer = Explainer(bundle, compute=ON_CPU, method="layercam", n_stages=2)
        return np.stack([explainer.explain(image, label).heat for label in bundle.classes])

    frozen = shared_backbone(name)
    branches = [TrainableStages(draw_backbone(name), n_frozen) for n_frozen in (2, 3, 0)]
    for i, branch in enumerate(branches):
        for values in branch.parameters():
            values.data = values.data * (1 + 0.1 * (i + 1))
    together = with_backbone(bundle, BranchedBackbone(frozen, branches).eval())
    heat = show(together)
    weight = together.head.weight.copy()
    weight[:, frozen(torch.zeros(1, 3, 64, 64)).shape[1] :] = 0
    alone = replace(together, head=replace(together.head, weight=weight))
    without = show(alone)
    assert heat.max() > 0
    assert not np.allclose(heat, without, rtol=0.05)
    plain = replace(
        alone,
        backbone=frozen,
        head=replace(alone.head, weight=np.ascontiguousarray(weight[:, weight.any(0)])),
    )
    expected = show(plain)
    np.testing.assert_allclose(without, expected, rtol=1e-3, atol=1e-3 * expected.max())


def test_ensemble_heat_is_the_mean_of_its_members(bundle: ModelBundle, image: NDArray[np.uint8]) -> None:
    """The second has another class order, input size and temperature."""
    other = with_backbone(bundle, draw_backbone("test_efficientnet"), 128)
    other = replace(other, classes=other.classes[::-1], priors=other.priors[::-1], temperature=3.0)
    together = Explainer(bundle, other, compute=ON_CPU)
    assert (together.classes, together.input_px) == (bundle.classes, bundle.preprocessing.input_size[0])
    alone = [Explainer(model, compute=ON_CPU) for model in (bundle, other)]
    for label in bundle.classes:
        found, first, second = (explainer.explain(image, label) for explainer in (together, *alone))
        assert found.heat.shape == first.heat.shape == second.heat.shape == image.shape[:2]
        np.testing.assert_allclose(found.heat, (first.heat + second.heat) / 2, rtol=1e-5)
        mean = (first.explained_probability + second.explained_probability) / 2
        assert found.explained_probability == pytest.approx(mean)
    smaller = replace(other, preprocessing=replace(other.preprocessing, input_size=(64, 64)))
    alone[1] = Explainer(smaller, compute=ON_CPU)
    found, first, second = (
        explainer.explain(image, "dots").heat
        for explainer in (Explainer(smaller, bundle, compute=ON_CPU), *alone)
    )
    assert (found.shape, second.shape) == (image.shape[:2], (43, 64))
    grown = sum_maps([torch.from_numpy(second)[None]], first.shape)[0].numpy()
    np.testing.assert_allclose(found, (first + grown) / 2, rtol=1e-4, atol=1e-6)


def test_ensemble_averages_logit_adjustments(bundle: ModelBundle, image: NDArray[np.uint8]) -> None:
    adjusted = replace(bundle, tau=50.0)  # always predicts the rarest class
    assert Explainer(adjusted, compute=ON_CPU).explain(image).prediction == "rings"
    assert Explainer(bundle, adjusted, compute=ON_CPU).explain(image).prediction == "rings"
    stranger = replace(bundle, classes=("bars", "dots", "spirals"))
    with pytest.raises(ConfigError, match=r"a and b .* knows rings, spirals"):
        Explainer(bundle, stranger, names=("a", "b"), compute=ON_CPU)


def test_mlp_head_can_be_explained(bundle: ModelBundle, image: NDArray[np.uint8]) -> None:
    head, n = bundle.head, bundle.head.weight.shape[1]
    # x = relu(x) - relu(-x) gives the same logits, and so the same map
    hidden = LinearHead(
        weight=np.hstack([head.weight, -head.weight]),
        bias=head.bias,
        hidden_weight=np.vstack([np.eye(n), -np.eye(n)]).astype(np.float32),
        hidden_bias=np.zeros(2 * n, np.float32),
    )
    plain, found = (
        Explainer(replace(bundle, head=each), compute=ON_CPU).explain(image) for each in (head, hidden)
    )
    assert found.heat.max() > 0
    np.testing.assert_allclose(found.heat, plain.heat, atol=1e-3)


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_heat_of_a_mirror_image_is_mirrored(
    bundle: ModelBundle, image: NDArray[np.uint8], method: CamName
) -> None:
    explainer = Explainer(replace(bundle, hflip=True), compute=ON_CPU, method=method)
    heat = explainer.explain(image, "dots").heat
    mirrored = explainer.explain(np.ascontiguousarray(image[:, ::-1]), "dots").heat
    np.testing.assert_allclose(mirrored[:, ::-1], heat, rtol=1e-2, atol=1e-2 * heat.max())


@pytest.mark.parametrize(
    ("size", "expected"),
    [((96, 64), (64, 96)), ((640, 320), (80, 160)), ((30, 900), (160, 5)), ((1, 2000), (160, 1))],
)
def test_heat_has_the_image_proportions(
    bundle: ModelBundle, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    pixels = np.asarray(draw_of_class("bars", 1, size))
    assert Explainer(bundle, compute=ON_CPU).explain(pixels).heat.shape == expected


def test_heat_outside_a_crop_is_zero(bundle: ModelBundle) -> None:
    cropped = replace(bundle, preprocessing=replace(bundle.preprocessing, fit="crop"))
    heat = (
        Explainer(cropped, compute=ON_CPU)
        .explain(np.asarray(draw_of_class("bars", 1, (120, 80))), "bars")
        .heat
    )
    assert heat.shape == (80, 120)
    assert heat[:, 20:100].max() > 0
    heat = heat.copy()
    heat[:, 20:100] = 0
    assert heat.max() == 0


def test_unknown_class_suggests_similar_names(bundle: ModelBundle, image: NDArray[np.uint8]) -> None:
    with pytest.raises(ConfigError, match=r"class 'dot'; did you mean 'dots'\? the model knows"):
        Explainer(bundle, compute=ON_CPU).explain(image, "dot")


def test_unknown_cam_method_is_refused(bundle: ModelBundle) -> None:
    with pytest.raises(ConfigError, match=r"method='cam' is not one of gradcam, gradcam\+\+, layercam"):
        Explainer(bundle, compute=ON_CPU, method="cam")  # type: ignore[arg-type]


class Scrambled(OneConvolution):
    """Like Hiera, outputs positions in another order than in space."""

    def forward_intermediates(self, x: Tensor, indices: list[int]) -> tuple[Tensor, list[Tensor]]:
        maps, _ = super().forward_intermediates(x, indices)
        return maps, [maps.flip(2)] * len(indices)


def test_backbone_without_feature_maps_is_refused(by_hand: ModelBundle) -> None:
    scrambled, nameless = Scrambled(), OneConvolution()
    nameless.feature_info = [{"module": "elsewhere"}]
    for network in (scrambled, nameless):
        backbone = Backbone("odd", network, "pooled")
        with pytest.raises(ConfigError, match="odd cannot be explained: none of its last 1 stages"):
            Explainer(replace(by_hand, backbone=backbone), compute=ON_CPU)


def test_constant_image_can_be_explained(bundle: ModelBundle) -> None:
    heat = Explainer(bundle, compute=ON_CPU).explain(np.asarray(Image.new("RGB", (50, 40)))).heat
    assert np.isfinite(heat).all()

"""One network from prepared pixels to predictions, with the same results as `Predictor`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixelplay.array_types import Float32Array, Float64Array, IntArray
from pixelplay.config import ComputeConfig
from pixelplay.data.transforms import Preprocessing
from pixelplay.errors import ConfigError
from pixelplay.evaluation.novelty import MIN_DISTANCE, Novelty
from pixelplay.inference.predictor import ClassAlignment
from pixelplay.model.bundle import ModelBundle
from pixelplay.model.classifier import LinearHead
from pixelplay.model.features import FeatureExtractor

# of the reference that exported models are compared with, and of the network that is exported
REFERENCE_COMPUTE = ComputeConfig(device="cpu", precision="fp32")


class ClassifierGraph(nn.Module):
    """A classifier, or an ensemble that averages probabilities, as one network in fp32.

    Args:
        bundles: M models with the same preprocessing; they are not modified.
        names: of the models in error messages.

    Attributes:
        classes: (K,) names in the order of the first model.
        preprocessing: of the pixels.

    Raises:
        ConfigError: the models have different classes, or need differently prepared pixels.
    """

    def __init__(self, bundles: Sequence[ModelBundle], names: Sequence[str]) -> None:
        super().__init__()
        alignment = ClassAlignment(bundles, names)
        _check_same_pixels([bundle.preprocessing for bundle in bundles], names)
        self.classes = alignment.classes
        self.preprocessing = bundles[0].preprocessing
        self.members = nn.ModuleList(
            _Member(bundle, order) for bundle, order in zip(bundles, alignment.orders, strict=True)
        )
        self.novelty = _NoveltyScale(bundles[0].novelty)
        self.adjustment = _buffer(alignment.adjustment)  # (K,)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classify pixels (B, H, W, 3) uint8.

        Returns:
            probs (B, K) float32, prediction (B,) int64 in [0, K), novelty (B,) float32 in [0, 1].
        """
        outputs = [member(pixels) for member in self.members]
        novelty = self.novelty(*outputs[0][:2])
        log_probs = torch.stack([output[2] for output in outputs])  # (M, B, K)
        if len(outputs) > 1:
            probs = log_probs.exp().mean(dim=0)
            mean = probs.log()
        else:
            probs, mean = log_probs[0].exp(), log_probs[0]
        return probs, (mean - self.adjustment).argmax(dim=1), novelty


class _Member(nn.Module):
    """One model: pixels → features, logits in its own class order, log probabilities in the common one."""

    def __init__(self, bundle: ModelBundle, order: IntArray) -> None:
        super().__init__()
        extractor = FeatureExtractor(
            bundle.backbone,
            bundle.preprocessing,
            hflip=bundle.hflip,
            device="cpu",
            precision="fp32",
            training_precision=bundle.precision,
        )
        self.backbone = extractor.backbone
        self.hflip, self.temperature = bundle.hflip, bundle.temperature
        self.mean = torch.tensor(bundle.preprocessing.mean).mul(255).view(1, 3, 1, 1)
        self.std = torch.tensor(bundle.preprocessing.std).mul(255).view(1, 3, 1, 1)
        self.head = _make_head(bundle.head)
        self.order = torch.from_numpy(order)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images = (pixels.permute(0, 3, 1, 2).float() - self.mean) / self.std  # (B, 3, H, W)
        if self.hflip:
            views = self.backbone(torch.cat([images, images.flip(3)]))  # (2 B, D)
            features = views.unflatten(0, (2, -1)).mean(dim=0)
        else:
            features = self.backbone(images)  # (B, D)
        logits = self.head(features)  # (B, K)
        return features, logits, (logits / self.temperature).log_softmax(dim=1)[:, self.order]


class _NoveltyScale(nn.Module):
    """`Novelty.measure` as a network."""

    def __init__(self, novelty: Novelty) -> None:
        super().__init__()
        references = torch.from_numpy(novelty.references).float()  # (R, D)
        self.n_features = len(novelty.mean)
        self.mean, self.scale = torch.from_numpy(novelty.mean), torch.from_numpy(novelty.scale)
        self.references, self.lengths = references.T.contiguous(), references.square().sum(dim=1)
        self.centre, self.spread = _buffer(novelty.centre), _buffer(novelty.spread)
        self.scores = _buffer(novelty.scores)  # (n,) ascending

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        scaled = (features[:, : self.n_features] - self.mean) / self.scale
        squares = scaled.square().sum(dim=1, keepdim=True) + self.lengths - 2 * scaled @ self.references
        distances = (squares.amin(dim=1).clamp(min=0) / self.n_features).sqrt()  # (B,)
        signals = torch.stack([distances.clamp(min=MIN_DISTANCE).log(), -logits.logsumexp(dim=1)], dim=1)
        scores = ((signals - self.centre) / self.spread).sum(dim=1)  # (B,)
        beyond = (scores - self.scores[-1]).clamp(min=0)
        return 1 - (1 - self._fraction_below(scores)) * (-beyond).exp()

    def _fraction_below(self, scores: Tensor) -> Tensor:
        """Interpolate linearly between the held-out scores, as `numpy.interp` does."""
        n = len(self.scores)
        if n == 1:
            return torch.full_like(scores, 1 / 2)
        n_below = (scores[:, None] >= self.scores).sum(dim=1)  # (B,)
        left = (n_below - 1).clamp(0, n - 2)
        low, high = self.scores[left], self.scores[left + 1]
        # equal scores have no slope; numpy.interp then takes the upper of them
        share = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return (left + 1 + share) / (n + 1)


def _make_head(head: LinearHead) -> nn.Sequential:
    """Build the linear layers of a head."""
    layers: list[nn.Module] = []
    if head.hidden_weight is not None and head.hidden_bias is not None:
        layers += [_make_linear(head.hidden_weight, head.hidden_bias), nn.ReLU()]
    return nn.Sequential(*layers, _make_linear(head.weight, head.bias))


def _make_linear(weight: Float32Array, bias: Float32Array) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(weight))
    layer.bias.copy_(torch.from_numpy(bias))
    return layer


def _buffer(values: Float64Array) -> Tensor:
    return torch.from_numpy(values).float()


def _check_same_pixels(preprocessings: Sequence[Preprocessing], names: Sequence[str]) -> None:
    """Raise ConfigError unless all models see the same pixels; mean and std are applied inside."""
    for name, own in zip(names, preprocessings, strict=True):
        keys = ("input_size", "interpolation", "fit", "max_value", *(["mean"] if own.fit == "pad" else []))
        if different := [key for key in keys if getattr(own, key) != getattr(preprocessings[0], key)]:
            raise ConfigError(
                f"{names[0]} and {name} cannot be exported as one model: their preprocessing differs in "
                f"{', '.join(different)}; export them separately"
            )

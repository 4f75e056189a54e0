"""Small models of every kind that can be exported."""

from collections.abc import Callable

import numpy as np

from networks import shared_backbone
from pixelplay.data.transforms import Preprocessing
from pixelplay.evaluation.conformal import HeldOutScores
from pixelplay.evaluation.novelty import fit_novelty
from pixelplay.model.backbone import Backbone
from pixelplay.model.bundle import ModelBundle
from pixelplay.model.classifier import LinearHead
from pixelplay.model.features import FeatureExtractor
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages

PX = {"test_convnext": 64, "test_vit": 160, "test_efficientnet": 64}
N_HIDDEN = 16


def _fine_tuned(backbone: Backbone) -> Backbone:
    """Add two branches whose last stages differ from the frozen ones."""
    branches = [TrainableStages(backbone, n) for n in (2, 3)]
    for scale, branch in zip((1.1, 0.9), branches, strict=True):
        for value in branch.parameters():
            value.data *= scale
    return BranchedBackbone(backbone, branches).eval()


def make_bundle(
    name: str = "test_convnext",
    *,
    fine_tuned: bool = False,
    mlp: bool = False,
    classes: tuple[str, ...] = ("bars", "dots", "rings"),
    **changes: object,
) -> ModelBundle:
    """Build a model with a random head whose predictions and novelty vary between images."""
    backbone = shared_backbone(name, "pooled" if mlp else "stages")
    if fine_tuned:
        backbone = _fine_tuned(backbone)
    preprocessing = Preprocessing(input_size=(PX[name], PX[name]), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    rng = np.random.default_rng(0)
    extractor = FeatureExtractor(backbone, preprocessing, hflip=True, device="cpu", precision="fp32")
    noise = rng.integers(0, 256, (24, 1, 1, 3)) + rng.normal(0, 20, (24, *preprocessing.input_size, 3))
    pixels = noise.clip(0, 255).astype(np.uint8)
    features = np.concatenate([extractor(pixels[i : i + 8]) for i in range(0, 24, 8)])  # (24, D)
    scale = features.std(axis=0) + features.std()
    n_hidden = N_HIDDEN if mlp else 0

    def weights(n: int, inputs: int) -> np.ndarray:
        return (rng.normal(size=(n, inputs)) / np.sqrt(inputs)).astype(np.float32)

    first = weights(n_hidden or len(classes), features.shape[1]) / scale.astype(np.float32) * 3
    offset = -first @ features.mean(axis=0)
    head = LinearHead(weight=first, bias=offset)
    if mlp:
        head = LinearHead(
            weight=weights(len(classes), n_hidden) * 3,
            bias=np.zeros(len(classes), np.float32),
            hidden_weight=first,
            hidden_bias=offset,
        )
    folds = np.arange(24) % 2
    settings: dict[str, object] = {
        "backbone": backbone,
        "classes": classes,
        "preprocessing": preprocessing,
        "hflip": True,
        "precision": "fp32",
        "temperature": 1.3,
        "tau": 0.0,
        "priors": np.array([0.6, 0.3, 0.1]),
        "metric": "macro_f1",
        "trained_on": frozenset(),
        "head": head,
        "made_by": {"pixelplay": "0", "weights": "random", "weights_licence": "none"},
        "held_out": HeldOutScores(
            split="val",
            lac=np.linspace(0, 1, 40),
            aps=np.linspace(0, 1, 40),
            confidence=np.linspace(1, 0, 40),
            is_right=np.arange(40) < 30,
        ),
        "novelty": fit_novelty(features, folds, features, folds, head.logits(features)),
    }
    return ModelBundle(**{**settings, **changes})  # type: ignore[arg-type]


KINDS: dict[str, Callable[[], ModelBundle]] = {
    "linear probe": make_bundle,
    "no hflip": lambda: make_bundle(hflip=False),
    "tau": lambda: make_bundle(tau=0.3),
    "trained in bf16": lambda: make_bundle(precision="bf16"),
    "fine-tuned": lambda: make_bundle(fine_tuned=True, tau=0.5),
    "original recipe": lambda: make_bundle(mlp=True),
    "vit": lambda: make_bundle("test_vit"),
    "efficientnet": lambda: make_bundle("test_efficientnet", tau=0.5),
}

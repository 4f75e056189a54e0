"""Bundles + image → where in it the evidence for a class lies."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from pixelplay.arrays import Float32Array, Float64Array, UInt8Array
from pixelplay.config import CamName, ComputeConfig, check_choice
from pixelplay.data.dataset import ImageDataset
from pixelplay.data.decode import decode_image, silence_pillow
from pixelplay.data.transforms import Preprocessing, crop_box, eval_transform
from pixelplay.errors import ConfigError, ImageError
from pixelplay.evaluation.calibration import natural_probs
from pixelplay.inference.cam import CAM_METHODS, CamMethod, sum_maps
from pixelplay.inference.predictor import align_classes
from pixelplay.model.bundle import ModelBundle
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import pick_device
from pixelplay.model.features import Normalizer
from pixelplay.model.stage_hooks import StageHooks
from pixelplay.text import name_some, suggest

DEFAULT_METHOD: CamName = "layercam"  # by benchmarks/faithfulness.py, and so are the stages
DEFAULT_STAGES = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Where a model sees a class in one image.

    Attributes:
        heat: (h, w) float32 >= 0, evidence for the class over the whole upright image, whose
            proportions it has; its long side is at most the network's input size. In units of the calibrated
            logit, to be compared within a method. All 0 where no place speaks for the class by itself.
        label: the class explained.
        probability: of that class.
        decided: the class that the model decides for.
        decided_probability: of that one.
    """

    heat: Float32Array
    label: str
    probability: float
    decided: str
    decided_probability: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ExplainedImage:
    """One image, and what can be said of it.

    Attributes:
        path: as the user named it.
        pixels: (H, W, 3) uint8, upright; none, (0, 0, 3), where it could not be read.
        explanation: None where it could not be read.
        error: why there is none.
    """

    path: str
    pixels: UInt8Array
    explanation: Explanation | None = None
    error: ImageError | None = None


class Explainer:
    """One trained classifier, or several that answer together, that show where they look.

    It computes in fp32 whatever the models were learned in: probabilities are within 0.02 of `Predictor`'s.

    Args:
        bundles: the models; they are left as they are.
        names: (M,) what a user calls them.
        compute: device; the rest plays no part.
        method: how gradients become a map (default: the most faithful in benchmarks/faithfulness.py).
        n_stages: the last stages of each network whose maps are added up.

    Raises:
        ConfigError: unknown method, a backbone whose stages give no maps, or models that know
            different classes.
    """

    def __init__(
        self,
        *bundles: ModelBundle,
        names: Sequence[str] | None = None,
        compute: ComputeConfig | None = None,
        method: CamName | None = None,
        n_stages: int = DEFAULT_STAGES,
    ) -> None:
        method = method or DEFAULT_METHOD
        check_choice("method", method, get_args(CamName))
        device = pick_device((compute or ComputeConfig()).device)
        self._alignment = align_classes(bundles, names or [f"model {i + 1}" for i in range(len(bundles))])
        self._models = [_Model(bundle, CAM_METHODS[method], n_stages, device) for bundle in bundles]

    @property
    def classes(self) -> tuple[str, ...]:
        """(K,) class names."""
        return self._alignment.classes

    @property
    def input_size(self) -> int:
        """Side of the largest square that a network sees, px."""
        return max(model.input_size for model in self._models)

    def check_label(self, label: str) -> None:
        """Raise for a class that the model does not know.

        Raises:
            ConfigError: it does not; the nearest names are given.
        """
        if label not in self.classes:
            hint = suggest(label, self.classes) or ";"
            raise ConfigError(f"class {label!r} is unknown{hint} the model knows {name_some(self.classes)}")

    def explain(self, pixels: UInt8Array, label: str | None = None) -> Explanation:
        """Explain one image.

        Args:
            pixels: (H, W, 3) uint8, upright, as `decode_image` gives them.
            label: the class to explain (default: the one that is decided for).

        Raises:
            ConfigError: the model knows no such class; the nearest names are given.
        """
        if label is not None:
            self.check_label(label)
        sights = [model.see(pixels) for model in self._models]
        probs = self._alignment.mean([sight.probs[None] for sight in sights])  # (1, K)
        decided = int(self._alignment.decide(probs)[0])
        k = decided if label is None else self.classes.index(label)
        heats = [
            model.heat_of(sight, int(order[k]), pixels.shape[:2])
            for model, sight, order in zip(self._models, sights, self._alignment.orders, strict=True)
        ]
        return Explanation(
            heat=_mean_of(heats),
            label=self.classes[k],
            probability=float(probs[0, k]),
            decided=self.classes[decided],
            decided_probability=float(probs[0, decided]),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sight:
    """What a model makes of one image: it can be asked for the evidence for one class.

    Attributes:
        probs: (K,) calibrated, in the model's order.
        logits: (K,) calibrated, that gradients can be taken of.
        outputs: of the stages that are watched.
    """

    probs: Float64Array
    logits: Tensor
    outputs: Sequence[Tensor]


class _Model:
    """One model, watched."""

    def __init__(self, bundle: ModelBundle, see: CamMethod, n_stages: int, device: str) -> None:
        self._bundle, self._see = bundle, see
        self._backbone = copy.deepcopy(bundle.backbone).eval().requires_grad_(False).to(device)
        self._watch = StageHooks(self._backbone, n_stages, bundle.preprocessing.input_size)
        self._normalize = Normalizer(bundle.preprocessing, device)

    @property
    def input_size(self) -> int:
        """Side of the square that the network sees, px."""
        return self._bundle.preprocessing.input_size

    def see(self, pixels: UInt8Array) -> _Sight:
        """Answer for an image (H, W, 3), and remember how."""
        images = self._views_of(pixels)  # (B, 3, S, S)
        with torch.enable_grad(), self._watch() as outputs:
            features: Tensor = self._backbone(images)  # (B, D)
            logits = _apply_head(self._bundle.head, features.mean(dim=0)) / self._bundle.temperature  # (K,)
        probs = natural_probs(logits.detach().cpu().numpy()[None], 1.0)[0]
        return _Sight(probs=probs, logits=logits, outputs=outputs)

    def heat_of(self, sight: _Sight, k: int, shape: tuple[int, ...]) -> Float32Array:
        """Evidence (h, w) for class k over an image of the shape (H, W)."""
        gradients = torch.autograd.grad(
            sight.logits[k], sight.outputs, allow_unused=True, materialize_grads=True
        )
        heat = self._add_views(sight.outputs, gradients)  # (S, S)
        return _lay_over_photograph(heat, shape, self._bundle.preprocessing)

    def _views_of(self, pixels: UInt8Array) -> Tensor:
        """The image as the network sees it, and its mirror image where the model answers for both."""
        view = eval_transform(pixels, self._bundle.preprocessing)
        images = self._normalize(torch.from_numpy(view.copy())[None])  # (1, 3, S, S)
        if self._bundle.hflip:
            images = torch.cat([images, images.flip(3)])
        return images.requires_grad_()  # frozen weights make no gradient of their own

    def _add_views(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
        """Sum over stages and views of what each contributes, without negative parts: (S, S)."""
        maps = self._watch.as_maps([output.detach() for output in outputs])
        gradients = self._watch.as_maps(gradients)
        densities = [self._see(a, g).cpu() for a, g in zip(maps, gradients, strict=True)]
        views = sum_maps(densities, (self.input_size, self.input_size))  # (B, S, S)
        if self._bundle.hflip:
            views = torch.stack([views[0], views[1].flip(1)])
        return views.sum(dim=0).relu()


def explain_all(
    explainer: Explainer, datasets: Sequence[ImageDataset], label: str | None
) -> Iterator[ExplainedImage]:
    """Explain images one after another, in order, whatever is wrong with some of them."""
    for dataset in datasets:
        for path in dataset.paths:
            yield _explain_file(explainer, dataset, path, label)


def _explain_file(
    explainer: Explainer, dataset: ImageDataset, path: str, label: str | None
) -> ExplainedImage:
    name = dataset.storage.display_path(path)
    try:
        data = dataset.storage.read(path)
        with silence_pillow():
            pixels = decode_image(data, path=path, target_px=explainer.input_size)
    except ImageError as error:
        return ExplainedImage(path=name, pixels=np.empty((0, 0, 3), np.uint8), error=error.detached())
    return ExplainedImage(path=name, pixels=pixels, explanation=explainer.explain(pixels, label))


def _mean_of(heats: Sequence[Float32Array]) -> Float32Array:
    """Mean of maps (h, w) of one image, in the size of the largest."""
    largest = max(heats, key=lambda heat: heat.shape)
    grown = [sum_maps([torch.from_numpy(heat)[None]], largest.shape)[0].numpy() for heat in heats]
    return np.asarray(np.mean(grown, axis=0, dtype=np.float32))


def _apply_head(head: LinearHead, features: Tensor) -> Tensor:
    """Logits (K,) of features (D,), with their gradient."""
    arrays = {name: torch.from_numpy(a).to(features.device) for name, a in head.arrays().items()}
    if "hidden_weight" in arrays:
        features = (arrays["hidden_weight"] @ features + arrays["hidden_bias"]).relu()
    return arrays["weight"] @ features + arrays["bias"]


def _lay_over_photograph(heat: Tensor, shape: tuple[int, ...], preprocessing: Preprocessing) -> Float32Array:
    """Bring a map of the network's square (S, S) into the proportions of the image (H, W).

    What a centre crop hides from the network gives no evidence.
    """
    height, width = shape
    scale = min(1.0, preprocessing.input_size / max(height, width))
    left, top, right, bottom = (round(x * scale) for x in crop_box((width, height), preprocessing))
    whole = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), np.float32)  # (h, w)
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    seen = sum_maps([heat[None]], (bottom - top, right - left))[0]
    whole[top:bottom, left:right] = seen.clamp(min=0).cpu().numpy()
    return whole

"""Explainer: where in an image the evidence for a class is."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from pixelplay.array_types import Float32Array, Float64Array, UInt8Array
from pixelplay.config import CamName, ComputeConfig, check_choice
from pixelplay.data.transforms import Preprocessing, eval_transform, fit_boxes
from pixelplay.errors import ConfigError
from pixelplay.evaluation.calibration import temperature_softmax
from pixelplay.inference.cam import CAM_METHODS, CamMethod, sum_maps
from pixelplay.inference.predictor import ClassAlignment
from pixelplay.model.bundle import ModelBundle
from pixelplay.model.classifier import LinearHead
from pixelplay.model.device import resolve_device_name
from pixelplay.model.features import Normalizer
from pixelplay.model.stage_hooks import StageHooks
from pixelplay.text import name_some, suggest

# most faithful method and number of stages in benchmarks/faithfulness.py
DEFAULT_METHOD: CamName = "layercam"
DEFAULT_STAGES = 5


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Evidence for a class in one image.

    Attributes:
        heat: (h, w) float32 >= 0, evidence over the upright image, with its aspect ratio; the long side
            is at most the network's input size. In units of the calibrated logit, comparable within one
            method. All 0 if no region supports the class.
        prediction, probability: the predicted class and its probability.
        explained, explained_probability: the class the heat is about and its probability.
    """

    heat: Float32Array
    prediction: str
    probability: float
    explained: str
    explained_probability: float


class Explainer:
    """Shows which regions of an image support a class, for one classifier or an ensemble.

    It computes in fp32 whatever the models' precision; probabilities are within 0.02 of `Predictor`'s, which
    `pixelplay.explain` reports.

    Args:
        bundles: the models; they are not modified.
        names: of the models in error messages.
        compute: only its device is used.
        method: class activation map (default: the most faithful one).
        n_stages: number of last stages of each network whose maps are added.

    Attributes:
        classes: (K,) class names.
        input_px: longest side of the network inputs.
        max_value: value of white in images with more than 8 bits, for the first model.

    Raises:
        ConfigError: unknown method, a backbone without feature maps, or models with different classes.
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
        device = resolve_device_name((compute or ComputeConfig()).device)
        self._alignment = ClassAlignment(bundles, names or [f"model {i + 1}" for i in range(len(bundles))])
        self._models = [_Model(bundle, CAM_METHODS[method], n_stages, device) for bundle in bundles]
        self.classes = self._alignment.classes
        self.max_value = bundles[0].preprocessing.max_value
        self.input_px = max(max(model.input_size) for model in self._models)

    def check_class(self, name: str) -> None:
        """Raise ConfigError with the nearest names unless the model knows a class."""
        if name not in self.classes:
            hint = suggest(name, self.classes) or ";"
            raise ConfigError(f"unknown class {name!r}{hint} the model knows {name_some(self.classes)}")

    def explain(self, pixels: UInt8Array, class_name: str | None = None) -> Explanation:
        """Explain one image.

        Args:
            pixels: (H, W, 3) uint8, upright, as returned by `decode_image`.
            class_name: class to explain (default: the predicted one); errors as in `check_class`.
        """
        if class_name is not None:
            self.check_class(class_name)
        outputs = [model.forward(pixels) for model in self._models]
        probs, pred = self._alignment.predict([own[None] for own, _, _ in outputs])  # (1, K), (1,)
        predicted = int(pred[0])
        k = predicted if class_name is None else self.classes.index(class_name)
        heats = [
            model.heat(logits[i], stages, pixels.shape[:2])
            for model, (_, logits, stages), i in zip(
                self._models, outputs, self._alignment.orders[:, k].tolist(), strict=True
            )
        ]
        # averaged at the size of the largest
        size = max(heat.shape for heat in heats)
        resized = [sum_maps([torch.from_numpy(heat)[None]], size)[0].numpy() for heat in heats]
        return Explanation(
            heat=np.asarray(np.mean(resized, axis=0, dtype=np.float32)),
            prediction=self.classes[predicted],
            probability=float(probs[0, predicted]),
            explained=self.classes[k],
            explained_probability=float(probs[0, k]),
        )


class _Model:
    """One model with hooks on its last stages."""

    def __init__(self, bundle: ModelBundle, method: CamMethod, n_stages: int, device: str) -> None:
        self.input_size = bundle.preprocessing.input_size
        self._bundle, self._method = bundle, method
        self._backbone = copy.deepcopy(bundle.backbone).eval().requires_grad_(False).to(device)
        self._hooks = StageHooks(self._backbone, n_stages, self.input_size)
        self._normalize = Normalizer(bundle.preprocessing, device)

    def forward(self, pixels: UInt8Array) -> tuple[Float64Array, Tensor, list[Tensor]]:
        """Compute probabilities (K,), differentiable logits (K,), stage outputs."""
        view = eval_transform(pixels, self._bundle.preprocessing)
        images = self._normalize(torch.from_numpy(view.copy())[None])  # (1, 3, S_h, S_w)
        if self._bundle.hflip:
            images = torch.cat([images, images.flip(3)])  # (2, 3, S_h, S_w)
        images.requires_grad_()  # all weights are frozen, so gradients start at the images
        with torch.enable_grad(), self._hooks() as outputs:
            features: Tensor = self._backbone(images)  # (B, D)
            logits = _apply_head(self._bundle.head, features.mean(dim=0)) / self._bundle.temperature  # (K,)
        probs = temperature_softmax(logits.detach().cpu().numpy()[None], 1.0)[0]
        return probs, logits, list(outputs.values())

    def heat(self, logit: Tensor, outputs: Sequence[Tensor], shape: tuple[int, ...]) -> Float32Array:
        """Compute the evidence (h, w) for a logit over an image of the shape (H, W)."""
        gradients = torch.autograd.grad(logit, outputs, allow_unused=True, materialize_grads=True)
        maps = self._hooks.as_maps([output.detach() for output in outputs])
        pairs = zip(maps, self._hooks.as_maps(gradients), strict=True)
        densities = [self._method(a, g).cpu() for a, g in pairs]  # (B, H_s, W_s) of each stage
        views = sum_maps(densities, self.input_size)  # (B, S_h, S_w)
        if self._bundle.hflip:
            views = torch.stack([views[0], views[1].flip(1)])
        heat = views.sum(dim=0).relu()  # (S_h, S_w)
        return _map_to_image(heat, shape, self._bundle.preprocessing)


def _apply_head(head: LinearHead, features: Tensor) -> Tensor:
    """Compute differentiable logits (K,) of features (D,)."""
    arrays = {name: torch.from_numpy(a).to(features.device) for name, a in head.arrays().items()}
    if "hidden_weight" in arrays:
        features = (arrays["hidden_weight"] @ features + arrays["hidden_bias"]).relu()
    return arrays["weight"] @ features + arrays["bias"]


def _map_to_image(heat: Tensor, shape: tuple[int, ...], preprocessing: Preprocessing) -> Float32Array:
    """Map the heat of the network's input (S_h, S_w) onto an image (H, W): (h, w).

    Pixels outside a crop have no heat; heat on borders is dropped.
    """
    height, width = shape
    source, (x0, y0, x1, y1) = fit_boxes(shape, preprocessing)
    scale = min(1.0, max(preprocessing.input_size) / max(height, width))
    left, top, right, bottom = (round(x * scale) for x in source)
    canvas = np.zeros((max(1, round(height * scale)), max(1, round(width * scale))), np.float32)  # (h, w)
    bottom, right = max(bottom, top + 1), max(right, left + 1)
    visible = sum_maps([heat[None, y0:y1, x0:x1]], (bottom - top, right - left))[0]
    canvas[top:bottom, left:right] = visible.clamp(min=0).cpu().numpy()
    return canvas

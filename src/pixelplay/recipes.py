"""Values of all settings together: PixelPlay's own are the defaults, the original recipe differs."""

from collections.abc import Callable
from typing import Any, Literal

from pixelplay.config import AugmentConfig, FinetuneConfig, TrainConfig

Recipe = Literal["pixelplay", "pixelplay25"]


def original_recipe(**settings: Any) -> TrainConfig:
    """Settings of PixelPlay's first competition entry; those given replace them, `finetune` as a whole.

    ConvNeXt-Tiny fine-tuned in full under a two-layer head, weighted sampling over classes raised
    to equal size, label smoothing, AdamW with cosine annealing, early stopping on validation loss.
    """
    recipe: dict[str, Any] = {
        "tune": "full",
        "backbone": "convnext_tiny.in12k_ft_in1k",
        "imbalance": "sampler",
        "min_per_class": "largest",
        "finetune": FinetuneConfig(
            start="random",
            head="mlp",
            epochs=30,
            lr=1e-4,
            head_lr=1e-4,
            layer_decay=1.0,
            weight_decay=0.01,
            warmup_frac=0.0,
            ema_frac=0.0,
            label_smoothing=0.1,
            dropout=0.6,
            clip_norm=None,
            focus=0.0,
            with_probe="off",
            refit_epochs=0,
            patience=3,
        ),
        "augmenting": AugmentConfig(augment=("crop", "rotation"), crop_scale=0.5),
    }
    return TrainConfig(**{**recipe, **settings})


RECIPES: dict[Recipe, Callable[..., TrainConfig]] = {"pixelplay": TrainConfig, "pixelplay25": original_recipe}

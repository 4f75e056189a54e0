"""TrainedClassifier: the result of a training, from the linear probe to the ensemble of all folds."""

from dataclasses import dataclass, field
from typing import Any

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.training.plan_file import FinetunePlan
from pixelplay.training.settings_conflicts import TrainedMethod


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedClassifier:
    """Backbone and head, and the held-out logits that temperature and tau are fitted on."""

    finetune: TrainedMethod  # "none" (linear probe), "partial" or "full"
    backbone: Backbone  # with its trained layers
    head: LinearHead  # features → natural-prior logits
    trained_on: IntArray  # positions of all images it was fitted on
    prior_rows: IntArray  # positions whose class frequencies the logits have
    held_out: IntArray  # (n,) positions of the images that selected its settings
    logits: Float32Array  # (n, K) with natural priors; NaN where an image could not be held out
    folds: IntArray | None  # (n,) fold in which each was held out; None for a validation split
    chosen: dict[str, dict[str, Any]]  # setting → its value and the evidence for it
    history: list[dict[str, float]] = field(default_factory=list)  # also of a rejected fine-tuning
    plan: FinetunePlan | None = None  # None for a linear probe

    @property
    def held_out_split(self) -> str:
        """Where `logits` come from: "oof" or "val"."""
        return "val" if self.folds is None else "oof"

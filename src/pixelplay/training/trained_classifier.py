"""TrainedClassifier: the result of a training, from the linear probe to the ensemble of all folds."""

from dataclasses import dataclass, field
from typing import Any

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.training.compatibility import TrainedMethod
from pixelplay.training.finetune_plan import FinetunePlan


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedClassifier:
    """Backbone and head, and the held-out logits that temperature and tau are fitted on.

    Attributes:
        finetune: how it was trained: "none" (linear probe), "partial" or "full".
        backbone: the network with its trained layers.
        head: features → natural-prior logits.
        trained_on: positions of all images it was fitted on.
        prior_rows: positions whose class frequencies the logits have.
        held_out: (n,) positions of the images that selected its settings.
        logits: (n, K) of those, with natural priors; NaN where an image could not be held out.
        folds: (n,) fold in which each was held out; None for a validation split.
        chosen: setting → its value and the evidence for it.
        history: rows of history.csv; for a linear probe those of a fine-tuning that was not better.
        plan: what the fine-tuning did; None for a linear probe.
    """

    finetune: TrainedMethod
    backbone: Backbone
    head: LinearHead
    trained_on: IntArray
    prior_rows: IntArray
    held_out: IntArray
    logits: Float32Array
    folds: IntArray | None
    chosen: dict[str, dict[str, Any]]
    history: list[dict[str, float]] = field(default_factory=list)
    plan: FinetunePlan | None = None

    @property
    def held_out_split(self) -> str:
        """Where `logits` come from: "oof" or "val"."""
        return "val" if self.folds is None else "oof"

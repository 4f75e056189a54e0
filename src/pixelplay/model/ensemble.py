"""Combine several classifiers on one frozen backbone into one network and one head.

A mean of logits is linear in the concatenated features of all members. Shared stages are computed once, and
prediction needs no support for ensembles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelplay.array_types import IntArray
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead, average_heads
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages


@dataclass(frozen=True, kw_only=True, eq=False)
class EnsembleMember:
    """One classifier of an ensemble: its differences from the frozen backbone.

    Its own stages replace the frozen ones or, if it keeps those, come in addition. The head is on the frozen
    features, or only those from before the split, followed by those of its own stages.
    """

    branches: list[TrainableStages]  # at most one unless `keeps_frozen`
    head: LinearHead
    keeps_frozen: bool


def ensemble_member(backbone: Backbone, head: LinearHead, n_frozen: int | None) -> EnsembleMember:
    """Describe a classifier as an ensemble member.

    Args:
        backbone: the frozen one, one with branches, or one with fine-tuned last stages.
        n_frozen: number of stages before the fine-tuned ones if these replace the frozen ones, else None.
    """
    if n_frozen is not None:
        return EnsembleMember(branches=[TrainableStages(backbone, n_frozen)], head=head, keeps_frozen=False)
    branches = backbone.branches if isinstance(backbone, BranchedBackbone) else []
    return EnsembleMember(branches=branches, head=head, keeps_frozen=True)


def average_members(
    frozen: Backbone, members: Sequence[EnsembleMember], temperatures: Sequence[float] | None = None
) -> tuple[Backbone, LinearHead]:
    """Build one network and one head that compute the mean of all logits.

    All members share the `frozen` backbone; their logits are divided by their temperatures, (M,) > 0.
    """
    n_base = frozen.n_features
    branches: list[TrainableStages] = []
    columns: list[IntArray] = []  # of each member's features in the concatenated ones
    n_features = n_base
    for member in members:
        n_own = BranchedBackbone(frozen, member.branches).n_features - n_base
        n_shared = n_base if member.keeps_frozen else n_base - n_own
        columns.append(np.concatenate([np.arange(n_shared), n_features + np.arange(n_own)]))
        n_features += n_own
        branches += member.branches
    heads = [member.head for member in members]
    backbone = BranchedBackbone(frozen, branches) if branches else frozen
    return backbone.eval(), average_heads(heads, columns, n_features, temperatures)

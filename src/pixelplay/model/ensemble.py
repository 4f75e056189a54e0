"""Several classifiers on one frozen backbone → one network and one head that answer for all of them.

A mean of logits is linear in the features of all members side by side: what they share is computed
once, and prediction needs to know nothing about ensembles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixelplay.arrays import IntArray
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead, average_heads
from pixelplay.model.split_backbone import BranchedBackbone, TrainableStages


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One classifier of an ensemble, as the ways in which it differs from the frozen backbone.

    Attributes:
        tails: its own, beside the frozen one.
        head: on the frozen features and those of its tails; where it is not `beside`, on those only
            of the frozen features that come from in front of its one tail.
        is_beside: whether its head sees the frozen features too.
    """

    tails: list[TrainableStages]
    head: LinearHead
    is_beside: bool


def ensemble_member(backbone: Backbone, head: LinearHead, n_front: int | None) -> Member:
    """See a classifier as a member.

    Args:
        backbone: the frozen one, one with tails beside it, or one whose last stages were tuned.
        head: on its features.
        n_front: stages in front of the tuned ones, where they stand in the place of the frozen ones;
            None where they do not.
    """
    if n_front is not None:
        return Member(tails=[TrainableStages(backbone, n_front)], head=head, is_beside=False)
    tails = backbone.tails if isinstance(backbone, BranchedBackbone) else []
    return Member(tails=tails, head=head, is_beside=True)


def average_members(
    frozen: Backbone, members: Sequence[Member], temperatures: Sequence[float] | None = None
) -> tuple[Backbone, LinearHead]:
    """The mean of all members' logits as one network and one head.

    Args:
        frozen: what all members were made from.
        temperatures: that each member's logits are divided by; None: 1 for all.
    """
    n_frozen = frozen.n_features
    tails: list[TrainableStages] = []
    columns: list[IntArray] = []  # of each member's features among those of all
    n_features = n_frozen
    for member in members:
        n_own = BranchedBackbone(frozen, member.tails).n_features - n_frozen
        n_shared = n_frozen if member.is_beside else n_frozen - n_own
        columns.append(np.concatenate([np.arange(n_shared), n_features + np.arange(n_own)]))
        n_features += n_own
        tails += member.tails
    heads = [member.head for member in members]
    backbone = BranchedBackbone(frozen, tails) if tails else frozen
    return backbone.eval(), average_heads(heads, columns, n_features, temperatures)

"""Several classifiers on one frozen backbone → one network and one head that answer for all of them.

A mean of logits is linear in the features of all members side by side: what they share is computed
once, and prediction needs to know nothing about ensembles.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pixelplay.model.backbone import Backbone
from pixelplay.model.head import LinearHead, average_heads
from pixelplay.model.tail import BranchedBackbone, Tail


@dataclass(frozen=True, kw_only=True)
class Member:
    """One classifier of an ensemble.

    Attributes:
        backbone: the frozen one, one with branches beside it, or one whose last stages were tuned.
        head: on its features, D or more of them.
        n_front: stages in front of the tuned ones, where they stand in the place of the frozen ones;
            None where they do not.
    """

    backbone: Backbone
    head: LinearHead
    n_front: int | None


def join_members(
    frozen: Backbone, members: Sequence[Member], temperatures: Sequence[float] | None = None
) -> tuple[Backbone, LinearHead]:
    """The mean of all members' logits as one network and one head.

    Args:
        frozen: what all members were made from.
        temperatures: that each member's logits are divided by; None: 1 for all.
    """
    n_frozen = frozen.n_features
    tails: list[Tail] = []
    columns: list[NDArray[np.int64]] = []  # of each member's features among those of all
    n_features = n_frozen
    for member in members:
        own = _tails_of(member)
        n_own = BranchedBackbone(frozen, own).n_features - n_frozen
        n_shared = n_frozen if member.n_front is None else n_frozen - n_own
        columns.append(np.concatenate([np.arange(n_shared), n_features + np.arange(n_own)]))
        n_features += n_own
        tails += own
    heads = [member.head.placed(own, n_features) for member, own in zip(members, columns, strict=True)]
    backbone = BranchedBackbone(frozen, tails) if tails else frozen
    return backbone.eval(), average_heads(heads, temperatures)


def _tails_of(member: Member) -> list[Tail]:
    if member.n_front is not None:
        return [Tail(member.backbone, member.n_front)]
    return member.backbone.tails if isinstance(member.backbone, BranchedBackbone) else []

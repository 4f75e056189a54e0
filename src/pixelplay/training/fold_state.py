"""A finished fold of a cross-validation, which a kill cannot lose: one safetensors file."""

import json
import os
from dataclasses import dataclass
from typing import Any

import torch

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.atomic import write_durably
from pixelplay.errors import DataError
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.ensemble import Member
from pixelplay.model.split_backbone import Tail
from pixelplay.text import counted

RESULT = "fold.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """A classifier that has not seen one fold, and what it says about it.

    Attributes:
        repeat: which dealing of the photographs, from 0.
        fold: which fold of it, from 0.
        rows: (n,) positions in the material that were held out.
        logits: (n, K) of those, with natural priors.
        member: the classifier.
        depth: how deep it was trained.
        chosen: setting → its value and the evidence for it.
        history: rows of history.csv, empty for a probe.
        notes: what was said meanwhile.
    """

    repeat: int
    fold: int
    rows: IntArray
    logits: Float32Array
    member: Member
    depth: str
    chosen: dict[str, dict[str, Any]]
    history: list[dict[str, float]]
    notes: list[str]


def has_fold(folder: str) -> bool:
    """Whether a fold is finished."""
    return os.path.isfile(os.path.join(folder, RESULT))


def write_fold(folder: str, fold: Fold) -> None:
    """Write all of it: it is there as a whole or not at all."""
    from safetensors.torch import save

    tensors = {"logits": torch.from_numpy(fold.logits)}
    tensors |= {f"head.{name}": torch.from_numpy(a) for name, a in fold.member.head.arrays().items()}
    for i, tail in enumerate(fold.member.tails):
        state = tail.network.state_dict()
        tensors |= {f"tail.{i}.{name}": value.contiguous().cpu() for name, value in state.items()}
    about = {
        "n_fronts": [tail.n_front for tail in fold.member.tails],
        "is_beside": fold.member.is_beside,
        "depth": fold.depth,
        "chosen": fold.chosen,
        "history": fold.history,
        "notes": fold.notes,
    }
    write_durably(save(tensors, metadata={"fold": json.dumps(about)}), os.path.join(folder, RESULT))


def read_fold(folder: str, held_out: IntArray, place: tuple[int, int], frozen: Backbone) -> Fold:
    """Read what a killed process has finished.

    Args:
        held_out: (n,) positions in the material.
        place: repeat and fold.

    Raises:
        DataError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = os.path.join(folder, RESULT)

    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["fold"])
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        tails = [Tail(frozen, n_front) for n_front in about["n_fronts"]]
        for i, tail in enumerate(tails):
            start = f"tail.{i}."
            tail.network.load_state_dict(
                {name.removeprefix(start): value for name, value in kept.items() if name.startswith(start)}
            )
        head = {
            name.removeprefix("head."): value.numpy()
            for name, value in kept.items()
            if name.startswith("head.")
        }
        logits = kept["logits"].numpy()
        if len(logits) != len(held_out):
            raise ValueError(f"{counted(len(logits), 'photograph')}, not {len(held_out)}")
        return Fold(
            repeat=place[0],
            fold=place[1],
            rows=held_out,
            logits=logits,
            member=Member(tails=tails, head=LinearHead(**head), is_beside=about["is_beside"]),
            depth=about["depth"],
            chosen=about["chosen"],
            history=about["history"],
            notes=about["notes"],
        )
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be continued from ({type(error).__name__}: {error}); start anew with "
            "--force instead of --resume"
        ) from None

"""The state of a training that a kill cannot lose: one safetensors file, renamed into place."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pixelplay.arrays import Float32Array, IntArray
from pixelplay.atomic import write_bytes
from pixelplay.errors import DataError
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.ensemble import Member
from pixelplay.model.split_backbone import TrainableStages
from pixelplay.text import counted

SUFFIX = ".safetensors"
CHECKPOINT = f"checkpoint{SUFFIX}"


@dataclass
class Where:
    """Where a training is. All chance is derived from seed, epoch and batch, so none of it is kept here.

    Attributes:
        epochs: of the plan, or as many of them as there turns out to be time for.
        epoch: the one under way; 0 measures the weights before the first step.
        n_batches: batches of it that are done.
        step: optimizer steps in all.
        seconds: time so far, that of earlier processes too.
        epoch_s: of the steps of this epoch.
        loss_sum: of the batches of this epoch, each times its images.
        n_seen: images behind it.
        tally: right, given and predicted images of each class in this epoch, as they count, (3, K).
        history: one row for each finished epoch.
        best_epoch: row of the history whose weights are the best.
        best_score: its score, lower is better.
        limit_s: of `seconds`, at which training ends early; that of the first process, whose clock counts.
        began_s: `seconds` when the epoch under way began.
        stopped: why training ended before its plan; "" while it has not.
    """

    epochs: int
    epoch: int = 0
    n_batches: int = 0
    step: int = 0
    seconds: float = 0.0
    epoch_s: float = 0.0
    loss_sum: float = 0.0
    n_seen: int = 0
    tally: list[list[float]] = field(default_factory=list)
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0
    best_score: float = float("inf")
    limit_s: float | None = None
    began_s: float = 0.0
    stopped: str = ""


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything that changes in a training.

    Attributes:
        best: weights of the best epoch.
        misses: (N,) how wrong the network was about each image when it last learned from it, 0 to 1; 1
            where it has not.
        misses_before: (N,) the same as the epoch under way began, by which it is drawn.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]
    progress: Where
    misses: Tensor
    misses_before: Tensor


def write_checkpoint(state: State, folder: str) -> None:
    """Write all of it; a kill leaves the old one or the new one."""
    from safetensors.torch import save

    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, CHECKPOINT)
    tensors = {name: value.detach().contiguous().cpu() for name, value in _tensors(state).items()}
    write_bytes(save(tensors, metadata={"progress": json.dumps(asdict(state.progress))}), path)


def has_checkpoint(folder: str) -> bool:
    """Whether a training can be continued from there."""
    return os.path.isfile(os.path.join(folder, CHECKPOINT))


def has_progress(folder: str) -> bool:
    """Whether something is there that a killed process has finished or begun, in a folder or below it."""
    return any(name.endswith(SUFFIX) for _, _, names in os.walk(folder) for name in names)


@torch.no_grad()
def read_checkpoint(state: State, folder: str) -> None:
    """Bring a fresh state to where the checkpoint is.

    Raises:
        DataError: the file is damaged or belongs to another training.
    """
    from safetensors import SafetensorError, safe_open

    path = os.path.join(folder, CHECKPOINT)
    try:
        with safe_open(path, framework="pt") as file:
            progress = Where(**json.loads(file.metadata()["progress"]))
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        _prime(state.optimizer, kept)
        for name, value in _tensors(state).items():
            if kept[name].shape != value.shape:  # copying would spread one row over many
                raise ValueError(f"{name} is {tuple(kept[name].shape)}, not {tuple(value.shape)}")
            value.copy_(kept[name])
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be continued from ({type(error).__name__}: {error}); start anew with "
            "--force instead of --resume"
        ) from None
    vars(state.progress).update(vars(progress))


def _tensors(state: State) -> Mapping[str, Tensor]:
    """Name every tensor that changes, in place."""
    found: dict[str, Tensor] = {f"live.{name}": x for name, x in changing(state.network).items()}
    found |= {f"best.{name}": value for name, value in state.best.items()}
    found |= {"misses": state.misses, "misses_before": state.misses_before}
    parameters = (p for group in state.optimizer.param_groups for p in group["params"])
    for n, parameter in enumerate(parameters):
        for name, value in state.optimizer.state[parameter].items():
            found[f"optimizer.{n}.{name}"] = value
    return found


def changing(network: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, and the buffers of the head."""
    found: dict[str, Tensor] = {
        name: value.data for name, value in network.named_parameters() if value.requires_grad
    }
    return found | {
        name: value
        for name, value in network.named_buffers()
        if name.startswith("head.") and name not in ("head.mean", "head.scale")
    }


def _prime(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Let the optimizer make the moments that were kept, as it does in its first step; nothing moves."""
    numbers = {int(name.split(".")[1]) for name in kept if name.startswith("optimizer.")}
    if not numbers:
        return  # no step has been taken
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for n in numbers:
        parameters[n].grad = torch.zeros_like(parameters[n])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()


def copy_of(network: nn.Module) -> dict[str, Tensor]:
    """Copies of what changes in a network."""
    return {name: value.detach().clone() for name, value in changing(network).items()}


def restore(network: nn.Module, kept: Mapping[str, Any]) -> None:
    """Put copies back."""
    for name, value in changing(network).items():
        value.copy_(kept[name])


RESULT = "fold.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """A classifier that has not seen one fold, and what it says about it.

    Attributes:
        repeat: which dealing of the images, from 0.
        fold: which fold of it, from 0.
        rows: (n,) positions in the material that were held out.
        logits: (n, K) of those, with natural priors.
        member: the classifier.
        finetune: how deep it was trained.
        chosen: setting → its value and the evidence for it.
        history: rows of history.csv, empty for a probe.
        notes: what was said meanwhile.
    """

    repeat: int
    fold: int
    rows: IntArray
    logits: Float32Array
    member: Member
    finetune: str
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
        "finetune": fold.finetune,
        "chosen": fold.chosen,
        "history": fold.history,
        "notes": fold.notes,
    }
    write_bytes(save(tensors, metadata={"fold": json.dumps(about)}), os.path.join(folder, RESULT))


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
        tails = [TrainableStages(frozen, n_front) for n_front in about["n_fronts"]]
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
            raise ValueError(f"{counted(len(logits), 'image')}, not {len(held_out)}")
        return Fold(
            repeat=place[0],
            fold=place[1],
            rows=held_out,
            logits=logits,
            member=Member(tails=tails, head=LinearHead(**head), is_beside=about["is_beside"]),
            finetune=about["finetune"],
            chosen=about["chosen"],
            history=about["history"],
            notes=about["notes"],
        )
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be continued from ({type(error).__name__}: {error}); start anew with "
            "--force instead of --resume"
        ) from None

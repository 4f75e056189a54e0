"""Training state on disk: checkpoints of a running training, and finished folds of a cross-validation."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pixelplay.array_types import Float32Array, IntArray
from pixelplay.atomic import write_bytes
from pixelplay.errors import DataError
from pixelplay.model.backbone import Backbone
from pixelplay.model.classifier import LinearHead
from pixelplay.model.ensemble import EnsembleMember
from pixelplay.model.split_backbone import TrainableStages

SUFFIX = ".safetensors"
CHECKPOINT, FOLD = f"checkpoint{SUFFIX}", f"fold{SUFFIX}"


@dataclass(kw_only=True)
class TrainState:
    """Everything that changes during a training; random numbers derive from seed, epoch and batch."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    best: dict[str, Tensor]  # weights of the best epoch
    errors: Tensor  # (N,) 1 minus the probability of its label when last trained on; 1 before
    errors_before: Tensor  # (N,) the same at the start of the epoch; they decide what it draws
    epochs: int  # planned; fewer where the time budget turns out too short
    counts: list[list[float]]  # (3, K) weighted correct, labelled and predicted images of this epoch
    time_limit_s: float | None  # value of `seconds` at which training ends early
    epoch: int = 0  # current; 0 evaluates the initial weights
    n_batches: int = 0  # finished in the current epoch
    step: int = 0  # optimizer steps so far
    seconds: float = 0.0  # time so far, including earlier processes
    epoch_s: float = 0.0  # of it on the batches of this epoch
    epoch_start_s: float = 0.0  # `seconds` at the start of this epoch
    loss_sum: float = 0.0  # of this epoch: batch loss times number of images
    n_seen: int = 0  # images in `loss_sum`
    recent_losses: list[float] = field(default_factory=list)  # of batches that lr_frac does not know yet
    smoothed_loss: float | None = None  # of the batches that it knows; None before the first
    lr_frac: float = 1.0  # factor on the learning rates, below 1 while the loss is above the initial one
    history: list[dict[str, float]] = field(default_factory=list)  # one row per finished epoch
    best_epoch: int = 0  # index in `history`
    best_loss: float = float("inf")  # its selection loss
    stopped: str = ""  # why training ended early; "" while it has not

    def progress(self) -> dict[str, Any]:
        """Return the attributes that are plain values, JSON-ready."""
        tensors = {"network", "optimizer", "best", "errors", "errors_before"}
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name not in tensors}


def write_checkpoint(state: TrainState, folder: str) -> None:
    """Write the training state atomically."""
    from safetensors.torch import save

    os.makedirs(folder, exist_ok=True)
    tensors = {name: value.detach().contiguous().cpu() for name, value in _tensors(state).items()}
    content = save(tensors, metadata={"progress": json.dumps(state.progress())})
    write_bytes(content, os.path.join(folder, CHECKPOINT))


def has_checkpoint(folder: str, name: str = CHECKPOINT) -> bool:
    """Return True if a folder holds a checkpoint, or a finished fold."""
    return os.path.isfile(os.path.join(folder, name))


def has_checkpoints(folder: str) -> bool:
    """Return True if a folder or one below it holds a checkpoint or a finished fold."""
    return any(name.endswith(SUFFIX) for _, _, names in os.walk(folder) for name in names)


def has_progress(folder: str) -> bool:
    """Return True if the run with this folder of checkpoints has a plan, a checkpoint or a finished fold."""
    return os.path.isfile(os.path.join(os.path.dirname(folder), "plan.json")) or has_checkpoints(folder)


@torch.no_grad()
def read_checkpoint(state: TrainState, folder: str) -> None:
    """Restore a training state in place.

    Raises:
        DataError: the file is damaged or belongs to another training.
    """
    path = os.path.join(folder, CHECKPOINT)
    with _explain_damage(path):
        metadata, kept = _read_safetensors(path)
        progress = json.loads(metadata["progress"])
        if set(progress) != set(state.progress()):
            raise ValueError("unknown progress")
        _create_optimizer_state(state.optimizer, kept)
        for name, value in _tensors(state).items():
            if kept[name].shape != value.shape:  # copy_ would broadcast
                raise ValueError(f"{name} has shape {tuple(kept[name].shape)}, not {tuple(value.shape)}")
            value.copy_(kept[name])
    vars(state).update(progress)


@contextmanager
def _explain_damage(path: str) -> Iterator[None]:
    """Raise DataError with the path for anything that a damaged file causes."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"could not read {path} ({reason}); use --force instead of --resume") from None


def _read_safetensors(path: str) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Name every tensor of a training state; all are updated in place."""
    found = {f"current.{name}": value for name, value in trainable_tensors(state.network).items()}
    found |= {f"best.{name}": value for name, value in state.best.items()}
    found |= {"errors": state.errors, "errors_before": state.errors_before}
    parameters = (p for group in state.optimizer.param_groups for p in group["params"])
    for n, parameter in enumerate(parameters):
        for name, value in state.optimizer.state[parameter].items():
            found[f"optimizer.{n}.{name}"] = value
    return found


def trainable_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained and the buffers of the head that change."""
    found = {name: value.data for name, value in network.named_parameters() if value.requires_grad}
    return found | {
        name: value
        for name, value in network.named_buffers()
        if name.startswith("head.") and name not in ("head.mean", "head.scale")
    }


def _create_optimizer_state(optimizer: torch.optim.Optimizer, kept: Mapping[str, Tensor]) -> None:
    """Let the optimizer create its moments by a step with zero gradient and zero learning rate."""
    numbers = {int(name.split(".")[1]) for name in kept if name.startswith("optimizer.")}
    if not numbers:
        return  # before the first step
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for n in numbers:
        parameters[n].grad = torch.zeros_like(parameters[n])
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    optimizer.zero_grad()


def copy_weights(network: nn.Module) -> dict[str, Tensor]:
    """Copy the tensors of a network that change in training."""
    return {name: value.detach().clone() for name, value in trainable_tensors(network).items()}


def restore_weights(network: nn.Module, kept: Mapping[str, Tensor]) -> None:
    """Write copied tensors back into a network."""
    for name, value in trainable_tensors(network).items():
        value.copy_(kept[name])


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldResult:
    """A classifier trained without one fold, and its predictions for it."""

    repeat: int
    fold: int
    rows: IntArray  # (n,) positions of the held-out images
    logits: Float32Array  # (n, K), with natural priors
    member: EnsembleMember
    finetune: str  # "none", "partial" or "full"
    chosen: dict[str, dict[str, Any]]  # setting → its value and the evidence for it
    history: list[dict[str, float]]  # rows of history.csv; empty for a linear probe
    notes: list[str]  # logged meanwhile


def write_fold(folder: str, result: FoldResult) -> None:
    """Write a finished fold atomically."""
    from safetensors.torch import save

    tensors = {"logits": torch.from_numpy(result.logits)}
    tensors |= {f"head.{name}": torch.from_numpy(a) for name, a in result.member.head.arrays().items()}
    for i, branch in enumerate(result.member.branches):
        state = branch.network.state_dict()
        tensors |= {f"stages.{i}.{name}": value.contiguous().cpu() for name, value in state.items()}
    about = {
        "n_frozen": [branch.n_frozen for branch in result.member.branches],
        "keeps_frozen": result.member.keeps_frozen,
        **{name: getattr(result, name) for name in ("finetune", "chosen", "history", "notes")},
    }
    write_bytes(save(tensors, metadata={"fold": json.dumps(about)}), os.path.join(folder, FOLD))


def read_fold(folder: str, held_out: IntArray, place: tuple[int, int], frozen: Backbone) -> FoldResult:
    """Read the finished fold that held out some positions (n,); `place` is its repetition and fold.

    Raises:
        DataError: the file is damaged.
    """
    path = os.path.join(folder, FOLD)
    with _explain_damage(path):
        metadata, kept = _read_safetensors(path)
        about = json.loads(metadata["fold"])
        branches = [TrainableStages(frozen, n_frozen) for n_frozen in about.pop("n_frozen")]
        for i, branch in enumerate(branches):
            branch.network.load_state_dict(_with_prefix(kept, f"stages.{i}."))
        head = LinearHead(**{name: value.numpy() for name, value in _with_prefix(kept, "head.").items()})
        logits: Float32Array = np.asarray(kept["logits"].numpy())
        if len(logits) != len(held_out):
            raise ValueError(f"{len(logits)} images, not {len(held_out)}")
        member = EnsembleMember(branches=branches, head=head, keeps_frozen=about.pop("keeps_frozen"))
        repeat, fold = place
        return FoldResult(repeat=repeat, fold=fold, rows=held_out, logits=logits, member=member, **about)


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}

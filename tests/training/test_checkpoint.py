"""Checkpoints: resume restores a training bit by bit; a damaged file is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from networks import shared_backbone
from pixelplay.config import FinetuneConfig
from pixelplay.errors import DataError
from pixelplay.model.classifier import Classifier, TrainableLinearHead, TrainableMlpHead
from pixelplay.model.cpu_layers import freeze_depthwise_filters
from pixelplay.model.split_backbone import split_backbone
from pixelplay.training.checkpoint import (
    CHECKPOINT,
    TrainState,
    copy_weights,
    has_checkpoint,
    read_checkpoint,
    restore_weights,
    trainable_tensors,
    write_checkpoint,
)
from pixelplay.training.optim import make_optimizer

K = 3


def make_state(head: str = "mlp", *, n_classes: int = K) -> TrainState:
    """Create the initial state of training the last two stages; always the same."""
    backbone = shared_backbone("test_efficientnet")
    frozen, trainable = split_backbone(backbone, 2, (64, 64))
    assert frozen is not None
    freeze_depthwise_filters(trainable, frozen.map_shape, frozen.n_stats, fast=True)
    n = backbone.n_features
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = (
            TrainableMlpHead(n, n_classes, dropout=0.2)
            if head == "mlp"
            else TrainableLinearHead(
                np.zeros(n, np.float32), np.ones(n, np.float32), n_classes, start=None, dropout=0.2
            )
        )
    network = Classifier(trainable, made)
    # as the trainer does; it changes the order of values in memory
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainState(
        network=network,
        optimizer=make_optimizer(network, FinetuneConfig(), 8),
        best=copy_weights(network),
        errors=torch.ones(20),
        errors_before=torch.ones(20),
        epochs=2,
        counts=[[0.0] * n_classes for _ in range(3)],
        time_limit_s=60.0,
    )


def take_steps(state: TrainState, n: int) -> None:
    """Train on random inputs that depend on the step only."""
    state.network.train()
    for _ in range(n):
        generator = torch.Generator().manual_seed(state.step)
        maps = torch.randn(8, 32, 8, 8, generator=generator)
        stats = torch.randn(8, 144, generator=generator)
        labels = torch.randint(K, (8,), generator=generator)
        torch.manual_seed(state.step)  # dropout
        loss = cross_entropy(state.network(maps, stats), labels)
        loss.backward()
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.loss_sum += float(loss.detach())
        state.n_seen += 8
        state.counts[0][1] += 1
        state.errors_before.copy_(state.errors)
        state.errors[state.step % 20] /= 3
        state.step += 1
        state.n_batches += 1
    state.history.append({"epoch": 1, "val_loss": 0.1 + 0.2, "train_loss": float("nan")})
    for name, value in copy_weights(state.network).items():
        state.best[name].copy_(value)
    state.best_loss, state.best_epoch, state.seconds = 1 / 3, 1, 12.25


def snapshot(state: TrainState) -> dict[str, Tensor]:
    """Copy every tensor of a training, including the frozen ones."""
    found = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    found |= {f"best.{name}": value for name, value in state.best.items()}
    found |= {"errors": state.errors, "errors_before": state.errors_before}
    for n, stats in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{n}.{name}": value for name, value in stats.items()}
    return {name: value.clone() for name, value in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def progress_of(state: TrainState) -> str:
    return str(state.progress())  # every digit; NaN equals NaN


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_checkpoint_restores_every_tensor_bit_by_bit(head: str, tmp_path: Path) -> None:
    state = make_state(head)
    take_steps(state, 3)
    expected = snapshot(state)
    write_checkpoint(state, str(tmp_path))
    assert_same(snapshot(state), expected)  # writing changes nothing
    fresh = make_state(head)
    assert any(not torch.equal(value, expected[name]) for name, value in snapshot(fresh).items())
    read_checkpoint(fresh, str(tmp_path))
    assert_same(snapshot(fresh), expected)
    assert progress_of(fresh) == progress_of(state)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_resume_from_a_checkpoint_equals_an_uninterrupted_training(head: str, tmp_path: Path) -> None:
    uninterrupted = make_state(head)
    take_steps(uninterrupted, 3)
    take_steps(uninterrupted, 4)
    state = make_state(head)
    take_steps(state, 3)
    write_checkpoint(state, str(tmp_path))
    take_steps(state, 1)  # lost
    resumed = make_state(head)
    read_checkpoint(resumed, str(tmp_path))
    take_steps(resumed, 4)
    assert_same(snapshot(resumed), snapshot(uninterrupted))
    assert progress_of(resumed) == progress_of(uninterrupted)


def test_checkpoint_of_a_parameter_without_gradient_can_be_read(tmp_path: Path) -> None:
    def with_idle_weight() -> TrainState:
        state = make_state("linear")
        state.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "peak_lr": 0.1})
        return state

    state, fresh = with_idle_weight(), with_idle_weight()
    take_steps(state, 2)
    write_checkpoint(state, str(tmp_path))
    read_checkpoint(fresh, str(tmp_path))
    assert_same(snapshot(fresh), snapshot(state))


def test_resume_from_before_the_first_step_restores_the_initial_state(tmp_path: Path) -> None:
    write_checkpoint(make_state(), str(tmp_path))
    expected, resumed = make_state(), make_state()
    read_checkpoint(resumed, str(tmp_path))
    take_steps(resumed, 2)
    take_steps(expected, 2)
    assert_same(snapshot(resumed), snapshot(expected))


def test_reading_a_checkpoint_changes_no_frozen_weight(tmp_path: Path) -> None:
    state = make_state()
    frozen = {
        name: value.detach().clone()
        for name, value in state.network.state_dict().items()
        if name not in trainable_tensors(state.network)
    }
    assert any("conv_dw" in name for name in frozen)
    assert any("running_mean" in name for name in frozen)
    write_checkpoint(state, str(tmp_path))
    read_checkpoint(state, str(tmp_path))
    found = state.network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in frozen.items())


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "cut in the header": whole[:100],
        "cut in the numbers": whole[:-1000],
        "random": np.random.default_rng(0).bytes(5000),
        "text": b"Dear Sir or Madam",
        "zeros": bytes(len(whole)),
    }
    path.write_bytes(content[kind])


def assert_refused(state: TrainState, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_checkpoint(state, str(folder))
    message = str(caught.value)
    assert str(folder / CHECKPOINT) in message
    assert "--force instead of --resume" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "kind", ["empty", "cut in the header", "cut in the numbers", "random", "text", "zeros"]
)
def test_damaged_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    write_checkpoint(make_state(), str(tmp_path))
    damage(tmp_path / CHECKPOINT, kind)
    assert_refused(make_state(), tmp_path)


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    assert_refused(make_state(), tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"progress": "{"}, {"progress": "[]"}, {"progress": '{"a": 1}'}]
)
def test_checkpoint_without_progress_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    write_checkpoint(make_state(), str(tmp_path))
    save_file(load_file(tmp_path / CHECKPOINT), tmp_path / CHECKPOINT, metadata=metadata)
    assert_refused(make_state(), tmp_path)


@pytest.mark.parametrize("other", ["classes", "head"])
def test_checkpoint_of_another_training_is_refused(other: str, tmp_path: Path) -> None:
    state = make_state("linear")
    take_steps(state, 1)
    write_checkpoint(state, str(tmp_path))
    assert_refused(
        {
            "classes": make_state("linear", n_classes=K + 1),
            "head": make_state("mlp"),
        }[other],
        tmp_path,
    )


@pytest.mark.parametrize(
    "name", ["current.head.linear.weight", "best.head.linear.bias", "optimizer.0.exp_avg", "errors"]
)
def test_checkpoint_tensors_are_not_broadcast(name: str, tmp_path: Path) -> None:
    state, path = make_state(), tmp_path / CHECKPOINT
    take_steps(state, 1)
    write_checkpoint(state, str(tmp_path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:1].clone()}, path, metadata=metadata)
    assert_refused(make_state(), tmp_path)


def test_writing_a_checkpoint_leaves_one_file(tmp_path: Path) -> None:
    folder, state = tmp_path / "run" / "checkpoint", make_state()
    for _ in range(3):
        write_checkpoint(state, str(folder))
        assert os.listdir(folder) == [CHECKPOINT]


def test_interrupted_write_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    state = make_state()
    take_steps(state, 2)
    write_checkpoint(state, str(tmp_path))
    expected = snapshot(state)
    whole = (tmp_path / CHECKPOINT).read_bytes()
    (tmp_path / f"{CHECKPOINT}.tmp").write_bytes(whole[: len(whole) // 2])
    resumed = make_state()
    read_checkpoint(resumed, str(tmp_path))
    assert_same(snapshot(resumed), expected)
    take_steps(resumed, 1)
    write_checkpoint(resumed, str(tmp_path))
    assert os.listdir(tmp_path) == [CHECKPOINT]
    again = make_state()
    read_checkpoint(again, str(tmp_path))
    assert_same(snapshot(again), snapshot(resumed))


def test_temporary_file_is_no_checkpoint(tmp_path: Path) -> None:
    assert not has_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / f"{CHECKPOINT}.tmp").write_bytes(b"half")
    assert not has_checkpoint(str(tmp_path))
    write_checkpoint(make_state(), str(tmp_path))
    assert has_checkpoint(str(tmp_path))


def test_restored_weights_equal_the_copied_ones() -> None:
    state = make_state()
    kept, before = copy_weights(state.network), snapshot(state)
    take_steps(state, 2)
    after = copy_weights(state.network)
    assert all(not torch.equal(after[name], kept[name]) for name in kept)
    with torch.no_grad():
        restore_weights(state.network, kept)
    found = snapshot(state)
    assert all(torch.equal(found[name], before[name]) for name in found if name.startswith("network."))

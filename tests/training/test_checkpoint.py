"""What checkpoint.py promises: a training goes on as if nothing had happened, or says why it cannot."""

import os
from dataclasses import asdict
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
    State,
    Where,
    changing,
    copy_of,
    has_checkpoint,
    read_checkpoint,
    restore,
    write_checkpoint,
)
from pixelplay.training.optim import AveragedWeights, make_optimizer

K = 3


def make_state(head: str = "mlp", *, is_averaged: bool = True, n_classes: int = K) -> State:
    """A training of the last two stages that has not begun; always the same."""
    backbone = shared_backbone("test_efficientnet")
    stages = split_backbone(backbone, 2, 64)
    freeze_depthwise_filters(stages, is_shortened=True)
    tail = stages.tail
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
    network = Classifier(tail, made)
    # as the loop does, which changes the order of numbers in memory
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = [name for name, value in network.named_parameters() if value.requires_grad]
    return State(
        network=network,
        optimizer=make_optimizer(network, FinetuneConfig(), 8),
        averaged=AveragedWeights(network, names, 5) if is_averaged else None,
        best=copy_of(network),
        progress=Where(epochs=2, tally=[[0] * n_classes for _ in range(3)]),
        misses=torch.ones(20),
        misses_before=torch.ones(20),
    )


def take_steps(state: State, n: int) -> None:
    """Learn something that depends on the number of the step alone."""
    where = state.progress
    state.network.train()
    for _ in range(n):
        generator = torch.Generator().manual_seed(where.step)
        maps = torch.randn(8, 32, 8, 8, generator=generator)
        stats = torch.randn(8, 144, generator=generator)
        labels = torch.randint(K, (8,), generator=generator)
        torch.manual_seed(where.step)  # dropout
        loss = cross_entropy(state.network(maps, stats), labels)
        loss.backward()
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak_lr"]
        state.optimizer.step()
        state.optimizer.zero_grad()
        if state.averaged is not None:
            state.averaged.update(where.step)
        where.loss_sum += float(loss.detach())
        where.n_seen += 8
        where.tally[0][1] += 1
        state.misses_before.copy_(state.misses)
        state.misses[where.step % 20] /= 3
        where.step += 1
        where.n_batches += 1
    where.history.append({"epoch": 1, "val_loss": 0.1 + 0.2, "train_loss": float("nan")})
    for name, value in copy_of(state.network).items():
        state.best[name].copy_(value)
    where.best_score, where.best_epoch, where.seconds = 1 / 3, 1, 12.25


def snapshot(state: State) -> dict[str, Tensor]:
    """Copies of every number that a training moves, and of those that it must not move."""
    found = {f"network.{name}": value for name, value in state.network.state_dict().items()}
    found |= {f"best.{name}": value for name, value in state.best.items()}
    if state.averaged is not None:
        found |= {f"averaged.{name}": value for name, value in state.averaged.values.items()}
    found |= {"misses": state.misses, "misses_before": state.misses_before}
    for n, stats in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{n}.{name}": value for name, value in stats.items()}
    return {name: value.clone() for name, value in found.items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def same_text(where: Where) -> str:
    return str(asdict(where))  # NaN equals NaN, and every digit counts


@pytest.mark.parametrize("is_averaged", [True, False])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_everything_comes_back_bit_for_bit(head: str, is_averaged: bool, tmp_path: Path) -> None:
    state = make_state(head, is_averaged=is_averaged)
    take_steps(state, 3)
    expected = snapshot(state)
    write_checkpoint(state, str(tmp_path))
    assert_same(snapshot(state), expected)  # writing changes nothing
    fresh = make_state(head, is_averaged=is_averaged)
    assert any(not torch.equal(value, expected[name]) for name, value in snapshot(fresh).items())
    read_checkpoint(fresh, str(tmp_path))
    assert_same(snapshot(fresh), expected)
    assert same_text(fresh.progress) == same_text(state.progress)


@pytest.mark.parametrize("is_averaged", [True, False])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_a_training_that_was_killed_goes_on_as_if_it_had_not(
    head: str, is_averaged: bool, tmp_path: Path
) -> None:
    uninterrupted = make_state(head, is_averaged=is_averaged)
    take_steps(uninterrupted, 3)
    take_steps(uninterrupted, 4)
    state = make_state(head, is_averaged=is_averaged)
    take_steps(state, 3)
    write_checkpoint(state, str(tmp_path))
    take_steps(state, 1)  # lost
    resumed = make_state(head, is_averaged=is_averaged)
    read_checkpoint(resumed, str(tmp_path))
    take_steps(resumed, 4)
    assert_same(snapshot(resumed), snapshot(uninterrupted))
    assert same_text(resumed.progress) == same_text(uninterrupted.progress)


def test_a_weight_that_never_had_a_gradient_is_no_obstacle(tmp_path: Path) -> None:
    def with_idle_weight() -> State:
        state = make_state("linear")
        state.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "peak_lr": 0.1})
        return state

    state, fresh = with_idle_weight(), with_idle_weight()
    take_steps(state, 2)
    write_checkpoint(state, str(tmp_path))
    read_checkpoint(fresh, str(tmp_path))
    assert_same(snapshot(fresh), snapshot(state))


def test_a_checkpoint_from_before_the_first_step_can_be_read(tmp_path: Path) -> None:
    write_checkpoint(make_state(), str(tmp_path))
    expected, resumed = make_state(), make_state()
    read_checkpoint(resumed, str(tmp_path))
    take_steps(resumed, 2)
    take_steps(expected, 2)
    assert_same(snapshot(resumed), snapshot(expected))


def test_reading_moves_no_weight_that_is_not_trained(tmp_path: Path) -> None:
    state = make_state()
    frozen = {
        name: value.detach().clone()
        for name, value in state.network.state_dict().items()
        if name not in changing(state.network)
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


def assert_refused(state: State, folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_checkpoint(state, str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder / CHECKPOINT} cannot be continued from (")
    assert message.endswith("; start anew with --force instead of --resume")


@pytest.mark.parametrize(
    "kind", ["empty", "cut in the header", "cut in the numbers", "random", "text", "zeros"]
)
def test_a_damaged_file_is_refused_with_the_way_on(kind: str, tmp_path: Path) -> None:
    write_checkpoint(make_state(), str(tmp_path))
    damage(tmp_path / CHECKPOINT, kind)
    assert_refused(make_state(), tmp_path)


def test_no_file_at_all_is_refused_with_the_way_on(tmp_path: Path) -> None:
    assert_refused(make_state(), tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"progress": "{"}, {"progress": "[]"}, {"progress": '{"a": 1}'}]
)
def test_a_file_that_does_not_say_where_it_is_is_refused(
    metadata: dict[str, str] | None, tmp_path: Path
) -> None:
    write_checkpoint(make_state(), str(tmp_path))
    save_file(load_file(tmp_path / CHECKPOINT), tmp_path / CHECKPOINT, metadata=metadata)
    assert_refused(make_state(), tmp_path)


@pytest.mark.parametrize("other", ["classes", "head", "average"])
def test_a_checkpoint_of_another_training_is_refused(other: str, tmp_path: Path) -> None:
    state = make_state("linear", is_averaged=False)
    take_steps(state, 1)
    write_checkpoint(state, str(tmp_path))
    assert_refused(
        {
            "classes": make_state("linear", is_averaged=False, n_classes=K + 1),
            "head": make_state("mlp", is_averaged=False),
            "average": make_state("linear", is_averaged=True),
        }[other],
        tmp_path,
    )


@pytest.mark.parametrize(
    "name", ["live.head.linear.weight", "averaged.head.linear.bias", "optimizer.0.exp_avg"]
)
def test_one_row_does_not_stand_for_many(name: str, tmp_path: Path) -> None:
    state, path = make_state(), tmp_path / CHECKPOINT
    take_steps(state, 1)
    write_checkpoint(state, str(tmp_path))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file({**tensors, name: tensors[name][:1].clone()}, path, metadata=metadata)
    assert_refused(make_state(), tmp_path)


def test_a_completed_write_leaves_one_file(tmp_path: Path) -> None:
    folder, state = tmp_path / "run" / "checkpoint", make_state()
    for _ in range(3):
        write_checkpoint(state, str(folder))
        assert os.listdir(folder) == [CHECKPOINT]


def test_an_interrupted_write_leaves_the_one_before_it(tmp_path: Path) -> None:
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


def test_half_a_write_is_no_checkpoint(tmp_path: Path) -> None:
    assert not has_checkpoint(str(tmp_path / "nowhere"))
    (tmp_path / f"{CHECKPOINT}.tmp").write_bytes(b"half")
    assert not has_checkpoint(str(tmp_path))
    write_checkpoint(make_state(), str(tmp_path))
    assert has_checkpoint(str(tmp_path))


def test_kept_copies_are_put_back() -> None:
    state = make_state()
    kept, before = copy_of(state.network), snapshot(state)
    take_steps(state, 2)
    after = copy_of(state.network)
    assert all(not torch.equal(after[name], kept[name]) for name in kept)
    with torch.no_grad():
        restore(state.network, kept)
    found = snapshot(state)
    assert all(torch.equal(found[name], before[name]) for name in found if name.startswith("network."))

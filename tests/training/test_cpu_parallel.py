"""A step that is shared out among cores is the step of one core."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from jobs import plain_job
from networks import shared_backbone
from pixelplay.config import FinetuneConfig, Switch, TrainConfig
from pixelplay.errors import ConfigError
from pixelplay.model.backbone import Backbone, load_backbone
from pixelplay.model.classifier import Classifier, TrainableLinearHead, TrainableMlpHead
from pixelplay.model.device import Device
from pixelplay.model.split_backbone import split_backbone
from pixelplay.run_log import RunLog
from pixelplay.training.cpu_parallel import Forward, compiled_for_training, forward_for_training
from pixelplay.training.inputs import Batch, Inputs

FP32 = Device(name="cpu", precision="fp32")
N_CLASSES = 3
pytestmark = pytest.mark.usefixtures("four_threads")


def make_head(n_features: int, dropout: float = 0.0) -> TrainableLinearHead:
    mean, scale = np.zeros(n_features, np.float32), np.ones(n_features, np.float32)
    head = TrainableLinearHead(mean, scale, N_CLASSES, start=None, dropout=dropout)
    torch.nn.init.normal_(head.linear.weight)
    return head


def make_classifier(
    head: str = "linear", *, dropout: float = 0.0, drop_path: float = 0.0
) -> tuple[Classifier, Tensor, Tensor]:
    """A tail of two stages, and a batch of 21 maps and moments for it."""
    torch.manual_seed(0)
    stages = split_backbone(shared_backbone("test_convnext"), 2, 64)
    maps, stats = torch.randn(21, *stages.shape), torch.randn(21, stages.n_stats)
    n_features = stages.tail(maps[:1], stats[:1]).shape[1]
    mlp = TrainableMlpHead(n_features, N_CLASSES, dropout=0.0)
    classifier = Classifier(
        stages.tail, mlp if head == "mlp" else make_head(n_features, dropout), drop_path=drop_path
    )
    classifier.train()
    return classifier, maps, stats


def gradients(classifier: Classifier) -> list[Tensor]:
    found = [value.grad.clone() for value in classifier.parameters() if value.grad is not None]
    classifier.zero_grad()
    return found


def test_logits_and_gradients_are_those_of_the_classifier() -> None:
    classifier, maps, stats = make_classifier()
    weights = torch.randn(21, N_CLASSES)
    found = []
    with forward_for_training(classifier, FP32, 21) as forward:
        assert forward is not classifier
        for run in (classifier, forward, forward):
            logits = run(maps, stats)
            (logits * weights).sum().backward()
            found.append((logits.detach(), gradients(classifier)))
    (logits, expected), *shared = found
    assert len(expected) > 10
    for other, values in shared:
        torch.testing.assert_close(other, logits)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(shared[0][0], shared[1][0])
    assert all(torch.equal(a, b) for a, b in zip(shared[0][1], shared[1][1], strict=True))


def test_gradients_of_several_batches_add_up() -> None:
    classifier, maps, stats = make_classifier()
    with forward_for_training(classifier, FP32, 21) as forward:
        forward(maps, stats).sum().backward()
        once = gradients(classifier)
        for _ in range(2):
            forward(maps, stats).sum().backward()
        twice = gradients(classifier)
    torch.testing.assert_close(twice, [2 * value for value in once])


def test_what_is_frozen_gets_no_gradient() -> None:
    classifier, maps, stats = make_classifier()
    frozen = next(classifier.tail.parameters())
    frozen.requires_grad_(False)
    with forward_for_training(classifier, FP32, 21) as forward:
        forward(maps, stats).sum().backward()
    assert frozen.grad is None
    assert classifier.head.linear.weight.grad is not None


def test_what_plays_no_part_gets_no_gradient() -> None:
    classifier, maps, stats = make_classifier()
    classifier.extra = torch.nn.Parameter(torch.ones(2))
    with forward_for_training(classifier, FP32, 21) as forward:
        forward(maps, stats).sum().backward()
    assert classifier.extra.grad is None


def test_bf16_is_shared_as_well() -> None:
    classifier, maps, stats = make_classifier()
    device = Device(name="cpu", precision="bf16")
    with device.autocast():
        logits = classifier(maps, stats)
    logits.sum().backward()
    expected = gradients(classifier)
    with forward_for_training(classifier, device, 21) as forward:
        with device.autocast():
            shared = forward(maps, stats)
        shared.sum().backward()
    torch.testing.assert_close(shared, logits, rtol=0.05, atol=0.05)
    torch.testing.assert_close(gradients(classifier), expected, rtol=0.1, atol=0.1)


def test_the_embedded_network_is_shared() -> None:
    """Its layers leave nothing out: else every user would train more slowly, and no figure would say why."""
    stages = split_backbone(load_backbone("lite0", None, offline=True).backbone, 2, 64)
    with forward_for_training(Classifier(stages.tail, make_head(10)), FP32, 32) as forward:
        assert not isinstance(forward, Classifier)


@pytest.mark.parametrize("n_images", [1, 2, 5])
def test_a_batch_smaller_than_planned_is_shared_all_the_same(n_images: int) -> None:
    classifier, maps, stats = make_classifier()
    with forward_for_training(classifier, FP32, 32) as forward:
        found = forward(maps[:n_images], stats[:n_images])
    torch.testing.assert_close(found, classifier(maps[:n_images], stats[:n_images]))


@pytest.mark.parametrize(
    ("head", "dropout", "drop_path", "batch_size"),
    [
        ("mlp", 0.0, 0.0, 32),  # its batch norm looks at the whole batch
        ("linear", 0.5, 0.0, 32),
        ("linear", 0.0, 0.1, 32),
        ("linear", 0.0, 0.0, 15),  # too few to share
    ],
)
def test_what_cannot_be_shared_is_not(head: str, dropout: float, drop_path: float, batch_size: int) -> None:
    classifier, _, _ = make_classifier(head, dropout=dropout, drop_path=drop_path)
    with forward_for_training(classifier, FP32, batch_size) as forward:
        assert forward is classifier


def test_a_network_with_stochastic_depth_of_its_own_is_not_shared() -> None:
    network = SwinTransformer(
        img_size=64,
        embed_dim=12,
        finetune=(1, 2),
        num_heads=(2, 2),
        window_size=4,
        num_classes=0,
        drop_path_rate=0.1,
    )
    stages = split_backbone(Backbone("swin", network), None, 64)
    n_features = stages.tail(torch.zeros(1, *stages.shape), torch.zeros(1, stages.n_stats)).shape[1]
    classifier = Classifier(stages.tail, make_head(n_features))
    with forward_for_training(classifier, FP32, 32) as forward:
        assert forward is classifier


def test_shares_leave_no_core_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, maps, stats = make_classifier()
    seen: list[int] = []
    tail = classifier.tail.forward

    def watch(maps: Tensor, stats: Tensor) -> Tensor:
        seen.append(torch.get_num_threads())
        return tail(maps, stats)

    monkeypatch.setattr(classifier.tail, "forward", watch)
    with forward_for_training(classifier, FP32, 21) as forward:  # 21 images make two shares
        forward(maps, stats)
    assert seen == [2, 2]


def test_an_error_in_a_share_comes_out_and_leaves_threads_as_they_were() -> None:
    classifier, maps, _ = make_classifier()
    with pytest.raises(RuntimeError), forward_for_training(classifier, FP32, 21) as forward:
        forward(maps, torch.randn(21, 999))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 4


# --- compiled ---


def fails(error: Exception, *, backwards: bool = False) -> Callable[[Classifier], Forward]:
    """As torch.compile where something is missing: the first batch fails, or what comes back from it."""

    def fail(*_: object) -> Tensor:
        raise error

    def compile_it(classifier: Classifier) -> Forward:
        def forward(maps: Tensor, stats: Tensor) -> Tensor:
            logits: Tensor = classifier(maps, stats)
            logits.register_hook(fail)
            return logits

        return forward if backwards else fail

    return compile_it


class Drawn:
    """A source of a drawn batch, whatever is asked for."""

    def __init__(self, maps: Tensor, stats: Tensor) -> None:
        self._inputs = maps, stats

    def train_batch(self, batch: Batch, epoch: int, size_px: int) -> Callable[[], Inputs]:
        return lambda: self._inputs

    def plain_batch(self, rows: NDArray[np.int64]) -> Callable[[], Inputs]:
        return lambda: self._inputs

    def flush(self) -> None:
        pass


def compile_for(compile_: Switch, log: RunLog) -> tuple[Forward, Forward, Classifier]:
    """What is taken, what there is without compiling, and the classifier."""
    classifier, maps, stats = make_classifier()
    config = TrainConfig(finetune="partial", finetuning=FinetuneConfig(compile=compile_))
    job = plain_job(Drawn(maps, stats), np.arange(24) % N_CLASSES, 3, config)

    def plain(maps: Tensor, stats: Tensor) -> Tensor:
        logits: Tensor = classifier(maps, stats)
        return logits

    return compiled_for_training(classifier, plain, job, log), plain, classifier


@pytest.mark.parametrize("backwards", [False, True])
def test_what_cannot_be_compiled_is_trained_without(backwards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fails(RuntimeError("no compiler\nlong story"), backwards=backwards))
    log = RunLog(quiet=True)
    found, plain, classifier = compile_for("auto", log)
    assert found is plain
    assert log.notes == ["training is not compiled, as torch.compile fails here (no compiler)"]
    assert gradients(classifier) == []  # of the trial


def test_a_try_to_compile_leaves_the_heads_norm_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module: module)
    classifier, maps, stats = make_classifier("mlp")
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    job = plain_job(Drawn(maps, stats), np.arange(24) % N_CLASSES, 3, TrainConfig(finetune="partial"))
    compiled_for_training(classifier, classifier, job, RunLog(quiet=True))
    assert all(torch.equal(value, before[name]) for name, value in classifier.named_buffers())


def test_what_cannot_be_compiled_and_must_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fails(RuntimeError("no compiler")))
    with pytest.raises(ConfigError) as caught:
        compile_for("on", RunLog(quiet=True))
    assert str(caught.value) == "torch.compile fails here (no compiler); use --compile off"


def test_too_little_memory_is_no_failure_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", fails(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        compile_for("auto", RunLog(quiet=True))


def test_what_can_be_compiled_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Forward] = []

    def as_it_is(classifier: Classifier) -> Forward:
        made.append(classifier.forward)
        return made[-1]

    monkeypatch.setattr(torch, "compile", as_it_is)
    log = RunLog(quiet=True)
    found, _, classifier = compile_for("auto", log)
    assert (found, log.notes) == (made[0], [])
    assert gradients(classifier) == []

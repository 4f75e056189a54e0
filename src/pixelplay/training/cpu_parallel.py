"""A batch → logits: in shares, one for each core of a CPU, whose gradients come back as one, or compiled."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixelplay.errors import ConfigError
from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.device import Device, is_out_of_memory, shared_cores
from pixelplay.run_log import RunLog
from pixelplay.thread_pool import ThreadPool
from pixelplay.training.schedule import Job

SMALLEST_SHARE = 8  # images
MAX_SHARES = 16  # each has gradients of its own until they are added
Forward = Callable[[Tensor, Tensor], Tensor]
Share = tuple[Tensor, Tensor]  # of maps and of moments
Gradients = tuple[Tensor | None, ...]


@contextmanager
def forward_for_training(classifier: Classifier, device: Device, batch_size: int) -> Iterator[Forward]:
    """Give a classifier's forward pass in training, its batches shared out among the cores of a CPU.

    Cores that share every layer wait for each other after every layer, forwards and backwards
    (benchmarks/LOG.md). Shared out, the logits are the same but for the last digits, which depend on the
    number of cores, and so in time does what comes twice in an epoch. That holds while no image
    depends on those beside it: not with a head that has a batch norm, and not where something is left out
    by chance, whose order threads would not keep. There, and on a GPU, it is the classifier itself.

    Args:
        batch_size: images a batch, at most.
    """
    with shared_cores() as n_cores:
        most = min(MAX_SHARES, batch_size // SMALLEST_SHARE)
        n_shares = max((n for n in range(1, most + 1) if n_cores % n == 0), default=1)  # no core is idle
        is_apart = isinstance(classifier.head, TrainableLinearHead) and not _leaves_out(classifier)
        if device.name != "cpu" or n_shares == 1 or not is_apart:
            yield classifier
            return
        with ThreadPool(n_shares, prepare=lambda: torch.set_num_threads(n_cores // n_shares)) as pool:
            yield _Shared(classifier, device, pool, n_shares)


def compiled_for_training(classifier: Classifier, plain: Forward, job: Job, log: RunLog) -> Forward:
    """Compile a classifier and try it, forwards and backwards; where that fails, say so and do without.

    Args:
        plain: what it does without.

    Raises:
        ConfigError: it cannot be compiled, and that was asked for.
    """
    batch, *_ = job.batches(1, np.ones(len(job.labels), np.float32))
    sample = job.source.train_batch(batch, job.epochs_before + 1, job.size_px(0))()
    compiled: Forward = torch.compile(classifier.train())
    buffers = dict(classifier.named_buffers())
    before = {name: value.clone() for name, value in buffers.items()}
    try:
        with job.device.autocast():
            logits = compiled(*sample)
        logits.logsumexp(1).mean().backward()  # type: ignore[no-untyped-call]
    except Exception as error:  # a missing compiler shows in many ways
        if is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    else:
        return compiled
    finally:
        classifier.zero_grad()
        for name, value in buffers.items():  # a norm of the head has counted the try
            value.copy_(before[name])
    if job.config.finetuning.compile == "on":
        raise ConfigError(f"torch.compile fails here ({reason}); use --compile off")
    log.note(f"training is not compiled, as torch.compile fails here ({reason})")
    return plain


def _leaves_out(classifier: Classifier) -> bool:
    """Whether dropout or stochastic depth leave something out, the network's own too."""
    shares = [
        getattr(layer, name, None)
        for layer in classifier.modules()
        for name in ("p", "drop_prob", "drop_rate")
    ]
    return any(isinstance(share, int | float) and share > 0 for share in shares)


class _Shared:
    """Runs shares of a batch in threads, and keeps their graphs."""

    def __init__(self, classifier: Classifier, device: Device, pool: ThreadPool, n_shares: int) -> None:
        self.values = [value for value in classifier.parameters() if value.requires_grad]
        self._classifier, self._device, self._crew, self._n_shares = classifier, device, pool, n_shares

    def __call__(self, maps: Tensor, stats: Tensor) -> Tensor:
        """Logits (B, K) of maps (B, C, H, W) and moments (B, D_front)."""
        n = min(self._n_shares, len(maps))
        shares = list(zip(maps.tensor_split(n), stats.tensor_split(n), strict=True))
        logits: Tensor = _Together.apply(self, shares, *self.values)
        return logits

    def see(self, shares: Sequence[Share]) -> list[Tensor]:
        """Logits of each share, with their graphs."""
        jobs = [self._crew.give(partial(self._see_one, share)) for share in shares]
        return [job.result() for job in jobs]

    def gradients(self, logits: Sequence[Tensor], gradients: Sequence[Tensor]) -> Gradients:
        """Of the values, summed over the shares in their order; None of those that play no part."""

        def one(logits: Tensor, gradients: Tensor) -> Gradients:
            return torch.autograd.grad(logits, self.values, gradients, allow_unused=True)

        jobs = [self._crew.give(partial(one, *pair)) for pair in zip(logits, gradients, strict=True)]
        found = [job.result() for job in jobs]
        return tuple(_sum(parts) for parts in zip(*found, strict=True))

    def _see_one(self, share: Share) -> Tensor:
        with self._device.autocast():  # each thread has its own
            logits: Tensor = self._classifier(*share)
        return logits


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return sum(there[1:], start=there[0]) if there else None


class _Together(torch.autograd.Function):
    """The shares' logits as one tensor, whose gradient goes back to each of them."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, shares: Sequence[Share], *values: Tensor) -> Tensor:
        """Logits (B, K)."""
        ctx.shared, ctx.logits = shared, shared.see(shares)
        return torch.cat([logits.detach() for logits in ctx.logits])

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Any:
        """Gradients of the values."""
        parts = torch.split(gradients, [len(logits) for logits in ctx.logits])
        return None, None, *ctx.shared.gradients(ctx.logits, parts)

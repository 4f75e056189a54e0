"""CPU parallelism in training: one shard of the batch per core."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pixelplay.model.classifier import Classifier, TrainableLinearHead
from pixelplay.model.device import Device, share_cores
from pixelplay.thread_pool import ThreadPool

MIN_SHARD = 8  # images
MAX_SHARDS = 16  # each holds its own gradients until they are summed
Forward = Callable[[Tensor, Tensor], Tensor]
Shard = tuple[Tensor, Tensor]  # feature maps and channel statistics
Gradients = tuple[Tensor | None, ...]


@contextmanager
def parallel_forward(classifier: Classifier, device: Device, batch_size: int) -> Iterator[Forward]:
    """Provide the forward pass for training, with batches split across the cores of a CPU.

    Cores that share every layer synchronise after every layer, forward and backward, which is slower (see
    benchmarks/DECISIONS.md). Splitting changes the logits only by rounding, which depends on the number of
    cores and, over time, affects which hard examples are drawn. With a batch norm in the head, with dropout
    or stochastic depth (whose random order threads would not keep), and on a GPU, the plain classifier is
    provided.
    """
    with share_cores() as n_cores:
        limit = min(MAX_SHARDS, batch_size // MIN_SHARD)
        n_shards = max((n for n in range(1, limit + 1) if n_cores % n == 0), default=1)  # no core is idle
        is_separable = isinstance(classifier.head, TrainableLinearHead) and not _has_dropout(classifier)
        if device.name != "cpu" or n_shards == 1 or not is_separable:
            yield classifier
            return
        with ThreadPool(n_shards, initializer=lambda: torch.set_num_threads(n_cores // n_shards)) as pool:
            yield _ShardedForward(classifier, device, pool, n_shards)


def _has_dropout(classifier: Classifier) -> bool:
    """Return True if dropout or stochastic depth is active, including the backbone's own."""
    names = ("p", "drop_prob", "drop_rate")
    rates = [getattr(layer, name, None) for layer in classifier.modules() for name in names]
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


class _ShardedForward:
    """Runs shards of a batch in threads and keeps their graphs."""

    def __init__(self, classifier: Classifier, device: Device, pool: ThreadPool, n_shards: int) -> None:
        self.parameters = [value for value in classifier.parameters() if value.requires_grad]
        self._classifier, self._device, self._pool, self._n_shards = classifier, device, pool, n_shards

    def __call__(self, maps: Tensor, stats: Tensor) -> Tensor:
        """Return logits (B, K) of feature maps (B, C, H, W) and channel statistics (B, D_frozen)."""
        n = min(self._n_shards, len(maps))
        shards = list(zip(maps.tensor_split(n), stats.tensor_split(n), strict=True))
        logits: Tensor = _ConcatenateShards.apply(self, shards, *self.parameters)
        return logits

    def forward_shards(self, shards: Sequence[Shard]) -> list[Tensor]:
        """Return the logits of each shard, with their graphs."""

        def forward(shard: Shard) -> Tensor:
            with self._device.autocast():  # autocast is per thread
                logits: Tensor = self._classifier(*shard)
            return logits

        futures = [self._pool.submit(forward, shard) for shard in shards]
        return [future.result() for future in futures]

    def backward_shards(self, logits: Sequence[Tensor], gradients: Sequence[Tensor]) -> Gradients:
        """Return the parameters' gradients, summed over the shards in order; None for unused ones."""

        def backward(logits: Tensor, gradient: Tensor) -> Gradients:
            return torch.autograd.grad(logits, self.parameters, gradient, allow_unused=True)

        futures = [self._pool.submit(backward, *pair) for pair in zip(logits, gradients, strict=True)]
        found = [future.result() for future in futures]
        return tuple(_sum(parts) for parts in zip(*found, strict=True))


def _sum(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return sum(present[1:], start=present[0]) if present else None


class _ConcatenateShards(torch.autograd.Function):
    """Concatenates the shards' logits; its backward pass runs in each shard."""

    @staticmethod
    def forward(ctx: Any, sharded: _ShardedForward, shards: Sequence[Shard], *parameters: Tensor) -> Tensor:
        """Return logits (B, K)."""
        ctx.sharded, ctx.logits = sharded, sharded.forward_shards(shards)
        return torch.cat([logits.detach() for logits in ctx.logits])

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> Any:
        """Return the gradients of the parameters."""
        parts = torch.split(gradients, [len(logits) for logits in ctx.logits])
        return None, None, *ctx.sharded.backward_shards(ctx.logits, parts)

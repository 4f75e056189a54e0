"""A batch → logits, each core of a CPU seeing to a share of it; gradients come back as one."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pixelplay.config import FinetuneConfig
from pixelplay.model.classifier import Classifier, TrainedLinear
from pixelplay.model.features import Device

SMALLEST_SHARE = 8  # photographs; with fewer, several cores work on each share

Forward = Callable[[Tensor, Tensor], Tensor]
Share = tuple[Tensor, Tensor]


@contextmanager
def forward_for_training(
    classifier: Classifier, device: Device, settings: FinetuneConfig, batch_size: int
) -> Iterator[Forward]:
    """Give a classifier's forward pass in training, its batches shared out among the cores of a CPU.

    Cores that share every layer wait for each other after every layer, forwards and backwards
    (benchmarks/LOG.md). Shared out, the logits are the same but for the last digits. That holds while no
    photograph depends on those beside it: not with a head that has a batch norm, and not where something is
    left out by chance, whose order threads would not keep. There, and on a GPU, it is the classifier itself.

    Args:
        batch_size: photographs a batch, at most.
    """
    is_drawn = settings.dropout > 0 or settings.drop_path > 0
    n_threads = torch.get_num_threads()
    n_shares = min(n_threads, batch_size // SMALLEST_SHARE)
    if device.name != "cpu" or is_drawn or n_shares < 2 or not isinstance(classifier.head, TrainedLinear):
        yield classifier
        return
    pool = ThreadPoolExecutor(n_shares, initializer=lambda: torch.set_num_threads(n_threads // n_shares))
    with pool:
        yield _Shared(classifier, device, pool, n_shares)
    torch.set_num_threads(n_threads)  # what threads that start later would have


class _Shared:
    """Runs shares of a batch in threads, and keeps their graphs."""

    def __init__(
        self, classifier: Classifier, device: Device, pool: ThreadPoolExecutor, n_shares: int
    ) -> None:
        self.values = [value for value in classifier.parameters() if value.requires_grad]
        self._classifier, self._device, self._pool, self._n_shares = classifier, device, pool, n_shares

    def __call__(self, maps: Tensor, moments: Tensor) -> Tensor:
        """Logits (B, K) of maps (B, C, H, W) and moments (B, D_front)."""
        shares = zip(maps.tensor_split(self._n_shares), moments.tensor_split(self._n_shares), strict=True)
        logits: Tensor = _Together.apply(self, list(shares), *self.values)
        return logits

    def see(self, shares: Sequence[Share]) -> list[Tensor]:
        """Logits of each share, with their graphs."""
        return list(self._pool.map(self._see_one, shares))

    def gradients(self, logits: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """Of the values, summed over the shares in their order."""

        def one(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                pair[0], self.values, pair[1], allow_unused=True, materialize_grads=True
            )

        first, *others = self._pool.map(one, zip(logits, slopes, strict=True))
        return [sum(parts[1:], start=parts[0]) for parts in zip(first, *others, strict=True)]

    def _see_one(self, share: Share) -> Tensor:
        with self._device.autocast():  # each thread has its own
            logits: Tensor = self._classifier(*share)
        return logits


class _Together(torch.autograd.Function):
    """The shares' logits as one tensor, whose gradient goes back to each of them."""

    @staticmethod
    def forward(ctx: Any, shared: _Shared, shares: Sequence[Share], *values: Tensor) -> Tensor:
        """Logits (B, K)."""
        ctx.shared, ctx.logits = shared, shared.see(shares)
        return torch.cat([logits.detach() for logits in ctx.logits])

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Any:
        """Gradients of the values."""
        parts = torch.split(slopes, [len(logits) for logits in ctx.logits])
        return None, None, *ctx.shared.gradients(ctx.logits, parts)

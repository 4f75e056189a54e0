"""Device, precision, CPU threads and out-of-memory errors."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from pixelplay.config import ComputeConfig, Precision
from pixelplay.errors import ConfigError
from pixelplay.thread_pool import prefetch_map

Item = TypeVar("Item")
Result = TypeVar("Result")


_PID = os.getpid()  # of the process that imported torch
_LOCK = threading.Lock()
_N_THREADS: list[int] = []  # for each running job, the number of torch threads before the first one


def use_one_thread_after_fork() -> None:
    """Use one torch thread in a forked process, as OpenMP's threads exist in the parent only.

    With more, the first parallel operation would wait for them forever.
    """
    if os.getpid() != _PID and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@contextmanager
def share_cores() -> Iterator[int]:
    """Yield the number of cores torch may use, so that threads can divide them.

    `torch.set_num_threads` in one thread also sets the default of threads that start later, anywhere in the
    process. Therefore the first job to enter saves the number and the last one to leave restores it, however
    the jobs overlap.
    """
    with _LOCK:
        n_threads = _N_THREADS[0] if _N_THREADS else torch.get_num_threads()
        _N_THREADS.append(n_threads)
    try:
        yield n_threads
    finally:
        with _LOCK:
            _N_THREADS.pop()
            if not _N_THREADS:
                torch.set_num_threads(n_threads)


def map_on_cores(work: Callable[[Item], Result], items: Iterable[Item], device: str) -> Iterator[Result]:
    """Yield work(item) in order; on a CPU each core processes its own item.

    Cores that split every layer wait for each other after each one, and for the core that also decodes an
    image; that takes 1.4 times as long (benchmarks/DECISIONS.md). The results do not depend on the number
    of cores.
    """
    if device != "cpu":
        yield from map(work, items)
        return
    with share_cores() as n_cores:
        yield from prefetch_map(
            work, items, num_workers=n_cores, ahead=n_cores, initializer=lambda: torch.set_num_threads(1)
        )


def resolve_device_name(requested: str) -> str:
    """Resolve `auto` to "cuda", "mps" or "cpu", in this order; ConfigError without the requested device."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if requested == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available[requested]:
        raise ConfigError(f"device {requested!r} is not available; use --device auto")
    return requested


def resolve_precision(requested: Precision, device: str) -> Precision:
    """Resolve `auto`: bf16 where the device computes it natively, else fp32."""
    if requested != "auto":
        return requested
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "cpu":
        capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def to_device(values: torch.Tensor, device: str) -> torch.Tensor:
    """Copy a tensor to a device; asynchronously with CUDA.

    MPS would read an asynchronous copy later, when the source memory may already be reused.
    """
    return values.to(device, non_blocking=device == "cuda")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Device ("cpu", "cuda" or "mps") and precision ("fp32" or "bf16") a network runs with."""

    name: str
    precision: Precision

    @property
    def is_bf16(self) -> bool:
        """True if convolutions and matrix products run in bf16."""
        return self.precision == "bf16"

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the precision."""
        return torch.autocast(self.name, dtype=torch.bfloat16, enabled=self.is_bf16)

    def rng_devices(self) -> list[int]:
        """Return the GPU indices for `torch.random.fork_rng`."""
        return [torch.cuda.current_device()] if self.name == "cuda" else []


def resolve_device(compute: ComputeConfig) -> Device:
    """Resolve the settings on this machine; errors are those of `resolve_device_name`."""
    name = resolve_device_name(compute.device)
    return Device(name=name, precision=resolve_precision(compute.precision, name))


class InsufficientMemoryError(ConfigError):
    """Out of memory with the requested or the smallest batch size."""


def inference_memory_message(device: str, batch_size: int) -> str:
    """Return the message of an out-of-memory error in inference."""
    return f"{device} is out of memory with a batch size of {batch_size}; lower --batch-size"


@contextmanager
def translate_memory_errors(message: str) -> Iterator[None]:
    """Replace torch's out-of-memory errors by one whose message says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InsufficientMemoryError(message) from None


def is_out_of_memory(error: Exception) -> bool:
    """Recognise out-of-memory errors; on a CPU and with MPS only the message identifies them."""
    phrases = ("can't allocate memory", "not enough memory", "out of memory")
    is_typed = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_typed or any(phrase in str(error) for phrase in phrases)

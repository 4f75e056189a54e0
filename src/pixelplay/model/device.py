"""Work that runs a network, on a CPU side by side on its cores instead of on all of them together."""

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


@contextmanager
def shared_cores() -> Iterator[int]:
    """Give the number of cores that torch may use, to be shared out among threads.

    A thread takes its part with `torch.set_num_threads`, which also says what threads that start later have,
    anywhere in the process. So the first job that enters notes the number and the last that leaves restores
    it, however the jobs overlap.
    """
    with _CORES.lock:
        if not _CORES.n_jobs:
            _CORES.n_usual = torch.get_num_threads()
        _CORES.n_jobs += 1
    try:
        yield _CORES.n_usual
    finally:
        with _CORES.lock:
            _CORES.n_jobs -= 1
            if not _CORES.n_jobs:
                torch.set_num_threads(_CORES.n_usual)


class _Cores:
    """How many jobs share the cores out, and how many there are."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.n_jobs = 0
        self.n_usual = 1


_CORES = _Cores()


def map_on_cores(work: Callable[[Item], Result], items: Iterable[Item], device: str) -> Iterator[Result]:
    """Yield what the network makes of each item, in order; on a CPU each core takes an item of its own.

    Cores that share every layer wait for each other after every layer, and all of them for one that also
    decodes an image: together they take 1.4 times as long (benchmarks/LOG.md). What a core makes of an
    item does not depend on how many cores there are.

    Args:
        work: runs a network; on a CPU in threads.
    """
    if device != "cpu":
        yield from map(work, items)
        return
    with shared_cores() as n_cores:
        yield from prefetch_map(
            work, items, num_workers=n_cores, ahead=n_cores, prepare=lambda: torch.set_num_threads(1)
        )


def pick_device(asked: str) -> str:
    """Resolve `auto`, and refuse a device that this machine does not have.

    Raises:
        ConfigError: the asked device is not there.
    """
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if has[name])
    if not has[asked]:
        raise ConfigError(f"device {asked!r} is not available here; use --device auto")
    return asked


def pick_precision(asked: Precision, device: str) -> Precision:
    """Resolve `auto`: bf16 where the device computes it natively, else fp32."""
    if asked != "auto":
        return asked
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device == "cpu":
        capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def to_device(values: torch.Tensor, device: str) -> torch.Tensor:
    """Values on a device, in time for what comes next there; with CUDA the host goes on at once.

    An Apple GPU would read them later, when their memory may be something else.
    """
    return values.to(device, non_blocking=device == "cuda")


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where and in which numbers a network runs.

    Attributes:
        name: "cpu", "cuda" or "mps".
        precision: "fp32" or "bf16".
    """

    name: str
    precision: Precision

    @property
    def is_bf16(self) -> bool:
        """Whether convolutions and matrix products run in bf16."""
        return self.precision == "bf16"

    def autocast(self) -> torch.autocast:
        """Context in which they run in the chosen numbers."""
        return torch.autocast(self.name, dtype=torch.bfloat16, enabled=self.is_bf16)

    def generators(self) -> list[int]:
        """Positions of the GPUs whose random numbers `torch.random.fork_rng` is to give back."""
        return [torch.cuda.current_device()] if self.name == "cuda" else []


def find_device(compute: ComputeConfig) -> Device:
    """Resolve what `auto` is on this machine.

    Raises:
        ConfigError: the asked device is not there.
    """
    name = pick_device(compute.device)
    return Device(name=name, precision=pick_precision(compute.precision, name))


class TooLittleMemoryError(ConfigError):
    """Memory does not suffice for the smallest batches, or for those that were asked for."""


def inference_memory_error(device: str, batch_size: int) -> TooLittleMemoryError:
    """The error of a network that only looks, and what to lower."""
    return TooLittleMemoryError(
        f"{device} has too little memory for batches of {batch_size}; lower --batch-size"
    )


@contextmanager
def explain_memory_errors(explained: TooLittleMemoryError) -> Iterator[None]:
    """Raise where memory runs out what says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise explained from None


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: CUDA has an error of its own, a CPU and MPS say it in words."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    is_named = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return is_named or any(said in str(error) for said in words)

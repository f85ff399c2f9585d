"""The limits of a machine, measured, and the least time that a layer's work takes within them."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Limits:
    """What one machine can do, as torch reaches it.

    Attributes:
        flops: floating-point operations a second of a large square product.
        bandwidth: bytes a second at which a large tensor is read.
    """

    flops: float
    bandwidth: float

    def least_seconds(self, flops: float, bytes_moved: float) -> tuple[float, str]:
        """The time that work takes at least, and which limit binds: ``compute`` or ``memory``."""
        compute, memory = flops / self.flops, bytes_moved / self.bandwidth
        return (compute, "compute") if compute >= memory else (memory, "memory")


class LimitRuns:
    """Runs that meet the limits of a machine: a large square product, and a read of memory.

    Each read is of the next part of a block that no cache holds; weights that stay in a cache are
    read faster than this.

    Args:
        device: where they run.
        dtype: of the product; float32 on a CPU that is less than half as fast in this one.
        side: of its matrices; by default 1024 on a CPU and 8192 elsewhere.
        part_bytes: of one read; by default 64 MiB on a CPU and 4 GiB elsewhere, where a read
            must take long against its launch.
    """

    PRODUCT, READ = "product", "read of memory"
    PARTS = 8

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        side: int | None = None,
        part_bytes: int | None = None,
    ) -> None:
        on_cpu = device.type == "cpu"
        self._side = side or (1024 if on_cpu else 8192)
        if on_cpu and not _multiplies(dtype):
            dtype = torch.float32
        count = (part_bytes or (2**26 if on_cpu else 2**32)) // torch.float32.itemsize
        self._a, self._b = (
            torch.randn(self._side, self._side, device=device, dtype=dtype) for _ in range(2)
        )
        self._parts = torch.ones(self.PARTS if on_cpu else 1, count, device=device)
        self._next = itertools.cycle(self._parts)

    @property
    def runs(self) -> dict[str, Callable[[], Tensor]]:
        """By name, for :func:`interleaved`."""
        return {self.PRODUCT: lambda: self._a @ self._b, self.READ: lambda: next(self._next).sum()}

    def limits(self, seconds: Mapping[str, float]) -> Limits:
        """The limits by the times of :attr:`runs`."""
        flops, read = 2.0 * self._side**3, self._parts[0].nbytes
        return Limits(flops / seconds[self.PRODUCT], read / seconds[self.READ])


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether the CPU has products in this dtype, and does not make do element by element."""
    whole = torch.float32
    return dtype.itemsize >= whole.itemsize or product_seconds(dtype) <= 2 * product_seconds(whole)


def product_seconds(dtype: torch.dtype) -> float:
    """Time of a small square product on the CPU, the least of three."""
    a, b = torch.ones(2, 256, 256, dtype=dtype)
    return min(seconds(lambda: a @ b, torch.device("cpu")) for _ in range(3))


def seconds(run: Callable[[], Tensor | None], device: torch.device) -> float:
    """Wall-clock time of one call; the device is waited for."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


Runs = Mapping[str, Callable[[], Tensor | None]]


def alternating(
    sets: Sequence[Runs],
    device: torch.device,
    repeats: int,
    least_seconds: float = 0.0,
    spells: int = 3,
) -> dict[str, float]:
    """The median time of each run of all sets, which take turns by set in a few spells.

    For sets that must not disturb each other, but are to be compared: on a machine that others
    share, what was measured a minute ago may hold no more, and what reads much memory leaves
    nothing in the caches for those who run next.

    Args:
        sets: what is timed, by names of which none is in two sets.
        device: what is waited for at the end of each run.
        repeats: least turns of each run.
        least_seconds: of timed runs of a set together.
        spells: of each set; an untimed round begins each.
    """
    found: dict[str, list[float]] = {name: [] for runs in sets for name in runs}
    for _ in range(spells):
        for runs in sets:
            times = _turns(runs, device, -(-repeats // spells), least_seconds / spells)
            for name, some in times.items():
                found[name] += some
    return {name: statistics.median(times) for name, times in found.items()}


def interleaved(
    runs: Runs, device: torch.device, repeats: int, least_seconds: float = 0.0
) -> dict[str, float]:
    """The median time of each run; they take turns, in another random order each round.

    A machine that warms up or slows down is thus unfair to none, and none always runs after the
    same other one, which may have left its weights in the cache, or thrown them out. One untimed
    round goes before.

    Args:
        runs: what is timed, by name.
        device: what is waited for at the end of each run.
        repeats: rounds.
        least_seconds: of timed runs together; further rounds follow until it is reached.
    """
    times = _turns(runs, device, repeats, least_seconds)
    return {name: statistics.median(some) for name, some in times.items()}


def _turns(
    runs: Runs, device: torch.device, repeats: int, least_seconds: float
) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    order, shuffled = list(runs), random.Random(0)
    spent, rounds = 0.0, 0
    while runs and (rounds < repeats or spent < least_seconds):
        shuffled.shuffle(order)
        for name in order:
            time_taken = seconds(runs[name], device)
            found[name].append(time_taken)
            spent += time_taken
        rounds += 1
    return found


def captured(run: Callable[[], Tensor | None]) -> Callable[[], None] | None:
    """A replay of the CUDA graph of ``run``, which costs no launches; None if it has none.

    A run that reads a number back from the device cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # torch raises this for every operation that a capture forbids
        torch.cuda.synchronize()
        return None
    replay: Callable[[], None] = graph.replay
    return replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""The limits of a machine, measured, and the least time that a layer's work takes within them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
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

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, size: int | None = None) -> Limits:
        """Best of several large products, and of several passes over memory.

        What is read is larger than any cache; weights that stay in one are read faster.

        Args:
            size: side of the product; by default 1024 on a CPU and 8192 elsewhere.
        """
        size = size or (1024 if device.type == "cpu" else 8192)
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        block = torch.ones(max(2**27, 16 * size * size), device=device)
        product = min(seconds(lambda: a @ b, device) for _ in range(10))
        reading = min(seconds(lambda: block.sum(), device) for _ in range(10))
        return cls(2 * size**3 / product, block.numel() * block.element_size() / reading)

    def least_seconds(self, flops: float, bytes_moved: float) -> tuple[float, str]:
        """The time that work takes at least, and which limit binds: ``compute`` or ``memory``."""
        compute, memory = flops / self.flops, bytes_moved / self.bandwidth
        return (compute, "compute") if compute >= memory else (memory, "memory")


def seconds(run: Callable[[], Tensor | None], device: torch.device) -> float:
    """Wall-clock time of one call; the device is waited for."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def interleaved(
    runs: dict[str, Callable[[], Tensor | None]],
    device: torch.device,
    repeats: int,
    least_seconds: float = 0.0,
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
    return {name: statistics.median(times) for name, times in found.items()}


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

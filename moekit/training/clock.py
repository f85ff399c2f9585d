"""How long steps and runs take."""

from __future__ import annotations

import statistics
import time

import torch


class StepClock:
    """The durations of steps; pauses between ``stop`` and ``start`` do not count.

    On CUDA, events on the stream are timed, which costs no synchronisation until ``median``.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._begin: float | torch.cuda.Event | None = None
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """A step begins."""
        self._begin = self._now()

    def stop(self) -> None:
        """The step that began last ends."""
        if self._begin is not None:
            self._spans.append((self._begin, self._now()))
            self._begin = None

    def take_median(self) -> float | None:
        """Median seconds of the steps since the last call, None if there were none."""
        if self._cuda:
            torch.cuda.synchronize()
        seconds = [_between(begin, end) for begin, end in self._spans]
        self._spans.clear()
        return statistics.median(seconds) if seconds else None

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return end - begin


class WallClock:
    """Seconds of a run, also over the processes that it was continued in."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._before = 0.0

    def start(self, before: float) -> None:
        """The run goes on now, after ``before`` seconds in earlier processes."""
        self._began, self._before = time.perf_counter(), before

    def read(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._began

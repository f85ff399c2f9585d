"""How long steps take and how much memory they need."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch

_CLEAR_PEAK = "5"  # what Linux wants in /proc/self/clear_refs to restart the peak


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


class PeakMemory:
    """The most memory in use since this was made.

    On CUDA it is torch's allocated memory. On the CPU it is the resident memory of the whole
    process, Python and its libraries included; where the system cannot restart that peak (any
    but Linux) it counts from the start of the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.of: Literal["cuda", "process"] = "cuda" if device.type == "cuda" else "process"
        self._device = device
        if self.of == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _restart_process_peak()

    def read(self) -> int:
        """The peak so far, in bytes."""
        if self.of == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _restart_process_peak() -> None:
    if sys.platform != "linux":
        return
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    except OSError:
        return  # forbidden in some containers; the peak then counts from the start

"""Peak memory of a stretch of code."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import torch


class PeakMemory:
    """Measures the largest memory held while the block runs, in bytes.

    On CUDA this is what torch's allocator held for tensors. On CPU it is the resident size of the
    whole process, its code and libraries included; where the system cannot restart its own
    high-water mark (anywhere but Linux), it is that of the process since its start.

    Attributes:
        bytes: the peak; 0 before the block ends.

    Example:
        >>> with PeakMemory(torch.device("cpu")) as memory:
        ...     x = torch.ones(1000, 1000)
        >>> memory.bytes > 4_000_000
        True
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _restart_resident_peak()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.bytes = _resident_peak()


@contextmanager
def collecting_only_what_is_new() -> Iterator[None]:
    """Within, garbage is looked for only among what is made within.

    For many measurements in a row: to look at all objects of a process in which torch and
    transformers are loaded takes a third of a second each time. A process that has set objects
    apart itself is left as it is.
    """
    gc.collect()
    apart = gc.get_freeze_count() > 0
    if not apart:
        gc.freeze()
    try:
        yield
    finally:
        if not apart:
            gc.unfreeze()


def release_freed_memory() -> None:
    """Give what was freed back to the system, as far as the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc has it, other C libraries do not
        trim(0)


def _restart_resident_peak() -> None:
    """Set the high-water mark back to the present size (proc(5), clear_refs 5).

    What earlier work has freed is given back first, so that it does not count again.
    """
    gc.collect()
    release_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the mark stays that of the process


def _resident_peak() -> int:
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        found = None
    return int(found.group(1)) * 1024 if found else _reported_peak()


def _reported_peak() -> int:
    if sys.platform == "win32":
        return 0  # the standard library has no measure of it there
    import resource  # absent on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

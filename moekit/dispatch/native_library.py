"""Kernels for CPUs, compiled for the machine at their first use and kept for the next process."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import math
import mmap
import os
import shutil
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.cache import cached, default_cache
from moekit.errors import OutputError
from moekit.experts.groups import RowGroups

SOURCE = Path(__file__).with_name("native_kernels.cpp")
PARTS = (
    *("vectors", "dots", "tiles", "pairs", "groups", "products", "gradients", "call", "combine"),
    *("direct", "grouped"),
)
HEADERS = [SOURCE.with_name(f"native_{part}.h") for part in PARTS]
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-ffp-contract=fast", "-w"),
)
KERNELS = ("forward", "backward", "add_direct", "direct_backward", "product", "gradient")
NAME = "kernels.so"
PATIENCE = 120.0  # seconds; it takes 3 to 10

logger = logging.getLogger(__name__)


# The struct ``Call`` of ``native_call.h``, where they are explained: sizes, flags and
# addresses, each of eight bytes.
FIELDS = (
    *("threads", "tokens", "slots", "rows", "experts", "width", "hidden", "out_width"),
    *("count_E", "assignment_R", "weight_NK", "half_weights", "x_ND", "x_ld"),
    *("up_EJD", "up_expert", "up_ld", "down_EOH", "down_expert", "down_ld"),
    *("up_bias_EJ", "down_bias_EO", "inner_RJ", "y_NO", "grad_NO", "grad_ld"),
    *("in_pairs", "zero_grad_up_EJD", "zero_grad_down_EOH"),
    *("grad_RO", "back_RJ", "grad_NK", "grad_x_ND", "grad_up_EJD", "grad_down_EOH"),
)
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # of all operands

# Work, in multiply-adds, below which one thread is done before a second one is awake.
ONE_THREAD = 2**20
ONE_THREAD_WRITES = 2**18  # bytes of a gradient, likewise
# Bytes of a gradient from which on its memory is fresh from the system each time, whoever asks for
# it (glibc keeps no larger blocks), so that pages of experts without rows need never be touched.
FRESH = 2**25


def packed(fields: dict[str, int]) -> bytes:
    """A call for the kernels from all fields, in their order."""
    return struct.pack(f"{len(fields)}q", *fields.values())


class KernelCall:
    """A call of the kernels while it is put together; holds what it points to.

    Args:
        fields: names of what the kernels are handed, in order.
        dtype: of the operands.
    """

    def __init__(self, fields: tuple[str, ...], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.fields: dict[str, int] = dict.fromkeys(fields, 0)
        self._held: list[Tensor] = []

    def give(self, name: str, tensor: Tensor) -> None:
        """Set a field to where the tensor is."""
        self._held.append(tensor)
        self.fields[name] = tensor.data_ptr()

    def give_rows(self, name: str, stride: str, rows: Tensor) -> None:
        """Set two fields to a matrix's data and the stride of its rows."""
        step, within = rows.stride()
        if within != 1:
            rows, step = rows.contiguous(), rows.shape[1]
        self.give(name, rows)
        self.fields[stride] = step

    def room(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result or a stage on the way to it."""
        tensor = torch.empty(shape, dtype=dtype)
        self.give(name, tensor)
        return tensor

    def gradient(self, name: str, groups: RowGroups, *shape: int) -> Tensor:
        """Memory for a weight's gradient, which several threads write if it is large.

        Where most experts have no rows, the pages of these come zeroed from the system when, and
        if, they are read.
        """
        size = math.prod(shape) * self.dtype.itemsize
        if size >= ONE_THREAD_WRITES:
            self.fields["threads"] = torch.get_num_threads()
        if size < FRESH or 2 * int((groups.count_E > 0).sum()) >= groups.experts:
            return self.room(name, *shape, dtype=self.dtype)
        tensor = untouched(shape, self.dtype)
        self.give(name, tensor)
        self.fields[f"zero_{name}"] = True
        return tensor

    def run(self, name: str) -> None:
        """Run a kernel."""
        kernels = library()
        assert kernels is not None  # who makes a call has looked
        getattr(kernels, f"moekit_{name}_{DTYPES[self.dtype]}")(packed(self.fields))


def untouched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros, in pages that the system makes when they are touched.

    Not by numpy, whose zeros ask for large pages: the system then moves memory about to find them,
    which was slower than all else after other work.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; the log then says why.

    They run on the OpenMP threads that torch brings along, and are not linked with others.
    """
    compiler = _compiler()
    if compiler is None:
        logger.info("experts run without kernels of our own: these need Linux and a C++ compiler")
        return None
    try:
        return _opened(_compiled(compiler))
    except (OSError, OutputError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("experts run without kernels of our own, which do not compile: %s", said)
        return None


def sorted_ids(ids: Tensor, size: int) -> tuple[Tensor, Tensor] | None:
    """The order that sorts R ids of ``0 … size - 1``, stable, and how often each occurs (size,).

    None where this process has not loaded the kernels: nothing is compiled for this alone.

    Raises:
        IndexError: an id is not one of them.
    """
    kernels = library() if library.cache_info().currsize else None
    if kernels is None or ids.dtype != torch.int64:
        return None
    ids, rows = ids.contiguous(), ids.numel()
    order, counts = torch.empty(rows, dtype=torch.int64), torch.empty(size, dtype=torch.int64)
    pointers = ids.data_ptr(), size, order.data_ptr(), counts.data_ptr()
    if kernels.moekit_sort_ids(rows, *pointers):
        raise IndexError(f"an id is not one of 0 to {size - 1}")
    return order, counts


def _compiler() -> str | None:
    if sys.platform != "linux":
        return None
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, filter(None, (asked, "g++", "clang++")))), None)


def _compiled(compiler: str) -> Path:
    """Where the library is, made now if it is not there."""

    def build(folder: Path) -> None:
        logger.info("compiling kernels for this CPU")
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(folder / NAME)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)

    return cached(default_cache() / "kernels" / _key(compiler), build) / NAME


def _key(compiler: str) -> str:
    """Names the source, the compiler and the CPU, whose instructions the library contains."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=10)
    sources = b"".join(path.read_bytes() for path in (SOURCE, *HEADERS))
    parts = (sources, version.stdout, repr(FLAGS).encode(), _cpu().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in KERNELS:
        for dtype in ("float32", "bfloat16"):
            function: Any = getattr(found, f"moekit_{name}_{dtype}")
            function.argtypes, function.restype = [ctypes.c_char_p], None
    for name in ("decode_float32", "decode_bfloat16", "runs_in_pairs"):
        getattr(found, f"moekit_{name}").argtypes = [ctypes.c_char_p]
    size, data = ctypes.c_int64, ctypes.c_void_p
    found.moekit_sort_ids.argtypes = [size, data, size, data, data]
    found.moekit_has_pairs.argtypes = [ctypes.c_int64] * 3
    return found

"""Kernels for CPUs, compiled for the machine at their first use and kept for the next process."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import secrets
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("native_kernels.cpp")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-ffp-contract=fast", "-w"),
)
PATIENCE = 120.0  # seconds; it takes 3 to 10

logger = logging.getLogger(__name__)


class Call(ctypes.Structure):
    """The struct of the same name in ``native_kernels.cpp``, where the fields are explained."""

    _fields_ = tuple(
        (name, ctypes.c_int64 if kind == "size" else ctypes.c_void_p)
        for kind, names in (
            ("size", "threads tokens slots rows experts width hidden out_width"),
            ("data", "count_E assignment_R weight_NK x_ND"),
            ("size", "x_ld"),
            ("data", "up_EJD"),
            ("size", "up_expert up_ld"),
            ("data", "down_EOH"),
            ("size", "down_expert down_ld"),
            ("data", "up_bias_EJ down_bias_EO inner_RJ place_NK start_E used_E"),
            ("data", "outer_RH out_RO y_NO grad_NO"),
            ("size", "grad_ld"),
            ("data", "grad_RO rows_RD back_RH scaled_RH back_RJ back_RD grad_R"),
            ("data", "grad_x_ND grad_up_EJD grad_down_EOH"),
        )
        for name in names.split()
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had; the log then says why.

    torch must be imported before, since the kernels run on the OpenMP threads that it brings.
    """
    compiler = _compiler()
    if compiler is None:
        logger.info("no C++ compiler here: experts run without kernels of our own")
        return None
    try:
        path = _compiled(compiler)
        return _opened(path)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning("experts run without kernels of our own, which do not compile: %s", said)
        return None


def _compiler() -> str | None:
    if sys.platform == "win32":
        return None
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, filter(None, (asked, "g++", "clang++")))), None)


def _compiled(compiler: str) -> Path:
    """Where the library is, made now if it is not there."""
    path = _cache() / f"kernels-{_key(compiler)}.so"
    if not path.exists():
        logger.info("compiling kernels for this CPU into %s", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            # Not linked with an OpenMP of its own: there would be two sets of threads.
            command = [compiler, *FLAGS, "-nostdlib", str(SOURCE), "-o", str(scratch)]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    return path


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "moekit"


def _key(compiler: str) -> str:
    """Names the source, the compiler and the CPU, whose instructions the library contains."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=10)
    parts = (SOURCE.read_bytes(), version.stdout, repr(FLAGS).encode(), _cpu().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("flags", "Features", "model name", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _opened(path: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(path))
    for name in ("forward", "backward"):
        for dtype in ("float32", "bfloat16"):
            function: Any = getattr(found, f"moekit_{name}_{dtype}")
            function.argtypes, function.restype = [ctypes.POINTER(Call)], None
    found.moekit_large_pages.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.moekit_large_pages.restype = None
    return found

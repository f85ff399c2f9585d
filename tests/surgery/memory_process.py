"""Runs a script that measures its peak memory, so that what it holds is what is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


def measured(script: str, *arguments: Path) -> dict[str, Any]:
    """What a script beside this file printed last, as JSON.

    glibc raises the size from which it maps an allocation by itself each time such a one is freed,
    and keeps smaller ones, in an order that differs from run to run; a fixed size gives every
    freed tensor back, so that the peak is that of the tensors held (within 1%, by measurement;
    without it one run differs from the next by a third).
    """
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *map(str, arguments)],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)},
        check=True,
        capture_output=True,
        text=True,
    )
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts

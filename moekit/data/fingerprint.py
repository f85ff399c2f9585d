"""Short strings that change when files or settings do; the keys of the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def fingerprint_of(paths: Iterable[Path]) -> str:
    """A digest of the absolute name, size and modification time of each file."""
    return digest_of([_stamp(path) for path in paths])


def digest_of(value: Any) -> str:
    """A digest of a JSON value, the same in every process."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _stamp(path: Path) -> tuple[str, int, int]:
    if not path.exists():
        return str(path), -1, -1
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns

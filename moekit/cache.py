"""Folders that are built once, appear complete or not at all, and are checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from moekit.errors import MoekitError, OutputError

_MANIFEST = "manifest.json"


def default_cache() -> Path:
    """The folder in ``MOEKIT_CACHE``, or ``~/.cache/moekit``."""
    return Path(os.path.expanduser(os.environ.get("MOEKIT_CACHE") or "~/.cache/moekit"))


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """``folder``, built by ``build(scratch)`` unless it is there and whole.

    ``build`` fills a scratch folder, which takes its final name only when complete, under a lock
    that the other processes wanting it wait for. A folder of which any file is missing or differs
    from its recorded digest is built again. What a killed process left is never loaded, and removed
    by the next.

    Raises:
        OutputError: if the cache cannot be written.
    """
    if is_whole(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not is_whole(folder):
                _rebuild(folder, build)
    except MoekitError:
        raise
    except OSError as error:
        raise OutputError(
            f"the cache {folder.parent} cannot be written ({error.strerror or error}); free some "
            "space, or set MOEKIT_CACHE to a folder that can be written"
        ) from error
    return folder


def is_whole(folder: Path) -> bool:
    """Whether ``folder`` holds every file of its manifest, unchanged."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return bool(manifest) and all(_digest(folder / n) == d for n, d in manifest.items())
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _rebuild(folder: Path, build: Callable[[Path], None]) -> None:
    scratch = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
    scratch.mkdir()
    try:
        build(scratch)
        _seal(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        scratch.replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {path.relative_to(folder).as_posix(): _digest(path) for path in files}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

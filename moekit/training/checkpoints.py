"""Checkpoints that are whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moekit.errors import OutputError

STAGING = ".saving"
_NAME = re.compile(r"checkpoint-(\d+)")
_INDEX = "model.safetensors.index.json"


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders in ``output``, oldest step first. None is half-written."""
    if not output.is_dir():
        return []
    found = [path for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimiser step after which ``checkpoint`` was taken."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def last_whole(output: Path) -> Path | None:
    """The newest checkpoint in ``output`` whose files are all readable, or None."""
    return next((path for path in reversed(checkpoints(output)) if is_whole(path)), None)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file that a resume needs is there and not cut short.

    A save that was interrupted never gets the name of a checkpoint; this catches what happens to
    one afterwards: a lost block, a half-made copy.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        weights = _weight_files(checkpoint)
        for path in weights:
            with safe_open(path, framework="pt"):  # compares its header with the file's size
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
    archives += list(checkpoint.glob("rng_state*.pth")) or [checkpoint / "rng_state.pth"]
    return "log_history" in state and all(map(zipfile.is_zipfile, archives))


def _weight_files(checkpoint: Path) -> list[Path]:
    index = checkpoint / _INDEX
    if not index.exists():
        return [checkpoint / "model.safetensors"]
    names = set(json.loads(index.read_text())["weight_map"].values())
    return [checkpoint / Path(name).name for name in sorted(names)]


def publish(staged: Path, output: Path) -> Path:
    """Give the finished folder ``staged`` its place in ``output``, in one step.

    All of it is on the disk before it is renamed. A folder of that name is moved away first.
    """
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            _flush(path)
    _flush(staged)
    target = output / staged.name
    if target.exists():
        _discard(target)
    os.replace(staged, target)
    _flush(output)
    return target


def clear_staging(output: Path) -> None:
    """Remove what an interrupted save left behind."""
    shutil.rmtree(output / STAGING, ignore_errors=True)


def keep_newest(output: Path, count: int, also: Path | None = None) -> None:
    """Delete all but the ``count`` newest checkpoints and the one ``also`` names."""
    for path in checkpoints(output)[:-count]:
        if also is None or path.resolve() != also.resolve():
            _discard(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path``, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    _flush(partial)
    os.replace(partial, path)


@contextmanager
def saving_to(output: Path) -> Iterator[None]:
    """Turn what the system says about a failed write below ``output`` into one sentence."""
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        raise _unwritable(output, error) from error
    except RuntimeError as error:  # torch.save on a full disk
        if "PytorchStreamWriter" not in str(error) and "cannot be opened" not in str(error):
            raise
        raise _unwritable(output, error) from error


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; interrupted half-way, it no longer has a checkpoint's name."""
    condemned = checkpoint.parent / STAGING / f"discarded-{checkpoint.name}"
    shutil.rmtree(condemned, ignore_errors=True)
    condemned.parent.mkdir(exist_ok=True)
    os.replace(checkpoint, condemned)
    shutil.rmtree(condemned, ignore_errors=True)


def _unwritable(output: Path, error: Exception) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    full = getattr(error, "errno", errno.ENOSPC) in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space there or give another folder" if full else "give another folder"
    return OutputError(f"cannot write to {output}: {reason}; {remedy}")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

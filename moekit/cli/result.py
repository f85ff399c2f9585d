"""Writing the model that a command made."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from moekit.cli import options as opt
from moekit.compare.record import write_json
from moekit.errors import OutputError


def require_free(output: Path) -> None:
    """Refuse a folder that holds something, or that cannot be written, before any work is done.

    Raises:
        OutputError: it does, or cannot.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} is there already and would be replaced; choose another place")
    opt.require_writable(output.parent)


def write_model(
    model: Any, tokenizer: Any, output: Path, reports: dict[str, dict[str, Any]] | None = None
) -> None:
    """All files under another name first, so that ``output`` is complete when it appears.

    Args:
        reports: JSON files beside the model, by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    scratch = output.with_name(f".{output.name}.{secrets.token_hex(4)}")
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(str(scratch))
        for name, report in (reports or {}).items():
            write_json(scratch / name, report)
        if output.exists():
            output.rmdir()
        os.replace(scratch, output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

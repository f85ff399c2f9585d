"""Writing the model that a command made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moekit.cli import options as opt
from moekit.compare.record import write_json
from moekit.surgery.shards import appearing, require_free


def require_place(output: Path) -> None:
    """Refuse a folder that holds something, or that cannot be written, before any work is done.

    Raises:
        OutputError: it does, or cannot.
    """
    require_free(output)
    opt.require_writable(output.parent)


def write_model(
    model: Any,
    tokenizer: Any,
    output: Path,
    reports: dict[str, dict[str, Any]] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a model, its tokenizer and reports; ``output`` appears when all of it is there.

    Args:
        reports: JSON files beside the model, by name.
        finish: given the finished folder before it takes the name ``output``.

    Raises:
        OutputError: the folder cannot be written.
    """
    with appearing(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
        for name, report in (reports or {}).items():
            write_json(folder / name, report)
        if finish is not None:
            finish(folder)

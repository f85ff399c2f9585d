"""Writing the model that a command made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit.cli import options as opt
from moekit.compare.record import write_json
from moekit.errors import OutputError
from moekit.surgery.shards import appearing


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
    """Write a model, its tokenizer and reports; ``output`` appears when all of it is there.

    Args:
        reports: JSON files beside the model, by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    with appearing(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(str(folder))
        for name, report in (reports or {}).items():
            write_json(folder / name, report)

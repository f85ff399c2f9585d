"""From a source to rows: JSON lines, parquet and hub data sets as tables."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moekit.data.columns import SPLIT_NAMES, Columns
from moekit.data.files import JSON, JSON_LINES, json_objects, parquet_rows
from moekit.data.hub import PREFIX, Hub
from moekit.data.sources import files_below, matching_files
from moekit.errors import DataError

_TABLES = (".parquet", *JSON_LINES, *JSON)
Row = tuple[str, Mapping[str, Any], str | None]


def read_rows(source: str) -> Iterator[Row]:
    """The rows of a table: a name for messages, columns, and the split where the source says it.

    A column ``split`` that holds train, validation or test is the row's split.

    Args:
        source: a file of JSON lines or parquet, a folder of such, a pattern, or
            ``hub:owner/name``.

    Raises:
        DataError: there is no such table, or it cannot be read.
    """
    if source.startswith(PREFIX):
        yield from Hub(source, Columns()).rows()
        return
    for path in _files(source):
        rows = parquet_rows(path) if path.name.lower().endswith(".parquet") else json_objects(path)
        for name, row in rows:
            yield name, row, SPLIT_NAMES.get(str(row.get("split")).lower())


def _files(source: str) -> list[Path]:
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = list(files_below(Path(path)))
    elif os.path.exists(path):
        found = [Path(path)]
    elif glob.has_magic(source):
        found = list(matching_files(path))
    else:
        raise DataError(
            f"{source!r} does not exist; give JSON lines, parquet, a folder of such, or "
            "hub:owner/name"
        )
    tables = [file for file in found if file.name.lower().endswith(_TABLES)]
    if not tables:
        raise DataError(
            f"{source} holds no table; wanted JSON lines ({', '.join(JSON_LINES[:2])}, .json) or "
            "parquet"
        )
    return tables

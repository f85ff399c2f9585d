"""Readers of one file: plain text, JSON lines and parquet."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from moekit.data.columns import Columns, documents_from_rows
from moekit.data.document import Document, chunks, normalise
from moekit.errors import DataError

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
JSON = (".json", ".json.gz")
TABLES = (".csv", ".tsv", ".xls", ".xlsx")
WHOLE_FILE_BYTES = 16 << 20
"""A plain text file larger than this is never held whole: it is read as chunks."""
_STEP = 1 << 20
_ROWS = 256


@dataclass(frozen=True)
class Problem:
    """Why a file holds no readable text: a short kind to count, and the sentence to say."""

    kind: str
    sentence: str


def read_file(path: Path, columns: Columns) -> Iterator[Document]:
    """The documents of one file that the user named.

    Raises:
        DataError: if the file is missing, unreadable, empty, binary, not UTF-8 or malformed.
    """
    name = path.name.lower()
    if name.endswith(TABLES):
        raise DataError(
            f"{path} is a table for a spreadsheet; save it as parquet or JSON lines with a text "
            "column"
        )
    if name.endswith(".parquet"):
        return _read_parquet(path, columns)
    if name.endswith(JSON_LINES + JSON):
        return _read_json_lines(path, columns)
    problem = text_problem(path)
    if problem:
        raise DataError(problem.sentence)
    return _read_text(path)


def read_member(path: Path, columns: Columns) -> Iterator[Document] | Problem:
    """The documents of one file met in a folder or pattern, or why it is to be passed over.

    Only files that are no text are passed over. A damaged JSON lines or parquet file is an error
    here too, since leaving out part of a data set in silence would mislead. A ``.json`` file is
    JSON lines when its first line is an object with the text column, and plain text otherwise.
    """
    name = path.name.lower()
    if name.endswith(TABLES):
        return Problem("table", f"{path} is a table")
    if name.endswith(".parquet") or name.endswith(JSON_LINES):
        return read_file(path, columns)
    if name.endswith(JSON) and _first_line_has_text(path, columns):
        return _read_json_lines(path, columns)
    problem = text_problem(path)
    return problem or _read_text(path)


def text_problem(path: Path) -> Problem | None:
    """Why ``path`` is not UTF-8 text, or ``None`` if it is; the file is read in steps."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    blank, start = True, True
    try:
        with path.open("rb") as file:
            while data := file.read(_STEP):
                if start and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    return _not_utf8(path, "UTF-16")
                if b"\0" in data:
                    return _binary(path)
                blank = not decoder.decode(data).strip() and blank
                start = False
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return _not_utf8(path, "latin1")
    except OSError as error:
        return Problem("unreadable", f"{path} cannot be read: {_reason(error)}")
    return _empty(path) if blank else None


def _empty(path: Path) -> Problem:
    return Problem("empty", f"{path} is empty; give a file with text in it")


def _binary(path: Path) -> Problem:
    return Problem("binary", f"{path} is a binary file (it has NUL bytes); give a text file")


def _not_utf8(path: Path, guess: str) -> Problem:
    return Problem(
        "not UTF-8",
        f"{path} is not UTF-8 text; convert it first, for instance with "
        f"`iconv -f {guess} -t utf-8`",
    )


def _read_text(path: Path) -> Iterator[Document]:
    try:
        if path.stat().st_size <= WHOLE_FILE_BYTES:
            yield Document(normalise(path.read_bytes().decode()), str(path))
            return
        with path.open(encoding="utf-8-sig") as file:
            pieces = iter(lambda: file.read(_STEP), "")
            for number, chunk in enumerate(chunks(pieces)):
                if chunk.strip():
                    yield Document(chunk, f"{path}#{number}")
    except (OSError, UnicodeDecodeError) as error:  # it changed since it was checked
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_json_lines(path: Path, columns: Columns) -> Iterator[Document]:
    lines = json_objects(path)
    first = next(lines, None)
    if first is None:
        raise DataError(f"{path} is empty; give one JSON object with text a line")
    return documents_from_rows(chain([first], lines), list(first[1]), columns, str(path))


def json_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's name for messages, and its object.

    Raises:
        DataError: if the file cannot be read, is not UTF-8, or a line is no JSON object.
    """
    try:
        with _open_text(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise DataError(_not_utf8(path, "latin1").sentence) from error


def _object(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}:{number} is not JSON ({_reason(error)}); wanted one JSON object a line"
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{number} is a JSON {type(value).__name__}; wanted one JSON object a line"
        )
    return value


def _open_text(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _first_line_has_text(path: Path, columns: Columns) -> bool:
    try:
        _, first = next(json_objects(path), (None, {}))
        return columns.text_in(list(first), str(path)) in first
    except DataError:
        return False


def parquet_rows(
    path: Path, wanted: Callable[[Sequence[str]], Collection[str]] = list
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's name for messages, and its columns.

    Args:
        path: the file.
        wanted: given the columns that there are, those to read.

    Raises:
        DataError: if the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with path.open("rb") as opened:
            file = pq.ParquetFile(opened)
            columns = wanted(file.schema_arrow.names)
            names = [name for name in file.schema_arrow.names if name in columns]
            batches = file.iter_batches(batch_size=_ROWS, columns=names)
            rows = (row for batch in batches for row in batch.to_pylist())
            yield from ((f"{path}:{number}", row) for number, row in enumerate(rows))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as parquet: {_reason(error)}") from error


def _read_parquet(path: Path, columns: Columns) -> Iterator[Document]:
    def wanted(available: Sequence[str]) -> Collection[str]:
        kinds = (columns.text_in, columns.group_in, columns.split_in)
        return {name for kind in kinds if (name := kind(available, str(path)))}

    rows = parquet_rows(path, wanted)
    first = next(rows, None)
    if first is not None:
        yield from documents_from_rows(chain([first], rows), list(first[1]), columns, str(path))


def file_bytes(path: Path, columns: Columns) -> int:
    """About how many bytes of text ``path`` holds: its size, or that of a parquet's text column."""
    if not path.name.lower().endswith(".parquet"):
        return path.stat().st_size
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        number = metadata.schema.names.index(columns.text_in(metadata.schema.names, str(path)))
    except (pa.ArrowException, OSError, DataError):
        return path.stat().st_size  # reading it will say what is wrong
    groups = range(metadata.num_row_groups)
    return sum(metadata.row_group(g).column(number).total_uncompressed_size for g in groups)


def _reason(error: BaseException) -> str:
    """The first line of what ``error`` says, without a closing full stop."""
    lines = str(getattr(error, "strerror", None) or error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__

"""From what a user types to a stream of documents.

A source is one of

- ``stdlib``: the standard library of the running Python, which is always there;
- a file: plain UTF-8 text of any suffix, JSON lines (``.jsonl``, ``.ndjson``, ``.json``, also with
  ``.gz``) or parquet;
- a folder, read with all its subfolders (the first of which is a document's group), or a pattern
  such as ``'notes/**/*.md'``; what is no text in it is passed over;
- ``hub:owner/name`` or ``hub:owner/name:configuration``, streamed from the Hugging Face hub.
"""

from __future__ import annotations

import glob
import os
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from moekit.data.columns import Columns
from moekit.data.document import Document, cut_if_few, thin
from moekit.data.files import Problem, file_bytes, read_file, read_member
from moekit.data.fingerprint import fingerprint_of
from moekit.data.hub import PREFIX, Hub
from moekit.data.standard_library import StandardLibrary
from moekit.errors import DataError


class Source(Protocol):
    """Somewhere that documents are read from."""

    @property
    def description(self) -> str:
        """What it is, for messages and reports."""

    def size(self) -> int | None:
        """About how many bytes of text it holds, or ``None`` when only reading it would tell."""

    def fingerprint(self) -> str:
        """A digest that changes when the content does."""

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Its documents, in a fixed order; what is passed over is counted by kind."""


def read_documents(
    source: str,
    *,
    text_column: str | None = None,
    group_column: str | None = None,
    split_column: str | None = None,
    limit_bytes: int | None = None,
) -> Iterator[Document]:
    """The documents of ``source``.

    A source of fewer than 20 documents is cut into contiguous chunks of about 16,384 characters at
    blank lines, then line ends (see :func:`~moekit.data.document.cut_if_few`), so that even one
    file can be split; a plain text file over 16 MiB always is.

    Args:
        source: ``"stdlib"``, a file, a folder, a pattern or ``"hub:owner/name"``.
        text_column: column of the text; guessed among text, content, document and body.
        group_column: column of the group; ``domain`` if there is one.
        split_column: column of the split; ``split`` if it holds names of splits.
        limit_bytes: read at most so many UTF-8 bytes, taken evenly over all of a local source, or
            from the start of a hub data set.

    Raises:
        DataError: if the source is missing, unreadable, empty, binary or malformed.

    Example:
        >>> next(read_documents("stdlib")).group
        'source'
    """
    opened = open_source(source, Columns(text_column, group_column, split_column))
    return documents_of(opened, limit_bytes, Counter())


def documents_of(
    source: Source, limit_bytes: int | None, skipped: Counter[str]
) -> Iterator[Document]:
    """The documents of an opened source, cut when few, thinned to ``limit_bytes``."""
    total = source.size() if limit_bytes is not None else None
    return thin(cut_if_few(source.documents(skipped)), limit_bytes, total)


def open_source(source: str, columns: Columns) -> Source:
    """Find what ``source`` names, without reading its text yet.

    Raises:
        DataError: if there is no such thing.
    """
    if source == "stdlib":
        return StandardLibrary()
    if source.startswith(PREFIX):
        return Hub(source, columns)
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # unlike pathlib's, these take a name of any length
        return Files(f"folder {source}", tuple(files_below(path)), columns, root=path)
    if os.path.isfile(path):
        return File(path, columns)
    if os.path.exists(path):
        raise DataError(f"{source} is neither a file nor a folder; give one of these")
    if glob.has_magic(source):
        return Files(f"pattern {source}", tuple(matching_files(str(path))), columns)
    raise DataError(f"{textwrap.shorten(source, 200)!r} does not exist; {_wanted(source)}")


class File:
    """One file that the user named: whatever keeps it from being read is an error."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self.description = f"file {path}"
        self._path = path
        self._columns = columns

    def size(self) -> int:
        """Bytes of text, about."""
        return file_bytes(self._path, self._columns)

    def fingerprint(self) -> str:
        """Changes whenever the file does."""
        return fingerprint_of([self._path])

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Its documents; nothing is passed over."""
        found = False
        for document in read_file(self._path, self._columns):
            found = True
            yield document
        if not found:
            raise DataError(f"{self._path} is empty; give a file with text in it")


class Files:
    """The files of a folder or pattern, in the order of their names.

    Those that are no text are passed over and counted. With a root, a document of a subfolder has
    the subfolder's name for a group, unless its file gives one.
    """

    def __init__(
        self, description: str, paths: tuple[Path, ...], columns: Columns, root: Path | None = None
    ) -> None:
        if not paths:
            raise DataError(f"{description} has no files; give one with text files in it")
        self.description = description
        self._paths = paths
        self._columns = columns
        self._root = root

    def size(self) -> int:
        """Bytes of text, about."""
        return sum(file_bytes(path, self._columns) for path in self._paths)

    def fingerprint(self) -> str:
        """Changes whenever a file does, comes or goes."""
        return fingerprint_of(self._paths)

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """The documents of every file that holds text.

        Raises:
            DataError: if none does.
        """
        found = False
        for path in self._paths:
            documents = read_member(path, self._columns)
            if isinstance(documents, Problem):
                skipped[documents.kind] += 1
                continue
            for document in documents:
                found = True
                yield replace(document, group=document.group or self._folder(path))
        if not found:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
            raise DataError(
                f"{self.description} holds no text in {len(self._paths)} files"
                + (f" ({kinds})" if kinds else "")
                + "; give one with UTF-8 text, JSON lines or parquet files"
            )

    def _folder(self, path: Path) -> str | None:
        parts = path.relative_to(self._root).parts if self._root else ()
        return parts[0] if len(parts) > 1 else None


def files_below(root: Path) -> Iterator[Path]:
    """The files of a folder and its subfolders in the order of their names, but for hidden ones."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                yield path


def matching_files(pattern: str) -> Iterator[Path]:
    """The files that a pattern matches, in the order of their names."""
    for name in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isfile(name):
            yield Path(name)


def _wanted(source: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return f"give a file, a folder or a pattern, or hub:{source} for the data set of that name"
    return "give a file, a folder, a pattern, 'stdlib' or hub:owner/name"

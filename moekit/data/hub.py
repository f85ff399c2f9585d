"""Text data sets by their hub name, streamed; the only source that uses the network."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from moekit.data.columns import SPLIT_NAMES, Columns, documents_from_rows
from moekit.data.document import Document
from moekit.data.fingerprint import digest_of
from moekit.errors import DataError

PREFIX = "hub:"
_NAME = re.compile(r"hub:(?P<name>\w[\w.-]*(?:/\w[\w.-]*)?)(?::(?P<config>[^\s:]+))?")


class Hub:
    """A data set ``hub:owner/name`` or ``hub:owner/name:configuration``.

    Splits called train, validation or test (or valid, dev, ...) are kept as such and others left
    out; when none is called so, all are read and the split is drawn.
    """

    def __init__(self, source: str, columns: Columns) -> None:
        match = _NAME.fullmatch(source)
        if match is None:
            raise DataError(
                f"{source!r} is no hub name; wanted hub:owner/name or hub:owner/name:configuration"
            )
        self._name: str = match["name"]
        if os.path.exists(self._name):  # datasets would read it in the place of the hub's
            raise DataError(
                f"{source!r} is also a path here, {self._name!r}; leave out hub: to read that, or "
                "work in another folder"
            )
        self.description = source
        self._config: str | None = match["config"]
        self._columns = columns

    def size(self) -> None:
        """Unknown before it is read."""

    def fingerprint(self) -> str:
        """The name: what was once fetched and packed is used again without the network."""
        return digest_of([self._name, self._config])

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Stream the documents of every split.

        Raises:
            DataError: if the hub cannot be reached, or the data set is missing, private, or has no
                text column.
        """
        for name, rows in self._streams(skipped):
            yield from self._split(name, rows)

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any], str | None]]:
        """Stream each row's name for messages, its columns, and its split where it has one.

        Raises:
            DataError: if the hub cannot be reached, or the data set is missing or private.
        """
        for split, rows in self._streams(Counter()):
            for number, row in enumerate(rows):
                yield f"{self.description} ({split}):{number}", row, SPLIT_NAMES.get(split)

    def _streams(self, skipped: Counter[str]) -> Iterator[tuple[str, Iterator[Mapping[str, Any]]]]:
        """The splits to read; whatever goes wrong in reading them says that it was the hub."""
        try:
            splits = self._splits()
            known = {name: rows for name, rows in splits.items() if name in SPLIT_NAMES}
            if known and len(known) < len(splits):
                skipped["other split"] += len(splits) - len(known)
        except Exception as error:
            raise self._refusal(error) from error
        for name, rows in (known or splits).items():
            yield name, self._readable(rows)

    def _readable(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
        try:
            yield from rows
        except Exception as error:
            # datasets, huggingface_hub, fsspec and their HTTP clients each raise their own kinds,
            # with no common base, and all of them mean that this name could not be read.
            raise self._refusal(error) from error

    def _splits(self) -> Mapping[str, Iterable[Mapping[str, Any]]]:
        import datasets

        found: Mapping[str, Iterable[Mapping[str, Any]]] = datasets.load_dataset(
            self._name, self._config, streaming=True
        )
        return found

    def _split(self, split: str, stream: Iterator[Mapping[str, Any]]) -> Iterator[Document]:
        where = f"{self.description} ({split})"
        first = next(stream, None)
        if first is None:
            return

        def named() -> Iterator[tuple[str, Mapping[str, Any]]]:
            yield f"{where}:0", first
            for number, row in enumerate(stream, start=1):
                yield f"{where}:{number}", row

        for document in documents_from_rows(named(), list(first), self._columns, where):
            yield replace(document, split=document.split or SPLIT_NAMES.get(split))

    def _refusal(self, error: Exception) -> DataError:
        import datasets

        lines = str(error).strip().splitlines()
        reason = lines[0].rstrip(".") if lines else type(error).__name__
        if isinstance(error, datasets.exceptions.DatasetNotFoundError):
            advice = "check the name, and log in to the hub if it is private or gated"
        elif isinstance(error, ValueError):
            advice = "check the name and its configuration"
        else:
            advice = "check the network, or give a local file or folder"
        return DataError(f"{self.description} cannot be read from the hub ({reason}); {advice}")

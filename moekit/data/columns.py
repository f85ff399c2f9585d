"""Which columns of a table of documents hold the text, its group and its split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.data.document import Document, normalise
from moekit.errors import DataError
from moekit.spec import suggestion

TEXT_COLUMNS = ("text", "content", "document", "body")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True)
class Columns:
    """The columns a user named; those left ``None`` are guessed.

    The text is guessed among ``text``, ``content``, ``document`` and ``body``; the group is
    ``domain`` when there is one; the split is ``split`` when there is one and its first value is
    the name of a split.
    """

    text: str | None = None
    group: str | None = None
    split: str | None = None

    def text_in(self, available: Sequence[str], where: str) -> str:
        """The text column among ``available``.

        Raises:
            DataError: if there is none, or the one named is missing.
        """
        if self.text is not None:
            return _named(self.text, available, where)
        for name in TEXT_COLUMNS:
            if name in available:
                return name
        raise DataError(
            f"{where} has no column {', '.join(TEXT_COLUMNS[:-1])} or {TEXT_COLUMNS[-1]}; name the "
            f"text column, which can be {_listed(available)}{_of_pairs(available)}"
        )

    def group_in(self, available: Sequence[str], where: str) -> str | None:
        """The group column among ``available``, or ``None``."""
        return _optional(self.group, "domain", available, where)

    def split_in(self, available: Sequence[str], where: str) -> str | None:
        """The split column among ``available``, whose values may yet prove to be no splits."""
        return _optional(self.split, "split", available, where)


def _of_pairs(available: Sequence[str]) -> str:
    """What to say where the columns are those of examples and not of documents."""
    if {"prompt", "completion"} <= set(available) or "messages" in available:
        return "; examples of prompts and answers are read by `moekit adapt --completions`"
    return ""


def documents_from_rows(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    available: Sequence[str],
    columns: Columns,
    where: str,
) -> Iterator[Document]:
    """The documents of ``rows``, each a name for messages and a mapping of columns to values.

    Rows whose text is null or blank are passed over.

    Raises:
        DataError: if a column is missing, a text is no string, or a split has an unknown name.
    """
    text_column = columns.text_in(available, where)
    group_column = columns.group_in(available, where)
    split_column = columns.split_in(available, where)
    first = True
    for name, row in rows:
        if first and split_column and columns.split is None:
            split_column = split_column if _is_split(row.get(split_column)) else None
        first = False
        text = _text(row, text_column, name)
        if text.strip():
            yield Document(
                text,
                name,
                group=_label(row, group_column),
                split=_split(row, split_column, name),
            )


def _text(row: Mapping[str, Any], column: str, name: str) -> str:
    if column not in row:
        raise DataError(f"{name} has no {column!r}; it has {_listed(list(row))}")
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{name}: column {column!r} holds {type(value).__name__}, and text is wanted; name "
            f"another text column among {_listed(list(row))}"
        )
    return normalise(value)


def _label(row: Mapping[str, Any], column: str | None) -> str | None:
    value = row.get(column) if column else None
    return None if value is None else str(value)


def _split(row: Mapping[str, Any], column: str | None, name: str) -> str | None:
    if column is None:
        return None
    value = row.get(column)
    if not _is_split(value):
        raise DataError(
            f"{name}: column {column!r} holds {value!r}; wanted train, validation or test, so mend "
            "it, or rename the column to have the split drawn"
        )
    return SPLIT_NAMES[str(value).lower()]


def _is_split(value: Any) -> bool:
    return isinstance(value, str) and value.lower() in SPLIT_NAMES


def _named(name: str, available: Sequence[str], where: str) -> str:
    if name in available:
        return name
    raise DataError(
        f"{where} has no column {name!r}; it has {_listed(available)}" + suggestion(name, available)
    )


def _optional(name: str | None, default: str, available: Sequence[str], where: str) -> str | None:
    if name is not None:
        return _named(name, available, where)
    return default if default in available else None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"

"""The distinct documents of a source, kept on disk while they are split and tokenised."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from moekit.data.document import Document
from moekit.data.splits import content_key, stronger


class Spool:
    """Texts in one file, read back by number in any order.

    A document equal to an earlier one is not kept twice: the first stays, in the more guarded of
    their splits.

    Attributes:
        keys: content key of each distinct document.
        groups: the group of each, or ``None``.
        given: the split that the source gave each, or ``None``.
        duplicates: how many documents were equal to an earlier one.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w+b")
        self._ends = array("q", [0])
        self._number: dict[bytes, int] = {}
        self.groups: list[str | None] = []
        self.given: list[str | None] = []
        self.duplicates = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._number)

    @property
    def keys(self) -> list[bytes]:
        """The content key of each document."""
        return list(self._number)

    def add(self, document: Document) -> None:
        """Keep ``document``, unless it is there already."""
        key = content_key(document.text)
        number = self._number.setdefault(key, len(self._number))
        if number < len(self.groups):
            self.duplicates += 1
            self.given[number] = stronger(self.given[number], document.split)
            return
        self._ends.append(self._ends[-1] + self._file.write(document.text.encode()))
        self.groups.append(document.group)
        self.given.append(document.split)

    def bytes_of(self, number: int) -> int:
        """UTF-8 bytes of one document."""
        return self._ends[number + 1] - self._ends[number]

    def text(self, number: int) -> str:
        """The text of one document."""
        self._file.seek(self._ends[number])
        return self._file.read(self.bytes_of(number)).decode()

    def texts(self, numbers: Sequence[int]) -> Texts:
        """The texts of some documents, to be iterated as often as wanted."""
        return Texts(self, numbers)

    def batches(self, numbers: Iterable[int], limit: int) -> Iterator[list[int]]:
        """``numbers`` in their order, in batches of about ``limit`` bytes of text."""
        batch: list[int] = []
        size = 0
        for number in numbers:
            batch.append(number)
            size += self.bytes_of(number)
            if size >= limit:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


class Texts:
    """Some texts of a spool, in a fixed order, one in memory at a time."""

    def __init__(self, spool: Spool, numbers: Sequence[int]) -> None:
        self._spool = spool
        self._numbers = numbers

    def __iter__(self) -> Iterator[str]:
        return map(self._spool.text, self._numbers)

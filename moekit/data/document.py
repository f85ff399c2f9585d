"""A document: the unit of text that is read, deduplicated and given to one split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice

FEW_DOCUMENTS = 20
"""Below this many documents a source is cut into chunks, so that every split can get some."""
CHUNK_CHARACTERS = 16_384
SMALLEST_CHUNK = 1_024
_STEP = 1 << 20


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        text: the text, with ``\\n`` line ends and no byte order mark.
        name: where it came from, for messages (``"corpus.jsonl:12"``).
        group: the domain it belongs to, when the source says so.
        split: ``"train"``, ``"validation"`` or ``"test"``, when the source says so.
    """

    text: str
    name: str
    group: str | None = None
    split: str | None = None


def normalise(text: str) -> str:
    """``text`` without byte order mark, with ``\\n`` line ends and no lone surrogates."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def chunks(pieces: Iterable[str], size: int = CHUNK_CHARACTERS) -> Iterator[str]:
    """Cut a text, given in pieces, into contiguous chunks of at most ``size`` characters.

    A chunk ends after the last blank line in the second half of its window, else after the last
    line, else after the last space, else at ``size``. The chunks joined are the text, and they do
    not depend on how it was divided into pieces.
    """
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > size:
            end = _boundary(buffer, start, start + size)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _boundary(text: str, start: int, end: int) -> int:
    for mark in ("\n\n", "\n", " "):
        found = text.rfind(mark, start + (end - start) // 2, end)
        if found >= 0:
            return found + len(mark)
    return end


def cut_if_few(documents: Iterable[Document]) -> Iterator[Document]:
    """Pass ``documents`` on, cut into chunks when there are fewer than ``FEW_DOCUMENTS``.

    The chunks are about 16,384 characters, or a twentieth of all the text but at least 1,024 when
    there is less. They are contiguous and disjoint, so that no text is in two of them. Documents
    that came with a split stay whole.
    """
    documents = iter(documents)
    head = list(islice(documents, FEW_DOCUMENTS))
    if len(head) == FEW_DOCUMENTS:
        yield from chain(head, documents)
        return
    total = sum(len(document.text) for document in head)
    size = max(SMALLEST_CHUNK, min(CHUNK_CHARACTERS, total // FEW_DOCUMENTS))
    for document in head:
        yield from [document] if document.split else _cut(document, size)


def _cut(document: Document, size: int) -> Iterator[Document]:
    text = document.text
    pieces = (text[start : start + _STEP] for start in range(0, len(text), _STEP))
    for number, chunk in enumerate(chunks(pieces, size)):
        if chunk.strip():
            yield replace(document, text=chunk, name=f"{document.name}#{number}")


def thin(documents: Iterable[Document], limit: int | None, total: int | None) -> Iterator[Document]:
    """At most ``limit`` UTF-8 bytes of text, taken evenly from ``total`` bytes of documents.

    A document is kept while the share of bytes kept lags behind ``limit / total``, so that a source
    sorted by domain keeps every domain. With an unknown total the first ``limit`` bytes are kept.
    The document that crosses the limit is cut there, on a character.
    """
    if limit is None:
        yield from documents
        return
    share = min(1.0, limit / total) if total else 1.0
    kept = seen = 0
    for document in documents:
        data = document.text.encode()
        if kept <= share * seen:
            text = data[: limit - kept].decode(errors="ignore")
            if text.strip():
                yield replace(document, text=text)
            kept += len(data)
        seen += len(data)
        if kept >= limit:
            return

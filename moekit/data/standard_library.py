"""The embedded default: the running Python's own standard library, sources and documentation."""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from moekit.data.document import Document, normalise
from moekit.data.files import text_problem
from moekit.data.fingerprint import fingerprint_of
from moekit.errors import DataError

_SKIPPED = {"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"}
_TOPICS = Path("pydoc_data") / "topics.py"


class StandardLibrary:
    """Standard library modules, group ``"source"``, then pydoc's topics, ``"documentation"``.

    Tests, IDLE, installed packages and files that are not UTF-8 are left out. The order is that of
    the names, so two runs of one Python read the same documents in the same order.
    """

    description = "the Python standard library"

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._modules = _modules(self._root)
        if not self._modules:
            raise DataError(
                f"this Python ships no standard library sources in {self._root}; give a text file, "
                "a folder or a hub name"
            )

    def size(self) -> int:
        """Bytes of text, about."""
        paths = [*self._modules, self._root / _TOPICS]
        return sum(path.stat().st_size for path in paths if path.exists())

    def fingerprint(self) -> str:
        """Changes whenever a file does."""
        return fingerprint_of([*self._modules, self._root / _TOPICS])

    def documents(self, skipped: Counter[str]) -> Iterator[Document]:
        """Every module and topic; files that are no text are counted in ``skipped``."""
        for path in self._modules:
            problem = text_problem(path)
            if problem:
                skipped[problem.kind] += 1
                continue
            name = path.relative_to(self._root).as_posix()
            yield Document(normalise(path.read_bytes().decode()), name, group="source")
        yield from _topics()


def _modules(root: Path) -> list[Path]:
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        if inside != _TOPICS and not _SKIPPED.intersection(inside.parts):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _topics() -> Iterator[Document]:
    if find_spec("pydoc_data") is None or find_spec("pydoc_data.topics") is None:
        return  # some distributions leave it out
    from pydoc_data.topics import topics

    for name in sorted(topics):
        if topics[name].strip():
            yield Document(normalise(topics[name]), f"topic {name}", group="documentation")

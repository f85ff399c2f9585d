"""Text written for the tests, and the real data beside the repository where there is some."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SENTENCE = "the expert router sends a token to its bank and café naïve 世界 🙂 weight"
WORDS = SENTENCE.split()


@pytest.fixture
def text_data() -> Path:
    """The folder of real text beside the repository."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"
    if not folder.is_dir():
        pytest.skip("the real data folder is absent")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to connect is a failure that nothing can mistake for an unreachable host."""

    connect = socket.socket.connect

    def refuse(*_: object) -> None:
        raise AssertionError("a test tried to use the network")

    def connect_here(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:  # by which the workers of a loader speak
            refuse()
        connect(self, address)

    monkeypatch.setattr("socket.socket.connect", connect_here)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """A writer of folders with ``count`` distinct text files of about ``words`` words."""

    def write(name: str = "corpus", count: int = 60, words: int = 120) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        draw = random.Random(name)
        for number in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(words))
            (folder / f"{number:03}.txt").write_text(f"document {number}\n\n{text}\n", "utf-8")
        return folder

    return write

"""What the tests of text sources share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from moekit.data import read_documents
from moekit.errors import DataError

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def texts(source: Path | str, **columns: Any) -> list[str]:
    return [found.text for found in read_documents(str(source), **columns)]


def refusal(source: Path | str, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        list(read_documents(str(source), **columns))
    message = str(caught.value)
    assert "\n" not in message
    assert not message.endswith(".")
    return message


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path

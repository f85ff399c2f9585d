"""Folders, patterns and damaged files as sources of text."""

from __future__ import annotations

import gzip
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_cases import refusal, texts, write_lines

from moekit.data import read_documents
from moekit.data.columns import Columns
from moekit.data.sources import open_source
from moekit.errors import DataError

# --- folders and patterns


def tree(root: Path) -> Path:
    (root / "b" / "deep").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / "z.txt").write_text("zed")
    (root / "b" / "two.md").write_text("two")
    (root / "b" / "deep" / "one.py").write_text("one = 1")
    (root / ".git" / "config").write_text("hidden")
    (root / ".hidden.txt").write_text("hidden")
    (root / "b" / "image.bin").write_bytes(b"\x89PNG\0\0")
    (root / "b" / "latin.txt").write_bytes("é".encode("latin1"))
    (root / "b" / "empty.txt").write_text(" \n")
    (root / "b" / "table.csv").write_text("a,b\n1,2\n")
    write_lines(root / "rows.jsonl", [{"text": "row", "domain": "own"}])
    write_lines(root / "b" / "lines.json", [{"text": "line"}])
    (root / "b" / "package.json").write_text('{\n "name": "x"\n}')
    return root


def test_a_folder_is_read_in_order_and_what_is_no_text_is_counted(tmp_path: Path) -> None:
    source = open_source(str(tree(tmp_path)), Columns())
    skipped = Counter[str]()
    found = list(source.documents(skipped))
    assert [(one.text, one.group) for one in found] == [
        ("row", "own"),
        ("zed", None),
        ("line", "b"),
        ('{\n "name": "x"\n}', "b"),
        ("two", "b"),
        ("one = 1", "b"),
    ]
    assert skipped == {"binary": 1, "not UTF-8": 1, "empty": 1, "table": 1}


def test_a_pattern_takes_what_it_matches(tmp_path: Path) -> None:
    tree(tmp_path)
    assert texts(f"{tmp_path}/**/*.py") == ["one = 1"]
    assert texts(f"{tmp_path}/*.[tj]*") == ["row", "zed"]
    assert "no files" in refusal(f"{tmp_path}/*.rst")


def test_a_name_that_looks_like_a_pattern_is_a_file_first(tmp_path: Path) -> None:
    path = tmp_path / "notes[1].txt"
    path.write_text("bracketed")
    assert texts(path) == ["bracketed"]


def test_a_damaged_table_in_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / "part.parquet").write_bytes(b"PAR1 cut")
    assert "part.parquet cannot be read as parquet" in refusal(tmp_path)


def test_a_folder_with_no_text_is_an_error(tmp_path: Path) -> None:
    assert "has no files" in refusal(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "b.txt").write_text("")
    assert "holds no text in 2 files (1 binary, 1 empty)" in refusal(tmp_path)


# --- bad files


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xef\xbb\xbf \r\n", "is empty"),
        ("a.txt", b"text\0text", "is a binary file (it has NUL bytes)"),
        ("a.txt", "caf\u00e9".encode("latin1"), "is not UTF-8 text; convert it first"),
        ("a.txt", b"cut \xe4\xb8", "is not UTF-8 text; convert it first"),
        ("a.txt", "text".encode("utf-16"), "iconv -f UTF-16"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": null}\n', "is empty"),
        ("a.jsonl", b'{"text": "caf\xe9"}', "is not UTF-8 text"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}' * 9, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.parquet", b"PAR1" + bytes(50) + b"PAR1", "cannot be read as parquet"),
        ("a.csv", b"a,b\n1,2\n", "save it as parquet or JSON lines"),
    ],
)
@pytest.mark.parametrize("limit", [None, 100])
def test_a_bad_file_is_one_clear_sentence(
    tmp_path: Path, name: str, data: bytes, said: str, limit: int | None
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    message = refusal(path, limit_bytes=limit)
    assert said in message
    assert str(path) in message


def test_an_empty_parquet_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert "a.parquet is empty" in refusal(tmp_path / "a.parquet")


def test_a_missing_source_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give a file, a folder"):
        read_documents(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="hub:owner/corpus for the data set"):
        read_documents("owner/corpus")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        read_documents("/dev/null")
    with pytest.raises(DataError, match="does not exist"):
        read_documents("Once upon a time " * 1000)
    with pytest.raises(DataError, match="does not exist"):
        read_documents("~nobody-by-this-name/text")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such permissions")
def test_a_file_that_may_not_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "locked.txt"
    path.write_text("secret")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # the superuser may read every file
    assert "locked.txt cannot be read: Permission denied" in refusal(path)

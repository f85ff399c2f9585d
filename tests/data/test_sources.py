"""Readers: what each kind of source yields, and what is said of a bad one."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from source_cases import UNICODE, refusal, texts, write_lines

from moekit.data import Document, document, read_documents
from moekit.data import files as files_module
from moekit.data.document import chunks, cut_if_few, normalise, thin

# --- the standard library


def test_standard_library_has_sources_and_documentation() -> None:
    found = list(read_documents("stdlib"))
    counts = Counter(one.group for one in found)
    assert set(counts) == {"source", "documentation"}
    assert min(counts.values()) > 50
    assert sum(len(one.text) for one in found) > 5_000_000
    names = [one.name for one in found]
    assert "json/decoder.py" in names
    assert "topic assert" in names
    left_out = {"test", "tests", "idlelib", "site-packages"}
    assert not [name for name in names if left_out.intersection(name.split("/"))]
    # the topics are also a module; reading that too would put one text in two splits
    assert "pydoc_data/topics.py" not in names


def test_standard_library_modules_are_read_as_they_are() -> None:
    found = {one.name: one.text for one in read_documents("stdlib")}
    assert found["json/decoder.py"] == Path(json.decoder.__file__).read_text("utf-8")


def test_standard_library_order_is_fixed() -> None:
    assert list(read_documents("stdlib")) == list(read_documents("stdlib"))


def test_standard_library_limit_keeps_both_groups() -> None:
    found = list(read_documents("stdlib", limit_bytes=1_000_000))
    assert {one.group for one in found} == {"source", "documentation"}
    size = sum(len(one.text.encode()) for one in found)
    assert 900_000 < size <= 1_000_000


def test_missing_standard_library_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert "no standard library sources" in refusal("stdlib")


# --- plain text


def test_plain_text_loses_byte_order_mark_and_carriage_returns(tmp_path: Path) -> None:
    path = tmp_path / "notes.text"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert texts(path) == ["one\ntwo\nthree\n"]


def test_a_large_file_is_cut_without_losing_a_character(text_data: Path) -> None:
    path = text_data / "tinyshakespeare.txt"
    found = texts(path)
    assert "".join(found) == path.read_text("utf-8")
    assert len(found) > 60
    assert all(len(text) <= document.CHUNK_CHARACTERS for text in found)
    # nearly all chunks end where a speech does
    assert sum(text.endswith("\n\n") for text in found[:-1]) > 0.95 * (len(found) - 1)


def test_a_file_too_large_to_hold_is_read_as_the_same_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "".join(f"línea {n}\r\n" for n in range(40_000)).encode())
    whole = texts(path)
    monkeypatch.setattr(files_module, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(files_module, "_STEP", 977)
    assert texts(path) == whole
    assert "".join(whole) == "".join(f"línea {n}\n" for n in range(40_000))


@settings(deadline=None)
@given(UNICODE, st.integers(1, 12), st.integers(1, 7))
def test_chunks_join_to_the_text_however_it_comes(text: str, size: int, step: int) -> None:
    pieces = [text[start : start + step] for start in range(0, len(text), step)]
    found = list(chunks(pieces, size))
    assert "".join(found) == text
    assert found == list(chunks([text], size))
    assert all(0 < len(chunk) <= size for chunk in found)


def test_chunks_end_at_blank_line_then_line_then_space() -> None:
    assert list(chunks(["aaaaa\n\nbb\nbb b"], 10)) == ["aaaaa\n\n", "bb\nbb b"]
    assert list(chunks(["aaaa aa\nbb bb"], 10)) == ["aaaa aa\n", "bb bb"]
    assert list(chunks(["aaaaaa bbbbbb"], 10)) == ["aaaaaa ", "bbbbbb"]
    assert list(chunks(["aaaaaaaaaaaaa"], 10)) == ["aaaaaaaaaa", "aaa"]


@pytest.mark.parametrize("count", [1, 19, 20, 21])
def test_only_a_source_of_few_documents_is_cut(count: int) -> None:
    given_ = [Document("line\n" * 10_000, f"{n}") for n in range(count)]
    found = list(cut_if_few(given_))
    assert (len(found) > count) == (count < 20)
    assert "".join(one.text for one in found) == "".join(one.text for one in given_)


def test_documents_with_a_split_of_their_own_stay_whole() -> None:
    given_ = [Document("line\n" * 10_000, "a", split="test"), Document("x\n" * 10_000, "b")]
    found = list(cut_if_few(given_))
    assert found[0] == given_[0]
    assert len(found) > 2


@settings(deadline=None)
@given(st.text(st.characters()))  # lone surrogates too
def test_normalised_text_can_be_encoded_and_stays_so(text: str) -> None:
    once = normalise(text)
    once.encode()
    assert "\r" not in once
    assert normalise(once) == once.removeprefix("\ufeff")


def test_surrogate_pairs_are_joined_and_lone_ones_replaced() -> None:
    assert normalise("\ud83d\ude42 \ud83d") == "🙂 \ufffd"


# --- limits


@settings(deadline=None)
@given(
    st.lists(st.text("aé世", min_size=1, max_size=30), max_size=40),
    st.integers(1, 500),
    st.booleans(),
)
def test_a_limit_is_kept_and_nearly_reached(parts: list[str], limit: int, known: bool) -> None:
    given_ = [Document(text, str(number)) for number, text in enumerate(parts)]
    total = sum(len(text.encode()) for text in parts)
    found = list(thin(given_, limit, total if known else None))
    kept = sum(len(one.text.encode()) for one in found)
    assert kept <= limit
    longest = max((len(text.encode()) for text in parts), default=0)
    # a document is passed over only when the share is ahead, so at most one document is missing
    assert kept >= min(limit, total) - longest - 3
    names = [int(one.name) for one in found]
    assert names == sorted(set(names))


def test_a_limit_spares_every_domain_of_a_sorted_file(text_data: Path) -> None:
    path = text_data / "domains.parquet"
    rows = pq.read_table(path, columns=["domain", "text"]).to_pylist()
    sizes = Counter[str]()
    for row in rows:
        sizes[row["domain"]] += len(row["text"].encode())
    found = Counter[str]()
    for one in read_documents(str(path), limit_bytes=sum(sizes.values()) // 4):
        found[one.group or ""] += len(one.text.encode())
    large = [name for name, size in sizes.items() if size > 300_000]
    assert len(large) > 10
    for name in large:
        assert found[name] / sizes[name] == pytest.approx(0.25, abs=0.1)


def test_a_limit_looks_at_the_text_column_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"image": bytes([n]) * 5000, "text": f"{n} words " * 20} for n in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    size = sum(len(text) for text in texts(path, limit_bytes=10_000))
    assert 9_000 < size <= 10_000


# --- tables


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json", "rows.jsonl.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = '{"text": "one\\r\\n"}\n\n{"text": "zwei ü"}\r\n{"text": null}\n{"text": " "}\n'
    encoded = b"\xef\xbb\xbf" + data.encode()
    path.write_bytes(gzip.compress(encoded, mtime=0) if name.endswith("gz") else encoded)
    found = list(read_documents(str(path)))
    assert [one.text for one in found] == ["one\n", "zwei ü"]
    assert found[1].name == f"{path}:3#0"


def test_columns_are_guessed(tmp_path: Path) -> None:
    rows = [
        {"id": n, "body": "no", "content": f"text {n}", "domain": f"d{n}", "split": split}
        for n, split in enumerate(["train", "valid", "dev", "Test", "val", "validation"])
    ]
    found = list(read_documents(str(write_lines(tmp_path / "rows.jsonl", rows))))
    assert [one.text for one in found] == [f"text {n}" for n in range(6)]
    assert [one.group for one in found] == [f"d{n}" for n in range(6)]
    held_out = ["validation", "validation", "test", "validation", "validation"]
    assert [one.split for one in found] == ["train", *held_out]


def test_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"text": "no", "lyrics": f"la {n}", "year": 1990 + n, "fold": "test"} for n in range(3)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    found = list(
        read_documents(str(path), text_column="lyrics", group_column="year", split_column="fold")
    )
    assert [(one.text, one.group, one.split) for one in found] == [
        (f"la {n}", str(1990 + n), "test") for n in range(3)
    ]


def test_a_split_column_of_something_else_is_left_alone(tmp_path: Path) -> None:
    rows = [{"text": "a", "split": "fold-1"}, {"text": "b", "split": "train"}]
    found = list(read_documents(str(write_lines(tmp_path / "rows.jsonl", rows))))
    assert [one.split for one in found] == [None, None]


def test_parquet_matches_what_pyarrow_reads(text_data: Path) -> None:
    path = text_data / "domains.parquet"
    rows = pq.read_table(path).to_pylist()
    found = list(read_documents(str(path)))
    assert [(one.text, one.group, one.split) for one in found] == [
        (normalise(row["text"]), row["domain"], row["split"]) for row in rows
    ]


def test_parquet_of_dictionary_strings_and_nulls(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    column = pa.array(["a", None, "b", "  ", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column, "other": [1, 2, 3, 4, 5]}), path, row_group_size=2)
    assert texts(path) == ["a", "b", "a"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        ({"prose": "x", "id": 1}, {}, "prose, id"),
        ({"prompt": "x", "completion": "y"}, {}, "are read by `moekit adapt --completions`"),
        ({"messages": [{"role": "user", "content": "x"}]}, {}, "adapt --completions"),
        ({"text": "x", "id": 1}, {"text_column": "txt"}, "did you mean text?"),
        ({"text": "x", "id": 1}, {"group_column": "genre"}, "has no column 'genre'; it has text"),
        ({"text": "x", "id": 1}, {"split_column": "part"}, "has no column 'part'; it has text"),
        ({"text": 3, "id": 1}, {}, "column 'text' holds int"),
        ({"text": "x", "fold": "extra"}, {"split_column": "fold"}, "holds 'extra'; wanted train"),
    ],
)
def test_bad_columns_are_named(
    tmp_path: Path, kind: str, row: dict[str, Any], columns: dict[str, str], said: str
) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_lines(path, [row])
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    message = refusal(path, **columns)
    assert str(path) in message
    assert said in message


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "cut', "rows.jsonl:2 is not JSON"),
        ("[" * 100_000, "rows.jsonl:2 is not JSON"),
        ('["text"]', "rows.jsonl:2 is a JSON list; wanted one JSON object a line"),
        ('{"other": "x"}', "rows.jsonl:2 has no 'text'; it has other"),
        ('{"text": ["x"]}', "rows.jsonl:2: column 'text' holds list"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert said in refusal(path)

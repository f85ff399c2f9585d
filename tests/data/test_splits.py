"""Splits: no text is in two of them, and a document keeps its own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import documents_in, small

from moekit.data import packed, prepare, read_documents
from moekit.data.splits import SPLITS, assign_splits, content_key
from moekit.errors import DataError

Writer = Callable[..., Path]


def test_no_document_is_in_two_splits(write_corpus: Writer, cache: Path) -> None:
    source = write_corpus(count=100)
    names = sorted(source.iterdir())
    for number, path in enumerate(names[:50]):  # the same again, under names that sort elsewhere
        text = path.read_text("utf-8")
        (source / f"copy{number}.txt").write_text(f"\n{text}  " if number % 2 else text, "utf-8")
    data = prepare(small(source, validation_share=0.3, test_share=0.3, sequence_length=4), cache)
    assert data.report["duplicates_removed"] == 50
    assert sum(data.report["documents"].values()) == 100
    found = {split: {t.strip() for t in documents_in(data, split)} for split in SPLITS}
    assert all(len(texts) > 10 for texts in found.values())
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert not found["validation"] & found["test"]


def test_a_held_out_document_is_taken_from_training(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"words of text {n} " * 9, "split": "train"} for n in range(30)]
    rows += [{"text": rows[n]["text"], "split": "test"} for n in (3, 4)]
    rows += [{"text": rows[n]["text"], "split": "validation"} for n in (4, 5)]
    rows += [{"text": rows[3]["text"], "split": "train"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepare(small(path, sequence_length=4), cache)
    assert data.report["documents"] == {"train": 27, "validation": 1, "test": 2}
    assert data.report["duplicates_removed"] == 5
    assert data.report["splits_given"]


def test_given_splits_are_kept(text_data: Path, cache: Path) -> None:
    spec = small(text_data / "domains.parquet", limit_bytes=3_000_000)
    data = prepare(spec, cache)
    given_ = dict.fromkeys(SPLITS, 0)
    for one in read_documents(spec.source, limit_bytes=spec.limit_bytes):
        given_[one.split or ""] += len(one.text.encode())
    assert data.report["bytes"] == given_
    assert len(data.groups) > 20
    assert set(data.train.groups.tolist()) <= set(range(len(data.groups)))
    name = data.groups[int(data.train.groups[0])]
    text = data.tokenizer.decode(data.train[0]["input_ids"])
    one = next(
        one.text
        for one in read_documents(spec.source)
        if one.group == name and text[:20] in one.text
    )
    assert text[:20] in one


def test_missing_held_out_splits_are_drawn(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"words {n} " * 9, "split": "test" if n < 5 else "train"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = prepare(small(path, sequence_length=4), cache).report["documents"]
    assert documents["test"] == 5
    assert 1 <= documents["validation"] < 15
    assert sum(documents.values()) == 60


@settings(deadline=None)
@given(
    st.integers(3, 60),
    st.floats(0.01, 0.49),
    st.floats(0.01, 0.49),
    st.integers(0, 1000),
)
def test_a_split_is_the_documents_own(
    count: int, validation: float, test: float, seed: int
) -> None:
    def split_of(keys: list[bytes]) -> dict[bytes, int]:
        found = assign_splits(keys, [None] * len(keys), validation, test, seed)
        return dict(zip(keys, found.tolist(), strict=True))

    keys = [content_key(f"{seed} {number}") for number in range(count)]
    found = split_of(keys)
    assert set(found.values()) == {0, 1, 2}
    assert split_of(random.Random(seed).sample(keys, count)) == found


@pytest.mark.parametrize("seed", range(10))
def test_three_documents_are_enough_and_two_are_not(seed: int) -> None:
    keys = [content_key(str(number)) for number in range(3)]
    for share in (0.01, 0.49):
        found = assign_splits(keys, [None] * 3, share, share, seed)
        assert sorted(found.tolist()) == [0, 1, 2]
    with pytest.raises(DataError, match="2 distinct documents are too few"):
        assign_splits(keys[:2], [None] * 2, 0.1, 0.1, seed)
    found = assign_splits(keys, ["test", None, "train"], 0.1, 0.1, seed)
    assert found[0] == 2
    assert sorted(found[1:].tolist()) == [0, 1]
    with pytest.raises(DataError, match="1 documents not held out are too few for train and val"):
        assign_splits(keys[:2], ["test", None], 0.1, 0.1, seed)


def test_a_document_keeps_its_split_when_others_come() -> None:
    keys = [content_key(str(number)) for number in range(2000)]
    whole = assign_splits(keys, [None] * 2000, 0.05, 0.1, seed=3)
    part = assign_splits(keys[:1000], [None] * 1000, 0.05, 0.1, seed=3)
    assert (whole[:1000] == part).all()
    counts = np.bincount(whole)
    assert counts / 2000 == pytest.approx([0.85, 0.05, 0.1], abs=0.02)
    other = assign_splits(keys, [None] * 2000, 0.05, 0.1, seed=4)
    assert (other != whole).mean() > 0.1


def test_the_tokenizer_never_sees_held_out_text(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    train = packed.train_tokenizer

    def watch(texts: Any, vocab_size: int, folder: Path) -> Any:
        seen.extend(texts)
        return train(texts, vocab_size, folder)

    monkeypatch.setattr(packed, "train_tokenizer", watch)
    data = prepare(small(write_corpus(), sequence_length=2), cache)
    assert len(seen) == data.report["documents"]["train"]
    for split in ("validation", "test"):
        held_out = documents_in(data, split)
        assert held_out
        assert not held_out & set(seen)

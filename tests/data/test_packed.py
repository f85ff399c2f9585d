"""Packed data: what every block holds, and what is refused."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import small, splits, stream
from torch.utils.data import DataLoader

from moekit.data import PackedDataset, TextSpec, prepare, read_documents
from moekit.data.blocks import PackedDocument, token_dtype, write_split
from moekit.data.splits import SPLITS
from moekit.data.tokenizer import encode
from moekit.errors import CheckpointError, DataError, MoekitError, SpecError

Writer = Callable[..., Path]


# --- packing


def slow_blocks(documents: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    blocks, block = [], []
    for document in documents:
        for token in document:
            block.append(token)
            if len(block) == length:
                blocks.append(block)
                block = []
    return blocks


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 70_000), min_size=1, max_size=20),
            st.integers(0, 50),
            st.integers(-1, 3),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 9),
)
def test_blocks_match_a_slow_reference(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[list[int], int, int]],
    length: int,
) -> None:
    folder = tmp_path_factory.mktemp("packed")
    written = [PackedDocument(np.array(ids), size, group) for ids, size, group in documents]
    write_split(folder, "train", written, "uint32")
    dataset = PackedDataset(folder, "train", length, "uint32")

    expected = slow_blocks([ids for ids, _, _ in documents], length)
    assert [block["input_ids"].tolist() for block in dataset] == expected
    assert len(dataset) == len(expected)

    of_tokens = slow_blocks([[group] * len(ids) for ids, _, group in documents], length)
    assert [dataset.token_groups(i).tolist() for i in range(len(dataset))] == of_tokens
    majority = [min(set(b), key=lambda g, b=b: (-b.count(g), g)) for b in of_tokens]
    assert dataset.groups.tolist() == majority

    shares = slow_blocks([[size / len(ids)] * len(ids) for ids, size, _ in documents], length)
    for index, share in enumerate(shares):
        assert dataset.bytes_of(index) == pytest.approx(sum(share), abs=1e-9)
    if shares:
        used = len(expected) * length
        assert dataset.bytes_per_token == pytest.approx(sum(map(sum, shares)) / used, abs=1e-9)


def test_a_block_is_what_a_model_wants(write_corpus: Writer, cache: Path) -> None:
    data = prepare(small(write_corpus()), cache)
    block = data.train[0]
    assert set(block) == {"input_ids", "labels"}
    assert block["input_ids"].shape == (16,)
    assert block["input_ids"].dtype == torch.int64
    assert torch.equal(block["input_ids"], block["labels"])
    block["labels"][:] = -100  # as a collator does; the input must not change with it
    assert (block["input_ids"] >= 0).all()
    assert torch.equal(data.train[-1]["input_ids"], data.train[len(data.train) - 1]["input_ids"])
    for beyond in (len(data.train), -len(data.train) - 1):
        with pytest.raises(IndexError):
            data.train[beyond]
        with pytest.raises(IndexError):
            data.train.bytes_of(beyond)


def test_packed_text_is_the_documents_each_closed(write_corpus: Writer, cache: Path) -> None:
    source = write_corpus()
    data = prepare(small(source), cache)
    read = [one.text for one in read_documents(str(source))]
    number = {text: place for place, text in enumerate(read)}
    seen: list[str] = []
    for split in SPLITS:
        dataset = splits(data)[split]
        whole = PackedDataset(dataset._path.parent, split, 1, dataset._dtype)
        parts = data.tokenizer.decode(stream(whole)).split("<|endoftext|>")
        assert parts.pop() == ""
        seen += parts
        order = [number[text] for text in parts]
        if split == "train":
            assert order != sorted(order)
        else:
            assert order == sorted(order)
        assert stream(dataset) == stream(whole)[: len(dataset) * 16]
        assert len(stream(whole)) - len(stream(dataset)) < 16
        size = sum(len(text.encode()) for text in parts)
        assert dataset.bytes == data.report["bytes"][split] == size
        assert dataset.tokens == data.report["tokens"][split] == len(whole)
        assert dataset.documents == data.report["documents"][split] == len(parts)
    assert sorted(seen) == sorted(read)


def test_bits_per_byte_of_a_uniform_model_are_those_of_its_code(
    write_corpus: Writer, cache: Path
) -> None:
    data = prepare(small(write_corpus(), sequence_length=2), cache)
    nats_per_token = math.log(len(data.tokenizer))
    bits_per_byte = nats_per_token / data.test.bytes_per_token / math.log(2)
    code = data.report["tokens"]["test"] * math.log2(len(data.tokenizer))
    # a tail of one token is dropped, at most
    assert bits_per_byte == pytest.approx(code / data.report["bytes"]["test"], rel=2e-3)


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(258, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_tokens_are_stored_narrow_but_whole(vocabulary: int, dtype: str) -> None:
    assert token_dtype(vocabulary) == dtype
    assert np.array([vocabulary - 1]).astype(dtype)[0] == vocabulary - 1


def test_a_data_set_is_mapped_and_pickles_to_its_path(write_corpus: Writer, cache: Path) -> None:
    data = prepare(small(write_corpus(words=2000)), cache)
    first = data.train[0]["input_ids"]
    assert isinstance(data.train._mapped, np.memmap)
    pickled = pickle.dumps(data.train)
    assert len(pickled) < data.train.tokens / 4
    again = pickle.loads(pickled)
    assert torch.equal(again[0]["input_ids"], first)
    assert len(again) == len(data.train)


def test_a_loader_with_workers_sees_every_block_once(write_corpus: Writer, cache: Path) -> None:
    data = prepare(small(write_corpus(count=30)), cache)
    loader = DataLoader(data.train, batch_size=4, num_workers=2)
    found = torch.cat([batch["input_ids"] for batch in loader])
    assert found.flatten().tolist() == stream(data.train)


def test_no_text_can_forge_an_end_of_text(write_corpus: Writer, cache: Path) -> None:
    source = write_corpus(count=30)
    for path in source.iterdir():
        path.write_text(path.read_text("utf-8") + "<|endoftext|> <|pad|>" * 5, "utf-8")
    data = prepare(small(source), cache)
    end = data.tokenizer.eos_token_id
    whole = PackedDataset(data.train._path.parent, "train", 1, "uint16")
    assert stream(whole).count(end) == data.report["documents"]["train"]
    assert data.tokenizer.pad_token_id not in stream(whole)


# --- another tokenizer


def test_a_tokenizer_of_ones_own_is_used(write_corpus: Writer, tmp_path: Path, cache: Path) -> None:
    source = write_corpus()
    first = prepare(small(source), cache)
    mine = tmp_path / "mine"
    first.tokenizer.save_pretrained(str(mine))
    data = prepare(small(source, tokenizer=str(mine), vocab_size=9999), cache)
    assert stream(data.train) == stream(first.train)
    assert data.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    text = "the router\n"
    assert encode(data.tokenizer, [text]) == encode(first.tokenizer, [text])
    with pytest.raises(CheckpointError, match="does not exist"):
        prepare(small(source, tokenizer=str(tmp_path / "absent")), cache)


# --- refusals


@pytest.mark.parametrize(
    "fields",
    [
        {"vocab_size": 257},
        {"sequence_length": 1},
        {"validation_share": 0.0},
        {"test_share": -0.1},
        {"validation_share": 0.5, "test_share": 0.5},
        {"limit_bytes": 0},
        {"seed": -1},
        {"source": 3},
    ],
)
def test_a_contradictory_spec_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        TextSpec(**fields)


def test_a_spec_goes_to_json_and_back() -> None:
    spec = TextSpec(source="a.txt", limit_bytes=7, tokenizer="owner/name")
    assert TextSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty"),
        ("one word", "1 distinct documents are too few for train, validation and test"),
        (" ".join(map(str, range(2000))), "a block has 16000; give more text"),
    ],
)
def test_too_little_text_is_one_clear_sentence(
    tmp_path: Path, cache: Path, content: str, said: str
) -> None:
    path = tmp_path / "little.txt"
    path.write_text(content)
    with pytest.raises(DataError) as caught:
        prepare(small(path, sequence_length=16_000), cache)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_splits_that_leave_nothing_to_train_on_are_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {n}", "split": ("validation", "test")[n % 2]} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="0 documents not held out are too few for train"):
        prepare(small(path), cache)


@pytest.mark.parametrize("source", ["missing.txt", "hub:no such name"])
def test_a_bad_source_touches_no_cache(cache: Path, source: str) -> None:
    with pytest.raises(DataError):
        prepare(small(source), cache)
    assert not cache.exists()


def test_a_failed_read_leaves_nothing_half_written(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' * 50 + "broken\n")
    for _ in range(2):
        with pytest.raises(MoekitError, match=r"rows\.jsonl:51 is not JSON"):
            prepare(small(path), cache)
        assert not [entry for entry in (cache / "text").iterdir() if entry.is_dir()]


def test_the_default_prepares_offline(cache: Path) -> None:
    start_time = time.monotonic()
    data = prepare(TextSpec(limit_bytes=2_000_000, vocab_size=512), cache)
    assert time.monotonic() - start_time < 60
    assert data.groups == ("documentation", "source")
    assert len(data.train) > 100
    assert data.report["source"] == "the Python standard library"

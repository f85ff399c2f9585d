"""Packed data: what every block holds, that no text leaks, and that the cache can be trusted."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from moekit.data import PackedDataset, TextData, TextSpec, packed, prepare, read_documents
from moekit.data.blocks import PackedDocument, token_dtype, write_split
from moekit.data.splits import SPLITS, assign_splits, content_key
from moekit.data.tokenizer import encode
from moekit.errors import CheckpointError, DataError, MoekitError, OutputError, SpecError

ROOT = Path(__file__).resolve().parents[2]
Writer = Callable[..., Path]


def small(source: Path | str, **fields: Any) -> TextSpec:
    defaults = {"vocab_size": 300, "sequence_length": 16}
    return TextSpec(source=str(source), **{**defaults, **fields})


def splits(data: TextData) -> dict[str, PackedDataset]:
    return {"train": data.train, "validation": data.validation, "test": data.test}


def stream(dataset: PackedDataset) -> list[int]:
    return [token for block in dataset for token in block["input_ids"].tolist()]


def documents_in(data: TextData, split: str) -> set[str]:
    """The texts of a split, read back through the tokenizer, but for the cut-off last ones."""
    text = data.tokenizer.decode(stream(splits(data)[split]))
    return set(text.split("<|endoftext|>")[:-1])


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


# --- splits


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


# --- the cache


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(packed._Preparation, "build", never)


def test_the_cache_is_hit_until_something_changes(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_corpus()
    spec = small(source)
    first = prepare(spec, cache)
    with monkeypatch.context() as patch:
        forbid(patch)
        again = prepare(spec, cache)
        assert again.report == first.report
        assert stream(again.train) == stream(first.train)
        longer = prepare(spec.replace(sequence_length=32), cache)  # needs no other files
        assert longer.train[0]["input_ids"].tolist() == stream(first.train)[:32]
        for change in (
            {"seed": 1},
            {"vocab_size": 301},
            {"test_share": 0.1},
            {"limit_bytes": 9**5},
        ):
            with pytest.raises(AssertionError, match="built again"):
                prepare(spec.replace(**change), cache)
    (source / "000.txt").write_text("other words entirely")
    assert prepare(spec, cache).report["bytes"] != first.report["bytes"]
    (source / "new.txt").write_text("one more")
    assert sum(prepare(spec, cache).report["documents"].values()) == 61


@pytest.mark.parametrize(
    "name",
    [
        "train.tokens",
        "test.documents.npy",
        "meta.json",
        "manifest.json",
        "tokenizer/tokenizer.json",
    ],
)
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_cache_is_built_again(
    write_corpus: Writer, cache: Path, name: str, damage: str
) -> None:
    spec = small(write_corpus(count=30))
    first = prepare(spec, cache)
    expected, report = stream(first.train), first.report
    (folder,) = (path for path in (cache / "text").iterdir() if path.is_dir())
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = prepare(spec, cache)
    assert stream(again.train) == expected
    assert again.report == report


def test_threads_share_one_build(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small(write_corpus())
    builds = []
    build = packed._Preparation.build

    def counted(self: Any, folder: Path) -> None:
        builds.append(folder)
        build(self, folder)

    monkeypatch.setattr(packed._Preparation, "build", counted)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: stream(prepare(spec, cache).train), range(4)))
    assert len(builds) == 1
    assert all(one == found[0] for one in found)


SCRIPT = """
import hashlib, json, sys
from pathlib import Path
from moekit.data import TextSpec, prepare
def progress(description, done, total):
    print(description, flush=True)
    if description == sys.argv[3]:
        import time; time.sleep(60)
spec = TextSpec(source=sys.argv[1], vocab_size=300, sequence_length=16)
data = prepare(spec, Path(sys.argv[2]), progress)
whole = hashlib.sha256()
for split in (data.train, data.validation, data.test):
    for block in split:
        whole.update(block["input_ids"].numpy().tobytes())
print(json.dumps([whole.hexdigest(), data.report], sort_keys=True))
"""


def start(source: Path, cache: Path, stop_at: str = "", seed: str = "0") -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(source), str(cache), stop_at],
        env=environment,
        stdout=subprocess.PIPE,
    )


def last_line(process: subprocess.Popen[bytes]) -> bytes:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.splitlines()[-1]


def test_processes_with_one_cache_or_two_agree(write_corpus: Writer, tmp_path: Path) -> None:
    source = write_corpus()
    shared, own = tmp_path / "shared", tmp_path / "own"
    running = [start(source, shared, seed="1"), start(source, shared, seed="2")]
    running.append(start(source, own, seed="3"))
    assert len({last_line(process) for process in running}) == 1


def test_a_killed_build_leaves_nothing_that_loads(write_corpus: Writer, cache: Path) -> None:
    source = write_corpus()
    process = start(source, cache, stop_at="packing validation")
    assert process.stdout is not None
    while b"packing validation" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = {path.name for path in (cache / "text").iterdir() if path.is_dir()}
    assert left
    assert all(name.startswith(".") for name in left)
    data = prepare(small(source), cache)  # the lock died with its holder
    assert sum(data.report["documents"].values()) == 60
    folders = [path.name for path in (cache / "text").iterdir() if path.is_dir()]
    assert len(folders) == 1
    assert not folders[0].startswith(".")


def test_an_interrupted_build_cleans_up(write_corpus: Writer, cache: Path) -> None:
    def interrupt(description: str, _: int, __: int | None) -> None:
        if description == "packing test":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(small(write_corpus()), cache, interrupt)
    assert not [path for path in (cache / "text").iterdir() if path.is_dir()]


def test_the_default_cache_is_where_the_environment_says(
    write_corpus: Writer, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEKIT_CACHE", str(cache))
    prepare(small(write_corpus()))
    assert {path.name for path in cache.iterdir()} == {"text", "tokenizers"}


def test_a_cache_that_cannot_be_written_is_an_error(write_corpus: Writer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="set MOEKIT_CACHE"):
        prepare(small(write_corpus()), tmp_path / "file")


def test_progress_is_told(write_corpus: Writer, cache: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    spec = small(write_corpus())
    prepare(spec, cache, lambda *step: told.append(step))
    assert list(dict.fromkeys(description for description, _, _ in told)) == [
        "reading documents",
        "training the tokenizer",
        "packing train",
        "packing validation",
        "packing test",
    ]
    for description in {step[0] for step in told}:
        steps = [step for step in told if step[0] == description]
        assert [done for _, done, _ in steps] == sorted(done for _, done, _ in steps)
        assert steps[-1][1] == steps[-1][2]
    told.clear()
    prepare(spec, cache, lambda *step: told.append(step))
    assert told == []


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

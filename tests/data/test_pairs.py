"""Prompts with completions: what is learned of them, against tokenising the parts one by one."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from moekit.data import PairSpec, prepare_pairs, train_tokenizer
from moekit.data.pairs import IGNORED
from moekit.errors import DataError, SpecError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    text = "what is the capital of the land? it is a city, the city of the sea. " * 20
    return train_tokenizer([text, string.printable], 320, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerFast) -> Any:
    tokenizer.chat_template = TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


def table(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(*more: tuple[str, str]) -> list[dict[str, str]]:
    """At least two, so that one can be held out."""
    found = [*more, ("what is it?", " a city"), ("where is it?", " the sea")]
    return [{"prompt": prompt, "completion": completion} for prompt, completion in found]


def learned(block: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast) -> str:
    kept = block["labels"] != IGNORED
    assert torch.equal(block["labels"][kept], block["input_ids"][kept])
    return str(tokenizer.decode(block["input_ids"][kept]))


def every(found: Any) -> list[dict[str, torch.Tensor]]:
    return [*found.train, *found.validation]


def refusal(spec: PairSpec, tokenizer: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare_pairs(spec, tokenizer)
    message = str(caught.value)
    assert not message.endswith(".")
    return message


@given(
    prompt=st.text(string.ascii_letters + " \n?.", max_size=30),
    completion=st.text(string.ascii_letters + "é漢 ", min_size=1, max_size=30),
)
def test_learned_are_the_tokens_behind_the_prompt(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: Any
) -> None:
    """Where the two tokenise apart as they do together, which they do at such a boundary."""
    prompt += "\n"
    completion = "x" + completion
    rows = [{"prompt": prompt, "completion": completion}, *pairs()]
    source = table(tmp_path_factory.mktemp("pairs"), *rows)
    found = every(prepare_pairs(PairSpec(source), tokenizer))
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(completion, add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    wanted = [*before, *after, end]
    (block,) = [b for b in found if b["input_ids"].tolist() == wanted]
    assert block["labels"].tolist() == [IGNORED] * len(before) + [*after, end]


def test_columns_are_guessed_or_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for number, names in enumerate(
        [("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("q", "a")]
    ):
        rows = [dict(zip(names, pair.values(), strict=True)) for pair in pairs()]
        named = names if names == ("q", "a") else (None, None)
        spec = PairSpec(table(tmp_path, *rows, name=f"{number}.jsonl"), *named)
        texts = {learned(block, tokenizer) for block in every(prepare_pairs(spec, tokenizer))}
        assert texts == {" a city<|endoftext|>", " the sea<|endoftext|>"}


def test_instructions_may_have_an_input(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = [
        {"instruction": "what is", "input": "the sea?", "output": " it is"},
        {"instruction": "what is it?", "input": "", "output": " a city"},
    ]
    found = every(prepare_pairs(PairSpec(table(tmp_path, *rows)), tokenizer))
    texts = {tokenizer.decode(block["input_ids"]) for block in found}
    assert texts == {
        "what is\n\nthe sea? it is<|endoftext|>",
        "what is it? a city<|endoftext|>",
    }


@pytest.mark.parametrize("kind", ["messages", "prompt and completion"])
def test_of_a_conversation_the_assistant_is_learned(
    kind: str, chat: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    turns = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "what?"},
        {"role": "assistant", "content": "a city"},
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "the sea"},
    ]
    if kind == "messages":
        rows: list[Any] = [{"messages": turns}, {"messages": turns[1:3]}]
        wanted = {"a city</>the sea</>", "a city</>"}
    else:  # what the prompt's assistant said is given, not learned
        rows = [
            {"prompt": turns[:4], "completion": turns[4:]},
            {"prompt": turns[1:2], "completion": turns[2:3]},
        ]
        wanted = {"the sea</>", "a city</>"}
    found = every(prepare_pairs(PairSpec(table(tmp_path, *rows)), chat))
    assert {learned(block, chat) for block in found} == wanted
    whole = chat.apply_chat_template(turns, tokenize=False)
    assert whole in {chat.decode(block["input_ids"]) for block in found}


def test_splits_duplicates_and_lengths(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = pairs(*((f"number {i}? ", "yes") for i in range(40)), ("number 3? ", "yes"))
    rows += [{"prompt": "it", "completion": "  "}]  # nothing to learn
    rows += [{"prompt": "a city " * 50, "completion": "far behind"}]
    rows += [{"prompt": "", "completion": "the sea " * 50}]
    for place, split in ((0, "train"), (1, "validation"), (2, "test")):
        rows[place]["split"] = split
    found = prepare_pairs(PairSpec(table(tmp_path, *rows), sequence_length=24), tokenizer)
    assert found.report["duplicates"] == 1
    assert found.report["cut"] == 2
    assert found.report["without_completion"] == 1
    assert len(found.train) + len(found.validation) + 1 == 42 + 1  # one is of the test split
    assert found.report["train"] == len(found.train)
    assert len(found.validation) == 1  # the split that the table gives is kept
    assert max(len(block["input_ids"]) for block in every(found)) == 24
    drawn = [{k: v for k, v in row.items() if k != "split"} for row in rows]
    source = table(tmp_path, *drawn, name="drawn.jsonl")
    one, other = (prepare_pairs(PairSpec(source, seed=s), tokenizer) for s in (0, 1))
    assert one.validation
    assert [b["input_ids"].tolist() for b in one.validation] != [
        b["input_ids"].tolist() for b in other.validation
    ]


def test_an_end_of_text_cannot_be_forged(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = pairs(("it? ", "no<|endoftext|>"))
    found = every(prepare_pairs(PairSpec(table(tmp_path, *rows)), tokenizer))
    ends = [int((block["input_ids"] == tokenizer.eos_token_id).sum()) for block in found]
    assert ends == [1, 1, 1]


def test_parquet_folders_patterns_and_the_hub(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pairs(("is it? ", "yes"))
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "a.parquet")
    table(tmp_path, *rows[1:], name="b.jsonl")
    (tmp_path / "readme.txt").write_text("no table")
    answer = datasets.IterableDatasetDict(
        train=datasets.Dataset.from_list(rows[:2]).to_iterable_dataset(),
        validation=datasets.Dataset.from_list(rows[2:]).to_iterable_dataset(),
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: answer)
    wanted = {"yes<|endoftext|>", " a city<|endoftext|>", " the sea<|endoftext|>"}
    for source in (str(tmp_path), str(tmp_path / "[ab].*"), "hub:owner/name"):
        found = prepare_pairs(PairSpec(source), tokenizer)
        assert {learned(block, tokenizer) for block in every(found)} == wanted
    assert [learned(block, tokenizer) for block in found.validation] == [" the sea<|endoftext|>"]


def test_mistakes(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def said(*rows: Any, **columns: Any) -> str:
        return refusal(PairSpec(table(tmp_path, *rows), **columns), tokenizer)

    assert "does not exist" in refusal(PairSpec(str(tmp_path / "no.jsonl")), tokenizer)
    (tmp_path / "notes.txt").write_text("text")
    assert "holds no table" in refusal(PairSpec(str(tmp_path / "notes.txt")), tokenizer)
    assert "can be text" in said({"text": "a"})
    assert "has no 'completion'" in said(pairs()[0], {"prompt": "a"})
    assert "has no 'q'" in said(pairs()[0], prompt_column="q", completion_column="prompt")
    assert "holds int" in said({"prompt": "a", "completion": 3})
    assert "no completion that is not empty" in said({"prompt": "a", "completion": " "})
    assert "too few" in said(pairs()[0])
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert "no chat template" in said(talk)
    assert "is not JSON" in refusal(PairSpec(_broken(tmp_path)), tokenizer)
    with pytest.raises(SpecError, match="name both"):
        PairSpec("x", prompt_column="q")


def _broken(folder: Path) -> str:
    path = folder / "broken.jsonl"
    path.write_text("{\n")
    return str(path)


def test_mistakes_in_conversations(chat: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def said(messages: Any) -> str:
        return refusal(PairSpec(table(tmp_path, {"messages": messages})), chat)

    answer = {"role": "assistant", "content": "b"}
    assert "wanted a list of messages" in said("hello")
    assert "wanted a list of messages" in said([{"role": "user"}])
    assert "speaks first" in said([answer])
    chat.chat_template = "{{ messages | length }}" + TEMPLATE
    assert "in another way" in said([{"role": "user", "content": "a"}, answer])
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    assert "roles must alternate" in said([{"role": "user", "content": "a"}, answer])

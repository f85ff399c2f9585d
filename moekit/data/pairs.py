"""Prompts with completions, and conversations: text of which a part alone is to be learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moekit.data.document import normalise
from moekit.data.packed import ProgressHook
from moekit.data.rows import read_rows
from moekit.data.splits import SPLITS, assign_splits, content_key
from moekit.data.tokenizer import end_of_text_id
from moekit.errors import DataError
from moekit.spec import Spec

IGNORED = -100
MESSAGES = "messages"
_KNOWN = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)
_BATCH = 256


@dataclass(frozen=True)
class PairSpec(Spec):
    """A table of prompts and completions, or of conversations.

    Attributes:
        source: JSON lines, parquet, a folder or pattern of such, or ``hub:owner/name``.
        prompt_column, completion_column: their columns; by default those called prompt and
            completion (or response), question and answer, or instruction (with input) and output.
            A completion follows its prompt as it stands. Where there is a column ``messages`` and
            none is named, rows are conversations: lists of ``{"role", "content"}`` that the
            tokenizer's chat template renders, and what the assistant says is learned.
        sequence_length: longest example in tokens; what is beyond is cut off.
        validation_share: share of the examples that is held out, unless the source gives splits.
        seed: draws those.
    """

    source: str
    prompt_column: str | None = None
    completion_column: str | None = None
    sequence_length: int = 512
    validation_share: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raise :class:`~moekit.errors.SpecError` if a number is out of its range."""
        self.require(
            self.sequence_length >= 2,
            f"sequence_length is {self.sequence_length}; wanted 2 or more",
        )
        share = self.validation_share
        self.require(0 < share < 1, f"validation_share is {share}; wanted more than 0, below 1")
        self.require(
            (self.prompt_column is None) == (self.completion_column is None),
            "one of prompt_column and completion_column is named; name both, or neither",
        )


@dataclass(frozen=True)
class Example:
    """A text, and which of its characters are learned.

    Attributes:
        text: the whole text.
        spans: first and last + 1 character of each part that is learned.
        rendered: whether a chat template made it, with its special tokens.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    rendered: bool


@dataclass(frozen=True)
class PairData:
    """Examples as blocks: ``input_ids`` and ``labels`` (T,), -100 for what is not learned.

    Attributes:
        train, validation: the blocks, each as long as its example.
        report: counts: examples of each split, duplicates, cut (to the sequence length), and
            without_completion (left out, as nothing of their completion was left).
    """

    train: list[dict[str, Tensor]]
    validation: list[dict[str, Tensor]]
    report: dict[str, int]


def prepare_pairs(
    spec: PairSpec, tokenizer: PreTrainedTokenizerBase, progress: ProgressHook | None = None
) -> PairData:
    """Read, split and tokenise a table of prompts and completions.

    A token is learned if a character of it is. An end of text is learned behind a completion; a
    chat template writes its own. Examples that are equal are kept once.

    Args:
        spec: what to read.
        tokenizer: a fast one, which knows the characters of each token.
        progress: told how far it is.

    Raises:
        DataError: the table cannot be read, has no such columns, or too little in them; or the
            tokenizer cannot tell characters, has no chat template, or one that does not render
            the beginning of a conversation as it does in the whole.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which characters a token stands for, which is "
            "needed to learn completions alone; use a checkpoint with a tokenizer.json"
        )
    examples: dict[bytes, tuple[Example, str | None]] = {}
    read = 0
    for example, split in _examples(spec, tokenizer):
        read += 1
        examples.setdefault(content_key(example.text), (example, split))
        if progress is not None and read % _BATCH == 0:
            progress("reading examples", read, None)
    if not examples:
        raise DataError(f"{spec.source} has no completion that is not empty; give some")
    split_of = assign_splits(
        list(examples), [s for _, s in examples.values()], spec.validation_share, 0.0, spec.seed
    )
    counts = {"duplicates": read - len(examples), "cut": 0, "without_completion": 0}
    blocks: dict[str, list[dict[str, Tensor]]] = {name: [] for name in SPLITS}
    for place, (example, _) in enumerate(examples.values()):
        block = _block(example, tokenizer, spec.sequence_length, counts)
        if block is not None:
            blocks[SPLITS[split_of[place]]].append(block)
        if progress is not None:
            progress("tokenising examples", place + 1, len(examples))
    return PairData(
        blocks["train"],
        blocks["validation"],
        {**{name: len(blocks[name]) for name in ("train", "validation")}, **counts},
    )


def _examples(
    spec: PairSpec, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[Example, str | None]]:
    columns: tuple[str, ...] | None = None
    for name, row, split in read_rows(spec.source):
        if columns is None:
            columns = _columns(spec, list(row), name)
        example = _example(row, columns, name, tokenizer)
        if any(start < stop for start, stop in example.spans):
            yield example, split


def _columns(spec: PairSpec, available: Sequence[str], name: str) -> tuple[str, ...]:
    """The columns to read: the messages, or prompt and completion."""
    if spec.prompt_column is not None and spec.completion_column is not None:
        return spec.prompt_column, spec.completion_column
    if MESSAGES in available:
        return (MESSAGES,)
    for pair in _KNOWN:
        if set(pair) <= set(available):
            return pair
    raise DataError(
        f"{name} has neither {MESSAGES} nor prompt and completion; name the columns of prompt and "
        f"completion, which can be {', '.join(available) or 'none'}"
    )


def _example(
    row: Mapping[str, Any],
    columns: tuple[str, ...],
    name: str,
    tokenizer: PreTrainedTokenizerBase,
) -> Example:
    for column in columns:
        if column not in row:
            raise DataError(f"{name} has no {column!r}; it has {', '.join(row) or 'nothing'}")
    if columns == (MESSAGES,):
        return _conversation(row[MESSAGES], 0, name, tokenizer)
    prompt, completion = (row[column] for column in columns)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], len(prompt), name, tokenizer)
    for column, value in zip(columns, (prompt, completion), strict=True):
        if not isinstance(value, str):
            raise DataError(
                f"{name}: {column!r} holds {type(value).__name__}; wanted text in both columns, or "
                "a list of messages in both"
            )
    more = row.get("input") if columns == ("instruction", "output") else None
    if isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n\n{more}"
    prompt, completion = normalise(prompt), normalise(completion)
    end = len(prompt) + (len(completion) if completion.strip() else 0)
    return Example(prompt + completion, ((len(prompt), end),), rendered=False)


def _conversation(
    messages: Any, learned_from: int, name: str, tokenizer: PreTrainedTokenizerBase
) -> Example:
    """What the assistant says from message ``learned_from`` on is learned, its end of turn too."""
    _require_messages(messages, name)
    text, spans = "", []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:index], tokenizer, name, asks=True)
        through = _rendered(messages[: index + 1], tokenizer, name, asks=False)
        if not (before.startswith(text) and through.startswith(before)):
            raise DataError(
                f"{name}: the tokenizer's chat template renders the beginning of a conversation in "
                "another way once it goes on; give columns of prompt and completion"
            )
        text = through
        if index >= learned_from and str(message["content"]).strip():
            spans.append((len(before), len(through)))
    return Example(text, tuple(spans), rendered=True)


def _require_messages(messages: Any, name: str) -> None:
    if not (isinstance(messages, list) and all(map(_is_message, messages))):
        raise DataError(
            f'{name}: wanted a list of messages, each {{"role": "user" or "assistant", "content": '
            '"..."}'
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _rendered(
    messages: list[Any], tokenizer: PreTrainedTokenizerBase, name: str, *, asks: bool
) -> str:
    if not tokenizer.chat_template:
        raise DataError(
            f"{name} is a conversation, and the tokenizer {tokenizer.name_or_path!r} has no chat "
            "template; choose the tokenizer of a chat model, or give columns of prompt and "
            "completion"
        )
    if not messages:
        raise DataError(f"{name}: the assistant speaks first; wanted a message before")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except Exception as error:
        # Templates raise what they like, and jinja its own kinds.
        raise DataError(
            f"{name}: the tokenizer's chat template refuses the conversation ({error})"
        ) from error
    assert isinstance(text, str)
    return text


def _block(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    counts: dict[str, int],
) -> dict[str, Tensor] | None:
    encoded = tokenizer(
        example.text,
        add_special_tokens=not example.rendered,
        split_special_tokens=not example.rendered,  # no text can forge an end of text
        return_offsets_mapping=True,
        verbose=False,
    )
    ids: list[int] = list(encoded["input_ids"])
    learned = [
        any(start < stop and last > start and first < stop for start, stop in example.spans)
        for first, last in encoded["offset_mapping"]
    ]
    end = end_of_text_id(tokenizer)
    if not example.rendered:
        if ids[-1:] != [end]:
            ids.append(end)
            learned.append(True)
        learned[-1] = True
    counts["cut"] += len(ids) > length
    ids, learned = ids[:length], learned[:length]
    if not any(learned[1:]):
        counts["without_completion"] += 1
        return None
    labels = [token if wanted else IGNORED for token, wanted in zip(ids, learned, strict=True)]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

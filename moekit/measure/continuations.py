"""Multiple-choice items made of plain documents: which continuation is the true one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from moekit.data import Document
from moekit.data.tokenizer import encode
from moekit.errors import DataError
from moekit.measure.multiple_choice import ChoiceItem

_TRIES = 200


def continuation_items(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    each: int,
    *,
    context: int = 48,
    choice: int = 16,
    choices: int = 4,
    seed: int = 0,
) -> dict[str, list[ChoiceItem]]:
    """Items by group: a stretch of a document, its continuation, and stretches of other documents.

    The wrong choices come from other documents of the same group, and of any group where it has no
    other. All choices have the same number of tokens, begin with a space and are encoded the same
    alone as behind the context, so their log-likelihoods compare. The place of the true one is
    drawn.

    Args:
        documents: held-out text; those too short for an item are passed over.
        tokenizer: what counts tokens.
        each: items a group.
        context: tokens of a context.
        choice: tokens of a choice.
        choices: choices an item.
        seed: draws everything.

    Raises:
        DataError: no document is long enough, or there is none to take wrong choices from.

    Example:
        >>> continuation_items(held_out, tokenizer, each=8)["news"][0].answer  # doctest: +SKIP
        2
    """
    texts = _encoded(documents, tokenizer)
    long = [text for text in texts if len(text.tokens) > context + choice]
    if len({text.number for text in texts}) < 2 or not long:
        raise DataError(
            f"items of {context} + {choice} tokens need a document of more tokens, and a second "
            f"one; got {len(texts)} of which {len(long)} are so long"
        )
    maker = _Maker(texts, tokenizer, torch.Generator().manual_seed(seed), context, choice)
    groups = sorted({text.group for text in long})
    return {
        group: [
            maker.item([text for text in long if text.group == group], choices) for _ in range(each)
        ]
        for group in groups
    }


@dataclass(frozen=True)
class _Text:
    """A document as tokens."""

    number: int
    group: str
    tokens: list[int]


def _encoded(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[_Text]:
    tokens = encode(tokenizer, [d.text for d in documents]) if documents else []
    return [
        _Text(number, document.group or "", ids)
        for number, (document, ids) in enumerate(zip(documents, tokens, strict=True))
    ]


@dataclass
class _Maker:
    """Draws items."""

    texts: list[_Text]
    tokenizer: PreTrainedTokenizerBase
    generator: torch.Generator
    context: int
    choice: int

    def item(self, own: list[_Text], choices: int) -> ChoiceItem:
        """One item of a document of a group."""
        source, context, truth = self._passage(own)
        others = [t for t in self.texts if t.group == source.group and self._serves(t, source)]
        others = others or [t for t in self.texts if self._serves(t, source)]
        found = [truth]
        for _ in range(_TRIES if others else 0):
            if len(found) == choices:
                break
            wrong = self._stretch(others[self._below(len(others))], 0)
            if wrong is not None and wrong[1] not in found:
                found.append(wrong[1])
        if len(found) < choices:
            raise DataError(
                f"the other documents of {source.group!r} give no {choices - 1} choices"
            )
        order = torch.randperm(choices, generator=self.generator).tolist()
        return ChoiceItem(context, tuple(found[place] for place in order), order.index(0))

    def _passage(self, own: list[_Text]) -> tuple[_Text, str, str]:
        for _ in range(_TRIES):
            source = own[self._below(len(own))]
            stretch = self._stretch(source, self.context)
            if stretch is not None:
                return source, *stretch
        raise DataError(f"the documents of {own[0].group!r} have no stretch that begins at a word")

    def _stretch(self, text: _Text, before: int) -> tuple[str, str] | None:
        """A context of ``before`` tokens and what follows; None if the place drawn is unfit."""
        start = before + self._below(len(text.tokens) - before - self.choice + 1)
        ids = text.tokens[start - before : start + self.choice]
        head, tail = self._text(ids[:before]), self._text(ids[before:])
        whole, alone = encode(self.tokenizer, [head + tail, tail])
        fits = tail.startswith(" ") and whole == ids and alone == ids[before:]
        return (head, tail) if fits else None

    def _serves(self, text: _Text, source: _Text) -> bool:
        return text.number != source.number and len(text.tokens) >= self.choice

    def _below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self.generator))

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

"""Items made from documents: what they promise, on words whose document is known."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerBase

from moekit.data import Document, train_tokenizer
from moekit.data.tokenizer import encode
from moekit.errors import DataError
from moekit.measure.continuations import continuation_items

CONTEXT, CHOICE = 6, 4


def document(number: int, group: str | None = "a", words: int = 60) -> Document:
    """A text each of whose words names its document."""
    chance = random.Random(number)
    text = " ".join(f"d{number}é{chance.randrange(1000)}" for _ in range(words))
    return Document(text, f"{number}", group=group)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    texts = [document(number).text for number in range(6)]
    return train_tokenizer(texts, 400, tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("seed", range(3))
def test_what_items_promise(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    documents = [document(n, "ab"[n % 2]) for n in range(6)]
    found = continuation_items(
        documents, tokenizer, 20, context=CONTEXT, choice=CHOICE, choices=3, seed=seed
    )
    assert list(found) == ["a", "b"]
    places = set()
    for group, items in found.items():
        assert len(items) == 20
        own = [d for d in documents if d.group == group]
        for item in items:
            truth = item.choices[item.answer]
            source = [d for d in own if item.context + truth in d.text]
            assert source
            assert len(set(item.choices)) == 3
            assert len(encode(tokenizer, [item.context])[0]) == CONTEXT
            for place, choice in enumerate(item.choices):
                ids = encode(tokenizer, [choice, item.context + choice])
                assert choice.startswith(" ")
                assert len(ids[0]) == CHOICE
                assert ids[1][CONTEXT:] == ids[0]
                if place != item.answer:  # of another document of the group
                    assert any(choice in d.text for d in own)
                    assert any(choice not in d.text for d in source)
            places.add(item.answer)
    assert places == {0, 1, 2}


def test_the_seed_decides(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [document(n) for n in range(3)]

    def items(seed: int) -> object:
        return continuation_items(
            documents, tokenizer, 4, context=CONTEXT, choice=CHOICE, seed=seed
        )

    assert items(1) == items(1)
    assert items(1) != items(2)


def test_a_group_of_one_document_borrows(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = [document(0, "alone"), document(1, None), document(2, None)]
    found = continuation_items(documents, tokenizer, 5, context=CONTEXT, choice=CHOICE)
    for item in found["alone"]:
        wrong = [c for place, c in enumerate(item.choices) if place != item.answer]
        assert all(choice not in documents[0].text for choice in wrong)


def test_too_little_text(tokenizer: PreTrainedTokenizerBase) -> None:
    for documents in ([], [document(0)], [document(n, words=1) for n in range(3)]):
        with pytest.raises(DataError, match="second"):
            continuation_items(documents, tokenizer, 1)
    for other in ("d1", document(0).text[:12], document(1, words=6).text.replace(" ", "")):
        with pytest.raises(DataError, match="give no 3 choices"):
            continuation_items(
                [document(0), Document(other, "other", "a")],
                tokenizer,
                1,
                context=CONTEXT,
                choice=CHOICE,
            )

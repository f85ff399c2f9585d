"""Token types, and which tokens experts take, against slow loops."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moekit import Bank, Copy, MoESpec, SwiGLU, TopK, Zero
from moekit.measure import TOKEN_TYPES, observe, token_routing, token_texts, token_type
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM

WORDS = ["<eos>", "Ġthe", "the", "The", "ĠThe", "42", "Ġ7", "Ċ", "ĠĠ", ");", "_x", "é", "Ã", "x1"]


class Blocks:
    """A few blocks with padding and groups."""

    def __init__(self, blocks: Tensor, masked: bool, grouped: bool) -> None:
        self.blocks = blocks
        self.masked = masked
        if grouped:
            self.token_groups = lambda _: torch.arange(blocks.shape[1]) % 3 - 1

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {"input_ids": self.blocks[index], "labels": self.blocks[index]}
        if self.masked:
            mask = torch.ones_like(self.blocks[index])
            mask[: index % 3] = 0
            item["attention_mask"] = mask
        return item


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.fixture
def model() -> MoEDecoderForCausalLM:
    torch.manual_seed(0)
    bank = Bank((SwiGLU(count=3, hidden=8), Copy(1), Zero(1)))
    config = MoEDecoderConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        layers=[MoESpec(TopK(k=2), bank), MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8))],
    )
    return MoEDecoderForCausalLM(config)


@pytest.fixture
def blocks() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    weights = torch.arange(1, len(WORDS) + 1).float()
    return torch.multinomial(weights, 5 * 12, True, generator=generator).view(5, 12)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n    ", "whitespace"),
        (" 1984", "digits"),
        ("²", "digits"),
        (" +=", "punctuation"),
        ("__", "punctuation"),
        ("€", "punctuation"),
        (" return", "word start"),
        ("\n\treturn", "word start"),
        ("ing", "word fragment"),
        ("_id", "word fragment"),
        ("3rd", "word fragment"),
        (" x1", "word start"),
        ("字", "word fragment"),
        (" Paris", "capitalised"),
        ("_Private", "capitalised"),
        ("É", "capitalised"),
        ("\ufffd", "other"),
        ("", "other"),
    ],
)
def test_type_of_a_text(text: str, kind: str) -> None:
    assert token_type(text) == kind
    assert kind in TOKEN_TYPES


def test_texts_keep_the_space_before_a_word(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = dict(zip(WORDS, token_texts(tokenizer), strict=True))
    assert texts["Ġthe"] == " the"
    assert texts["the"] == "the"
    assert texts["Ċ"] == "\n"
    assert texts["<eos>"] == ""
    assert token_type(texts["Ã"]) == "other"  # half of a character


def test_texts_of_a_sentencepiece_vocabulary_keep_it_too() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "▁the": 1, "re": 2}, unk_token="<s>"))
    tokenizer.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert token_texts(fast) == ["", " the", "re"]


@pytest.mark.parametrize("masked", [False, True])
def test_counts_equal_a_loop(
    model: MoEDecoderForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    blocks: Tensor,
    masked: bool,
) -> None:
    data = Blocks(blocks, masked, grouped=True)
    got = token_routing(model, data, tokenizer, ("a", "b"), batch_size=2, minimum=3)
    texts = token_texts(tokenizer)
    by_type: dict[str, list[float]] = {}
    by_group: dict[int, list[float]] = {}
    pairs: list[Counter[tuple[int, int]]] = [Counter(), Counter()]
    ids: list[int] = []
    used: list[float] = []
    numbers: Counter[int] = Counter()
    for index in range(len(data)):  # one block at a time, one token at a time
        seen = next(iter(observe(model, _Only(data, index), batch_size=1)))
        for n, token in enumerate(seen.token_N.tolist()):
            if not seen.valid_N[n]:
                continue
            ids.append(token)
            count = 0
            for layer, routing in enumerate(seen.routings):
                chosen = routing.expert_NK[n].tolist()
                pairs[layer].update((token, expert) for expert in chosen)
                number = sum(layer == 1 or expert < 3 for expert in chosen)
                numbers[number] += 1
                count += number
            used.append(count / 2)
            by_type.setdefault(token_type(texts[token]), []).append(count / 2)
            by_group.setdefault(n % 12 % 3 - 1, []).append(count / 2)
    assert got.statistics.summary()["tokens"] == len(ids)
    assert {k: v.tokens for k, v in got.types.items()} == {k: len(v) for k, v in by_type.items()}
    for kind, use in got.types.items():
        assert use.experts == pytest.approx(sum(by_type[kind]) / len(by_type[kind]))
    for group, name in enumerate(("a", "b")):
        assert got.groups[name].tokens == len(by_group[group])
        want = sum(by_group[group]) / len(by_group[group])
        assert got.groups[name].experts == pytest.approx(want)
        assert [sum(share) for share in got.groups[name].share_LE] == pytest.approx([1, 1])
    assert got.histogram == pytest.approx([numbers[c] / len(ids) / 2 for c in range(3)])
    assert got.frequency_correlation == pytest.approx(_correlation(ids, used))
    _check_top(got.experts, pairs, Counter(ids), texts)


class _Only:
    """One block of a data set."""

    def __init__(self, data: Blocks, index: int) -> None:
        self.data, self.index = data, index

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.data[self.index]


def _correlation(ids: list[int], used: list[float]) -> float:
    count = Counter(ids)
    per_id = {i: sum(u for j, u in zip(ids, used, strict=True) if i == j) / count[i] for i in count}
    x = torch.tensor([math.log(count[i]) for i in ids], dtype=torch.float64)
    y = torch.tensor([per_id[i] for i in ids], dtype=torch.float64)
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def _check_top(experts, pairs, count, texts) -> None:  # type: ignore[no-untyped-def]
    total = sum(count.values())
    for layer, listed in enumerate(experts):
        for expert, tokens in enumerate(listed):
            mine = {t: n for (t, e), n in pairs[layer].items() if e == expert}
            load = sum(mine.values())
            most = sorted(mine.values(), reverse=True)[:8]
            assert [use.count for use in tokens.by_count] == most
            lift = {t: n / load / (count[t] / total) for t, n in mine.items() if count[t] >= 3}
            best = sorted(lift.values(), reverse=True)[:8]
            assert [use.lift for use in tokens.by_lift] == pytest.approx(best)
            for use in tokens.by_lift:
                matching = [t for t in lift if texts[t] == use.text]
                assert any(mine[t] == use.count for t in matching)


def test_without_groups_and_with_a_limit(
    model: MoEDecoderForCausalLM, tokenizer: PreTrainedTokenizerFast, blocks: Tensor
) -> None:
    model.train()
    got = token_routing(model, Blocks(blocks, False, False), tokenizer, batch_size=2, max_batches=1)
    assert got.groups == {}
    assert got.statistics.summary()["tokens"] == 24
    assert model.training


def test_no_correlation_where_every_token_has_as_many_experts(
    tokenizer: PreTrainedTokenizerFast, blocks: Tensor
) -> None:
    config = MoEDecoderConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        layers=MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8)),
    )
    got = token_routing(MoEDecoderForCausalLM(config), Blocks(blocks, False, False), tokenizer)
    assert got.frequency_correlation is None
    assert got.histogram == (0.0, 0.0, 1.0)


def test_a_dense_model_routes_nothing(tokenizer: PreTrainedTokenizerFast, blocks: Tensor) -> None:
    config = MoEDecoderConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        layers=SwiGLU(count=1, hidden=8),
    )
    got = token_routing(
        MoEDecoderForCausalLM(config), Blocks(blocks, False, True), tokenizer, ("a", "b")
    )
    assert got.histogram == got.experts == ()
    assert sum(use.tokens for use in got.types.values()) == blocks.numel()
    assert {use.experts for use in got.types.values()} == {0.0}

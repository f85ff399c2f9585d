"""Routing fluctuation against sets of experts counted token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokens import Blocks
from tiny_models import VOCABULARY, tiny_model
from torch import Tensor, nn

from moekit import AttentionAware, MoESpec, ReLURouting, SwiGLU, TopK
from moekit.errors import CheckpointError
from moekit.measure import Fluctuation, observe, routing_fluctuation
from moekit.models.language import MoEDecoderConfig, MoEDecoderForCausalLM
from moekit.routing import Routing


def routing(chosen: list[set[int]], slots: int, experts: int, valid: Tensor | None) -> Routing:
    """A routing of these sets, in an order of their own and with unused slots among them."""
    expert_NK = torch.full((len(chosen), slots), -1)
    for n, experts_of_token in enumerate(chosen):
        places = torch.randperm(slots)[: len(experts_of_token)]
        expert_NK[n, places] = torch.tensor(sorted(experts_of_token), dtype=torch.int64)
    return Routing(expert_NK, torch.zeros(expert_NK.shape), experts, valid_N=valid)


SETS = st.lists(st.sets(st.integers(0, 4), max_size=3), min_size=12, max_size=12)


@given(before=SETS, after=SETS, padded=st.booleans())
@settings(max_examples=80, deadline=None)
def test_against_sets(before: list[set[int]], after: list[set[int]], padded: bool) -> None:
    valid_N = torch.arange(12) % 3 != 0 if padded else None
    if padded:  # padding has no expert
        before, after = ([s if n % 3 else set() for n, s in enumerate(x)] for x in (before, after))
    found = Fluctuation.of(routing(before, 3, 5, valid_N), routing(after, 4, 5, valid_N))
    pairs = [(before[n], after[n]) for n in range(12) if n % 3 or not padded]
    assert found.tokens == len(pairs)
    assert found.changed_tokens == pytest.approx(sum(a != b for a, b in pairs) / len(pairs))
    lost = [1 - len(a & b) / max(len(a), len(b)) if a | b else 0.0 for a, b in pairs]
    assert found.changed_slots == pytest.approx(sum(lost) / len(pairs))


def test_no_tokens() -> None:
    none = routing([], 2, 3, None)
    assert Fluctuation.of(none, none) == Fluctuation(0, 0.0, 0.0)


def ours(*routers, seed: int = 0, experts: int = 4) -> MoEDecoderForCausalLM:  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    config = MoEDecoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=len(routers),
        num_attention_heads=2,
        initializer_range=0.3,
        layers=[MoESpec(router, SwiGLU(count=experts, hidden=8)) for router in routers],
    )
    return MoEDecoderForCausalLM(config)


def blocks(masked: bool) -> Blocks:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (5, 12), generator=generator)
    return Blocks(ids, masked, grouped=False)


def sets_of(model: nn.Module, data: Blocks) -> list[list[set[int]]]:
    """The experts of each token that is none of padding, a list a layer."""
    found: list[list[set[int]]] = []
    for seen in observe(model, data, batch_size=2):
        found = found or [[] for _ in seen.routings]
        for layer, made in zip(found, seen.routings, strict=True):
            rows = made.expert_NK[seen.valid_N].tolist()
            layer += [{e for e in row if e >= 0} for row in rows]
    return found


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["ours", "mixtral"])
def test_models_in_their_order(kind: str, masked: bool) -> None:
    if kind == "ours":
        models = [ours(TopK(k=2), AttentionAware(), ReLURouting(k=2), seed=s) for s in range(3)]
    else:
        models = [tiny_model("mixtral") for _ in range(3)]
        for seed, model in enumerate(models):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    data = blocks(masked)
    found = routing_fluctuation(iter(models), data, batch_size=2)
    assert len(found) == 2
    sets = [sets_of(model, data) for model in models]
    for pair, (before, after) in zip(found, itertools.pairwise(sets), strict=True):
        assert len(pair) == len(before)
        for layer, a, b in zip(pair, before, after, strict=True):
            changed = sum(x != y for x, y in zip(a, b, strict=True)) / len(a)
            assert layer.tokens == len(a)
            assert layer.changed_tokens == pytest.approx(changed)
            assert changed > 0
    again = routing_fluctuation([models[0], models[0]], data, batch_size=2)
    assert {layer.changed_slots for layer in again[0]} == {0.0}
    assert routing_fluctuation(models[:1], data) == []


def test_other_models_are_refused() -> None:
    data = blocks(masked=False)
    for other in (ours(TopK(k=2)), ours(TopK(k=2), TopK(k=2), experts=5)):
        with pytest.raises(CheckpointError, match="states of one model alone; tokens x experts"):
            routing_fluctuation([ours(TopK(k=2), TopK(k=2)), other], data)

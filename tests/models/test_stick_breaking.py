"""Stick-breaking attention against a scalar double loop, closed forms and limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.models.language import stick_breaking_attention, stick_breaking_weights


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def by_hand(logits_TS: Tensor, allowed_TS: Tensor) -> Tensor:
    """The weights, one at a time from the definition."""
    queries, keys = logits_TS.shape
    rows = []
    for i in range(queries):
        left, row = 1.0, [0.0] * keys
        for j in reversed(range(keys)):
            if allowed_TS[i, j]:
                beta = 1 / (1 + math.exp(-float(logits_TS[i, j])))
                row[j] = beta * left
                left *= 1 - beta
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_weights_equal_a_scalar_double_loop(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_TS = 3 * torch.randn(7, 9, generator=generator, dtype=torch.float64)
    allowed_TS = torch.rand(7, 9, generator=generator) < 0.6
    allowed_TS[0] = False
    found = stick_breaking_weights(logits_TS, allowed_TS)
    torch.testing.assert_close(found, by_hand(logits_TS, allowed_TS), rtol=1e-12, atol=1e-15)
    single = stick_breaking_weights(logits_TS.float(), allowed_TS)
    torch.testing.assert_close(single.double(), found, rtol=0, atol=1e-6)


def test_without_a_preference_each_takes_half_of_what_is_left() -> None:
    """Neither a softmax with a recency bias nor sigmoids without the product do."""
    weights = stick_breaking_weights(torch.zeros(6, 6), causal(6))
    distance = torch.arange(6)[:, None] - torch.arange(6)
    wanted = torch.where(distance >= 0, 2.0 ** -(distance.clamp_min(0) + 1), 0.0)
    assert torch.equal(weights, wanted)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_goes_nowhere(seed: int) -> None:
    torch.manual_seed(seed)
    logits_TS, allowed_TS = 2 * torch.randn(8, 8, dtype=torch.float64), causal(8)
    kept = (1 - logits_TS.sigmoid()).masked_fill(~allowed_TS, 1.0).prod(-1)
    weights = stick_breaking_weights(logits_TS, allowed_TS)
    torch.testing.assert_close(weights.sum(-1), 1 - kept)
    assert bool((weights.sum(-1) < 1).all())


@pytest.mark.parametrize("size", [50.0, 1e4, 1e30])
def test_a_certain_token_takes_all(size: float) -> None:
    logits_TS = torch.randn(5, 5)
    logits_TS.fill_diagonal_(size)
    weights = stick_breaking_weights(logits_TS, causal(5))
    torch.testing.assert_close(weights, torch.eye(5), rtol=0, atol=1e-20)


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    allowed = torch.rand(2, 5, 6) < 0.7
    assert torch.autograd.gradcheck(lambda x: stick_breaking_weights(x, allowed), logits)


def test_long_sequences_in_bfloat16_stay_finite() -> None:
    torch.manual_seed(0)
    logits = (20 * torch.randn(4, 4096)).bfloat16().requires_grad_()
    allowed = causal(4096)[[0, 1, 2048, 4095]]
    weights = stick_breaking_weights(logits, allowed)
    assert weights.dtype == torch.float32
    assert bool(torch.isfinite(weights).all())
    assert bool((weights.sum(-1) <= 1 + 1e-5).all())
    weights.square().sum().backward()
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize("seed", range(3))
def test_attention_equals_a_loop_over_queries(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, slots, length, width = 2, 3, 2, 5, 4

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query = draw(batch, heads, slots, length, width)
    key, value = draw(batch, heads, length, width), draw(batch, heads, length, width)
    found, weights = stick_breaking_attention(query, key, value, causal(length)[None, None])
    assert found.shape == query.shape
    for b in range(batch):
        for h in range(heads):
            for k in range(slots):
                logits_TS = query[b, h, k] @ key[b, h].T / 2
                wanted_TS = by_hand(logits_TS, causal(length))
                torch.testing.assert_close(weights[b, h, k], wanted_TS)
                torch.testing.assert_close(found[b, h, k], wanted_TS @ value[b, h])

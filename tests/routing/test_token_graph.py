"""Routing over a graph of tokens against loops over pairs of tokens, and its bad inputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_graph_cases import (
    EVERY_SPEC,
    EXPERTS,
    built,
    by_loops,
    drawn,
    everyone,
    given_weights,
    scores,
)
from torch import Tensor

from moekit.routing import (
    AttentionAware,
    AttentionWeights,
    DotProductAttention,
    Pathway,
    RouterSpec,
    Routing,
    Sequences,
    Signals,
    SimilarityAware,
    TopK,
)


@pytest.mark.parametrize("seen", ["order", "everyone", "random", "padded"])
@EVERY_SPEC
def test_scores_equal_loops_over_pairs(spec: RouterSpec, seen: str) -> None:
    router, (x_BTD, signals) = built(spec), drawn(3, 6)
    visible = everyone(3, 6).tril()
    if seen == "everyone":
        visible = everyone(3, 6)
    if seen == "random":
        visible = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(2)) < 0.5
        visible |= torch.eye(6, dtype=torch.bool)
    if seen == "padded":
        valid_BT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
        signals = signals.replace(valid_N=valid_BT.flatten())
        visible &= valid_BT[:, None]
    elif seen != "order":
        signals = signals.replace(sequences=Sequences(3, visible))
    alone = ~visible.any(-1)
    lists = [
        [[i] if alone[b, i] else visible[b, i].nonzero().flatten().tolist() for i in range(6)]
        for b in range(3)
    ]
    routing = router(x_BTD.flatten(0, 1), signals)
    with torch.no_grad():
        wanted = by_loops(router, x_BTD, signals, lists)
    kept = (signals.valid_N if seen == "padded" else torch.ones(18).bool()).view(3, 6)
    torch.testing.assert_close(
        routing.scores_NE.view(3, 6, -1)[kept], wanted[kept], rtol=1e-10, atol=1e-12
    )
    check_choice(routing, wanted.flatten(0, 1), kept.flatten())


def check_choice(routing: Routing, wanted_NE: Tensor, kept_N: Tensor) -> None:
    """The best two by P, weighted by their shares of P; and nothing else in the routing."""
    for n in range(len(kept_N)):
        best = sorted(range(EXPERTS), key=lambda e: -float(wanted_NE[n, e]))[:2]
        if not kept_N[n]:
            assert routing.expert_NK[n].tolist() == [-1, -1]
            continue
        assert routing.expert_NK[n].tolist() == best
        share = wanted_NE[n, best] / wanted_NE[n, best].sum()
        torch.testing.assert_close(routing.weight_NK[n], share, rtol=1e-9, atol=1e-12)
    assert routing.losses == {}  # the method has no loss of its own


# --- special graphs -----------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["prob", "logit"])
@pytest.mark.parametrize("base", [TopK(k=2), TopK(k=1, normalize="none"), Pathway(k=2)], ids=str)
def test_an_identity_graph_is_the_router_itself(base: TopK, mix: str) -> None:
    router, (x_BTD, _) = built(AttentionAware(base, mix=mix)), drawn(1, 9)
    found = router(x_BTD[0], given_weights(torch.eye(9, dtype=torch.float64)))
    wanted = router.router(x_BTD[0])
    assert torch.equal(found.expert_NK, wanted.expert_NK)
    torch.testing.assert_close(found.weight_NK, wanted.weight_NK, rtol=0, atol=1e-6)
    assert torch.equal(found.logits_NE, wanted.logits_NE)


def test_a_low_temperature_leaves_a_token_itself_as_its_neighbour() -> None:
    """For rows of one length, which are most similar to themselves."""
    router, (x_BTD, signals) = built(SimilarityAware(rank=0, temperature=1e-5)), drawn(2, 9)
    x_ND = torch.nn.functional.normalize(x_BTD, dim=-1).flatten(0, 1)
    signals = signals.replace(sequences=Sequences(2, everyone(1, 9)))
    found, wanted = router(x_ND, signals), router.router(x_ND)
    assert torch.equal(found.expert_NK, wanted.expert_NK)
    torch.testing.assert_close(found.weight_NK, wanted.weight_NK, rtol=0, atol=1e-6)


@EVERY_SPEC
def test_a_token_alone_is_routed_by_the_router_itself(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(3, 1)
    found, wanted = router(x_BTD[:, 0], signals), router.router(x_BTD[:, 0])
    assert torch.equal(found.expert_NK, wanted.expert_NK)
    torch.testing.assert_close(found.weight_NK, wanted.weight_NK, rtol=0, atol=1e-6)


def test_a_uniform_graph_gives_every_token_the_mean() -> None:
    """The whole of it: no part of a token's own distribution is kept back."""
    router, (x_BTD, _) = built(AttentionAware()), drawn(1, 7)
    found = router(x_BTD[0], given_weights(torch.full((7, 7), 1 / 7, dtype=torch.float64)))
    mean_E = router.router(x_BTD[0]).scores_NE.mean(0)
    torch.testing.assert_close(found.scores_NE, mean_E.expand(7, -1))


def test_a_permutation_as_attention_hands_the_distributions_around() -> None:
    router, (x_BTD, _) = built(AttentionAware()), drawn(1, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(5))
    found = router(x_BTD[0], given_weights(torch.eye(8, dtype=torch.float64)[order]))
    wanted = router.router(x_BTD[0])
    torch.testing.assert_close(found.scores_NE, wanted.scores_NE[order], rtol=1e-12, atol=0)
    assert torch.equal(found.expert_NK, wanted.expert_NK[order])


def test_a_large_sigma_leaves_attention_as_it_is() -> None:
    x_BTD, signals = drawn(2, 6)
    plain = scores(built(AttentionAware()), x_BTD, signals)
    for sigma, close in ((1e8, True), (1.0, False)):
        router = built(AttentionAware(heads="posterior", sigma=sigma))
        assert torch.allclose(scores(router, x_BTD, signals), plain, rtol=1e-9) == close


def test_the_mean_over_heads_forms_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DotProductAttention, "weights", None)
    x_BTD, signals = drawn(2, 6)
    scores(built(AttentionAware()), x_BTD, signals)
    scores(built(SimilarityAware()), x_BTD, signals)


@pytest.mark.parametrize("heads", ["mean", "min_entropy", "posterior"])
def test_weights_and_their_factors_are_the_same_signal(heads: str) -> None:
    router, (x_BTD, signals) = built(AttentionAware(heads=heads)), drawn(2, 6)
    weight = signals.attention.weights(signals.sequences.view(None))
    torch.testing.assert_close(weight.sum(-1), torch.ones(2, 4, 6, dtype=torch.float64))
    torch.testing.assert_close(
        scores(router, x_BTD, signals.replace(attention=AttentionWeights(weight))),
        scores(router, x_BTD, signals),
    )


# --- invariances --------------------------------------------------------------------------------


@EVERY_SPEC
def test_the_order_of_tokens_does_not_matter_where_all_see_all(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(1, 8)
    signals = signals.replace(sequences=Sequences(1, everyone(1, 8)))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    attention = signals.attention
    moved = signals.replace(
        attention=attention.replace(
            query_BATC=attention.query_BATC[:, :, order], key_BGPC=attention.key_BGPC[:, :, order]
        ),
        value_ND=signals.value_ND[order],
    )
    found = scores(router, x_BTD[:, order], moved)
    torch.testing.assert_close(found, scores(router, x_BTD, signals)[:, order])


@EVERY_SPEC
@given(cut=st.integers(1, 6), seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_no_token_sees_a_later_one(spec: RouterSpec, cut: int, seed: int) -> None:
    router, (x_BTD, signals) = built(spec), drawn(2, 7)
    other_BTD, other = drawn(2, 7, seed=seed + 10)
    keep = torch.arange(7) < cut

    def changed(ours: Tensor, theirs: Tensor, dim: int) -> Tensor:
        shape = [1] * ours.dim()
        shape[dim] = 7
        return torch.where(keep.view(shape), ours, theirs * 10)

    value = changed(signals.value_ND.view(2, 7, -1), other.value_ND.view(2, 7, -1), 1)
    attention = signals.attention.replace(
        query_BATC=changed(signals.attention.query_BATC, other.attention.query_BATC, 2),
        key_BGPC=changed(signals.attention.key_BGPC, other.attention.key_BGPC, 2),
    )
    after = signals.replace(attention=attention, value_ND=value.flatten(0, 1))
    before = scores(router, x_BTD, signals)
    found = scores(router, changed(x_BTD, other_BTD, 1), after)
    torch.testing.assert_close(found[:, :cut], before[:, :cut], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[:, cut:], before[:, cut:])


@EVERY_SPEC
def test_sequences_of_a_batch_do_not_see_each_other(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(3, 5)
    together = scores(router, x_BTD, signals)
    for b in range(3):
        alone = Signals(
            sequences=Sequences(1),
            attention=signals.attention.replace(
                query_BATC=signals.attention.query_BATC[b : b + 1],
                key_BGPC=signals.attention.key_BGPC[b : b + 1],
            ),
            value_ND=signals.value_ND.view(3, 5, -1)[b],
        )
        torch.testing.assert_close(scores(router, x_BTD[b : b + 1], alone), together[b : b + 1])


class ListMemory:
    """Rows kept in lists."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.keys: list[Tensor] = []

    def extend(self, value_BTE: Tensor, key_BTC: Tensor) -> tuple[Tensor, Tensor]:
        self.values.append(value_BTE)
        self.keys.append(key_BTC)
        return torch.cat(self.values, 1), torch.cat(self.keys, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@EVERY_SPEC
def test_one_token_at_a_time_equals_all_at_once(spec: RouterSpec, dtype: torch.dtype) -> None:
    router, (x_BTD, signals) = built(spec).to(dtype), drawn(2, 7)
    x_BTD, attention = x_BTD.to(dtype), signals.attention.to(dtype)
    value_BTD = signals.value_ND.view(2, 7, -1).to(dtype)
    whole = scores(router, x_BTD, signals.replace(attention=attention))
    memory, start, found = ListMemory(), 0, []
    for stop in (3, 4, 6, 7):
        visible = everyone(1, 7).tril()[:, start:stop, :stop]
        step = Signals(
            sequences=Sequences(2, None if stop == 3 else visible, memory),
            attention=attention.replace(
                query_BATC=attention.query_BATC[:, :, start:stop],
                key_BGPC=attention.key_BGPC[:, :, :stop],
            ),
            value_ND=value_BTD[:, start:stop].flatten(0, 1),
        )
        found.append(scores(router, x_BTD[:, start:stop], step))
        start = stop
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-5, atol=1e-6)


def nats(share: Tensor) -> Tensor:
    return torch.special.entr(share).sum(-1)


@given(seed=st.integers(0, 10_000), length=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_entropy_of_a_mixture_is_bounded(seed: int, length: int) -> None:
    """At least the mean entropy of what is mixed, and at most that of the graph's row more."""
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(length, length, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    )
    router, x_ND = built(AttentionAware(), seed), drawn(1, length, seed)[0][0]
    mixed = nats(router(x_ND, given_weights(weight)).scores_NE)
    least = weight @ nats(router.router(x_ND).scores_NE)
    assert bool((mixed >= least - 1e-9).all())
    assert bool((mixed <= least + nats(weight) + 1e-9).all())

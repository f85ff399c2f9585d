"""Routing over a graph of tokens against loops over pairs of tokens, and its bad inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekit.dispatch import Rectified
from moekit.errors import SignalError, SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import (
    AttentionAware,
    AttentionWeights,
    Comet,
    DenseWarmup,
    DotProductAttention,
    Load,
    Pathway,
    Permuted,
    RouterSpec,
    Routing,
    Sequences,
    Signals,
    SimilarityAware,
    Site,
    TokenGraphRouter,
    TopK,
)

WIDTH, EXPERTS = 5, 4
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)
SPECS = (
    SimilarityAware(temperature=0.7),
    SimilarityAware(rank=2, mix="logit"),
    SimilarityAware(rank=0, temperature=2.0),
    AttentionAware(),
    AttentionAware(mix="logit"),
    AttentionAware(heads="min_entropy"),
    AttentionAware(heads="posterior", sigma=1.5),
)
EVERY_SPEC = pytest.mark.parametrize("spec", SPECS, ids=str)


def built(spec: RouterSpec, seed: int = 0) -> TokenGraphRouter:
    """A router in float64 with parameters of the size of one."""
    router = spec.build(SITE)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router.double()


def drawn(batch: int, length: int, seed: int = 1) -> tuple[Tensor, Signals]:
    """Rows (B, T, D) and the signals of a decoder: two key-value heads serve four of queries."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    attention = DotProductAttention(normal(batch, 4, length, 3), normal(batch, 2, length, 3), 0.8)
    signals = Signals(
        sequences=Sequences(batch), attention=attention, value_ND=normal(batch * length, WIDTH)
    )
    return normal(batch, length, WIDTH), signals


def scores(router: TokenGraphRouter, x_BTD: Tensor, signals: Signals) -> Tensor:
    """P (B, T, E)."""
    return router(x_BTD.flatten(0, 1), signals).scores_NE.unflatten(0, x_BTD.shape[:2])


def given_weights(weight: Tensor) -> Signals:
    """The signals of weights (T, T) written by hand, for one sequence."""
    return Signals(sequences=Sequences(1), attention=AttentionWeights(weight[None, None]))


def everyone(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, length, dtype=torch.bool)


# --- loops over pairs ---------------------------------------------------------------------------


def shares(values: list[float]) -> list[float]:
    exponentials = [math.exp(v) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def dot(a: Tensor, b: Tensor) -> float:
    return sum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def similarity_graph(router: TokenGraphRouter, x: Tensor, seen: list[list[int]]) -> list[list]:
    spec, width = router.spec, x.shape[1]
    if spec.rank == 0:
        weight = torch.eye(width, dtype=torch.float64) / math.sqrt(width)
    elif spec.rank is None:
        weight = router.query_weight
    else:
        weight = router.query_weight.T @ router.key_weight
    return [
        shares([dot(x[i], weight @ x[j]) / spec.temperature for j in seen[i]])
        for i in range(len(x))
    ]


def heads_graph(signals: Signals, b: int, seen: list[list[int]]) -> list[list[list[float]]]:
    """Weights of each head and row, over the tokens that the row sees."""
    query, key = signals.attention.query_BATC[b], signals.attention.key_BGPC[b]
    return [
        [
            shares([0.8 * dot(query[a, i], key[a // 2, j]) for j in row])
            for i, row in enumerate(seen)
        ]
        for a in range(4)
    ]


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


def attention_graph(
    router: TokenGraphRouter, x: Tensor, signals: Signals, b: int, seen: list[list[int]]
) -> list[list[float]]:
    heads, spec = heads_graph(signals, b, seen), router.spec
    value = signals.value_ND.view(signals.sequences.count, -1, WIDTH)[b]
    graph = []
    for i, row in enumerate(seen):
        rows = [head[i] for head in heads]
        if spec.heads == "min_entropy":
            rows = [min(rows, key=entropy)]
        if spec.heads == "posterior":
            near = [
                math.exp(-float((x[i] - value[j]).square().sum()) / (2 * spec.sigma**2))
                for j in row
            ]
            products = [[a * e for a, e in zip(r, near, strict=True)] for r in rows]
            rows = [[p / sum(product) for p in product] for product in products]
        graph.append([sum(column) / len(rows) for column in zip(*rows, strict=True)])
    return graph


def by_loops(router: TokenGraphRouter, x_BTD: Tensor, signals: Signals, seen) -> Tensor:
    """P (B, T, E), one pair of tokens at a time."""
    found = torch.zeros(*x_BTD.shape[:2], EXPERTS, dtype=torch.float64)
    for b, x in enumerate(x_BTD):
        if isinstance(router.spec, SimilarityAware):
            graph = similarity_graph(router, x, seen[b])
        else:
            graph = attention_graph(router, x, signals, b, seen[b])
        for i in range(len(x)):
            for share, j in zip(graph[i], seen[b][i], strict=True):
                logits = router.router.weight @ x[j]
                found[b, i] += share * (logits if router.spec.mix == "logit" else logits.softmax(0))
            if router.spec.mix == "logit":
                found[b, i] = found[b, i].softmax(0)
    return found


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


# --- gradients ----------------------------------------------------------------------------------


@EVERY_SPEC
def test_gradients_equal_finite_differences(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(2, 4)
    names = [name for name, _ in router.named_parameters()]
    attention = signals.attention

    def output(x: Tensor, query: Tensor, key: Tensor, value: Tensor, *weights: Tensor) -> Tensor:
        given = signals.replace(
            attention=DotProductAttention(query, key, attention.scale), value_ND=value
        )
        parameters = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(router, parameters, (x, given)).scores_NE

    leaves = [x_BTD.flatten(0, 1), attention.query_BATC, attention.key_BGPC, signals.value_ND]
    leaves += [parameter.detach() for parameter in router.parameters()]
    assert torch.autograd.gradcheck(output, [leaf.clone().requires_grad_() for leaf in leaves])


def test_the_loss_of_one_token_trains_the_routing_of_its_neighbour() -> None:
    router, (x_BTD, _) = built(AttentionAware()), drawn(1, 3)
    weight = torch.tensor([[1.0, 0, 0], [0.0, 1, 0], [0.25, 0, 0.75]], dtype=torch.float64)
    x_ND = x_BTD[0].requires_grad_()
    router(x_ND, given_weights(weight)).scores_NE[2, 0].log().backward()
    touched = x_ND.grad.abs().sum(-1) > 0
    assert touched.tolist() == [True, False, True]
    assert float(router.router.weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    "spec", [AttentionAware(detach=True), SimilarityAware(rank=0, detach=True)], ids=str
)
def test_a_detached_graph_is_the_same_without_gradient(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec), drawn(1, 5)
    attached = built(spec.replace(detach=False))
    query = signals.attention.query_BATC.clone().requires_grad_()
    signals = signals.replace(attention=signals.attention.replace(query_BATC=query))
    x_BTD.requires_grad_()
    found = scores(router, x_BTD, signals)
    assert torch.equal(found, scores(attached, x_BTD, signals))
    found[0, 4, 0].backward()
    assert query.grad is None
    # All that is left is the gradient through R: P is linear in it, with the graph held fixed.
    with torch.no_grad():
        view = signals.sequences.view(None)
        weight = signals.attention.weights(view)[0].mean(0)
        if isinstance(spec, SimilarityAware):
            score = x_BTD[0] @ x_BTD[0].T / math.sqrt(WIDTH)
            weight = score.masked_fill(~everyone(1, 5).tril()[0], -math.inf).softmax(-1)
    own = x_BTD.detach()[0].requires_grad_()
    (weight @ (own @ router.router.weight.T).softmax(-1))[4, 0].backward()
    torch.testing.assert_close(x_BTD.grad[0], own.grad)


@EVERY_SPEC
def test_scores_that_underflow_have_finite_gradients(spec: RouterSpec) -> None:
    router, (x_BTD, signals) = built(spec).float(), drawn(2, 4)
    with torch.no_grad():
        router.router.weight.mul_(1e3)
    x_ND = x_BTD.float().flatten(0, 1).requires_grad_()
    router(x_ND, signals).weight_NK.square().sum().backward()
    for tensor in (x_ND, *router.parameters()):
        assert bool(torch.isfinite(tensor.grad).all())


@pytest.mark.parametrize("poison", ["factors", "weights"])
@EVERY_SPEC
def test_rows_that_see_nothing_keep_their_own_routing(spec: RouterSpec, poison: str) -> None:
    router, (x_BTD, signals) = built(spec), drawn(2, 4)
    valid_BT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    if poison == "weights":  # a softmax over nothing
        weight = signals.attention.weights(signals.sequences.view(valid_BT.flatten()))
        weight = weight.masked_fill(~valid_BT[:, None, :, None], math.nan)
        signals = signals.replace(attention=AttentionWeights(weight))
    x_ND = x_BTD.flatten(0, 1).requires_grad_()
    routing = router(x_ND, signals.replace(valid_N=valid_BT.flatten()))
    assert routing.expert_NK[:2].eq(-1).all()
    wanted = router.router(x_ND).scores_NE[:2]
    torch.testing.assert_close(routing.scores_NE[:2], wanted, rtol=1e-9, atol=1e-12)
    routing.scores_NE[2:].square().sum().backward()
    assert bool(torch.isfinite(x_ND.grad).all())


@pytest.mark.parametrize("scale", [1e3, 1e15])
def test_a_posterior_far_from_every_value_is_finite(scale: float) -> None:
    router = built(AttentionAware(heads="posterior", sigma=1e-15)).float()
    x_BTD, signals = drawn(1, 6)
    signals = signals.replace(value_ND=signals.value_ND.float() * scale)
    routing = router(x_BTD[0].float(), signals)
    assert bool(torch.isfinite(routing.scores_NE).all())


# --- composition --------------------------------------------------------------------------------


def test_state_belongs_to_the_wrapped_router() -> None:
    router = SimilarityAware(TopK(k=1, bias_rate=0.1)).build(SITE)
    router.update(Load(torch.tensor([4, 0, 0, 0]), torch.tensor(4)))
    assert router.router.correction_bias_E.tolist() == pytest.approx([-0.1, 0.1, 0.1, 0.1])
    warm = AttentionAware(DenseWarmup(k=1, warmup_k=3, warmup_steps=1)).build(SITE).double()
    x_BTD, signals = drawn(1, 4)
    assert warm(x_BTD[0], signals).expert_NK.shape == (4, 3)
    warm.update(Load(torch.zeros(4), torch.tensor(4)))
    assert warm(x_BTD[0], signals).expert_NK.shape == (4, 1)


def test_it_composes_with_permutations_and_rectification() -> None:
    router = Permuted(SimilarityAware(TopK(k=2)), steps=1).build(SITE).double()
    assert router.requires == {"sequences"}
    router.order_E.copy_(torch.tensor([2, 0, 3, 1]))
    x_BTD, signals = drawn(2, 5)
    found = router(x_BTD.flatten(0, 1), signals)
    wanted = router.router(x_BTD.flatten(0, 1), signals)
    assert torch.equal(found.expert_NK, router.order_E[wanted.expert_NK])
    bank = SwiGLU(count=EXPERTS, hidden=8)
    layer = MoESpec(AttentionAware(TopK(k=2)), bank, Rectified(groups=2)).build(WIDTH).double()
    out = layer(x_BTD, signals)
    assert torch.equal(out.routing.scores_NE, layer.router(x_BTD.flatten(0, 1), signals).scores_NE)
    with pytest.raises(SpecError, match="set normalize to selected"):
        MoESpec(AttentionAware(TopK(normalize="none")), bank, Rectified(groups=2))


def test_a_start_that_is_the_identity_in_the_mean() -> None:
    full = SimilarityAware().build(SITE)
    torch.testing.assert_close(full.query_weight, torch.eye(WIDTH) / math.sqrt(WIDTH))
    low = SimilarityAware(rank=20_000).build(SITE)
    torch.testing.assert_close(
        low.query_weight.T @ low.key_weight, torch.eye(WIDTH) / math.sqrt(WIDTH), rtol=0, atol=0.05
    )
    fixed = SimilarityAware(rank=0).build(SITE)
    assert [name for name, _ in fixed.named_parameters()] == ["router.weight"]


def test_experts_see_the_tokens_themselves() -> None:
    layer = MoESpec(AttentionAware(), SwiGLU(count=EXPERTS, hidden=8)).build(WIDTH).double()
    rows: list[Tensor] = []
    layer.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    x_BTD, _ = drawn(1, 6)
    weight = torch.rand(6, 6, dtype=torch.float64)
    layer(x_BTD, given_weights(weight / weight.sum(-1, keepdim=True)))
    seen = sorted(rows[0].tolist())
    assert seen == sorted(2 * x_BTD[0].tolist())


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimilarityAware(temperature=0.0), "temperature is 0.0; wanted 1e-06 or more"),
        (lambda: SimilarityAware(temperature=-1.0), "temperature is -1.0"),
        (lambda: SimilarityAware(temperature=math.nan), "temperature is nan"),
        (lambda: SimilarityAware(rank=-1), "rank is -1; wanted 0 or more, or None"),
        (lambda: SimilarityAware(detach=True), "set rank=0"),
        (lambda: AttentionAware(sigma=0.0), "sigma is 0.0; wanted a positive finite number"),
        (lambda: AttentionAware(sigma=math.inf), "sigma is inf"),
        (lambda: AttentionAware(heads="max"), "heads is 'max'"),
        (lambda: SimilarityAware(Comet()), "Comet does not tell apart; use TopK"),
        (lambda: AttentionAware(TopK(score="sigmoid")), "use score=softmax or mix=logit"),
        (
            lambda: MoESpec(SimilarityAware(TopK(k=5)), SwiGLU(count=4, hidden=8)),
            "k is 5 but the bank has 4 experts",
        ),
    ],
)
def test_bad_specs(make, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()


def test_sigmoid_logits_can_be_averaged() -> None:
    router = built(AttentionAware(TopK(score="sigmoid"), mix="logit"))
    x_BTD, _ = drawn(1, 6)
    found = router(x_BTD[0], given_weights(torch.full((6, 6), 1 / 6, dtype=torch.float64)))
    share_E = (x_BTD[0] @ router.router.weight.T).mean(0).sigmoid()
    torch.testing.assert_close(found.scores_NE, (share_E / share_E.sum()).expand(6, -1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": None}, r"rows \(N, D\) do not say which \(B, T, D\) they form"),
        ({"attention": None}, "needs the signal attention, which was not passed"),
        ({"sequences": Sequences(5)}, "has 5 sequences, which 12 rows cannot form"),
        ({"sequences": Sequences(0)}, "has 0 sequences, which 12 rows cannot form"),
        (
            {"sequences": Sequences(3, everyone(2, 4))},
            r"visible_BTP is \(2, 4, 4\) of torch.bool; wanted \(3 or 1, 4, 4\) of torch.bool",
        ),
        ({"sequences": Sequences(3, everyone(3, 4).float())}, "of torch.float32; wanted"),
        ({"sequences": Sequences(2)}, r"queries \(3, 4, 4, 3\) and keys .* B, T, P = 2, 6, 6"),
        (
            {"attention": AttentionWeights(torch.ones(3, 4, 4))},
            r"weights \(3, 4, 4\); wanted \(B, heads, T, P\) with B, T, P = 3, 4, 4",
        ),
        ({"attention": AttentionWeights(torch.ones(3, 1, 4, 5))}, r"weights \(3, 1, 4, 5\)"),
        ({"attention": AttentionWeights(torch.ones(3, 1, 5, 4))}, r"weights \(3, 1, 5, 4\)"),
    ],
)
def test_bad_signals(change: dict[str, object], message: str) -> None:
    router, (x_BTD, signals) = built(AttentionAware()), drawn(3, 4)
    with pytest.raises(SignalError, match=message):
        router(x_BTD.flatten(0, 1), signals.replace(**change))


def test_a_posterior_without_values_is_refused() -> None:
    router, (x_BTD, signals) = built(AttentionAware(heads="posterior")), drawn(3, 4)
    with pytest.raises(SignalError, match="needs the signal value_ND"):
        router(x_BTD.flatten(0, 1), signals.replace(value_ND=None))
    with pytest.raises(SignalError, match=r"value_ND has shape \(12, 4\); wanted \(12, 5\)"):
        router(x_BTD.flatten(0, 1), signals.replace(value_ND=torch.ones(12, 4)))


def test_weights_that_do_not_sum_to_one_are_refused_in_anomaly_mode() -> None:
    router, (x_BTD, _) = built(AttentionAware()), drawn(1, 4)
    weight = torch.eye(4, dtype=torch.float64)
    weight[2, 0] = 0.01
    router(x_BTD[0], given_weights(weight))
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        router(x_BTD[0], given_weights(torch.eye(4, dtype=torch.float64) * 1.0005))
        with pytest.raises(SignalError, match="do not sum to 1"):
            router(x_BTD[0], given_weights(weight))
        padded = given_weights(weight).replace(valid_N=torch.arange(4) != 2)
        router(x_BTD[0], padded)

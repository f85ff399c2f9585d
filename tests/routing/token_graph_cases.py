"""Routers over a graph of tokens, and loops over pairs that say what they compute."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.routing import (
    AttentionAware,
    AttentionWeights,
    DotProductAttention,
    RouterSpec,
    Sequences,
    Signals,
    SimilarityAware,
    Site,
    TokenGraphRouter,
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

"""What the four parts must be able to express: banks and dispatches.

See test_expressiveness.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from layer_parts import (
    EXPERTS,
    WIDTH,
    ScopeRouter,
    bank,
    layer_of,
    site,
)
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.dispatch import Dropless, Merged, plan_places, plan_rows
from moekit.experts import (
    GELU,
    Bank,
    Experts,
    FeedForwardExperts,
    RowGroups,
    Zero,
)
from moekit.layer import MoESpec
from moekit.routing import (
    Router,
    Routing,
    Signals,
    Site,
    TopK,
)

pytestmark = pytest.mark.usefixtures("double")


def test_experts_merged_into_one_before_they_run() -> None:
    layer = layer_of(ScopeRouter(site(), k=3), bank(), Merged().build())
    x_ND, scope_N = torch.randn(9, WIDTH), torch.tensor([0, 1, 0, 1, 1, 0, 0, 1, 1])
    out = layer(x_ND, Signals(scope_N=scope_N))
    weight_NE = out.routing.dense_weight_NE()
    for n in range(9):
        up = torch.einsum("e,eoi->oi", weight_NE[n], layer.experts.gate_up_proj)
        down = torch.einsum("e,eoi->oi", weight_NE[n], layer.experts.down_proj)
        gate, value = (up @ x_ND[n]).chunk(2)
        torch.testing.assert_close(out.y[n], down @ (F.silu(gate) * value))
    assert int(out.rows_E.sum()) == 9  # one row a token, not three
    out.y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_low_rank_bank_merged_weight_by_weight() -> None:
    """Any bank whose parameters count the experts first can be merged, a stranger's too."""
    layer = layer_of(ScopeRouter(site(), k=2), LowRank(bank(), rank=2), Merged().build())
    x_ND, scope_N = torch.randn(6, WIDTH), torch.tensor([0, 0, 1, 1, 0, 1])
    out = layer(x_ND, Signals(scope_N=scope_N))
    experts, weight_NE = layer.experts, out.routing.dense_weight_NE()
    for n in range(6):
        a, b, up, down = (
            torch.einsum("e,eoi->oi", weight_NE[n], value)
            for value in (experts.a, experts.b, experts.base.up_weight, experts.base.down_proj)
        )
        gate, value = ((up + b @ a) @ x_ND[n]).chunk(2)
        torch.testing.assert_close(out.y[n], down @ (F.silu(gate) * value))


def test_a_connector_changes_the_width_and_has_biases() -> None:
    spec = MoESpec(
        TopK(k=2),
        GELU(count=4, hidden=16, bias=True, out=12),
        shared=GELU(count=1, hidden=16, bias=True, out=12),
    )
    layer = spec.build(WIDTH)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x_BTD = torch.randn(2, 3, WIDTH)
    out = layer(x_BTD)
    assert out.y.shape == (2, 3, 12)
    x_ND = x_BTD.flatten(0, 1)
    weight_NE = out.routing.dense_weight_NE()
    wanted = torch.zeros(6, 12)
    for experts, weight in ((layer.experts, weight_NE), (layer.shared, torch.ones(6, 1))):
        for e in range(weight.shape[1]):
            inner = F.gelu(x_ND @ experts.up_proj[e].T + experts.up_bias[e])
            y = inner @ experts.down_proj[e].T + experts.down_bias[e]
            wanted = wanted + weight[:, e : e + 1] * y
    torch.testing.assert_close(out.y.flatten(0, 1), wanted)


class LowRank(Experts):
    """A frozen bank whose first projection learns a low-rank correction an expert (LoRA)."""

    def __init__(self, base: FeedForwardExperts, rank: int) -> None:
        super().__init__(base.kinds, base.width, base.out_width)
        self.base = base.requires_grad_(False)
        count, inner, width = base.up_weight.shape
        self.a = nn.Parameter(torch.randn(count, rank, width))
        self.b = nn.Parameter(torch.randn(count, inner, rank))

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        low = groups.linear(groups.linear(rows_RD, self.a), self.b)
        inner = groups.linear(rows_RD, self.base.up_weight) + low
        return groups.linear(self.base.activate(inner), self.base.down_proj)


def test_a_low_rank_bank_on_a_frozen_base() -> None:
    router = TopK(k=2).build(site())
    layer = layer_of(router, LowRank(bank(), rank=2))
    x_ND = torch.randn(9, WIDTH)
    merged = bank()
    merged.load_state_dict(layer.experts.base.state_dict())
    with torch.no_grad():
        merged.gate_up_proj += layer.experts.b @ layer.experts.a
    torch.testing.assert_close(layer(x_ND).y, layer_of(router, merged)(x_ND).y)
    layer(x_ND).y.sum().backward()
    assert layer.experts.a.grad is not None
    assert layer.experts.b.grad is not None
    assert all(p.grad is None for p in layer.experts.base.parameters())


class LowRankLinear(nn.Module):
    """A dense linear map with low-rank experts and null experts beside it (AdaMoE on LLaMA)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        experts = Bank((GELU(count=4, hidden=2), Zero(3)))
        self.experts = MoESpec(TopK(k=2, normalize="nonzero"), experts).build(width)

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Routing]:
        out = self.experts(x_ND)
        return self.base(x_ND) + out.y, out.routing


def test_null_tokens_pass_a_frozen_linear_map_exactly() -> None:
    module = LowRankLinear(WIDTH)
    nn.init.normal_(module.experts.router.weight)
    x_ND = torch.randn(60, WIDTH)
    y_ND, routing = module(x_ND)
    null_N = (routing.expert_NK >= 4).all(-1)
    assert bool(null_N.any())
    assert torch.equal(y_ND[null_N], module.base(x_ND)[null_N])
    assert not torch.equal(y_ND[~null_N], module.base(x_ND)[~null_N])


class Heads(Experts):
    """One projection an expert, used as a map before and as a reduce after attention."""

    def __init__(self, count: int, width: int, out: int) -> None:
        super().__init__(("feed_forward",) * count, width, out)
        self.weight = nn.Parameter(torch.randn(count, out, width))

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        return groups.linear(rows_RD, self.weight)


@pytest.mark.parametrize("padded", [False, True])
def test_a_map_and_a_reduce_around_attention_on_one_plan(padded: bool) -> None:
    """Mixture of attention heads (ModuleFormer): k query heads a token, keys and values shared."""
    tokens, head, k = 7, 4, 2
    router, query, output = (
        TopK(k=k).build(site()),
        Heads(EXPERTS, WIDTH, head),
        Heads(EXPERTS, head, WIDTH),
    )
    key, value = nn.Linear(WIDTH, head), nn.Linear(WIDTH, head)
    x_ND = torch.randn(tokens, WIDTH)
    routing = router(x_ND)
    ranges = query.dispatched_ranges
    plan = plan_places(routing, ranges, tokens) if padded else plan_rows(routing, ranges)
    query_NKH = plan.to_slots(query(plan.gather(x_ND), plan.groups))
    attended = F.scaled_dot_product_attention(
        query_NKH.transpose(0, 1),
        key(x_ND).expand(k, -1, -1),
        value(x_ND).expand(k, -1, -1),
        is_causal=True,
    )
    rows = output(plan.from_slots(attended.transpose(0, 1)), plan.groups)
    y_ND = plan.combine(rows)
    wanted = torch.zeros(tokens, WIDTH)
    for n in range(tokens):
        for slot in range(k):
            e = int(routing.expert_NK[n, slot])
            score = key(x_ND[: n + 1]) @ (query.weight[e] @ x_ND[n]) / head**0.5
            mixed = score.softmax(0) @ value(x_ND[: n + 1])
            wanted[n] += routing.weight_NK[n, slot] * (output.weight[e] @ mixed)
    torch.testing.assert_close(y_ND, wanted)
    y_ND.sum().backward()
    assert all(p.grad is not None for p in (*query.parameters(), *output.parameters()))


class Rows(Experts):
    """Experts of a single hidden unit, by the thousand: no matrix product, one row each (PEER)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__(("feed_forward",) * count, width, width)
        self.down = nn.Parameter(torch.randn(count, width))
        self.up = nn.Parameter(torch.randn(count, width))

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        inner_R1 = (rows_RD * groups.of_row(self.down)).sum(-1, keepdim=True)
        return F.gelu(inner_R1) * groups.of_row(self.up)


class ProductKeys(Router):
    """Top-k of all pairs of half keys, found among the k best of each half (Lample et al. 2019)."""

    def __init__(self, at: Site, k: int) -> None:
        super().__init__(at)
        self.k = k
        self.side = round(at.experts**0.5)
        self.left = nn.Parameter(torch.randn(self.side, at.width))
        self.right = nn.Parameter(torch.randn(self.side, at.width))

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        left, i = (x_ND @ self.left.T).topk(self.k)
        right, j = (x_ND @ self.right.T).topk(self.k)
        pairs = (left[:, :, None] + right[:, None, :]).flatten(1)
        ids = (i[:, :, None] * self.side + j[:, None, :]).flatten(1)
        best, at = pairs.topk(self.k)
        return Routing(ids.gather(1, at), best.softmax(-1), self.site.experts, full=True)


def test_experts_of_one_row_by_the_thousand() -> None:
    count = 64 * 64
    router = ProductKeys(site(("feed_forward",) * count), k=8)
    layer = layer_of(router, Rows(count, WIDTH))
    x_ND = torch.randn(5, WIDTH)
    out = layer(x_ND)
    every_NE = ((x_ND @ router.left.T)[:, :, None] + (x_ND @ router.right.T)[:, None, :]).flatten(1)
    best, ids = every_NE.topk(8)
    for n in range(5):
        assert sorted(out.routing.expert_NK[n].tolist()) == sorted(ids[n].tolist())
        inner = F.gelu(layer.experts.down[ids[n]] @ x_ND[n])
        torch.testing.assert_close(
            out.y[n], (best[n].softmax(0) * inner) @ layer.experts.up[ids[n]]
        )
    assert out.rows_E.shape == (count,)
    assert int(out.rows_E.sum()) == 5 * 8


@dataclass
class Store:
    """Expert weights outside the module, and a record of what was asked for."""

    weights: list[tuple[Tensor, Tensor]]
    fetched: list[int]

    def fetch(self, e: int) -> tuple[Tensor, Tensor]:
        self.fetched.append(e)
        return self.weights[e]


class Fetched(Experts):
    """Weights that are not in memory: each hit expert is fetched, run and let go (offload)."""

    def __init__(self, store: Store, like: FeedForwardExperts) -> None:
        super().__init__(like.kinds, like.width, like.out_width)
        self.store = store
        self.activate = like.activate

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        outputs = []
        for e, rows in enumerate(rows_RD.split(groups.sizes)):
            if len(rows):
                up, down = self.store.fetch(e)
                outputs.append(self.activate(rows @ up.T) @ down.T)
        return torch.cat(outputs) if outputs else rows_RD.new_zeros(0, self.out_width)


def test_weights_fetched_when_an_expert_is_hit() -> None:
    resident = bank()
    pairs = list(zip(resident.gate_up_proj.detach(), resident.down_proj.detach(), strict=True))
    store = Store(pairs, [])
    router = TopK(k=2).build(site())
    nn.init.normal_(router.weight)
    away = layer_of(router, Fetched(store, resident))
    here = layer_of(router, resident, Dropless(backend="loop").build())
    x_ND = torch.randn(3, WIDTH)
    with torch.no_grad():
        out = away(x_ND)
        assert torch.equal(out.y, here(x_ND).y)
        hit = sorted(set(out.routing.expert_NK.flatten().tolist()))
        assert store.fetched == hit
        assert len(hit) < EXPERTS
        assert list(away.experts.parameters()) == []
        assert away(torch.zeros(0, WIDTH)).y.shape == (0, WIDTH)
    assert store.fetched == hit

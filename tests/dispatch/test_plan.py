"""Plans: which row goes where, and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.dispatch import Plan, plan_places, plan_rows
from moekit.experts import GroupedMM, PaddedGroups, RowGroups
from moekit.routing import Routing


def random_routing(seed: int, tokens: int, experts: int, slots: int, used: float) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    expert_NK = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :slots]
    keep_NK = torch.rand(tokens, slots, generator=generator) < used
    weight_NK = torch.rand(tokens, slots, generator=generator, dtype=torch.float64)
    return Routing(
        expert_NK.masked_fill(~keep_NK, -1),
        weight_NK.masked_fill(~keep_NK, 0.0),
        experts,
        full=used == 1.0,
    )


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    experts = draw(st.integers(1, 6))
    return random_routing(
        draw(st.integers(0, 2**31)),
        draw(st.integers(0, 10)),
        experts,
        draw(st.integers(1, experts)),
        draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@st.composite
def ranges(draw: st.DrawFn, experts: int) -> list[tuple[int, int]]:
    """Some of the experts, as disjoint runs in order."""
    mask = draw(st.lists(st.booleans(), min_size=experts, max_size=experts))
    runs, start = [], None
    for e, inside in enumerate([*mask, False]):
        if inside and start is None:
            start = e
        if not inside and start is not None:
            runs.append((start, e))
            start = None
    return runs


def slow_rows(routing: Routing, runs: list[tuple[int, int]]) -> list[list[int]]:
    """The tokens of each dispatched expert, in token order."""
    experts = [e for start, stop in runs for e in range(start, stop)]
    return [
        [n for n in range(routing.tokens) if e in routing.expert_NK[n].tolist()] for e in experts
    ]


def run_and_compare(plan: Plan, routing: Routing, runs: list[tuple[int, int]]) -> None:
    """Experts that multiply by their own number, against a slow weighted sum."""
    x_ND = torch.randn(routing.tokens, 3, dtype=torch.float64)
    experts = [e for start, stop in runs for e in range(start, stop)]
    factor_E1 = torch.tensor([[e + 1.0] for e in experts], dtype=torch.float64)
    y_ND = plan.combine(plan.gather(x_ND) * plan.groups.of_row(factor_E1))
    wanted = torch.zeros_like(x_ND)
    for n in range(routing.tokens):
        for k, e in enumerate(routing.expert_NK[n].tolist()):
            if e in experts:
                wanted[n] += routing.weight_NK[n, k] * (e + 1) * x_ND[n]
    torch.testing.assert_close(y_ND, wanted, rtol=1e-12, atol=1e-12)


@given(routing=routings(), data=st.data())
def test_rows_are_sorted_by_expert_and_in_token_order(
    routing: Routing, data: st.DataObject
) -> None:
    runs = data.draw(ranges(routing.experts))
    plan = plan_rows(routing, runs)
    per_expert = slow_rows(routing, runs)
    assert plan.groups.count_E.tolist() == [len(tokens) for tokens in per_expert]
    assert plan.token_R.tolist() == [n for tokens in per_expert for n in tokens]
    if runs:
        run_and_compare(plan, routing, runs)


@given(routing=routings(), data=st.data(), spare=st.integers(0, 3))
def test_places_are_the_rows_and_zeros(routing: Routing, data: st.DataObject, spare: int) -> None:
    runs = data.draw(ranges(routing.experts))
    per_expert = slow_rows(routing, runs)
    places = max((len(tokens) for tokens in per_expert), default=0) + spare
    plan = plan_places(routing, runs, places)
    empty = routing.tokens
    wanted = [tokens + [empty] * (places - len(tokens)) for tokens in per_expert]
    assert plan.token_R.tolist() == [n for tokens in wanted for n in tokens]
    rows = plan.gather(torch.ones(routing.tokens, 2))
    assert torch.equal(rows[:, 0] != 0, plan.token_R < empty)
    if runs:
        run_and_compare(plan, routing, runs)


def test_a_plan_can_be_run_again() -> None:
    """Map, something else in between, then reduce, all on one plan (attention heads)."""
    routing = random_routing(0, 8, 4, 2, 1.0)
    plan = plan_rows(routing, [(0, 4)])
    x_ND = torch.randn(8, 3, dtype=torch.float64)
    once = plan.combine(plan.gather(x_ND) * 2)
    again = plan.combine(plan.gather(x_ND) * 2)
    assert torch.equal(once, again)


def test_combine_accumulates_in_float32() -> None:
    """256 small rows onto one token: bfloat16 sums would stop growing at 2^8 ulps."""
    experts = 300
    weight_NK = torch.full((1, experts), 1.0)
    for full in (True, False):
        routing = Routing(torch.arange(experts)[None], weight_NK, experts, full=full)
        plan = plan_rows(routing, [(0, experts)])
        rows = torch.ones(experts, 1, dtype=torch.bfloat16)
        assert float(plan.combine(rows)) == pytest.approx(300, rel=2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_every_grouped_product_is_the_loop(seed: int, dtype: torch.dtype) -> None:
    torch.manual_seed(seed)
    counts = torch.tensor([3, 0, 5, 1])
    rows, weight = torch.randn(9, 8), torch.randn(4, 16, 8)
    bias = torch.randn(4, 16)
    wanted = torch.cat(
        [
            part @ w.T + b
            for part, w, b in zip(
                rows.double().split([3, 0, 5, 1]), weight.double(), bias.double(), strict=True
            )
        ]
    )
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2}[dtype]
    given = rows.to(dtype), weight.to(dtype), bias.to(dtype)
    if dtype == torch.float64:
        given = rows.double(), weight.double(), bias.double()
    for kind in (RowGroups, GroupedMM):
        found = kind(counts).linear(*given)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * 8)
    padded = PaddedGroups(counts, 5)
    start, places = 0, torch.zeros(20, 8, dtype=dtype)
    for e, n in enumerate(counts.tolist()):
        places[e * 5 : e * 5 + n] = given[0][start : start + n]
        start += n
    found = padded.linear(places, *given[1:])
    taken = torch.cat([found[e * 5 : e * 5 + n] for e, n in enumerate(counts.tolist())])
    torch.testing.assert_close(taken.double(), wanted, rtol=tolerance, atol=tolerance * 8)


def test_slices_of_groups_are_their_experts() -> None:
    counts = torch.tensor([3, 0, 5, 1])
    for groups in (RowGroups(counts), GroupedMM(counts)):
        part = groups.slice(1, 3)
        assert type(part) is type(groups)
        assert part.sizes == [0, 5]
        assert part.experts == 2
    assert PaddedGroups(counts, 6).slice(1, 3).sizes == [6, 6]


def test_grouped_products_take_expanded_and_strided_gradients() -> None:
    rows = torch.randn(9, 8, requires_grad=True)
    weight = torch.randn(4, 16, 8, requires_grad=True)
    out = GroupedMM(torch.tensor([3, 0, 5, 1])).linear(rows, weight)
    out.sum().backward()  # an expanded gradient
    by_sum = rows.grad.clone()
    rows.grad = None
    out = GroupedMM(torch.tensor([3, 0, 5, 1])).linear(rows, weight)
    out.backward(torch.ones(16, 9).T)  # a transposed one
    torch.testing.assert_close(rows.grad, by_sum)
    assert bool((weight.grad[1] == 0).all())


def test_grouped_products_can_be_differentiated_twice() -> None:
    torch.manual_seed(0)
    found = []
    for kind in (RowGroups, GroupedMM):
        torch.manual_seed(0)
        rows = torch.randn(6, 8, requires_grad=True)
        weight = torch.randn(3, 8, 8, requires_grad=True)
        groups = kind(torch.tensor([2, 0, 4]))
        y = groups.linear(groups.linear(rows, weight).tanh(), weight)
        (g,) = torch.autograd.grad(y.square().sum(), rows, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [rows, weight]))
    for loop, grouped in zip(*found, strict=True):
        torch.testing.assert_close(grouped, loop, rtol=1e-4, atol=1e-4)


@given(st.data())
def test_a_compact_plan_moves_the_same_rows_in_fewer_slots(data: st.DataObject) -> None:
    routing = data.draw(routings())
    plan = plan_rows(routing, data.draw(ranges(routing.experts)))
    compact = plan.compact()
    rows_RD = torch.randn(len(plan.assignment_R), 3, dtype=torch.float64)
    assert torch.equal(compact.token_R, plan.token_R)
    torch.testing.assert_close(compact.combine(rows_RD), plan.combine(rows_RD))
    assert torch.equal(compact.from_slots(compact.to_slots(rows_RD)), rows_RD)
    counts = [plan.token_R.tolist().count(n) for n in range(routing.tokens)]
    if plan.every or not counts:
        assert compact is plan
    else:
        assert compact.weight_NK.shape == (routing.tokens, max(1, *counts))


def test_a_padded_plan_stays_as_it_is() -> None:
    plan = plan_places(random_routing(0, 5, 3, 2, 0.5), [(0, 3)], places=5)
    assert plan.compact() is plan

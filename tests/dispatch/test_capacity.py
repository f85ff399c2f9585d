"""Capacity: who stays when an expert overflows, and how many places each expert has."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moekit.dispatch import Capacity, capacities, limit
from moekit.errors import SpecError
from moekit.experts import Bank, Constant, Copy, ExpertsSpec, SwiGLU, Zero
from moekit.layer import MoESpec
from moekit.routing import Comet, DSelectK, Pathway, Routing, Signals, TopK

KINDS = ("feed_forward", "zero", "copy", "constant")


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    tokens, experts = draw(st.integers(0, 12)), draw(st.integers(1, 6))
    slots = draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    expert_NK = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :slots]
    used_NK = torch.rand(tokens, slots, generator=generator) < draw(st.sampled_from([0.5, 1.0]))
    weight_NK = torch.rand(tokens, slots, generator=generator).masked_fill(~used_NK, 0.0)
    settled_k = draw(st.sampled_from([None, 1, 2]))
    routing = Routing(expert_NK.masked_fill(~used_NK, -1), weight_NK, experts)
    return routing.replace(settled_k=settled_k)


def slow_limit(routing: Routing, capacity: list[int], priority: str) -> set[tuple[int, int]]:
    """The (token, slot) pairs that keep their place, handed out one at a time."""
    tokens, slots = routing.expert_NK.shape
    order = [list(range(slots)) for _ in range(tokens)]
    if routing.settled_k is not None:  # slots in no order: the larger weight is the better choice
        for n, row in enumerate(routing.weight_NK.tolist()):
            order[n].sort(key=lambda k, row=row: -row[k])
    if priority == "slot":
        queue = [(n, order[n][r]) for r in range(slots) for n in range(tokens)]
    else:
        queue = [(n, k) for n in range(tokens) for k in range(slots)]
    if priority == "score":
        queue.sort(key=lambda place: -float(routing.weight_NK[place]))
    left, kept = list(capacity), set()
    for place in queue:
        expert = int(routing.expert_NK[place])
        if expert >= 0 and left[expert] > 0:
            left[expert] -= 1
            kept.add(place)
    return kept


@pytest.mark.parametrize("priority", ["slot", "position", "score"])
@given(routing=routings(), data=st.data())
def test_equals_handing_out_places_one_at_a_time(
    priority: str, routing: Routing, data: st.DataObject
) -> None:
    capacity = data.draw(
        st.lists(st.integers(0, 8), min_size=routing.experts, max_size=routing.experts)
    )
    kept = limit(routing, capacity, priority)
    found = {(n, k) for n, k in kept.used_NK.nonzero().tolist()}
    assert found == slow_limit(routing, capacity, priority)
    assert torch.equal(kept.expert_NK[kept.used_NK], routing.expert_NK[kept.used_NK])
    assert torch.equal(kept.weight_NK, routing.weight_NK * kept.used_NK)
    assert not kept.full


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("router", [Comet, DSelectK])
def test_a_gate_that_settles_has_room_for_its_k(router: type, pad: bool, k: int) -> None:
    """``⌈1.25 · 24 k / 6⌉`` places, whether its trees are saturated (few experts) or not (all)."""
    dispatch = Capacity(factor=1.25, eval_factor=1.25, pad=pad)
    for gamma in (1e-6, 100.0):
        spec = MoESpec(router(k=k, gamma=gamma), SwiGLU(count=6, hidden=8), dispatch)
        layer = spec.build(8).double()
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        out = layer(torch.randn(24, 8, dtype=torch.float64))
        load_E = out.routing.load_E()
        places = -(-5 * 24 * k // (4 * 6))
        kept_E = load_E.clamp_max(places)
        assert torch.equal(out.rows_E, torch.full_like(kept_E, places) if pad else kept_E)
        assert int(out.dropped) == int((load_E - kept_E).sum())
        assert int(out.dropped) > 0 or gamma < 1
        assert bool((out.routing.used_NK.sum(1) <= k).all()) == (gamma < 1)


@given(routing=routings(), data=st.data(), seed=st.integers(0, 1000))
def test_random_priority_fills_every_place_and_no_more(
    routing: Routing, data: st.DataObject, seed: int
) -> None:
    capacity = data.draw(
        st.lists(st.integers(0, 8), min_size=routing.experts, max_size=routing.experts)
    )
    torch.manual_seed(seed)
    kept = limit(routing, capacity, "random")
    wanted = torch.minimum(routing.load_E(), torch.tensor(capacity))
    assert torch.equal(kept.load_E(), wanted)


def test_random_priority_is_fair_and_repeatable() -> None:
    routing = Routing(torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1), experts=1)
    torch.manual_seed(0)
    stays = torch.stack([limit(routing, [5], "random").used_NK[:, 0] for _ in range(600)])
    # Half the tokens stay; 600 draws of a fair coin stray by less than 5 standard deviations.
    assert float((stays.float().mean(0) - 0.5).abs().max()) < 5 * 0.5 / math.sqrt(600)
    torch.manual_seed(0)
    assert torch.equal(limit(routing, [5], "random").used_NK[:, 0], stays[0])


def test_first_choices_come_before_second_choices() -> None:
    # Tokens 0 and 1 have expert 1 second; token 2 has it first and comes last.
    routing = Routing(torch.tensor([[0, 1], [0, 1], [1, 0]]), torch.ones(3, 2), experts=2)
    by_slot = limit(routing, [2, 2], "slot")
    assert by_slot.expert_NK.tolist() == [[0, 1], [0, -1], [1, -1]]
    by_position = limit(routing, [2, 2], "position")
    assert by_position.expert_NK.tolist() == [[0, 1], [0, 1], [-1, -1]]


def test_one_capacity_an_expert() -> None:
    routing = Routing(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), experts=2)
    with pytest.raises(SpecError, match="1 capacities were given for 2 experts"):
        limit(routing, [1])
    assert limit(routing, [2, 0]).load_E().tolist() == [2, 0]


# --- how many places ----------------------------------------------------------------------------


@given(
    tokens=st.integers(0, 500),
    slots=st.integers(1, 4),
    working=st.integers(1, 16),
    cheap=st.integers(0, 8),
    factor=st.floats(0.1, 4.0),
    tau=st.floats(0.05, 2.0),
)
def test_capacities_add_up_and_keep_their_ratio(
    tokens: int, slots: int, working: int, cheap: int, factor: float, tau: float
) -> None:
    kinds = ["feed_forward"] * working + ["zero"] * cheap
    found = capacities(tokens, slots, kinds, factor, tau)
    exact = factor * slots * tokens / (tau * working + cheap)  # of a zero-computation expert
    # Rounded up, so the sum exceeds γ K T by less than one place an expert.
    assert -1e-6 <= sum(found) - factor * slots * tokens < len(kinds) + 1e-6
    for kind, places in zip(kinds, found, strict=True):
        wanted = exact * (tau if kind == "feed_forward" else 1.0)
        assert wanted - 1e-6 <= places < wanted + 1 + 1e-6


def test_the_published_setting() -> None:
    """8 feed-forward, 4 zero-computation experts, K=2, γ=1.1, τ=0.75, 1000 tokens."""
    kinds = ("feed_forward",) * 8 + ("zero", "copy", "constant", "constant")
    assert capacities(1000, 2, kinds, 1.1, 0.75) == [165] * 8 + [220] * 4
    # The formula as printed has no K: half of that, which must drop 45 % of the assignments.
    printed = capacities(1000, 1, kinds, 1.1, 0.75)
    assert printed == [83] * 8 + [110] * 4
    assert sum(printed) / 2000 == pytest.approx(0.55, abs=0.01)
    assert capacities(1000, 2, ("feed_forward",) * 8, 1.25) == [313] * 8  # ⌈312.5⌉


def test_exact_products_are_not_rounded_up() -> None:
    assert capacities(10, 1, ("feed_forward",), 1.1) == [11]  # 1.1 · 10 = 11.000000000000002
    assert capacities(0, 2, ("feed_forward",) * 3, 1.25) == [0, 0, 0]


MOEPP = Bank((SwiGLU(count=4, hidden=8), Constant(2), Copy(1), Zero(1)))


def run(spec: Capacity, bank: ExpertsSpec = MOEPP, tokens: int = 40, train: bool = True):
    layer = MoESpec(Pathway(k=2), bank, spec).build(8).train(train)
    x_ND = torch.randn(tokens, 8)
    routing = layer.router(x_ND)
    return layer, routing, layer.dispatch(x_ND, routing, layer.experts)


@pytest.mark.parametrize("priority", ["slot", "position", "score", "random"])
@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_no_expert_exceeds_its_places(priority: str, pad: bool, tau: float) -> None:
    spec = Capacity(factor=0.8, tau=tau, priority=priority, pad=pad)
    layer, routing, done = run(spec)
    places = capacities(40, 2, layer.experts.kinds, 0.8, tau)
    assert bool((done.routing.load_E() <= torch.tensor(places)).all())
    wanted = torch.minimum(routing.load_E(), torch.tensor(places))
    assert torch.equal(done.routing.load_E(), wanted)
    rows = [places[0]] * 4 if pad else wanted[:4].tolist()
    assert done.rows_E.tolist() == rows


def test_dropped_assignments_are_counted() -> None:
    torch.manual_seed(1)
    layer = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8), Capacity(factor=0.5)).build(8)
    out = layer(torch.randn(40, 8))
    assert int(out.dropped) == 80 - int(out.rows_E.sum())
    assert int(out.dropped) >= 40  # half the places
    assert int(layer.eval()(torch.randn(40, 8)).dropped) == 0


def test_a_token_that_loses_all_its_experts_gets_zero() -> None:
    layer = MoESpec(TopK(k=1), SwiGLU(count=2, hidden=8), Capacity(factor=0.2)).build(8)
    x_ND = torch.randn(20, 8)
    out = layer(x_ND)
    done = layer.dispatch(x_ND, out.routing, layer.experts)
    lost_N = ~done.routing.used_NK.any(-1)
    assert bool(lost_N.any())
    assert bool((out.y[lost_N] == 0).all())
    assert bool((out.y[~lost_N] != 0).any(-1).all())


def test_padding_takes_no_place_and_counts_for_none() -> None:
    layer = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=8), Capacity(factor=1.0, pad=True)).build(8)
    valid_N = torch.arange(30) < 10
    out = layer(torch.randn(30, 8), Signals(valid_N=valid_N))
    assert out.rows_E.tolist() == [5] * 4  # 10 tokens · 2 slots / 4 experts
    assert bool((out.y[~valid_N] == 0).all())


def test_count_tokens_is_the_formula_as_printed() -> None:
    _, _, done = run(Capacity(factor=1.1, tau=0.75, count="tokens", pad=True))
    assert done.rows_E.tolist() == [math.ceil(1.1 * 0.75 * 40 / (0.75 * 4 + 4))] * 4


@pytest.mark.parametrize("pad", [False, True])
def test_a_factor_without_bounds_limits_nothing(pad: bool) -> None:
    _, routing, done = run(Capacity(factor=1e300, pad=pad))
    assert torch.equal(done.routing.expert_NK, routing.expert_NK)
    rows = [routing.expert_NK.numel()] * 4 if pad else routing.load_E()[:4].tolist()
    assert done.rows_E.tolist() == rows


@pytest.mark.parametrize(
    "fields",
    [
        {"factor": 0.0},
        {"factor": -1.0},
        {"factor": float("inf")},
        {"factor": float("nan")},
        {"eval_factor": 0.0},
        {"tau": 0.0},
        {"tau": -0.5},
        {"priority": "best"},
        {"count": "experts"},
    ],
    ids=str,
)
def test_bad_values_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=next(iter(fields))):
        Capacity(**fields)  # type: ignore[arg-type]

"""Rectification against a plain loop over tokens, closed-form gradients, and its promises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rectify_reference import even_groups, reference
from torch import Tensor

from moekit.dispatch import Capacity, Dropless, Rectification, Rectified, rectify
from moekit.errors import SpecError
from moekit.experts import Bank, Copy, SwiGLU, Zero
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    Comet,
    DSelectK,
    ExpertChoice,
    GumbelSoftmax,
    Hash,
    Pathway,
    Permuted,
    ReLURouting,
    RouterSpec,
    Routing,
    Signals,
    TopK,
)


def routing_of(p_NE: Tensor, k: int) -> Routing:
    """Dropless top-k over given probabilities, ties to the lower id."""
    weight_NK, expert_NK = p_NE.detach().sort(dim=-1, descending=True, stable=True)
    weight_NK, expert_NK = weight_NK[:, :k], expert_NK[:, :k]
    weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
    return Routing(expert_NK, weight_NK, p_NE.shape[1], scores_NE=p_NE, full=True)


def probabilities(
    tokens: int, experts: int, seed: int, kind: str = "random", dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64) * 1.5
    if kind == "tied":
        logits = logits.round()
    if kind == "one expert":  # everybody wants expert 0
        logits[:, 0] += 10
    if kind == "flat":
        logits = torch.zeros_like(logits)
    return logits.softmax(-1).to(dtype)


@dataclass(frozen=True)
class Given:
    """Probabilities, choices, and which experts compute nothing."""

    p_NE: Tensor
    k: int
    spec: Rectified
    free: frozenset[int]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The experts with matrix products, one by one."""
        return [(e, e + 1) for e in range(self.p_NE.shape[1]) if e not in self.free]


@st.composite
def cases(draw: st.DrawFn) -> Given:
    groups = draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 3))
    fill_in = experts > 1 and draw(st.booleans())
    intra = draw(st.booleans())
    modes = ["auto", "all", "any", *(["ignore_kth"] if fill_in else [])] if intra else ["auto"]
    spec = Rectified(
        factor=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.5, 4.0])),
        groups=groups,
        fill_in=fill_in,
        intra_device=intra,
        unrouted=draw(st.sampled_from(modes)),
        priority=draw(st.sampled_from(["probability", "request", "position"])),
    )
    k = draw(st.integers(1, min(3, experts - fill_in)))
    kind = draw(st.sampled_from(["random", "tied", "one expert", "flat"]))
    tokens, seed = draw(st.integers(1, 17)), draw(st.integers(0, 2**31))
    cheap = draw(st.integers(0, 2))
    ids = st.integers(0, experts + cheap - 1)
    free = frozenset(draw(st.sets(ids, min_size=cheap, max_size=cheap)))
    return Given(probabilities(tokens, experts + cheap, seed, kind), k, spec, free)


@given(case=cases())
def test_equals_a_loop_over_tokens(case: Given) -> None:
    p_NE, k, spec = case.p_NE, case.k, case.spec
    routing = routing_of(p_NE, k)
    done = rectify(routing, spec, ranges=case.ranges)
    group = even_groups(len(p_NE), spec.groups)
    choices = routing.expert_NK.tolist()
    wanted = reference(choices, p_NE.tolist(), spec, group, k, case.free)
    requests = k + spec.fill_in
    found = [[e for e in row if e >= 0] for row in done.routing.expert_NK[:, :requests].tolist()]
    assert found == wanted.kept
    dense_NE = torch.zeros_like(p_NE)
    for t, weights in enumerate(wanted.weight):
        for e, weight in weights.items():
            dense_NE[t, e] = weight
    torch.testing.assert_close(done.routing.dense_weight_NE(), dense_NE, rtol=1e-12, atol=1e-12)
    used = done.routing.used_NK.sum(1).tolist()
    assert used == [len(weights) for weights in wanted.weight]  # no expert twice
    kept = sum(len(row) for row in wanted.kept)
    first = sum(
        e in row for t, row in enumerate(wanted.kept) for e in routing.expert_NK[t].tolist()
    )
    assert int(done.places) == wanted.places
    cheap = sum(e in case.free for row in wanted.kept for e in row)
    assert int(done.padding) == wanted.places - (kept - cheap)
    assert int(done.dropped) == len(p_NE) * k - first
    assert int(done.filled) == kept - first
    assert int(done.served) == sum(wanted.served)


@given(case=cases(), zeros=st.floats(0.0, 0.9))
def test_slots_in_no_order_are_taken_by_weight(case: Given, zeros: float) -> None:
    """As a tree gate has them: an expert a slot, unused where its weight is 0."""
    spec = case.spec.replace(fill_in=False, unrouted="auto")
    gate_NE = case.p_NE.masked_fill(torch.rand(case.p_NE.shape) < zeros, 0.0)
    gate_NE[:, 0] += 1e-3 * (gate_NE.sum(1) == 0)
    gate_NE = gate_NE / gate_NE.sum(1, keepdim=True)
    slots_NE = torch.where(gate_NE > 0, torch.arange(gate_NE.shape[1]), -1)
    routing = Routing(slots_NE, gate_NE, gate_NE.shape[1], scores_NE=gate_NE, settled_k=case.k)
    done = rectify(routing, spec, ranges=case.ranges)
    order_NE = gate_NE.sort(dim=-1, descending=True, stable=True).indices.tolist()
    choices = [[e for e in row if gate_NE[t, e] > 0] for t, row in enumerate(order_NE)]
    p = gate_NE.clamp_min(1e-30).tolist()
    group = even_groups(len(p), spec.groups)
    wanted = reference(choices, p, spec, group, case.k, case.free)
    slots = gate_NE.shape[1]
    for t, row in enumerate(done.routing.expert_NK[:, :slots].tolist()):
        assert all(found in (e, -1) for e, found in enumerate(row))  # each in its own slot
        assert sorted(e for e in row if e >= 0) == sorted(wanted.kept[t])
    dense_NE = torch.zeros_like(gate_NE)
    for t, weights in enumerate(wanted.weight):
        for e, weight in weights.items():
            dense_NE[t, e] = weight
    torch.testing.assert_close(done.routing.dense_weight_NE(), dense_NE, rtol=1e-12, atol=1e-12)
    assert int(done.dropped) == sum(map(len, choices)) - sum(map(len, wanted.kept))
    assert int(done.served) == sum(wanted.served)
    assert int(done.places) == wanted.places


def load_GE(routing: Routing, requests: int, spec: Rectified) -> Tensor:
    """Assignments of each group to each expert, counted in a loop."""
    count = torch.zeros(spec.groups, routing.experts, dtype=torch.int64)
    for t, g in enumerate(even_groups(routing.tokens, spec.groups)):
        for e in routing.expert_NK[t, :requests].tolist():
            if e >= 0:
                count[g, e] += 1
    return count


@pytest.mark.parametrize("kind", ["random", "one expert"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", range(3))
def test_fill_in_takes_empty_places_and_no_others(
    k: int, factor: float, seed: int, kind: str
) -> None:
    p_NE, spec = probabilities(48, 8, seed, kind), Rectified(factor=factor, groups=4)
    routing = routing_of(p_NE, k)
    plain = rectify(routing, spec.replace(fill_in=False))
    filled = rectify(routing, spec)
    assert torch.equal(filled.routing.expert_NK[:, :k], plain.routing.expert_NK[:, :k])
    # filled = min(vacant, requests) of every group and expert
    room = -(-int(factor * 10) * k * 12 // (8 * 10))
    vacant_GE = room - load_GE(plain.routing, k, spec)
    assert bool((vacant_GE >= 0).all())
    rank = p_NE.argsort(dim=-1, descending=True, stable=True)[:, k : k + 1]
    asked = Routing(rank, torch.ones_like(rank, dtype=torch.float64), 8)
    wanted_GE = torch.minimum(vacant_GE, load_GE(asked, 1, spec))
    fills = Routing(filled.routing.expert_NK[:, k : k + 1], filled.routing.weight_NK[:, :1], 8)
    assert torch.equal(load_GE(fills, 1, spec), wanted_GE)
    assert int(filled.filled) == int(wanted_GE.sum())
    assert int(filled.padding) == int(plain.padding) - int(filled.filled)
    assert int(filled.places) == int(plain.places) == room * 8 * 4


@pytest.mark.parametrize("fill_in", [False, True])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_no_token_is_left_without_an_expert(k: int, factor: float, fill_in: bool) -> None:
    spec = Rectified(factor=factor, groups=4, fill_in=fill_in)
    done = rectify(routing_of(probabilities(40, 8, 0), k), spec).routing
    assert bool(done.used_NK.any(-1).all())
    torch.testing.assert_close(
        done.weight_NK.sum(1), torch.ones(40, dtype=torch.float64), rtol=1e-12, atol=0
    )
    local_N = done.expert_NK[:, -1]
    group_N = torch.tensor(even_groups(40, 4))
    assert bool((local_N >= 0).any())
    assert bool((local_N // 2 == group_N)[local_N >= 0].all())
    alone = rectify(routing_of(probabilities(40, 8, 0), k), spec.replace(intra_device=False))
    assert int(alone.routing.used_NK.sum()) < int(done.used_NK.sum())


@pytest.mark.parametrize("intra_device", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_room_for_all_is_dropless(k: int, intra_device: bool) -> None:
    spec = Rectified(factor=8.0, groups=4, fill_in=False, intra_device=intra_device)
    routing = routing_of(probabilities(37, 8, 1), k)
    done = rectify(routing, spec)
    assert torch.equal(done.routing.expert_NK[:, :k], routing.expert_NK)
    assert int(done.dropped) == int(done.served) == 0
    torch.testing.assert_close(done.routing.weight_NK[:, :k], routing.weight_NK)
    layers = [built(TopK(k=k), dispatch) for dispatch in (spec, Dropless())]
    x_ND = torch.randn(37, 8, dtype=torch.float64)
    torch.testing.assert_close(layers[0](x_ND).y, layers[1](x_ND).y, rtol=1e-12, atol=1e-12)


def test_confident_tokens_win_whatever_their_position() -> None:
    """Position order would keep the first token; probability keeps the last."""
    p_NE = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
    kept = {
        priority: rectify(
            routing_of(p_NE, 1),
            Rectified(factor=0.5, fill_in=False, intra_device=False, priority=priority),
        ).routing.expert_NK[:, 0]
        for priority in ("probability", "request", "position")
    }
    assert kept["probability"].tolist() == kept["request"].tolist() == [-1, -1, 0]
    assert kept["position"].tolist() == [0, -1, -1]


def test_the_priority_of_a_fill_in_request() -> None:
    """All ask for the empty place of expert 1: the surest token gets it, or who wants it most."""
    p_NE = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.25, 0.65]])
    found = {
        priority: rectify(
            routing_of(p_NE, 1), Rectified(factor=1.0, intra_device=False, priority=priority)
        ).routing.expert_NK[:, 1]
        for priority in ("probability", "request")
    }
    assert found["probability"].tolist() == [1, -1, -1]
    assert found["request"].tolist() == [-1, 1, -1]


def test_capacity_is_that_of_each_group() -> None:
    """Expert 0 is wanted by the first group alone: a limit over all tokens would keep all four."""
    p_NE = torch.tensor([[0.9, 0.1]] * 4 + [[0.1, 0.9]] * 4)
    spec = Rectified(factor=1.0, groups=2, fill_in=False, intra_device=False)
    assert int(rectify(routing_of(p_NE, 1), spec).dropped) == 4
    assert int(rectify(routing_of(p_NE, 1), spec.replace(groups=1)).dropped) == 0


# --- weights and gradients ----------------------------------------------------------------------


@given(case=cases())
def test_gradients_are_those_of_the_formula(case: Given) -> None:
    """``∂w_i/∂p_i = 1 / D`` and so on, entry by entry of a dense Jacobian."""
    p_NE, k, spec = case.p_NE, case.k, case.spec
    cotangent_NE = torch.randn(p_NE.shape, dtype=torch.float64)
    p_NE = p_NE.clone().requires_grad_()
    done = rectify(routing_of(p_NE, k), spec, ranges=case.ranges)
    (found_NE,) = torch.autograd.grad((done.routing.dense_weight_NE() * cotangent_NE).sum(), p_NE)
    group = even_groups(len(p_NE), spec.groups)
    choices = routing_of(p_NE, k).expert_NK.tolist()
    plain = p_NE.detach().tolist()
    loop = reference(choices, plain, spec, group, k, case.free)
    computed = [e for e in range(p_NE.shape[1]) if e not in case.free]
    wanted_NE = torch.zeros_like(found_NE)
    for t, kept in enumerate(loop.kept):
        size = len(computed) // spec.groups
        mine = computed[group[t] * size : (group[t] + 1) * size]
        local = max(mine, key=lambda e: (plain[t][e], -e))
        missing = k + spec.fill_in - len(kept) if loop.served[t] else 0
        scale = sum(plain[t][e] for e in kept) + missing * plain[t][local]
        if k == 1 and not spec.fill_in and not missing:
            scale = 1.0  # straight-through
        for e in kept:
            wanted_NE[t, e] += cotangent_NE[t, e] / scale
        if missing:
            wanted_NE[t, local] += cotangent_NE[t, local] * missing / scale
    torch.testing.assert_close(found_NE, wanted_NE, rtol=1e-10, atol=1e-12)


def test_a_dropped_token_teaches_the_router_only_if_it_is_served() -> None:
    p_NE = torch.tensor([[0.6, 0.4], [0.9, 0.1]], dtype=torch.float64, requires_grad=True)
    spec = Rectified(factor=1.0, groups=1, fill_in=False)
    for intra_device, wanted in ((True, 1 / 0.6), (False, 0.0)):
        done = rectify(routing_of(p_NE, 1), spec.replace(intra_device=intra_device)).routing
        (gradient,) = torch.autograd.grad(done.weight_NK.sum(), p_NE)
        assert float(gradient[0, 0]) == pytest.approx(wanted, rel=1e-12)
        assert float(done.weight_NK[0].detach().sum()) == float(intra_device)


def test_probabilities_that_underflow_leave_weights_and_gradients_finite() -> None:
    logits = torch.tensor([[0.0, -300.0, -400.0, -500.0]] * 6, requires_grad=True)
    for fill_in in (False, True):
        spec = Rectified(factor=0.5, groups=2, fill_in=fill_in)
        done = rectify(routing_of(logits.softmax(-1), 2 - fill_in), spec).routing
        torch.testing.assert_close(done.weight_NK.sum(1), torch.ones(6))
        (gradient,) = torch.autograd.grad((done.weight_NK * 1e6).square().sum(), logits)
        assert bool(torch.isfinite(gradient).all())


# --- layers -------------------------------------------------------------------------------------


def built(router: RouterSpec, dispatch: Any, identical: bool = False) -> MoE:
    torch.manual_seed(3)
    layer = MoESpec(router, SwiGLU(count=8, hidden=8), dispatch).build(8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for parameter in layer.experts.parameters() if identical else ():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return layer


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("fill_in", [False, True])
def test_identical_experts_are_the_dense_layer(k: int, factor: float, fill_in: bool) -> None:
    spec = Rectified(factor=factor, groups=8, fill_in=fill_in)
    x_ND = torch.randn(64, 8, dtype=torch.float64)
    dense = built(TopK(k=1), Dropless(), identical=True)(x_ND).y
    out = built(TopK(k=k), spec, identical=True)(x_ND)
    torch.testing.assert_close(out.y, dense, rtol=1e-11, atol=1e-11)
    alone = built(TopK(k=k), spec.replace(intra_device=False), identical=True)(x_ND)
    wrong_N = ~torch.isclose(alone.y, dense).all(-1)
    if factor < 1:
        assert float(wrong_N.double().mean()) > 0.1
    done = rectify(out.routing, spec)
    assert int(out.dropped) == int(done.dropped) > 0
    assert int(out.rows_E.sum()) == int(done.routing.used_NK.sum())


def test_evaluation_has_its_own_factor() -> None:
    x_ND = torch.randn(64, 8, dtype=torch.float64)
    free = built(TopK(k=2), Rectified(factor=0.5, groups=4)).eval()
    dropless = built(TopK(k=2), Dropless()).eval()
    torch.testing.assert_close(free(x_ND).y, dropless(x_ND).y, rtol=1e-12, atol=1e-12)
    assert int(free(x_ND).dropped) == 0
    tight = built(TopK(k=2), Rectified(factor=2.0, eval_factor=0.5, groups=4))
    assert int(tight.eval()(x_ND).dropped) > int(tight.train()(x_ND).dropped)
    wanted = rectify(tight(x_ND).routing, Rectified(factor=0.5, groups=4)).dropped
    assert int(tight.eval()(x_ND).dropped) == int(wanted)


def test_padding_takes_no_place_and_gets_no_expert() -> None:
    layer = built(TopK(k=2), Rectified(factor=0.5, groups=4))
    valid_N = torch.rand(60) < 0.6
    valid_N[0] = valid_N[-1] = False
    x_ND = torch.randn(60, 8, dtype=torch.float64)
    wide = layer(x_ND, Signals(valid_N=valid_N))
    narrow = layer(x_ND[valid_N])
    torch.testing.assert_close(wide.y[valid_N], narrow.y, rtol=1e-12, atol=1e-12)
    assert bool((wide.y[~valid_N] == 0).all())
    assert torch.equal(wide.rows_E, narrow.rows_E)
    assert int(wide.dropped) == int(narrow.dropped) > 0


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_fewer_tokens_than_groups(tokens: int) -> None:
    spec = Rectified(factor=1.0, groups=4)
    done = rectify(routing_of(probabilities(tokens, 8, 0), 2), spec)
    assert done.routing.expert_NK.shape == (tokens, 4)
    assert bool(done.routing.used_NK.any(-1).all())


def test_groups_may_be_named() -> None:
    p_NE = probabilities(24, 8, 2)
    spec = Rectified(factor=0.7, groups=4)
    even = torch.tensor(even_groups(24, 4))
    order = torch.randperm(24)
    plain = rectify(routing_of(p_NE, 2), spec).routing
    mixed = rectify(routing_of(p_NE[order], 2), spec, even[order]).routing
    torch.testing.assert_close(mixed.dense_weight_NE(), plain.dense_weight_NE()[order])


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"factor": -0.1}, "factor is -0.1; wanted a number of at least 0"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"factor": float("inf")}, "factor is inf"),
        ({"eval_factor": -1.0}, "eval_factor is -1.0"),
        ({"groups": 0}, "groups is 0"),
        ({"unrouted": "some"}, "unrouted is 'some'; wanted one of 'auto', 'all'"),
        ({"priority": "random"}, "priority is 'random'"),
        ({"unrouted": "ignore_kth", "fill_in": False}, "set fill_in"),
        ({"unrouted": "all", "intra_device": False}, "set intra_device"),
    ],
)
def test_bad_fields(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Rectified(**fields)


@pytest.mark.parametrize(
    ("router", "dispatch", "said"),
    [
        (ReLURouting(k=2), Rectified(), "ReLURouting is not; use TopK"),
        (Permuted(TopK(k=2)), Rectified(), "Permuted is not; use TopK"),
        (GumbelSoftmax(), Rectified(), "GumbelSoftmax is not; use TopK"),
        (Comet(k=2), Rectified(), "Comet gives every expert that it does not choose weight 0"),
        (DSelectK(k=2), Rectified(), "set fill_in=False"),
        (Comet(k=2), Rectified(groups=3, fill_in=False), "spread evenly over 3 groups"),
        (ExpertChoice(), Rectified(), "ExpertChoice is not"),
        (Hash(k=2), Rectified(), "Hash is not"),
        (TopK(k=2), Rectified(groups=3), "8 experts cannot be spread evenly over 3 groups"),
        (TopK(k=2), Rectified(groups=16), "over 16 groups"),
        (TopK(k=8), Rectified(), "asks for choice 9 of a token, but there are 8 experts"),
        (TopK(k=1, normalize="none"), Rectified(), "set normalize to selected"),
        (TopK(k=2, scale=2.5), Rectified(), "leave the router's scale"),
        (TopK(k=2, bias_rate=1e-3), Rectified(), "bias_rate"),
        (TopK(k=2, groups=2, top_groups=1), Rectified(), "groups at their defaults"),
    ],
)
def test_layers_that_make_no_sense(router: RouterSpec, dispatch: Rectified, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        MoESpec(router, SwiGLU(count=8, hidden=8), dispatch)


def test_experts_that_compute_nothing_are_on_every_device() -> None:
    """Never full, never a repair, and in no device's share of the bank."""
    bank = Bank((Copy(1), SwiGLU(count=8, hidden=8), Zero(1)))
    for groups, said in ((5, "8 experts cannot be spread evenly over 5"), (10, "over 10 groups")):
        with pytest.raises(SpecError, match=said):
            MoESpec(TopK(k=2), bank, Rectified(groups=groups))
    with pytest.raises(SpecError, match="asks for choice 9 of a token, but there are 8 experts"):
        MoESpec(TopK(k=8), bank, Rectified())
    with pytest.raises(SpecError, match="normalize nonzero makes no difference"):
        MoESpec(Pathway(k=2), bank, Rectified())
    layer = MoESpec(TopK(k=2), bank, Rectified(factor=0.5, groups=4)).build(8).double()
    x_ND = torch.randn(64, 8, dtype=torch.float64)
    before = layer.router(x_ND)
    after = layer.dispatch.limited(before, layer.experts)
    cheap_NK = (before.expert_NK == 0) | (before.expert_NK == 9)
    assert bool(cheap_NK.any())
    assert torch.equal(after.expert_NK[:, :2][cheap_NK], before.expert_NK[cheap_NK])
    extra_NK = after.expert_NK[:, 2:]
    assert not bool(((extra_NK == 0) | (extra_NK == 9)).any())
    local_N, group_N = extra_NK[:, -1], torch.tensor(even_groups(64, 4))
    assert bool((local_N >= 0).any())
    assert bool(((local_N - 1) // 2 == group_N)[local_N >= 0].all())


def test_banks_and_routers_that_fit() -> None:
    assert MoESpec(Pathway(k=2), SwiGLU(count=8, hidden=8), Rectified(groups=4))
    assert MoESpec(TopK(k=8), SwiGLU(count=8, hidden=8), Rectified(fill_in=False))


def test_bad_calls() -> None:
    routing = routing_of(probabilities(12, 6, 0), 2)
    with pytest.raises(SpecError, match="no next choices for fill_in"):
        rectify(routing.replace(settled_k=2), Rectified())
    with pytest.raises(SpecError, match="the routing has none; use a softmax top-k router"):
        rectify(routing.replace(scores_NE=None), Rectified())
    with pytest.raises(SpecError, match=r"scores of shape \(12, 5\)"):
        rectify(routing.replace(scores_NE=routing.scores_NE[:, :5]), Rectified())
    with pytest.raises(SpecError, match="6 experts cannot be spread evenly over 4 groups"):
        rectify(routing, Rectified(groups=4))
    with pytest.raises(SpecError, match="asks for choice 7"):
        rectify(routing_of(probabilities(12, 6, 0), 6), Rectified())
    with pytest.raises(SpecError, match=r"group_N is torch.float32 of shape \(12,\)"):
        rectify(routing, Rectified(), torch.zeros(12))
    with pytest.raises(SpecError, match=r"of shape \(11,\); wanted torch.int64 of shape \(12,\)"):
        rectify(routing, Rectified(), torch.zeros(11, dtype=torch.int64))


def test_without_repairs_in_one_group_it_is_the_capacity_limit_by_score() -> None:
    routing = routing_of(probabilities(30, 6, 5), 1)
    spec = Rectified(factor=0.8, fill_in=False, intra_device=False)
    done: Rectification = rectify(routing, spec)
    layer_spec = Capacity(factor=0.8, priority="score")
    assert done.routing.expert_NK.shape == (30, 1)
    probable = routing.replace(weight_NK=routing.scores_NE.gather(1, routing.expert_NK))
    limited = layer_spec.build().limited(probable, SwiGLU(count=6, hidden=8).build(8))
    assert torch.equal(done.routing.expert_NK, limited.expert_NK)

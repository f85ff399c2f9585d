"""Rectification against a plain loop over tokens, closed-form gradients, and its promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rectify_cases import Given, built, cases, probabilities, routing_of
from rectify_reference import even_groups, reference
from torch import Tensor

from moekit.dispatch import Dropless, Rectified, rectify
from moekit.routing import (
    Routing,
    TopK,
)


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

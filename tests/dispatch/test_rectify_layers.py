"""Layers under rectified dispatch, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rectify_cases import built, probabilities, routing_of
from rectify_reference import even_groups

from moekit.dispatch import Capacity, Dropless, Rectification, Rectified, rectify
from moekit.errors import SpecError
from moekit.experts import Bank, Copy, SwiGLU, Zero
from moekit.layer import MoESpec
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
    Signals,
    TopK,
)

# --- layers -------------------------------------------------------------------------------------


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

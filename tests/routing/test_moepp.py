"""MoE++ (arXiv 2410.07348): zero-computation experts, gating residuals, heterogeneous balance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.errors import SignalError, SpecError
from moekit.experts import Bank, Constant, Copy, SwiGLU, Zero
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    Carry,
    HeterogeneousBalance,
    Pathway,
    PathwayRouter,
    Signals,
    Site,
    TopK,
)

FFN = ("feed_forward",) * 6
MIXED = Bank((SwiGLU(count=4, hidden=8), Constant(2), Copy(1), Zero(2)))
FIRST_CONSTANT, COPY, FIRST_ZERO = 4, 6, 7


def router_of(spec: Pathway, kinds: tuple[str, ...] = FFN, previous: int | None = None):
    router = spec.build(Site(8, kinds, previous)).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def forced(experts: tuple[int, ...], normalize: str = "nonzero") -> MoE:
    """A float64 layer in which every token picks ``experts``, with weights near 1/2 each."""
    layer = MoESpec(Pathway(k=2, bias=True, normalize=normalize), MIXED).build(8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        layer.router.bias.fill_(-200.0)
        layer.router.bias[list(experts)] = 0.0
    return layer


# --- the router ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "selected", "nonzero"])
def test_without_cheap_experts_and_residual_it_is_top_k_to_the_bit(mode: str) -> None:
    ours = MoESpec(Pathway(k=2, normalize=mode), SwiGLU(count=6, hidden=8)).build(8)
    top = MoESpec(TopK(k=2, normalize=mode), SwiGLU(count=6, hidden=8)).build(8)
    top.load_state_dict(ours.state_dict())
    x_ND = torch.randn(20, 8)
    assert torch.equal(ours(x_ND).y, top(x_ND).y)


def test_a_zero_gate_map_is_no_residual() -> None:
    with_map, without = router_of(Pathway(k=2), previous=5), router_of(Pathway(k=2))
    without.weight.data.copy_(with_map.weight)
    torch.nn.init.zeros_(with_map.gate_map)
    x_ND = torch.randn(9, 8, dtype=torch.float64)
    signals = Signals(previous_logits_NE=torch.randn(9, 5, dtype=torch.float64))
    assert torch.equal(with_map(x_ND, signals).logits_NE, without(x_ND).logits_NE)


def test_the_first_layer_owns_no_gate_map() -> None:
    """An unused parameter would break data-parallel training."""
    assert router_of(Pathway(k=2)).gate_map is None
    assert set(router_of(Pathway(k=2)).state_dict()) == {"weight"}
    assert router_of(Pathway(k=2), previous=5).gate_map.shape == (6, 5)


def test_logits_add_the_map_of_the_raw_logits_below() -> None:
    router = router_of(Pathway(k=2, logit_norm="std"), previous=5)
    x_ND = torch.randn(9, 8, dtype=torch.float64)
    below = torch.randn(9, 5, dtype=torch.float64)
    routing = router(x_ND, Signals(previous_logits_NE=below))
    wanted = x_ND @ router.weight.T + below @ router.gate_map.T
    torch.testing.assert_close(routing.logits_NE, wanted)  # raw: handed on before the division


def test_std_normalisation_is_that_of_the_released_model() -> None:
    """20 experts; logits over their unbiased standard deviation, softmax, renormalised top-2."""
    kinds = ("feed_forward",) * 16 + ("constant", "constant", "copy", "zero")
    router = router_of(Pathway(k=2, logit_norm="std"), kinds)
    x_ND = torch.randn(30, 8, dtype=torch.float64)
    routing = router(x_ND)
    for n in range(30):
        z = (router.weight @ x_ND[n]).detach()
        p = torch.softmax(z / z.std(), 0)
        weight, ids = p.topk(2)
        weight = torch.where(ids == 19, 0.0, weight)
        assert routing.expert_NK[n].tolist() == ids.tolist()
        torch.testing.assert_close(routing.weight_NK[n].detach(), weight / weight.sum())


def test_std_normalisation_of_equal_logits_is_finite() -> None:
    router = router_of(Pathway(k=2, logit_norm="std"))
    x_ND = torch.zeros(3, 8, dtype=torch.float64, requires_grad=True)
    routing = router(x_ND)
    routing.weight_NK[:, 0].sum().backward()
    assert bool(torch.isfinite(routing.weight_NK).all())
    assert float(x_ND.grad.abs().max()) < 1e3


def stack(detach_first: bool = False) -> tuple[list[PathwayRouter], Tensor]:
    """Three routers on one input, each handed the logits below, as the layers of a model are."""
    routers = [router_of(Pathway(k=2, normalize="none"), previous=p) for p in (None, 6, 6)]
    x_ND = torch.randn(12, 8, dtype=torch.float64)
    below, routing = None, None
    for router in routers:
        routing = router(x_ND, Signals(previous_logits_NE=below))
        below = routing.logits_NE.detach() if detach_first else routing.logits_NE
    return routers, routing.weight_NK.square().sum()


def test_the_residual_carries_gradient_through_every_layer() -> None:
    """Only the last layer's weights enter the loss, so W_1 is reached by residuals alone."""
    routers, loss = stack()
    loss.backward()
    assert all(float(router.weight.grad.abs().max()) > 1e-6 for router in routers)
    assert all(float(router.gate_map.grad.abs().max()) > 1e-6 for router in routers[1:])
    routers, loss = stack(detach_first=True)
    loss.backward()
    assert routers[0].weight.grad is None


def test_the_residual_is_recursive_and_of_logits() -> None:
    """G_3 = X W_3ᵀ + (X W_2ᵀ + (X W_1ᵀ) W_g2ᵀ) W_g3ᵀ, with gradients to match."""
    routers = [router_of(Pathway(k=2), previous=p) for p in (None, 6, 6)]
    parameters = [p for router in routers for p in router.parameters()]
    x_ND = torch.randn(5, 8, dtype=torch.float64)
    carry = Carry()
    for router in routers:
        signals = Signals(previous_logits_NE=carry.logits_NE)
        carry = carry.replace(logits_NE=router(x_ND, signals).logits_NE)
    w1, w2, w3 = (router.weight for router in routers)
    m2, m3 = routers[1].gate_map, routers[2].gate_map
    wanted = x_ND @ w3.T + (x_ND @ w2.T + (x_ND @ w1.T) @ m2.T) @ m3.T
    torch.testing.assert_close(carry.logits_NE, wanted)
    cotangent = torch.randn_like(wanted)
    ours = torch.autograd.grad((carry.logits_NE * cotangent).sum(), parameters)
    theirs = torch.autograd.grad((wanted * cotangent).sum(), parameters)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected)


def test_layers_hand_their_logits_on_in_the_carry() -> None:
    bank = SwiGLU(count=6, hidden=8)
    first = MoESpec(Pathway(k=2), bank).build(8)
    second = MoESpec(Pathway(k=2), bank).build(8, previous=6)
    x_ND = torch.randn(7, 8)
    below = first(x_ND)
    above = second(x_ND, carry=below.carry)
    assert torch.equal(below.carry.logits_NE, below.routing.logits_NE)
    wanted = x_ND @ second.router.weight.T + below.routing.logits_NE @ second.router.gate_map.T
    torch.testing.assert_close(above.routing.logits_NE, wanted)
    assert second(x_ND, carry=below.carry).carry.momentum == ()


# --- the experts --------------------------------------------------------------------------------


def test_zero_and_copy_skip_the_layer() -> None:
    layer = forced((FIRST_ZERO, COPY))
    x_ND = torch.randn(6, 8, dtype=torch.float64)
    assert torch.equal(layer(x_ND).y, x_ND)
    assert int(layer(x_ND).rows_E.sum()) == 0


def test_zero_and_one_expert_is_top_one_exactly() -> None:
    layer = forced((FIRST_ZERO, 2))
    x_ND = torch.randn(6, 8, dtype=torch.float64)
    gate, up = (x_ND @ layer.experts.parts[0].gate_up_proj[2].T).chunk(2, -1)
    wanted = (torch.nn.functional.silu(gate) * up) @ layer.experts.parts[0].down_proj[2].T
    assert bool((layer(x_ND).routing.weight_NK.sum(-1) == 1).all())
    torch.testing.assert_close(layer(x_ND).y, wanted, rtol=1e-14, atol=1e-15)
    assert layer(x_ND).rows_E.tolist() == [0, 0, 6, 0]


@pytest.mark.parametrize("mode", ["none", "selected", "nonzero"])
def test_two_zero_experts_give_zero_and_finite_gradients(mode: str) -> None:
    layer = forced((FIRST_ZERO, FIRST_ZERO + 1), normalize=mode)
    x_ND = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    out = layer(x_ND)
    assert bool((out.y == 0).all())
    out.y.square().sum().backward()
    for tensor in (x_ND, *layer.parameters()):
        assert bool(torch.isfinite(tensor.grad).all())


def test_the_other_modes_leave_the_zero_expert_its_share() -> None:
    for mode in ("none", "selected"):
        routing = forced((FIRST_ZERO, 2), normalize=mode)(
            torch.randn(6, 8, dtype=torch.float64)
        ).routing
        working = routing.weight_NK.masked_fill(routing.expert_NK == FIRST_ZERO, 0.0).sum(-1)
        assert bool((working < 0.99).all())


def test_a_constant_expert_that_does_not_look_averages() -> None:
    layer = forced((FIRST_CONSTANT, FIRST_ZERO))
    bank = layer.experts.parts[1]
    torch.nn.init.zeros_(bank.mix_proj)
    x_ND = torch.randn(6, 8, dtype=torch.float64)
    wanted = (x_ND + bank.constant[0]) / 2
    torch.testing.assert_close(layer(x_ND).y, wanted, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("own", [0, 1])
def test_every_constant_expert_has_its_own_parameters(own: int) -> None:
    layer = forced((FIRST_CONSTANT + own, FIRST_ZERO))
    bank = layer.experts.parts[1]
    assert bank.mix_proj.shape == (2, 2, 8)
    assert bank.constant.shape == (2, 8)
    layer(torch.randn(6, 8, dtype=torch.float64)).y.sum().backward()
    for gradient in (bank.constant.grad, bank.mix_proj.grad):
        assert bool((gradient[own] != 0).any())
        assert bool((gradient[1 - own] == 0).all())


def test_cheap_experts_reach_no_product_and_hold_no_products_weights() -> None:
    assert MIXED.parameters_E(8) == (8 * 16 + 8 * 8,) * 4 + (24, 24, 0, 0, 0)
    for pair in ((COPY, FIRST_ZERO), (FIRST_CONSTANT, FIRST_CONSTANT + 1)):
        out = forced(pair)(torch.randn(5, 8, dtype=torch.float64))
        assert out.rows_E.tolist() == [0, 0, 0, 0]


# --- balance ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.75, 0.5, 0.25, 0.1])
def test_the_load_settles_at_tau(settle, tau: float) -> None:
    """A router trained on the loss alone: f_FFN : f_ZC = τ : 1, and K τN / (τN + Z) in all."""
    bank = Bank((SwiGLU(count=8, hidden=4), Constant(2), Copy(1), Zero(1)))
    loss = HeterogeneousBalance(weight=1.0, tau=tau)
    spec = MoESpec(Pathway(k=2), bank, losses=(loss,))
    load_E = settle(spec)
    assert float(load_E[:8].mean() / load_E[8:].mean()) == pytest.approx(tau, rel=0.03)
    formula = 2 * tau * 8 / (tau * 8 + 4)
    assert spec.expected_load() == pytest.approx(formula)
    assert float(load_E[:8].sum()) == pytest.approx(formula, rel=0.02)


# --- refusals -----------------------------------------------------------------------------------


def test_bad_designs_are_refused() -> None:
    with pytest.raises(SpecError, match="tau is 0"):
        HeterogeneousBalance(tau=0)
    with pytest.raises(SpecError, match="count is -1"):
        Constant(-1)
    with pytest.raises(SpecError, match="count is 0"):
        Zero(0)
    with pytest.raises(SpecError, match="k is 10 but the bank has 9"):
        MoESpec(Pathway(k=10), MIXED)
    with pytest.raises(SpecError, match="zero-computation experts only"):
        MoESpec(Pathway(k=1), Bank((Constant(2), Zero(1))))
    with pytest.raises(SpecError, match="no parts"):
        Bank(())
    with pytest.raises(SpecError, match="at least two experts"):
        MoESpec(Pathway(k=1, logit_norm="std"), SwiGLU(count=1))


@pytest.mark.parametrize("shape", [None, (6, 5), (7, 6), (7,)])
def test_logits_of_the_wrong_shape_are_refused(shape: tuple[int, ...] | None) -> None:
    router = router_of(Pathway(k=2), previous=5)
    below = None if shape is None else torch.zeros(shape)
    with pytest.raises(SignalError, match=r"previous_logits_NE of shape \(7, 5\); got"):
        router(torch.randn(7, 8, dtype=torch.float64), Signals(previous_logits_NE=below))

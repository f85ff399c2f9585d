"""Sizes at the edge: no token, one token, one expert, every expert, odd widths, empty experts."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from contract_cases import BANKS, DISPATCHES, EXPERTS, Case, Inputs, every_case, label
from contract_oracle import dense_output, every_expert, relative_error

from moekit.dispatch import Capacity, DispatchSpec, Dropless, Merged, Rectified
from moekit.errors import SpecError
from moekit.experts import GELU, Bank, Constant, Copy, ExpertsSpec, SwiGLU, Zero
from moekit.routing import (
    DenseToSparse,
    ExpertChoice,
    GumbelSoftmax,
    Hash,
    NoisyTopK,
    Pathway,
    PerChunk,
    PerSequence,
    PerTask,
    ReLURouting,
    RouterSpec,
    Routing,
    Sinkhorn,
    SparseTransport,
    TopK,
)

ALL_BANKS = list(dict.fromkeys(itertools.chain(*BANKS.values())))
ALL_DISPATCHES = list(itertools.chain(*DISPATCHES.values()))
# Rectification needs probabilities, which a routing written down by hand does not have.
# Merging needs a decision a scope.
ANY_ROUTING = [d for d in ALL_DISPATCHES if not isinstance(d, Rectified | Merged)]


@pytest.mark.parametrize("tokens", [0, 1])
@every_case()
def test_no_token_and_one_token(case: Case, tokens: int) -> None:
    layer, inputs = case.layer(), Inputs.make(tokens)
    x_ND = inputs.x_ND.requires_grad_()
    out = layer(x_ND, inputs.signals, inputs.carry)
    assert out.y.shape == (tokens, case.experts.out_width(8))
    assert bool(torch.isfinite(out.y).all())
    out.y.sum().backward()
    assert x_ND.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert bool(torch.isfinite(parameter.grad).all())
        assert tokens > 0 or bool((parameter.grad == 0).all())
    assert tokens > 0 or int(out.rows_E.sum()) == 0


@pytest.mark.parametrize(
    "router",
    [
        TopK(k=1),
        TopK(k=1, normalize="none", score="sigmoid"),
        Pathway(k=1),
        ExpertChoice(capacity=1.0),
        SparseTransport(),
        Sinkhorn(),
        Hash(k=1),
        ReLURouting(k=0.5),
        DenseToSparse(temperature=0.1),
        GumbelSoftmax(),
        NoisyTopK(k=1),
        PerSequence(TopK(k=1)),
        PerChunk(NoisyTopK(k=1), length=2),
        PerTask(TopK(k=1)),
    ],
    ids=label,
)
def test_one_expert(router: RouterSpec) -> None:
    case = Case(router, SwiGLU(count=1, hidden=8))
    layer, inputs = case.layer(torch.float64), Inputs.make(9, torch.float64)
    out = layer(inputs.x_ND, inputs.signals, inputs.carry)
    (expert,) = every_expert(layer.experts, inputs.x_ND)
    weight_N1 = out.routing.weight_NK
    torch.testing.assert_close(out.y, weight_N1 * expert, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dispatch", [d for d in ALL_DISPATCHES if not isinstance(d, Merged)], ids=label
)
def test_every_expert_is_a_dense_mixture(dispatch: DispatchSpec) -> None:
    if isinstance(dispatch, Rectified):  # there is no further choice to fill in
        dispatch = dispatch.replace(factor=1.0, fill_in=False)
    case = Case(TopK(k=EXPERTS), SwiGLU(count=EXPERTS, hidden=8), dispatch)
    layer, inputs = case.layer(torch.float64), Inputs.make(9, torch.float64)
    if isinstance(dispatch, Capacity):
        layer.dispatch.spec = dispatch.replace(factor=1.0, tau=1.0)  # room for all
    out = layer(inputs.x_ND, inputs.signals, inputs.carry)
    share_NE = (inputs.x_ND @ layer.router.weight.T).softmax(-1)
    y_NED = torch.stack(every_expert(layer.experts, inputs.x_ND), dim=1)
    wanted = (share_NE[..., None] * y_NED).sum(1)
    torch.testing.assert_close(out.y, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "hidden"), [(5, 7), (8, 7), (5, 8), (1, 1), (9, 16)])
@pytest.mark.parametrize("router", [TopK(k=2), ReLURouting(k=2)], ids=label)
def test_widths_that_break_sixteen_byte_rows(
    router: RouterSpec, width: int, hidden: int, dtype: torch.dtype
) -> None:
    bank = Bank((SwiGLU(count=2, hidden=hidden, bias=True), Copy(1), GELU(count=1, hidden=hidden)))
    case = Case(router, bank)
    layer = case.layer(dtype, width=width)
    inputs = Inputs.make(7, dtype, width=width)
    x_ND = inputs.x_ND.requires_grad_()
    out = layer(x_ND, inputs.signals, inputs.carry)
    wanted = dense_output(layer.experts, x_ND, out.routing)
    assert relative_error(out.y, wanted) < (1e-5 if dtype == torch.float32 else 2e-2)
    out.y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def taken_by(expert: int, tokens: int, slots: int, experts: int) -> Routing:
    """Every token's first slot holds ``expert``; its other slots are empty."""
    expert_NK = torch.full((tokens, slots), -1)
    expert_NK[:, 0] = expert
    weight_NK = torch.zeros(tokens, slots, dtype=torch.float64)
    weight_NK[:, 0] = torch.rand(tokens, dtype=torch.float64) + 0.1
    return Routing(expert_NK, weight_NK.requires_grad_(), experts)


@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("dispatch", ANY_ROUTING, ids=label)
@pytest.mark.parametrize("bank", ALL_BANKS, ids=label)
def test_one_expert_takes_all_and_the_others_are_empty(
    bank: ExpertsSpec, dispatch: DispatchSpec, expert: int
) -> None:
    layer = Case(TopK(k=2), bank, dispatch).layer(torch.float64)
    if isinstance(dispatch, Capacity):  # room for all, in one expert
        layer.dispatch.spec = dispatch.replace(factor=2.0 * EXPERTS)
    count = len(bank.expert_kinds())
    if expert >= count:
        pytest.skip("the bank is smaller")
    x_ND = torch.randn(10, 8, dtype=torch.float64)
    routing = taken_by(expert, 10, 2, count)
    done = layer.dispatch(x_ND, routing, layer.experts)
    wanted = routing.weight_NK[:, :1] * every_expert(layer.experts, x_ND)[expert]
    torch.testing.assert_close(done.y_ND, wanted, rtol=1e-12, atol=1e-12)
    done.y_ND.sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        idle = [e for e in range(parameter.shape[0]) if not bool(parameter.grad[e].any())]
        assert len(idle) >= parameter.shape[0] - 1


@pytest.mark.parametrize("dispatch", ANY_ROUTING, ids=label)
@pytest.mark.parametrize("bank", ALL_BANKS, ids=label)
def test_a_routing_without_any_expert_gives_zero(bank: ExpertsSpec, dispatch: DispatchSpec) -> None:
    layer = Case(TopK(k=2), bank, dispatch).layer()
    expert_NK = torch.full((6, 2), -1)
    weight_NK = torch.zeros(6, 2, requires_grad=True)
    routing = Routing(expert_NK, weight_NK, len(bank.expert_kinds()))
    done = layer.dispatch(torch.randn(6, 8), routing, layer.experts)
    assert bool((done.y_ND == 0).all())
    done.y_ND.sum().backward()
    for parameter in layer.experts.parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad == 0).all())


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("shape", "experts"),
    [((5, 8), EXPERTS), ((7, 8), EXPERTS), ((6, 7), EXPERTS), ((6, 9), EXPERTS), ((6, 8), 7)],
)
@pytest.mark.parametrize("dispatch", ALL_DISPATCHES, ids=label)
def test_tokens_or_experts_that_a_routing_is_not_of_are_refused(
    dispatch: DispatchSpec, shape: tuple[int, int], experts: int, grad: bool
) -> None:
    """Kernels would read beyond the ends."""
    bank = SwiGLU(count=EXPERTS, hidden=8).build(8)
    routing = Routing(torch.zeros(6, 2, dtype=torch.int64), torch.rand(6, 2), experts, full=True)
    with torch.set_grad_enabled(grad), pytest.raises(SpecError, match=r"wanted \(6, 8\)|over 7"):
        dispatch.build()(torch.randn(shape), routing, bank)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dispatch", ALL_DISPATCHES, ids=label)
def test_what_lies_on_several_devices_is_refused(dispatch: DispatchSpec, grad: bool) -> None:
    """Kernels would take addresses of one for those of another."""
    bank, x_ND = SwiGLU(count=EXPERTS, hidden=8).build(8), torch.randn(6, 8)
    expert_NK, weight_NK = torch.zeros(6, 2, dtype=torch.int64), torch.rand(6, 2)
    given = {"scores_NE": torch.rand(6, EXPERTS), "scope_N": torch.arange(6), "scopes": 6}
    routing = Routing(expert_NK, weight_NK, EXPERTS, full=True, **given)
    away = Routing(expert_NK.to("meta"), weight_NK.to("meta"), EXPERTS, full=True)
    with torch.set_grad_enabled(grad):
        with pytest.raises(SpecError, match="on cpu and the routing is on meta"):
            dispatch.build()(x_ND, away, bank)
        if isinstance(dispatch, Merged):  # plain operations throughout, which torch looks after
            return
        with pytest.raises((RuntimeError, NotImplementedError), match="device"):
            dispatch.build()(x_ND, routing, bank.to("meta"))


@pytest.mark.parametrize("router", [TopK(k=2), Hash(k=1)], ids=label)
@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 9), (8, 0), ()])
def test_rows_of_another_width_are_refused(router: RouterSpec, shape: tuple[int, ...]) -> None:
    layer = Case(router, SwiGLU(count=EXPERTS, hidden=8)).layer()
    with pytest.raises(SpecError, match=r"this layer is for rows \(\.\.\., 8\)"):
        layer(torch.randn(shape))


def test_strided_inputs_are_as_good_as_contiguous_ones() -> None:
    """To rounding: a product of transposed operands adds up in an order of its own."""
    layer = Case(TopK(k=2), SwiGLU(count=EXPERTS, hidden=8)).layer(torch.float64)
    x_ND = torch.randn(8, 12, dtype=torch.float64).T
    assert not x_ND.is_contiguous()
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(layer(x_ND).y, layer(x_ND.contiguous()).y)
    x_BTD = torch.randn(4, 3, 8, dtype=torch.float64).transpose(0, 1)
    close(layer(x_BTD).y, layer(x_BTD.contiguous()).y)


def test_a_bank_of_banks_may_hold_banks() -> None:
    inner = Bank((SwiGLU(count=2, hidden=8), Zero(1)))
    nested = Case(TopK(k=2), Bank((Constant(1), inner, GELU(count=2, hidden=8))), Dropless())
    layer, inputs = nested.layer(torch.float64), Inputs.make(11, torch.float64)
    out = layer(inputs.x_ND)
    wanted = dense_output(layer.experts, inputs.x_ND, out.routing)
    torch.testing.assert_close(out.y, wanted, rtol=1e-12, atol=1e-12)
    assert layer.experts.dispatched_ranges == [(1, 3), (4, 6)]

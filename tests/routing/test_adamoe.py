"""AdaMoE (arXiv 2406.13233): null experts, weights over the true ones, null-aware balance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.experts import Bank, Copy, SwiGLU, Zero
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    HeterogeneousBalance,
    LossSite,
    LossSpec,
    NullAwareBalance,
    Routing,
    RoutingLosses,
    Site,
    SwitchBalance,
    TopK,
)

TRUE, NULL = 4, 3
BANK = Bank((SwiGLU(count=TRUE, hidden=8), Zero(NULL)))


def layer_of(k: int, null_logit: float | None = None, normalize: str = "nonzero") -> MoE:
    """A float64 layer; ``null_logit`` is added to the logits of all null experts."""
    spec = MoESpec(TopK(k=k, normalize=normalize, bias=True), BANK)
    layer = spec.build(8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        layer.router.bias.zero_()
        layer.router.bias[TRUE:] = 0.0 if null_logit is None else null_logit
    return layer


def x_of(tokens: int = 20) -> Tensor:
    return torch.randn(tokens, 8, dtype=torch.float64)


# --- weights ------------------------------------------------------------------------------------


def test_without_null_experts_it_is_renormalised_top_k_to_the_bit() -> None:
    ours = MoESpec(TopK(k=2, normalize="nonzero"), SwiGLU(count=4, hidden=8)).build(8)
    plain = MoESpec(TopK(k=2, normalize="selected"), SwiGLU(count=4, hidden=8)).build(8)
    plain.load_state_dict(ours.state_dict())
    x_ND = torch.randn(20, 8)
    assert torch.equal(ours(x_ND).y, plain(x_ND).y)


@pytest.mark.parametrize("k", [1, 3, 4, 6])
def test_nulls_that_never_win_leave_top_k_of_the_true_experts(k: int) -> None:
    layer = layer_of(k, null_logit=-1e9)
    plain = MoESpec(TopK(k=min(k, TRUE)), SwiGLU(count=TRUE, hidden=8)).build(8).double()
    plain.router.weight.data.copy_(layer.router.weight[:TRUE])
    plain.experts.load_state_dict(layer.experts.parts[0].state_dict())
    x_ND = x_of()
    torch.testing.assert_close(layer(x_ND).y, plain(x_ND).y, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_nulls_that_always_win_bypass_the_layer(k: int) -> None:
    layer, x_ND = layer_of(k, null_logit=1e9), x_of().requires_grad_()
    out = layer(x_ND)
    assert bool((out.y == 0).all())
    assert int(out.rows_E.sum()) == 0
    out.y.square().sum().backward()
    for tensor in (x_ND, *layer.parameters()):
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())


@pytest.mark.parametrize("gap", [10.0, 60.0, 80.0, 86.0, 88.0, 95.0, 103.0, 110.0, 1e4])
def test_float32_survives_any_distance_between_null_and_true_logits(gap: float) -> None:
    """The softmax of the true experts runs through the smallest float32 numbers to 0.

    Their weights do not: the softmax over the selected true logits knows no null.
    """
    layer = layer_of(TRUE, null_logit=gap).float()
    x_ND = x_of().float().requires_grad_()
    out = layer(x_ND)
    assert bool(torch.isfinite(out.y).all())
    total_N = out.routing.weight_NK.sum(-1)
    torch.testing.assert_close(total_N, torch.ones_like(total_N))  # one true expert or more each
    (out.y * 100).square().sum().backward()
    for tensor in (x_ND, *layer.parameters()):
        assert bool(torch.isfinite(tensor.grad).all())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 3, 5])
def test_weights_sum_to_one_or_exactly_zero(k: int, seed: int) -> None:
    torch.manual_seed(seed)
    routing = layer_of(k)(x_of(200)).routing
    true_NK = routing.expert_NK < TRUE
    total_N = routing.weight_NK.sum(-1)
    some_N = true_NK.any(-1)
    torch.testing.assert_close(total_N[some_N], torch.ones_like(total_N[some_N]))
    assert bool((total_N[~some_N] == 0).all())
    assert bool((routing.weight_NK[~true_NK] == 0).all())
    if k <= NULL:
        assert bool((~some_N).any())


def test_the_two_normalisations_differ_by_the_share_of_the_true_experts() -> None:
    ours, paper_option_1 = layer_of(4), layer_of(4, normalize="selected")
    paper_option_1.load_state_dict(ours.state_dict())
    x_ND = x_of()
    routing = paper_option_1(x_ND).routing
    share_N1 = (routing.weight_NK * (routing.expert_NK < TRUE)).sum(-1, keepdim=True)
    assert bool((share_N1 < 0.99).any())
    wanted = ours(x_ND).y * share_N1
    torch.testing.assert_close(paper_option_1(x_ND).y, wanted, rtol=1e-12, atol=1e-14)


def test_weights_are_a_softmax_over_the_selected_true_logits() -> None:
    routing = layer_of(4)(x_of()).routing
    for n in range(routing.tokens):
        true = [e for e in routing.expert_NK[n].tolist() if e < TRUE]
        wanted = routing.logits_NE[n, true].softmax(0)
        found = [
            w
            for e, w in zip(routing.expert_NK[n].tolist(), routing.weight_NK[n], strict=True)
            if e < TRUE
        ]
        torch.testing.assert_close(torch.stack(found), wanted)


def test_a_single_true_expert_has_weight_one_and_sends_the_router_nothing() -> None:
    layer, x_ND = layer_of(2), x_of(100)
    routing = layer(x_ND).routing
    single_N = (routing.expert_NK < TRUE).sum(-1) == 1
    assert bool(single_N.any())
    out = layer(x_ND[single_N])
    assert bool((out.routing.weight_NK.sum(-1) == 1).all())
    out.y.square().sum().backward()
    assert float(layer.router.weight.grad.abs().max()) < 1e-12


def test_rows_are_true_assignments_and_vary_with_the_token() -> None:
    layer, x_ND = layer_of(3), x_of(400)
    out = layer(x_ND)
    true_N = (out.routing.expert_NK < TRUE).sum(-1)
    assert int(out.rows_E.sum()) == int(true_N.sum())
    assert float(true_N.double().std()) > 0.3  # neither constant nor left to chance:
    assert torch.equal((layer(x_ND).routing.expert_NK < TRUE).sum(-1), true_N)


# --- balance ------------------------------------------------------------------------------------


def loss_of(spec: LossSpec, routing: Routing) -> Tensor:
    kinds = ("feed_forward",) * 2 + ("zero",) * 2
    router = TopK(k=2).build(Site(4, kinds))
    _, values = RoutingLosses([LossSite((spec,), router)])([routing])
    return values[type(spec).__name__]


def routing_of(ids: list[list[int]]) -> Routing:
    p = torch.tensor([[4, 2, 1, 1], [1, 5, 1, 1], [2, 1, 2, 3]], dtype=torch.float64) / 8
    ids_NK = torch.tensor(ids)
    return Routing(ids_NK, p.gather(1, ids_NK), 4, p.log(), p)


def test_three_tokens_by_hand() -> None:
    # f = (2, 1, 0, 3)/3, so the nulls count 1/2 each; P = (7, 8, 4, 5)/24.
    routing = routing_of([[0, 3], [1, 3], [0, 3]])
    wanted = 4 * (2 / 3 * 7 / 24 + 1 / 3 * 8 / 24 + 0.5 * (4 + 5) / 24)
    assert float(loss_of(NullAwareBalance(), routing)) == pytest.approx(wanted, abs=1e-12)


def test_load_may_move_between_nulls_for_free_unlike_in_the_plain_loss() -> None:
    one, other = routing_of([[0, 3], [1, 3], [0, 3]]), routing_of([[0, 2], [1, 2], [0, 3]])
    assert torch.equal(loss_of(NullAwareBalance(), one), loss_of(NullAwareBalance(), other))
    plain = [float(loss_of(SwitchBalance(), routing)) for routing in (one, other)]
    assert abs(plain[0] - plain[1]) > 0.01


def test_swapping_two_nulls_leaves_the_loss() -> None:
    routing = routing_of([[0, 3], [1, 3], [0, 2]])
    order = torch.tensor([0, 1, 3, 2])
    swapped = routing.replace(
        expert_NK=order[routing.expert_NK],
        scores_NE=routing.scores_NE[:, order],
        logits_NE=routing.logits_NE[:, order],
    )
    torch.testing.assert_close(
        loss_of(NullAwareBalance(), routing), loss_of(NullAwareBalance(), swapped)
    )


@pytest.mark.parametrize(("n", "m", "k"), [(8, 8, 3), (8, 8, 4), (8, 16, 4), (8, 32, 6)])
def test_the_load_settles_at_the_formula(settle, n: int, m: int, k: int) -> None:
    bank = Bank((SwiGLU(count=n, hidden=4), Zero(m)))
    losses = (NullAwareBalance(weight=1.0),)
    spec = MoESpec(TopK(k=k, normalize="nonzero"), bank, losses=losses)
    load_E = settle(spec)
    assert spec.expected_load() == pytest.approx(k * n / (n + m))
    assert float(load_E[:n].sum()) == pytest.approx(k * n / (n + m), rel=0.01)
    assert float(load_E[n:].std()) > 0.03  # nulls share their load as they like


def test_the_plain_loss_balances_the_nulls_among_themselves(settle) -> None:
    bank = Bank((SwiGLU(count=8, hidden=4), Zero(8)))
    router = TopK(k=3, normalize="nonzero")
    load_E = settle(MoESpec(router, bank, losses=(SwitchBalance(weight=1.0),)))
    assert float(load_E[8:].std()) < 0.005


# --- refusals -----------------------------------------------------------------------------------


def test_bad_designs_are_refused() -> None:
    with pytest.raises(SpecError, match="count is -2"):
        Zero(-2)
    with pytest.raises(SpecError, match="k is 8 but the bank has 7"):
        MoESpec(TopK(k=8), BANK)
    with pytest.raises(SpecError, match="k is 0"):
        TopK(k=0)
    with pytest.raises(SpecError, match="no null experts"):
        MoESpec(TopK(k=2), SwiGLU(count=4), losses=(NullAwareBalance(),))


def test_identity_nulls_keep_their_weight_in_every_mode() -> None:
    """``nonzero`` leaves out zero experts alone, so a copy is never silently lost."""
    layer = MoESpec(TopK(k=1, normalize="nonzero"), Bank((SwiGLU(count=1), Copy(3)))).build(8)
    x_ND = torch.randn(50, 8)
    out = layer(x_ND)
    copied_N = out.routing.expert_NK[:, 0] > 0
    assert bool(copied_N.any())
    assert torch.equal(out.y[copied_N], x_ND[copied_N])


def test_the_other_losses_set_other_loads() -> None:
    """Expected loads come from the loss that fixes them, not from the bank alone."""
    bank = Bank((SwiGLU(count=8, hidden=4), Zero(8)))
    router = TopK(k=3, normalize="nonzero")
    even = MoESpec(router, bank, losses=(NullAwareBalance(),)).expected_load()
    fewer = MoESpec(router, bank, losses=(HeterogeneousBalance(tau=0.5),)).expected_load()
    assert even == pytest.approx(1.5)
    assert fewer == pytest.approx(3 * 4 / (4 + 8))

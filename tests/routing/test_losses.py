"""Balance losses, z-loss and entropy: worked examples, padding, scopes, fixed values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.experts import Bank, SwiGLU, Zero
from moekit.layer import MoESpec
from moekit.routing import (
    Entropy,
    HeterogeneousBalance,
    L1Balance,
    Load,
    LossSite,
    LossSpec,
    NullAwareBalance,
    ReLURouting,
    RouterZ,
    Routing,
    RoutingLosses,
    Site,
    SwitchBalance,
    TopK,
)

FFN2_NULL2 = ("feed_forward", "feed_forward", "zero", "zero")


def routing_of(logits_NE: Tensor, expert_NK: list[list[int]], valid_N: Tensor | None = None):
    ids = torch.tensor(expert_NK)
    scores_NE = logits_NE.softmax(-1)
    weight_NK = scores_NE.gather(1, ids.clamp_min(0)) * (ids >= 0)
    routing = Routing(ids, weight_NK, logits_NE.shape[1], logits_NE, scores_NE)
    return routing.without_padding(valid_N)


def value(spec: LossSpec, kinds: tuple[str, ...], *routings: Routing) -> Tensor:
    """The unscaled loss of layers that share ``spec``."""
    router = TopK(k=1).build(Site(4, kinds))
    losses = RoutingLosses([LossSite((spec,), router) for _ in routings])
    _, values = losses(list(routings))
    return values[type(spec).__name__]


# Three tokens, four experts, probabilities in eighths.
PROBABILITIES = torch.tensor([[4, 2, 1, 1], [1, 5, 1, 1], [2, 2, 2, 2]], dtype=torch.float64) / 8
CHOICES = [[0, 1], [1, 2], [3, 0]]
# f = (2, 2, 1, 1)/3 and P = (7, 9, 4, 4)/24.
MEAN_P = [7 / 24, 9 / 24, 4 / 24, 4 / 24]
FRACTION = [2 / 3, 2 / 3, 1 / 3, 1 / 3]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (SwitchBalance(), 4 * sum(f * p for f, p in zip(FRACTION, MEAN_P, strict=True))),
        (
            SwitchBalance(divide_by_k=True),
            2 * sum(f * p for f, p in zip(FRACTION, MEAN_P, strict=True)),
        ),
        # Both null experts have the mean of their loads, 1/3, which each has already here.
        (NullAwareBalance(), 4 * (2 / 3 * 16 / 24 + 1 / 3 * 8 / 24)),
        (HeterogeneousBalance(tau=0.25), 2 / 3 * 16 / 24 + 0.25 * 1 / 3 * 8 / 24),
        (HeterogeneousBalance(tau=1.0), 2 / 3 * 16 / 24 + 1 / 3 * 8 / 24),
        # logits = log p, so logsumexp is 0.
        (RouterZ(), 0.0),
        (
            Entropy(of="token"),
            -sum(p * math.log(p) for p in PROBABILITIES.flatten().tolist()) / 3,
        ),
        (Entropy(of="marginal"), -sum(p * math.log(p) for p in MEAN_P)),
    ],
    ids=str,
)
def test_worked_example(spec: LossSpec, wanted: float) -> None:
    routing = routing_of(PROBABILITIES.log(), CHOICES)
    assert float(value(spec, FFN2_NULL2, routing)) == pytest.approx(wanted, abs=1e-12)


def test_marginal_entropy_has_the_gradient_of_the_entropy() -> None:
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    mean_E = logits.softmax(-1).mean(0)
    (wanted,) = torch.autograd.grad(-(mean_E * mean_E.log()).sum(), logits)
    router = TopK(k=1).build(Site(4, FFN2_NULL2))
    losses = RoutingLosses([LossSite((Entropy(of="marginal", weight=1.0),), router)])
    total, _ = losses([routing_of(logits, [[0]] * 6)])
    (found,) = torch.autograd.grad(total, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_z_loss_of_shifted_logits() -> None:
    logits = PROBABILITIES.log() + torch.tensor([[1.0], [2.0], [-3.0]], dtype=torch.float64)
    found = value(RouterZ(), FFN2_NULL2, routing_of(logits, CHOICES))
    assert float(found) == pytest.approx((1 + 4 + 9) / 3, abs=1e-12)


@pytest.mark.parametrize(
    "spec",
    [
        SwitchBalance(),
        NullAwareBalance(),
        HeterogeneousBalance(tau=0.3),
        RouterZ(),
        Entropy(of="token"),
        Entropy(of="marginal"),
    ],
    ids=str,
)
def test_the_load_carries_no_gradient_and_padding_none_at_all(spec: LossSpec) -> None:
    """The gradient is that of the loss with the load f as a constant, row by row."""
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids = logits.detach().topk(2, dim=-1).indices
    valid_N = torch.tensor([True, True, False, True, False])
    router = TopK(k=2).build(Site(4, FFN2_NULL2))
    losses = RoutingLosses([LossSite((spec.replace(weight=1.0),), router)])
    total, _ = losses([routing_of(logits, ids.tolist(), valid_N)])
    (found,) = torch.autograd.grad(total, logits)
    assert bool((found[~valid_N] == 0).all())
    if isinstance(spec, SwitchBalance | NullAwareBalance | HeterogeneousBalance):
        real = ids[valid_N]
        fraction_E = torch.stack([(real == e).sum() / 3 for e in range(4)]).double()
        if isinstance(spec, NullAwareBalance):
            fraction_E[2:] = fraction_E[2:].mean()
        factor = 1.0 if isinstance(spec, HeterogeneousBalance) else 4.0
        if isinstance(spec, HeterogeneousBalance):
            fraction_E = fraction_E * torch.tensor([1.0, 1.0, 0.3, 0.3])
        p = logits.detach().softmax(-1)
        wanted = p * (fraction_E - (p * fraction_E).sum(-1, keepdim=True)) * factor / 3
        torch.testing.assert_close(found[valid_N], wanted[valid_N], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        (SwitchBalance(), 2.0),
        (SwitchBalance(divide_by_k=True), 1.0),
        (NullAwareBalance(), 2.0),
        (HeterogeneousBalance(tau=0.25), 2 * (6 + 0.25 * 2) / 64),  # K (N_FFN + τ N_ZC) / N²
        (Entropy(of="token"), math.log(8)),
        (Entropy(of="marginal"), math.log(8)),
    ],
    ids=str,
)
def test_perfect_balance(spec: LossSpec, wanted: float) -> None:
    kinds = ("feed_forward",) * 6 + ("zero",) * 2
    ids = [[e, (e + 1) % 8] for e in range(8)]
    routing = routing_of(torch.zeros(8, 8, dtype=torch.float64), ids)
    assert float(value(spec, kinds, routing)) == pytest.approx(wanted, abs=1e-12)


def test_scope_layer_adds_layers_and_scope_global_pools_them() -> None:
    torch.manual_seed(1)
    one = routing_of(torch.randn(3, 4, dtype=torch.float64), [[0, 1], [0, 2], [0, 3]])
    two = routing_of(torch.randn(5, 4, dtype=torch.float64), [[3, 2]] * 5)
    kinds = ("feed_forward",) * 4
    layered = value(SwitchBalance(), kinds, one, two)
    alone = value(SwitchBalance(), kinds, one) + value(SwitchBalance(), kinds, two)
    torch.testing.assert_close(layered, alone)
    pooled = value(SwitchBalance(scope="global"), kinds, one, two)
    joined = routing_of(
        torch.cat([one.logits_NE, two.logits_NE]),
        one.expert_NK.tolist() + two.expert_NK.tolist(),
    )
    torch.testing.assert_close(pooled, value(SwitchBalance(), kinds, joined))
    assert float(pooled) != pytest.approx(float(layered))


def test_global_scope_pools_layers_of_which_only_some_have_padding() -> None:
    torch.manual_seed(2)
    logits = torch.randn(4, 4, dtype=torch.float64)
    valid_N = torch.tensor([True, False, True, True])
    masked = routing_of(logits, [[0, 1]] * 4, valid_N)
    plain = routing_of(torch.randn(2, 4, dtype=torch.float64), [[2, 3]] * 2)
    joined = routing_of(torch.cat([logits[valid_N], plain.logits_NE]), [[0, 1]] * 3 + [[2, 3]] * 2)
    kinds = ("feed_forward",) * 4
    for spec in (SwitchBalance(scope="global"), RouterZ(scope="global")):
        torch.testing.assert_close(
            value(spec, kinds, masked, plain), value(spec, kinds, joined), rtol=1e-12, atol=1e-12
        )


def test_layers_share_a_loss_when_spec_and_bank_agree() -> None:
    router = TopK(k=1).build(Site(4, ("feed_forward",) * 4))
    other = TopK(k=1).build(Site(4, ("feed_forward",) * 2))
    sites = [LossSite((SwitchBalance(),), r) for r in (router, router, other)]
    assert len(RoutingLosses(sites).losses) == 2
    pooled = [LossSite((SwitchBalance(scope="global"),), r) for r in (router, other)]
    with pytest.raises(SpecError, match="banks differ"):
        RoutingLosses(pooled)


def test_the_total_is_weighted_and_the_values_are_not() -> None:
    routing = routing_of(PROBABILITIES.log(), CHOICES)
    router = TopK(k=2).build(Site(4, FFN2_NULL2))
    specs = (SwitchBalance(weight=0.5), HeterogeneousBalance(weight=2.0, tau=0.5))
    total, values = RoutingLosses([LossSite(specs, router)])([routing])
    assert set(values) == {"SwitchBalance", "HeterogeneousBalance"}
    wanted = 0.5 * values["SwitchBalance"] + 2.0 * values["HeterogeneousBalance"]
    torch.testing.assert_close(total, wanted)
    assert not any(v.requires_grad for v in values.values())


def test_a_router_may_bring_its_own_loss() -> None:
    router = TopK(k=2).build(Site(4, FFN2_NULL2))

    class WithLoss(type(router)):
        @property
        def loss_weights(self) -> dict[str, float]:
            return {"own": 0.25}

    router.__class__ = WithLoss
    routing = routing_of(PROBABILITIES.log(), CHOICES)
    routing = routing.replace(losses={"own": torch.tensor(8.0)})
    total, values = RoutingLosses([LossSite((), router)])([routing])
    assert float(total) == 2.0
    assert float(values["own"]) == 8.0


def test_no_layer_no_loss() -> None:
    total, values = RoutingLosses([])([])
    assert float(total) == 0.0
    assert values == {}


@pytest.mark.parametrize("spec", [SwitchBalance(), RouterZ(), Entropy(), HeterogeneousBalance()])
def test_a_batch_of_nothing_but_padding(spec: LossSpec) -> None:
    logits = torch.randn(3, 4, requires_grad=True)
    routing = routing_of(logits, [[0, 1]] * 3, torch.zeros(3, dtype=torch.bool))
    router = TopK(k=2).build(Site(4, FFN2_NULL2))
    total, _ = RoutingLosses([LossSite((spec,), router)])([routing])
    (gradient,) = torch.autograd.grad(total, logits)
    assert float(total.detach()) == 0.0
    assert bool((gradient == 0).all())


def test_loads_add_up() -> None:
    one = Load(torch.tensor([1, 2]), torch.tensor(3))
    two = Load(torch.tensor([5, 0]), torch.tensor(4))
    both = one + two
    assert both.assignments_E.tolist() == [6, 2]
    assert int(both.tokens) == 7


@pytest.mark.parametrize(
    ("loss", "sentence"),
    [
        (NullAwareBalance(), "no null experts"),
        (L1Balance(k=1), "works on gates"),
    ],
)
def test_losses_that_make_no_sense_for_a_layer_are_refused(loss: LossSpec, sentence: str) -> None:
    with pytest.raises(SpecError, match=sentence):
        MoESpec(TopK(k=1), SwiGLU(count=4, hidden=8), losses=(loss,))


def test_a_controller_must_have_the_target_of_its_router() -> None:
    bank = Bank((SwiGLU(count=4, hidden=8), Zero(2)))
    with pytest.raises(SpecError, match="make them equal"):
        MoESpec(ReLURouting(k=2), bank, losses=(L1Balance(k=1),))
    with pytest.raises(SpecError, match="works on probabilities"):
        MoESpec(ReLURouting(k=2), bank, losses=(SwitchBalance(),))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (SwitchBalance, {"weight": -0.1}),
        (SwitchBalance, {"scope": "model"}),
        (SwitchBalance, {"then": ((5, 0.1), (5, 0.2))}),
        (SwitchBalance, {"then": ((0, 0.1),)}),
        (SwitchBalance, {"then": ((5, -0.1),)}),
        (HeterogeneousBalance, {"tau": 0.0}),
        (HeterogeneousBalance, {"tau": -1.0}),
        (Entropy, {"of": "expert"}),
    ],
)
def test_bad_values_are_refused(kind: type[LossSpec], fields: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        kind(**fields)

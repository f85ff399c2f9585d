"""DSelect-k against slow loops over the bits of each code, and balanced hash tables."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moekit.errors import SignalError, SpecError
from moekit.routing import DSelectK, DSelectKRouter, Hash, Signals, Site
from moekit.routing.smooth_step import smooth_step

WIDTH = 4


def built(experts: int, seed: int = 0, scale: float = 0.5, **fields: object) -> DSelectKRouter:
    router = DSelectK(**fields).build(Site(WIDTH, ("feed_forward",) * experts))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return router.double()


def inputs(tokens: int = 16, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)


def selections(router: DSelectKRouter, x_ND: Tensor) -> Tensor:
    """``r`` (N, K, E) as a product over the bits of each expert's binary code."""
    k, experts = router.spec.k, router.site.experts
    bits = math.ceil(math.log2(experts))
    z = smooth_step(x_ND @ router.bit_weight.T + router.bit_bias, router.spec.gamma)
    r = torch.ones(len(x_ND), k, experts, dtype=torch.float64)
    for j in range(k):
        for i in range(experts):
            for b, digit in enumerate(format(i, f"0{bits}b")):
                on = z[:, j * bits + b]
                r[:, j, i] = r[:, j, i] * (on if digit == "1" else 1 - on)
    return r.detach()


@pytest.mark.parametrize("experts", range(2, 18))
def test_equals_the_loop_over_codes(experts: int) -> None:
    router, x_ND = built(experts, k=2, gamma=6.0), inputs()
    r = selections(router, x_ND)
    share = (x_ND @ router.selector_weight.T + router.selector_bias).softmax(-1)
    wanted_NE = (share[..., None] * r).sum(1)
    routing = router(x_ND)
    torch.testing.assert_close(routing.weight_NK, wanted_NE, rtol=1e-11, atol=1e-14)
    assert torch.equal(routing.used_NK, wanted_NE > 0)
    entropy = (-r * (r + 1e-6).log()).sum((1, 2)).mean()
    torch.testing.assert_close(routing.losses["entropy"], entropy, rtol=1e-10, atol=1e-12)
    whole = wanted_NE.sum(1)
    if experts & (experts - 1) == 0:
        assert "reachability" not in routing.losses
        torch.testing.assert_close(whole, torch.ones_like(whole), rtol=1e-12, atol=0)
    else:
        penalty = (1 / (1e-6 + r.sum(-1))).sum(1).mean()
        torch.testing.assert_close(routing.losses["reachability"], penalty, rtol=1e-10, atol=0)
        assert bool((whole < 1).all())
    torch.testing.assert_close(routing.scores_NE.sum(1), torch.ones_like(whole))


@pytest.mark.parametrize("experts", [4, 6])
def test_one_selector_is_the_gate(experts: int) -> None:
    router, x_ND = built(experts, k=1, gamma=6.0), inputs()
    r = selections(router, x_ND)[:, 0]
    torch.testing.assert_close(router(x_ND).weight_NK, r, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("experts", [2, 5, 8, 16])
def test_a_static_saturated_gate_selects_the_coded_experts(experts: int) -> None:
    router = built(experts, k=2, static=True)
    assert set(dict(router.named_parameters())) == {"bit_bias", "selector_bias"}
    x_ND = inputs()
    for first in range(experts):
        second = (first + 1) % experts
        codes = [[int(c) for c in format(i, f"0{router.bits}b")] for i in (first, second)]
        with torch.no_grad():
            router.bit_bias.copy_(torch.tensor(codes).flatten() * 4.0 - 2.0)
        routing = router(x_ND)
        share = router.selector_bias.softmax(0)
        wanted = torch.zeros(experts, dtype=torch.float64)
        wanted[first] += share[0]
        wanted[second] += share[1]
        torch.testing.assert_close(routing.dense_weight_NE(), wanted.expand(16, -1))
        assert bool((routing.used_NK.sum(1) == 2).all())
        assert abs(float(routing.losses["entropy"].detach())) < 1e-5


def test_unreachable_codes_alone_give_finite_values_and_a_way_back() -> None:
    router = built(5, k=2, static=True).float()
    with torch.no_grad():
        router.bit_bias.fill_(2.0)  # code 7 of 5 experts, saturated
    routing = router(inputs().float())
    assert not bool(routing.used_NK.any())
    torch.testing.assert_close(routing.scores_NE, torch.full((16, 5), 0.2))
    assert bool(torch.isfinite(routing.logits_NE).all())
    assert float(routing.losses["reachability"].detach()) == pytest.approx(2e6, rel=1e-3)
    with torch.no_grad():
        router.bit_bias.fill_(0.45)  # nearly so: the penalty pulls the bits back
    loss = router(inputs().float()).losses["reachability"]
    loss.backward()
    assert bool((router.bit_bias.grad > 0).any())
    assert bool(torch.isfinite(router.bit_bias.grad).all())


@pytest.mark.parametrize("static", [False, True])
def test_gradients(static: bool) -> None:
    router, x_ND = built(6, k=2, gamma=40.0, static=static), inputs(4).requires_grad_()
    names = [name for name, _ in router.named_parameters()]

    def outputs(x_ND: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(router, given, (x_ND,))
        return routing.weight_NK, routing.scores_NE, *routing.losses.values()

    leaves = [x_ND, *router.parameters()]
    assert torch.autograd.gradcheck(outputs, leaves)


def test_losses_leave_padding_out() -> None:
    router, x_ND = built(6, k=2, gamma=6.0), inputs(10)
    valid_N = torch.arange(10) % 3 > 0
    masked = router(x_ND, Signals(valid_N=valid_N)).losses
    for name, value in router(x_ND[valid_N]).losses.items():
        torch.testing.assert_close(masked[name], value)
    assert router.loss_weights == {"entropy": 0.01, "reachability": 1.0}


def test_initial_parameters() -> None:
    router = DSelectK(k=4, gamma=2.0).build(Site(64, ("feed_forward",) * 16))
    for parameter, bound in ((router.bit_weight, 0.02), (router.selector_weight, 0.05)):
        assert 0.9 * bound < float(parameter.detach().abs().max()) <= bound * (1 + 1e-6)
    assert bool(router(torch.randn(20, 64)).used_NK.all())


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 0},
        *({"gamma": gamma} for gamma in (0.0, -1.0, math.nan, math.inf)),
        {"entropy": -0.1},
        {"reachability": -1.0},
    ],
    ids=str,
)
def test_bad_values_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="DSelectK"):
        DSelectK(**fields)  # type: ignore[arg-type]


def test_bad_banks_and_nan_are_refused() -> None:
    with pytest.raises(SpecError, match="at least 2 experts; the bank has 1"):
        DSelectK(k=1).build(Site(WIDTH, ("feed_forward",)))
    with pytest.raises(SpecError, match="k is 4 but the bank has 3"):
        DSelectK(k=4).build(Site(WIDTH, ("feed_forward",) * 3))
    router, x_ND = built(4, k=2), torch.full((2, WIDTH), float("nan"), dtype=torch.float64)
    assert bool(router(x_ND).weight_NK.isnan().all())
    with torch.autograd.set_detect_anomaly(True), pytest.raises(SignalError, match="DSelectK"):
        router(x_ND)


# --- balanced hash tables -----------------------------------------------------------------------


def hashed(k: int, experts: int = 4, vocabulary: int = 50):
    site = Site(WIDTH, ("feed_forward",) * experts, vocabulary=vocabulary)
    return Hash(k=k).build(site)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_balanced_table_deals_ids_to_the_least_loaded(k: int) -> None:
    router = hashed(k)
    frequency_V = (1000 / (1 + torch.arange(50.0)))[torch.randperm(50)]
    router.balance(frequency_V)
    load = [0.0] * 4
    for token in frequency_V.argsort(descending=True).tolist():
        row = router.table_VK[token].tolist()
        assert len(set(row)) == k
        others = [load[e] for e in range(4) if e not in row]
        assert max(load[e] for e in row) <= min(others, default=math.inf)
        for expert in row:
            load[expert] += float(frequency_V[token])
    if k == 1:  # no expert exceeds the mean by more than the last id it was given
        assert max(load) <= sum(load) / 4 + float(frequency_V.max())


def test_a_balanced_table_survives_a_checkpoint() -> None:
    ours, theirs = hashed(1), hashed(1)
    ours.balance(torch.arange(50))
    assert not torch.equal(ours.table_VK, theirs.table_VK)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.table_VK, theirs.table_VK)


@pytest.mark.parametrize(
    "frequency_V", [torch.ones(49), torch.ones(50, 1), -torch.ones(50), torch.full((50,), math.nan)]
)
def test_bad_frequencies_are_refused(frequency_V: Tensor) -> None:
    router = hashed(1)
    before = router.table_VK.clone()
    with pytest.raises(SpecError, match="Hash"):
        router.balance(frequency_V)
    assert torch.equal(router.table_VK, before)


@pytest.mark.parametrize("token", [-1, 50])
def test_ids_outside_the_table_are_refused(token: int) -> None:
    with pytest.raises(SignalError, match="outside 0 to 49"):
        hashed(1)(torch.zeros(2, WIDTH), Signals(token_id_N=torch.tensor([3, token])))

"""ModuleFormer's router and its loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.errors import DataError, SpecError
from moekit.measure import routing_information
from moekit.routing import (
    Entropy,
    LossSite,
    LossSpec,
    ModuleRouter,
    ModuleRouting,
    MutualInformation,
    Routing,
    RoutingLosses,
    Signals,
    Site,
    TopK,
)

WIDTH, EXPERTS = 6, 5


def router_of(**options: Any) -> ModuleRouter:
    router = ModuleRouting(**{"hidden": 8, **options}).build(
        Site(WIDTH, ("feed_forward",) * EXPERTS)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def rows(count: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


# --- the router ---------------------------------------------------------------------------------


def test_the_mlp_gate() -> None:
    router, x_ND = router_of(k=2), rows()
    hidden_NH = x_ND @ router.hidden_weight.T + router.hidden_bias
    gelu_NH = hidden_NH * 0.5 * (1 + torch.erf(hidden_NH / 2**0.5))
    probability_NE = (gelu_NH @ router.weight.T).softmax(-1)
    found = router(x_ND)
    torch.testing.assert_close(found.scores_NE, probability_NE)
    wanted = probability_NE.topk(2)
    assert torch.equal(found.expert_NK, wanted.indices)
    torch.testing.assert_close(found.weight_NK, wanted.values)


def test_the_cosine_and_linear_gates() -> None:
    router, x_ND = router_of(gate="cosine"), rows()
    z_NH = x_ND @ router.hidden_weight.T
    cosine_NE = torch.cosine_similarity(z_NH[:, None], router.weight[None], dim=-1)
    torch.testing.assert_close(router(x_ND).logits_NE, cosine_NE * router.temperature.exp())
    router = router_of(gate="linear")
    torch.testing.assert_close(router(x_ND).logits_NE, x_ND @ router.weight.T)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_weights_are_not_renormalised(k: int) -> None:
    x_ND = 0.2 * rows()  # confident tokens round to 1
    assert bool((router_of(k=k)(x_ND).weight_NK.sum(1) < 1 - 1e-4).all())
    torch.testing.assert_close(router_of(k=EXPERTS)(rows()).weight_NK.sum(1), torch.ones(40))


def test_the_hidden_width_follows_the_model() -> None:
    """256 of 1024 in the release."""
    assert ModuleRouting().build(Site(64, ("feed_forward",) * 4)).weight.shape == (4, 16)
    assert ModuleRouting().hidden_width(1024) == 256
    assert router_of(hidden=None).weight.shape == (EXPERTS, 1)


def test_blocks_of_added_modules_follow_the_others() -> None:
    router, x_ND = router_of(added=(1, 2)), rows()
    hidden_NH = F.gelu(x_ND @ router.hidden_weight.T + router.hidden_bias)
    parts = [(router.weight, 0), (router.added_0_weight, router.added_0_bias)]
    parts.append((router.added_1_weight, router.added_1_bias))
    wanted = torch.cat([hidden_NH @ weight.T + bias for weight, bias in parts], dim=1)
    torch.testing.assert_close(router(x_ND).logits_NE, wanted)
    assert [len(weight) for weight, _ in router.blocks] == [2, 1, 2]


def test_removed_modules_keep_their_share_of_the_softmax() -> None:
    router, x_ND = router_of(removed=3), rows()
    found = router(x_ND)
    hidden_NH = F.gelu(x_ND @ router.hidden_weight.T + router.hidden_bias)
    gone_NE = hidden_NH @ router.removed_weight.T + router.removed_bias
    whole_NE = torch.cat([found.logits_NE, gone_NE], dim=1).softmax(-1)
    torch.testing.assert_close(found.weight_NK, whole_NE.gather(1, found.expert_NK))
    torch.testing.assert_close(found.scores_NE, found.logits_NE.softmax(-1))
    assert int(found.expert_NK.max()) < EXPERTS


def test_sampled_modules() -> None:
    """The best are kept; the others are drawn as often as their probabilities say."""
    router, x_ND = router_of(k=3, sampled=2), rows(1).expand(20_000, WIDTH)
    best = int(router.eval()(x_ND[:1]).expert_NK[0, 0])
    found = router.train()(x_ND)
    assert bool((found.expert_NK[:, 0] == best).all())
    assert all(len(set(row)) == 3 for row in found.expert_NK[:200].tolist())
    probability_E = found.scores_NE[0].detach().double() + 1e-6
    probability_E[best] = 0
    share_E = probability_E / probability_E.sum()
    first_E = torch.bincount(found.expert_NK[:, 1], minlength=EXPERTS) / 20_000
    torch.testing.assert_close(first_E.double(), share_E, rtol=0, atol=0.02)
    torch.testing.assert_close(found.weight_NK, found.scores_NE.gather(1, found.expert_NK))
    every = router_of(k=2, sampled=2).train()(x_ND)
    assert len(every.expert_NK.unique()) == EXPERTS


def test_sampling_and_dropout_are_for_training() -> None:
    router = router_of(k=2, sampled=1, dropout=0.5)
    first, second = router.eval()(rows()), router(rows())
    assert torch.equal(first.weight_NK, second.weight_NK)
    assert torch.equal(first.expert_NK, first.scores_NE.topk(2).indices)
    assert not torch.equal(router.train()(rows()).logits_NE, first.logits_NE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 6}, "k is 6 but the bank has 5 experts"),
        ({"k": 0}, "k is 0"),
        ({"hidden": 0}, "hidden is 0"),
        ({"k": 2, "sampled": 3}, "sampled is 3; wanted 0 to k, which is 2"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"added": (4, 2)}, "6 modules were added, but the bank has 5"),
        ({"added": (-1,)}, r"added is \(-1,\)"),
        ({"removed": -1}, "removed -1"),
        ({"gate": "gmm"}, "gate is 'gmm'"),
        ({"init_std": 0.0}, "init_std is 0.0"),
    ],
)
def test_bad_routers(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        router_of(**options)
    with pytest.raises(ValueError, match=said):
        router_of(**options)


# --- the loss -----------------------------------------------------------------------------------


def value(spec: LossSpec, probability_NE: Tensor, valid_N: Tensor | None = None) -> Tensor:
    tokens, experts = probability_NE.shape
    ids_NK = torch.zeros(tokens, 1, dtype=torch.int64)
    routing = Routing(ids_NK, probability_NE[:, :1], experts, probability_NE.log(), probability_NE)
    router = TopK(k=1).build(Site(2, ("feed_forward",) * experts))
    losses = RoutingLosses([LossSite((spec,), router)])
    return losses([routing.without_padding(valid_N)])[1][type(spec).__name__]


def information(probability_NE: Tensor) -> float:
    """I(x; m) from the joint table p(x, m) = p(m|x) / N, term by term."""
    tokens, experts = probability_NE.shape
    joint = (probability_NE / tokens).tolist()
    marginal = [sum(row[m] for row in joint) for m in range(experts)]
    return sum(
        joint[x][m] * math.log(joint[x][m] * tokens / marginal[m])
        for x in range(tokens)
        for m in range(experts)
        if joint[x][m] > 0
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_is_minus_the_mutual_information(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_NE = 3 * torch.randn(13, 6, generator=generator, dtype=torch.float64)
    probability_NE = logits_NE.softmax(-1)
    found = float(value(MutualInformation(), probability_NE))
    assert found == pytest.approx(-information(probability_NE), abs=1e-12)
    assert -math.log(6) <= found <= 0
    valid_N = torch.arange(13) % 3 > 0
    padded = float(value(MutualInformation(), probability_NE, valid_N))
    assert padded == pytest.approx(-information(probability_NE[valid_N]), abs=1e-12)


def test_its_limits() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    assert float(value(MutualInformation(), torch.full((8, 4), 0.25))) == pytest.approx(0, abs=1e-6)
    balanced = float(value(MutualInformation(), eye.repeat(3, 1)))
    assert balanced == pytest.approx(-math.log(4))
    assert float(value(MutualInformation(), eye[:1].repeat(5, 1))) == pytest.approx(0, abs=1e-12)


def test_load_concentration() -> None:
    concentration = Entropy(of="marginal")
    assert float(value(concentration, torch.full((8, 4), 0.25))) == pytest.approx(math.log(4))
    single = torch.eye(4)[:1].repeat(5, 1)
    assert float(value(concentration, single)) == pytest.approx(0, abs=1e-6)


def test_every_row_of_the_router_learns_from_it() -> None:
    """From all probabilities, not from the chosen ones or from counts."""
    router = router_of(k=1, added=(2,))
    losses = RoutingLosses([LossSite((MutualInformation(),), router)])
    x_ND = rows(1).expand(3, WIDTH) + 0.1 * rows(3)
    routing = router(x_ND)
    assert len(routing.expert_NK.unique()) < EXPERTS
    losses([routing])[0].backward()
    for weight, _ in router.blocks:
        assert weight.grad is not None
        assert bool((weight.grad.abs().sum(1) > 0).all())


def test_no_token() -> None:
    """A rank may hold padding alone: its share of the loss is 0. A measurement is refused."""
    router = router_of()
    losses = RoutingLosses([LossSite((MutualInformation(),), router)])
    routing = router(rows(4), Signals(valid_N=torch.zeros(4, dtype=torch.bool)))
    total, _ = losses([routing])
    assert float(total.detach()) == 0
    total.backward()
    assert all(
        bool(torch.isfinite(p.grad).all()) for p in router.parameters() if p.grad is not None
    )
    for routings in ([routing], []):
        with pytest.raises(DataError, match="no token"):
            routing_information(routings)
        with pytest.raises(ValueError, match="no token"):
            routing_information(routings)


def test_information_of_several_batches() -> None:
    router = router_of()
    valid_N = torch.arange(40) < 33
    found = routing_information([router(rows(40, 1), Signals(valid_N=valid_N)), router(rows(7, 2))])
    scores = [router(rows(40, 1)).scores_NE[valid_N], router(rows(7, 2)).scores_NE]
    probability_NE = torch.cat(scores).detach().double()
    assert found.mutual == pytest.approx(information(probability_NE))
    assert found.conditional == pytest.approx(float(torch.special.entr(probability_NE).sum() / 40))

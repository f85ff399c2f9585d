"""The dense-to-sparse gate and its activation variant (arXiv 2401.13875)."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from temperature_cases import ALIKE, EXPERTS, OTHERS, STEP, WIDTH, router_of, rows
from torch import Tensor

from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import DenseToSparse, Site, TopK

# --- the gate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_weights_are_the_formula_expert_by_expert(activation: str) -> None:
    by_hand = {
        "identity": lambda z: z,
        "relu": lambda z: max(z, 0.0),
        "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
        "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
        "tanh": math.tanh,
        "gelu": lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        "silu": lambda z: z / (1 + math.exp(-z)),
        "softplus": lambda z: math.log1p(math.exp(z)),
    }[activation]
    router, x_ND = router_of(temperature=0.7, activation=activation), rows()
    routing = router(x_ND)
    weight_ED, bias_E = router.weight.tolist(), router.bias.tolist()
    for n, x_D in enumerate(x_ND.tolist()):
        scores = [sum(w * x for w, x in zip(w_D, x_D, strict=True)) for w_D in weight_ED]
        odds = [math.exp((by_hand(z) + b) / 0.7) for z, b in zip(scores, bias_E, strict=True)]
        for e in range(EXPERTS):
            assert routing.weight_NK[n, e].item() == pytest.approx(odds[e] / sum(odds), rel=1e-12)
    assert torch.equal(routing.expert_NK, torch.arange(EXPERTS).expand(20, -1))


def test_identity_at_temperature_one_is_the_softmax_mixture() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=8)
    ours = MoESpec(DenseToSparse(bias=False), bank).build(WIDTH).double()
    theirs = MoESpec(TopK(k=EXPERTS), bank).build(WIDTH).double()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x_ND = rows()
    torch.testing.assert_close(ours(x_ND).y, theirs(x_ND).y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [0.1, 3.0])
@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_scaling_gate_and_temperature_together(activation: str, factor: float) -> None:
    """Without effect exactly where the activation is homogeneous."""
    fields = {"activation": activation}
    ours, scaled = router_of(**fields), router_of(**fields, temperature=factor)
    for parameter in scaled.parameters():
        parameter.data.mul_(factor)
    x_ND = rows()
    gap = float((ours(x_ND).weight_NK - scaled(x_ND).weight_NK).detach().abs().max())
    if activation in ALIKE:
        assert gap < 1e-12
    else:
        assert gap > 1e-3


@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_euler_identity_of_the_log_gate(activation: str) -> None:
    """Σ W·∂ + Σ b·∂ + τ∂/∂τ of each log-probability is 0 where the scale is not identified."""
    router = router_of(activation=activation, temperature=0.6, learned=True)
    found = []
    for n, x_D in enumerate(rows(12)):
        log_share = router(x_D[None]).weight_NK[0, n % EXPERTS].log()
        by_W, by_b, by_log_tau = torch.autograd.grad(
            log_share, [router.weight, router.bias, router.log_temperature]
        )
        total = (router.weight * by_W).sum() + (router.bias * by_b).sum() + by_log_tau
        found.append(abs(float(total.detach())))
    if activation in ALIKE:
        assert max(found) < 1e-12
    else:
        assert max(found) > 0.1


@pytest.mark.parametrize("activation", ALIKE + OTHERS)
def test_fisher_information_is_singular_along_the_scale_alone(activation: str) -> None:
    """Of the gate with a learned temperature, its last expert fixed where a shift has no effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        gate = DenseToSparse(temperature=0.4, learned=True, activation=activation)
        router = gate.build(Site(1, ("feed_forward",) * 3)).double()
    slope = [1.0, -0.7, 0.0] if activation == "identity" else [1.0, -0.7, 0.3]
    router.weight.data.copy_(torch.tensor(slope)[:, None])
    router.bias.data.copy_(torch.tensor([0.3, -0.3, 0.0]))
    share_NE = router(torch.linspace(-3, 3, 400, dtype=torch.float64)[:, None]).weight_NK
    free = 2 if activation == "identity" else 3
    score_NEF = torch.zeros(*share_NE.shape, free + 3, dtype=torch.float64)
    for place in range(share_NE.numel()):
        by = torch.autograd.grad(
            share_NE.flatten()[place].log(),
            [router.weight, router.bias, router.log_temperature],
            retain_graph=True,
        )
        parts = (by[0][:free, 0], by[1][:2], by[2].view(1))  # by log τ, so along its unit
        score_NEF.view(-1, free + 3)[place] = torch.cat(parts)
    information = torch.einsum("ne,nef,neg->fg", share_NE.detach(), score_NEF, score_NEF) / 400
    scale = information.diagonal().sqrt()
    eigenvalue, vector = torch.linalg.eigh(information / scale[:, None] / scale)
    if activation in ALIKE:
        assert abs(float(eigenvalue[0])) < 1e-12 < 1e-4 < float(eigenvalue[1])
        wanted = torch.cat([router.weight[:free, 0], router.bias[:2], torch.ones(1)]) * scale
        cosine = torch.nn.functional.cosine_similarity(vector[:, 0], wanted.detach(), dim=0)
        assert abs(float(cosine)) > 1 - 1e-8
    else:
        assert float(eigenvalue[0]) > 1e-3


def test_the_activation_comes_before_bias_and_temperature() -> None:
    """Where every score is 0, tanh((0 + b)/τ) would differ from (tanh 0 + b)/τ."""
    router = router_of(activation="tanh", temperature=0.5)
    share_E = router(torch.zeros(1, WIDTH, dtype=torch.float64)).weight_NK[0]
    torch.testing.assert_close(share_E, (router.bias / 0.5).softmax(0))


@pytest.mark.parametrize("activation", ["identity", "tanh", "gelu"])
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_equal_finite_differences(activation: str, learned: bool) -> None:
    router = router_of(activation=activation, temperature=0.8, learned=learned)
    names = [name for name, _ in router.named_parameters()]
    assert ("log_temperature" in names) == learned

    def weights(x_ND: Tensor, *values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(router, given, (x_ND,)).weight_NK

    leaves = [rows(4), *(p.detach().clone() for p in router.parameters())]
    assert torch.autograd.gradcheck(weights, [leaf.requires_grad_() for leaf in leaves])


# --- limits -------------------------------------------------------------------------------------


def test_a_high_temperature_is_uniform_and_a_low_one_the_best_expert() -> None:
    x_ND = rows()
    hot, cold = router_of(temperature=1e9), router_of(temperature=1e-9)
    torch.testing.assert_close(
        hot(x_ND).weight_NK, torch.full((20, EXPERTS), 1 / EXPERTS, dtype=torch.float64)
    )
    routing = cold(x_ND)
    best_N = routing.logits_NE.argmax(-1)
    one_hot_NE = torch.nn.functional.one_hot(best_N, EXPERTS).double()
    assert torch.equal(routing.weight_NK, one_hot_NE)
    assert torch.equal(routing.used_NK, one_hot_NE > 0)  # the others are not run


@pytest.mark.parametrize(("temperature", "learned"), [(1e-6, False), (1e-6, True), (1e-37, False)])
def test_large_logits_at_a_low_temperature_stay_finite(temperature: float, learned: bool) -> None:
    router = router_of(temperature=temperature, learned=learned).float()
    with torch.no_grad():
        router.weight.mul_(1e4)
    x_ND = rows().float().requires_grad_()
    routing = router(x_ND)
    routing.weight_NK.square().sum().backward()
    assert bool(torch.isfinite(routing.weight_NK).all())
    for leaf in (x_ND, *router.parameters()):
        assert bool(torch.isfinite(leaf.grad).all())


# --- sparsification -----------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.16])
def test_experts_below_the_threshold_are_not_run(threshold: float) -> None:
    x_ND = rows(200)
    dense, sparse = router_of()(x_ND), router_of(threshold=threshold)(x_ND)
    kept_NE = dense.weight_NK >= threshold
    assert torch.equal(sparse.used_NK, kept_NE)
    assert torch.equal(sparse.weight_NK, dense.weight_NK * kept_NE)
    assert torch.equal(sparse.scores_NE, dense.weight_NK)
    assert len({int(n) for n in kept_NE.sum(-1)}) > 1
    assert int(kept_NE.sum(-1).min()) >= 1


def test_a_threshold_just_below_uniform_keeps_an_expert_for_every_token() -> None:
    router = router_of(threshold=math.nextafter(1 / EXPERTS, 0), temperature=1e30).float()
    assert bool(router(rows(500).float()).used_NK.any(-1).all())


def test_top_k_begins_when_the_annealing_ends() -> None:
    router = router_of(temperature=1.0, final=0.9, steps=3, k=2)
    x_ND = rows()
    for _ in range(3):
        assert bool(router(x_ND).used_NK.all())
        router.update(STEP)
    for training in (True, False):
        routing = router.train(training)(x_ND)
        assert bool((routing.used_NK.sum(-1) == 2).all())
        best_NK = routing.logits_NE.topk(2).indices
        assert bool(routing.used_NK.gather(1, best_NK).all())
        full = (routing.logits_NE / 0.9).softmax(-1)
        torch.testing.assert_close(
            routing.weight_NK, full.masked_fill(~routing.used_NK, 0.0), rtol=1e-6, atol=0
        )


def test_experts_left_out_send_no_gradient_of_their_weight() -> None:
    router, x_ND = router_of(k=1), rows(5)
    routing = router(x_ND)
    (found,) = torch.autograd.grad(routing.weight_NK.sum(), routing.logits_NE)
    best_N1 = routing.logits_NE.argmax(-1, keepdim=True)
    p_NE = routing.scores_NE.detach()
    p_N1 = p_NE.gather(1, best_N1)
    wanted = p_N1 * (torch.zeros_like(p_NE).scatter(1, best_N1, 1.0) - p_NE)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)

"""COMET's gate against its formulas, an explicit tree walk, and its bad inputs."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moekit.errors import SignalError, SpecError
from moekit.experts import SwiGLU
from moekit.layer import MoESpec
from moekit.routing import Comet, CometRouter, Signals, Site
from moekit.routing.comet import leaf_probabilities
from moekit.routing.smooth_step import selection_entropy, smooth_step

WIDTH = 4
GAMMAS = pytest.mark.parametrize("gamma", [1e-3, 0.5, 1.0, 10.0])


def built(experts: int, seed: int = 0, scale: float = 0.5, **fields: object) -> CometRouter:
    """A router in float64 whose parameters are large enough for some nodes to saturate."""
    router = Comet(**fields).build(Site(WIDTH, ("feed_forward",) * experts))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return router.double()


def inputs(tokens: int = 64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)


def order_of_leaves(experts: int) -> list[int]:
    """Heap numbers of the leaves from left to right, by walking the tree."""

    def below(node: int) -> list[int]:
        if node >= experts - 1:
            return [node]
        return below(2 * node + 1) + below(2 * node + 2)

    return below(0)


def walked(left_Q: list[float], experts: int) -> list[float]:
    """Probability of each leaf from left to right: from the leaf up to the root, node by node."""
    found = []
    for leaf in order_of_leaves(experts):
        probability, node = 1.0, leaf
        while node > 0:
            parent = (node - 1) // 2
            left = node == 2 * parent + 1
            probability *= left_Q[parent] if left else 1 - left_Q[parent]
            node = parent
        found.append(probability)
    return found


@torch.no_grad()
def trees(router: CometRouter, x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """``v`` and ``a`` (N, K, E) of a router, by explicit loops over tokens, trees and nodes."""
    k, experts = router.spec.k, router.site.experts
    v, a = (torch.zeros(len(x_ND), k, experts, dtype=torch.float64) for _ in range(2))
    for n, j in itertools.product(range(len(x_ND)), range(k)):
        left = []
        for q in range(j * (experts - 1), (j + 1) * (experts - 1)):
            t = float(router.node_weight[q] @ x_ND[n] + router.node_bias[q])
            left.append(closed_form(t, router.spec.gamma))
        v[n, j] = torch.tensor(walked(left, experts), dtype=torch.float64)
        for i in range(experts):
            row = j * experts + i
            a[n, j, i] = router.leaf_weight[row] @ x_ND[n] + router.leaf_bias[row]
    return v, a


def closed_form(t: float, gamma: float) -> float:
    if t <= -gamma / 2:
        return 0.0
    if t >= gamma / 2:
        return 1.0
    return -2 * t**3 / gamma**3 + 3 * t / (2 * gamma) + 0.5


# --- smooth step --------------------------------------------------------------------------------


@GAMMAS
def test_smooth_step_and_its_slope_equal_the_closed_form(gamma: float) -> None:
    t = torch.linspace(-gamma, gamma, 201, dtype=torch.float64).requires_grad_()
    value = smooth_step(t, gamma)
    (slope,) = torch.autograd.grad(value.sum(), t)
    inside = t.detach().abs() < gamma / 2
    wanted = torch.tensor([closed_form(i, gamma) for i in t.tolist()], dtype=torch.float64)
    wanted_slope = torch.where(inside, -6 * t.detach() ** 2 / gamma**3 + 3 / (2 * gamma), 0.0)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(slope, wanted_slope, rtol=1e-9, atol=1e-12 / gamma)


@GAMMAS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smooth_step_is_exact_and_flat_at_and_beyond_its_ends(
    gamma: float, dtype: torch.dtype
) -> None:
    ends = torch.tensor([-50 * gamma, -gamma / 2, gamma / 2, 50 * gamma], dtype=dtype)
    ends.requires_grad_()
    value = smooth_step(ends, gamma)
    (slope,) = torch.autograd.grad(value.sum(), ends)
    # γ/2 itself is rounded, so S and S' there are exact up to that rounding.
    near = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(value, torch.tensor([0, 0, 1, 1.0], dtype=dtype), rtol=0, atol=near)
    assert value[0] == 0
    assert value[3] == 1
    assert bool((slope.abs() * gamma <= near).all())
    inside = torch.linspace(-gamma / 2, gamma / 2, 4001, dtype=dtype)
    assert bool(((smooth_step(inside, gamma) >= 0) & (smooth_step(inside, gamma) <= 1)).all())


# --- trees --------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", range(2, 18))
def test_probabilities_and_weights_sum_to_one_and_equal_the_walk(experts: int) -> None:
    router, x_ND = built(experts, seed=experts, k=2, gamma=3.0), inputs(12)
    v, a = trees(router, x_ND)
    routing = router(x_ND)
    found = leaf_probabilities(router._left(x_ND))
    torch.testing.assert_close(found, v, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.sum(-1), torch.ones(12, 2).double(), rtol=1e-12, atol=0)
    top = v * a.exp()
    wanted_NE = top.sum(1) / top.sum((1, 2))[:, None]
    torch.testing.assert_close(routing.dense_weight_NE(), wanted_NE, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(
        routing.weight_NK.sum(1), torch.ones(12).double(), rtol=1e-12, atol=0
    )
    assert torch.equal(routing.used_NK, v.sum(1) > 0)
    logits_NE = ((v + 1e-8) * a.exp()).sum(1).log()
    torch.testing.assert_close(routing.logits_NE, logits_NE, rtol=1e-10, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_any_number_of_leaves(experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left_Q = torch.rand(experts - 1, generator=generator, dtype=torch.float64)
    wanted = torch.tensor(walked(left_Q.tolist(), experts), dtype=torch.float64)
    found = leaf_probabilities(left_Q[None, None])[0, 0]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("experts", [2, 3, 5, 8, 11])
def test_a_narrow_band_gives_one_leaf_a_tree(experts: int) -> None:
    router, x_ND = built(experts, k=2, gamma=1e-6), inputs()
    v, a = trees(router, x_ND)
    routing = router(x_ND)
    assert bool(((v == 0) | (v == 1)).all())
    assert torch.equal(leaf_probabilities(router._left(x_ND)), v)
    assert int(routing.used_NK.sum(1).max()) <= 2
    leaf = v.argmax(-1)
    share = a.gather(-1, leaf[..., None])[..., 0].softmax(-1)
    wanted = torch.zeros(len(x_ND), experts, dtype=torch.float64).scatter_add_(1, leaf, share)
    torch.testing.assert_close(routing.dense_weight_NE(), wanted, rtol=1e-12, atol=1e-14)


def test_one_saturated_tree_ignores_the_leaf_scores() -> None:
    router, x_ND = built(7, k=1, gamma=1e-6, scale=3.0), inputs()
    weight_NE = router(x_ND).dense_weight_NE()
    assert bool(((weight_NE == 0) | (weight_NE == 1)).all())
    with torch.no_grad():
        router.leaf_weight.mul_(-20)
    assert torch.equal(router(x_ND).dense_weight_NE(), weight_NE)


def test_two_experts_in_closed_form() -> None:
    router, x_ND = built(2, k=1, gamma=20.0), inputs()
    t = x_ND @ router.node_weight[0] + router.node_bias[0]
    a = x_ND @ router.leaf_weight.T + router.leaf_bias
    left = torch.tensor([closed_form(i, 20.0) for i in t.tolist()], dtype=torch.float64)
    top = torch.stack((left * a[:, 0].exp(), (1 - left) * a[:, 1].exp()), dim=1)
    wanted = top / top.sum(1, keepdim=True)
    torch.testing.assert_close(router(x_ND).weight_NK, wanted, rtol=1e-11, atol=1e-14)


def test_equal_leaf_scores_average_the_trees() -> None:
    """The softmax is one over all pairs: per-tree softmaxes would agree here, and differ below."""
    router, x_ND = built(6, k=3, gamma=4.0), inputs(10)
    v, a = trees(router, x_ND)
    per_tree = v * a.exp() / (v * a.exp()).sum(-1, keepdim=True)
    assert not torch.allclose(router(x_ND).weight_NK, per_tree.mean(1), atol=1e-3)
    with torch.no_grad():
        router.leaf_weight.zero_()
        router.leaf_bias.fill_(0.7)
    torch.testing.assert_close(router(x_ND).weight_NK, v.mean(1), rtol=1e-11, atol=1e-14)


# --- gradients ----------------------------------------------------------------------------------


def test_gradients_in_the_band() -> None:
    router, x_ND = built(5, k=2, gamma=40.0), inputs(4).requires_grad_()
    names = [name for name, _ in router.named_parameters()]

    def outputs(x_ND: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        given_ = dict(zip(names, values, strict=True))
        routing = torch.func.functional_call(router, given_, (x_ND,))
        return routing.weight_NK, routing.losses["entropy"]

    assert torch.autograd.gradcheck(outputs, [x_ND, *router.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [1e-6, 0.3])
def test_saturated_nodes_get_no_gradient_and_all_is_finite(gamma: float, dtype) -> None:
    router, x_ND = built(6, k=2, gamma=gamma, scale=5.0).to(dtype), inputs().to(dtype)
    routing = router(x_ND)
    cost = (routing.weight_NK * torch.randn_like(routing.weight_NK)).sum()
    (cost + routing.losses["entropy"] + routing.logits_NE.logsumexp(-1).sum()).backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in router.parameters())
    assert (gamma == 1e-6) == bool((router.node_weight.grad == 0).all())
    assert bool((router.leaf_weight.grad != 0).any())


@pytest.mark.parametrize("low", [0.0, 1e-45, 1e-40, 1e-38, 1e-30])
def test_probabilities_near_the_smallest_number(low: float) -> None:
    from moekit.routing.comet import _gate

    reach = torch.tensor([[[low, 1.0 - low]]], requires_grad=True)
    score = torch.tensor([[[60.0, -60.0]]], requires_grad=True)
    gate = _gate(score, reach)
    gate[0, 0].backward()
    wanted = low * torch.tensor(120.0, dtype=torch.float64).exp()
    wanted = 0.0 if low < 1.2e-38 else float(wanted / (wanted + 1))
    assert float(gate.detach()[0, 0]) == pytest.approx(wanted, rel=1e-4)
    assert bool(torch.isfinite(reach.grad).all() and torch.isfinite(score.grad).all())


# --- entropy, hardness, sparsity ----------------------------------------------------------------


@pytest.mark.parametrize("experts", [2, 5, 8])
def test_entropy_is_that_of_the_trees_and_vanishes_only_at_saturation(experts: int) -> None:
    x_ND = inputs(20)
    saturated = built(experts, k=2, gamma=1e-6)(x_ND)
    assert abs(float(saturated.losses["entropy"].detach())) < 1e-5
    soft = built(experts, k=2, gamma=3.0)
    v, _ = trees(soft, x_ND)
    wanted = (-v * (v + 1e-6).log()).sum((1, 2)).mean()
    torch.testing.assert_close(soft(x_ND).losses["entropy"], wanted, rtol=1e-10, atol=1e-12)
    assert float(wanted) > 1e-2
    one_soft_node = torch.tensor([[[1.0, 0.0, 0.0], [0.999, 0.001, 0.0]]], dtype=torch.float64)
    assert float(selection_entropy(one_soft_node, None)) > 1e-3


def test_entropy_leaves_padding_out() -> None:
    router, x_ND = built(6, k=2, gamma=3.0), inputs(10)
    valid_N = torch.arange(10) % 3 > 0
    found = router(x_ND, Signals(valid_N=valid_N)).losses["entropy"]
    torch.testing.assert_close(found, router(x_ND[valid_N]).losses["entropy"])
    nobody = router(x_ND, Signals(valid_N=torch.zeros(10, dtype=torch.bool))).losses["entropy"]
    assert float(nobody.detach()) == 0
    assert float(router(x_ND[:0]).losses["entropy"].detach()) == 0


def test_hard_rounds_nodes_in_evaluation_only() -> None:
    router, x_ND = built(7, k=2, gamma=50.0, hard=True), inputs()
    assert int(router.train()(x_ND).used_NK.sum(1).max()) == 7
    routing = router.eval()(x_ND)
    assert int(routing.used_NK.sum(1).max()) <= 2
    sharp = built(7, k=2, gamma=1e-9)
    torch.testing.assert_close(routing.weight_NK, sharp(x_ND).weight_NK)
    assert int(built(7, k=2, gamma=50.0).eval()(x_ND).used_NK.sum(1).min()) == 7


def test_skipping_experts_of_weight_zero_changes_nothing() -> None:
    router, x_ND = built(6, k=2, gamma=1.0), inputs()
    layer = MoESpec(Comet(k=2), SwiGLU(count=6, hidden=5)).build(WIDTH).double()
    layer.router.load_state_dict(router.state_dict())
    sparse = layer(x_ND)
    full_NE = torch.arange(6).expand(len(x_ND), -1)
    dense = layer.dispatch(x_ND, sparse.routing.replace(expert_NK=full_NE), layer.experts)
    torch.testing.assert_close(sparse.y, dense.y_ND, rtol=1e-12, atol=1e-14)
    assert int(sparse.rows_E.sum()) == int((sparse.routing.weight_NK > 0).sum()) < full_NE.numel()


@pytest.mark.parametrize("gamma", [0.01, 1.0, 10.0])
def test_initial_parameters(gamma: float) -> None:
    router = Comet(k=4, gamma=gamma).build(Site(64, ("feed_forward",) * 16))
    for name, bound in {"node": gamma / 100, "leaf": 0.05}.items():
        for parameter in (getattr(router, f"{name}_weight"), getattr(router, f"{name}_bias")):
            assert float(parameter.detach().abs().max()) <= bound * (1 + 1e-6)
            assert float(parameter.detach().abs().max()) > 0.9 * bound
    routing = router(torch.randn(50, 64))
    assert bool(routing.used_NK.all())  # nothing is saturated at the start


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 0},
        *({"gamma": gamma} for gamma in (0.0, -1.0, float("nan"), float("inf"))),
        {"entropy": -0.1},
    ],
    ids=str,
)
def test_bad_values_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(SpecError, match="Comet"):
        Comet(**fields)  # type: ignore[arg-type]


def test_bad_banks_and_nan_are_refused() -> None:
    with pytest.raises(SpecError, match="at least 2 experts; the bank has 1"):
        Comet(k=1).build(Site(WIDTH, ("feed_forward",)))
    with pytest.raises(SpecError, match="k is 4 but the bank has 3"):
        Comet(k=4).build(Site(WIDTH, ("feed_forward",) * 3))
    router, x_ND = built(4, k=2), torch.full((2, WIDTH), float("nan"), dtype=torch.float64)
    assert bool(router(x_ND).weight_NK.isnan().all())  # and is not swallowed as "no expert"
    with torch.autograd.set_detect_anomaly(True), pytest.raises(SignalError, match="CometRouter"):
        router(x_ND)

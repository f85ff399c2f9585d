"""The transport routers against slow loops in numpy, and what they promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moekit import Capacity, ExpertChoice, MoESpec, SwiGLU, SwitchBalance, TopK
from moekit.errors import SpecError
from moekit.routing import Signals, Sinkhorn, Site, SparseTransport, SparseTransportRouter
from moekit.routing.router import Router, RouterSpec
from moekit.routing.token_groups import TokenGroups

WIDTH, EXPERTS = 6, 4


def built(spec: RouterSpec, seed: int = 0, experts: int = EXPERTS) -> Any:
    router = spec.build(Site(WIDTH, ("feed_forward",) * experts)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return router


def inputs(tokens: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64)


def probabilities(router: Router, x_ND: Tensor) -> np.ndarray[Any, Any]:
    logits = x_ND.numpy() @ router.weight.detach().numpy().T
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def column(x: np.ndarray[Any, Any], k: int, total: float) -> np.ndarray[Any, Any]:
    """``total`` times the projection of ``x / total`` on the simplex of at most k entries."""
    order = np.argsort(-x, kind="stable")[:k]
    top = x[order] / total
    p = np.zeros_like(x)
    for n in range(1, k + 1):
        threshold = (top[:n].sum() - 1) / n
        if top[n - 1] > threshold:
            p[order] = np.maximum(top - threshold, 0)
    return total * p


def plan_by_loop(
    score: np.ndarray[Any, Any], k: int, a: float, b: float, steps: int
) -> np.ndarray[Any, Any]:
    """The plan (rows, columns) after ``steps`` of Adam at 0.01 on the semi-dual, γ = 1."""
    rows, columns = score.shape
    alpha, mean, square = np.zeros(rows), np.zeros(rows), np.zeros(rows)

    def plan() -> np.ndarray[Any, Any]:
        each = [column(alpha + score[:, j], k, b) for j in range(columns)]
        return np.stack(each, axis=1)

    for step in range(1, steps + 1):
        gradient = a - plan().sum(1)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        alpha = alpha + 0.01 * (mean / (1 - 0.9**step)) / (
            np.sqrt(square / (1 - 0.999**step)) + 1e-8
        )
    return plan()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("tokens", "factor", "steps"), [(12, 1.0, 20), (13, 1.7, 8), (5, 4.0, 3)])
def test_experts_take_the_largest_entries_of_the_plan(
    tokens: int, factor: float, steps: int, seed: int
) -> None:
    spec = SparseTransport(capacity_factor=factor, multiple_of=1, iterations=steps)
    router, x_ND = built(spec, seed), inputs(tokens, seed + 10)
    routing = router(x_ND)
    share = probabilities(router, x_ND)
    places = math.ceil(factor * tokens / EXPERTS)
    plan = plan_by_loop(share, places, 1.0, tokens / EXPERTS, steps)
    assert routing.load_E().tolist() == [places] * EXPERTS
    for e in range(EXPERTS):
        taken = routing.used_NK[:, e].numpy()
        positive = plan[:, e] > 1e-12
        assert positive.sum() <= places
        assert not (positive & ~taken).any()  # further tokens only where places are left
    np.testing.assert_allclose(
        routing.weight_NK.detach().numpy(), np.where(routing.used_NK, share, 0.0), atol=1e-12
    )
    result = router.transport(x_ND)
    np.testing.assert_allclose(result.plan_IJ[0].numpy(), plan, rtol=0, atol=1e-10)
    assert result.iterations == steps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_tokens_take_the_largest_entries_of_the_plan(k: int, seed: int) -> None:
    router, x_ND = built(SparseTransport(sparse="token", k=k), seed), inputs(9, seed)
    routing = router(x_ND)
    share = probabilities(router, x_ND)
    plan = plan_by_loop(share.T, k, 9 / EXPERTS, 1.0, 20).T
    np.testing.assert_allclose(router.transport(x_ND).plan_IJ[0].numpy().T, plan, atol=1e-10)
    assert routing.full
    assert routing.expert_NK.shape == (9, k)
    for n, row in enumerate(routing.expert_NK.tolist()):
        assert len(set(row)) == k
        assert set(np.flatnonzero(plan[n] > 1e-12)) <= set(row)
    weight = routing.weight_NK.detach().numpy()
    np.testing.assert_allclose(weight, np.take_along_axis(share, routing.expert_NK.numpy(), 1))


@pytest.mark.parametrize("capacity", [1.0, 1.5, 3.0])
def test_no_step_at_all_is_expert_choice(capacity: float) -> None:
    ours = built(SparseTransport(capacity_factor=capacity, multiple_of=1, iterations=0))
    choice, x_ND = built(ExpertChoice(capacity=capacity)), inputs(17)
    found, wanted = ours(x_ND), choice(x_ND)
    assert torch.equal(found.expert_NK, wanted.expert_NK)
    torch.testing.assert_close(found.weight_NK, wanted.weight_NK)


def test_more_steps_leave_fewer_tokens_without_an_expert() -> None:
    unrouted = []
    for steps in (0, 20, 300):
        routings = [
            built(SparseTransport(iterations=steps), seed)(inputs(64, seed)) for seed in range(5)
        ]
        unrouted.append(sum(int((~r.used_NK.any(1)).sum()) for r in routings))
    assert unrouted[0] > unrouted[1] > unrouted[2]


def test_the_plan_as_weights() -> None:
    spec = SparseTransport(capacity_factor=4, combine="plan", solver="bfgs", iterations=300)
    router, x_ND = built(spec), inputs(12)
    routing, result = router(x_ND), router.transport(x_ND)
    assert float(result.row_residual) <= 1e-6
    assert float(result.primal) == pytest.approx(float(result.dual), abs=1e-5)
    torch.testing.assert_close(routing.weight_NK, result.plan_IJ[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(routing.weight_NK.sum(1), torch.ones(12).double(), atol=1e-6, rtol=0)
    assert torch.equal(routing.used_NK, result.plan_IJ[0] > 0)
    assert not bool(routing.used_NK.all())
    assert torch.equal(routing.load_E(), result.nonzeros_J[0])


def test_at_most_k_tokens_an_expert_of_each_group() -> None:
    spec = SparseTransport(k=3, group_size=12, combine="plan")
    router, x_ND = built(spec), inputs(31)
    routing = router(x_ND)
    sizes = (10, 10, 11)
    for rows in routing.used_NK.split(sizes):
        assert int(rows.sum(0).max()) <= 3
    alone = [router(x) for x in x_ND.split(sizes)]
    torch.testing.assert_close(routing.weight_NK, torch.cat([r.weight_NK for r in alone]))
    assert spec.expected_load((0.25,) * 4, (True,) * 4) == pytest.approx(1.0)


@pytest.mark.parametrize("spec", [SparseTransport(), SparseTransport(sparse="token", k=2)])
def test_the_gate_learns_through_the_probabilities_of_the_chosen(spec: SparseTransport) -> None:
    router, x_ND = built(spec), inputs(12)
    cotangent = torch.randn(12, EXPERTS, dtype=torch.float64)
    routing = router(x_ND)
    (routing.dense_weight_NE() * cotangent).sum().backward()
    chosen_NE = routing.dense_weight_NE().detach() > 0
    weight = router.weight.detach().clone().requires_grad_()
    ((x_ND @ weight.T).softmax(-1) * chosen_NE * cotangent).sum().backward()
    torch.testing.assert_close(router.weight.grad, weight.grad)
    assert router.loss_weights == {}
    assert routing.losses == {}


@pytest.mark.parametrize("combine", ["softmax", "plan"])
@pytest.mark.parametrize("sparse", ["expert", "token"])
def test_nothing_but_padding_or_no_rows(sparse: Any, combine: Any) -> None:
    for solver in ("adam", "bfgs"):
        k = 2 if sparse == "token" else None
        router = built(SparseTransport(sparse=sparse, k=k, combine=combine, solver=solver))
        assert not bool(router(inputs(5), Signals(valid_N=torch.zeros(5).bool())).used_NK.any())
        assert router(inputs(0)).tokens == 0


def test_half_precision_routes_in_float32() -> None:
    router = built(SparseTransport()).bfloat16()
    routing = router(inputs(16).bfloat16())
    assert routing.weight_NK.dtype == torch.float32
    assert routing.load_E().tolist() == [4] * EXPERTS


def test_not_a_number_shows() -> None:
    router, x_ND = built(SparseTransport(combine="plan")), inputs(8)
    x_ND[3] = float("nan")
    assert bool(router(x_ND).weight_NK.isnan().any())


@pytest.mark.parametrize(
    "spec", [SparseTransport(), Sinkhorn(), SparseTransport(sparse="token", k=1)]
)
def test_later_tokens_change_earlier_ones(spec: RouterSpec) -> None:
    assert not spec.causal
    router, x_ND = built(spec).eval(), inputs(24)
    before = router(x_ND).dense_weight_NE()[:12] > 0
    changed = [torch.cat([x_ND[:12], inputs(12, seed) * 3]) for seed in range(5)]
    after = [router(x).dense_weight_NE()[:12] > 0 for x in changed]
    assert any(not torch.equal(one, before) for one in after)


def test_groups_are_even_runs_of_tokens() -> None:
    for rows in range(14):
        for size in (None, 1, 3, 5):
            for valid_N in (None, torch.rand(rows) < 0.6):
                groups = TokenGroups.of(torch.zeros(rows, 2), valid_N, size)
                wanted = torch.arange(rows) if valid_N is None else valid_N.nonzero()[:, 0]
                assert torch.equal(groups.row_GS[groups.live_GS], wanted)
                counts = groups.live_GS.sum(1).tolist()
                assert not counts or max(counts) - min(counts) <= 1
                assert not counts or (min(counts) > 0 and max(counts) <= (size or rows))
                value_N1 = torch.arange(1.0, rows + 1)[:, None]
                kept_N1 = value_N1 if valid_N is None else value_N1 * valid_N[:, None]
                assert torch.equal(groups.join(groups.split(value_N1)), kept_N1)


# --- Sinkhorn -----------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [0, 1, 20])
def test_sinkhorn_equals_scalings_of_rows_and_columns(iterations: int) -> None:
    spec = Sinkhorn(iterations=iterations, epsilon=0.5, multiple_of=1)
    router, x_ND = built(spec).eval(), inputs(14)
    kernel = np.exp(x_ND.numpy() @ router.weight.detach().numpy().T / 0.5)
    u, v = np.ones((14, 1)), np.ones((1, EXPERTS))
    for _ in range(iterations):
        v = 14 / EXPERTS / (kernel * u).sum(0, keepdims=True)
        u = 1 / (kernel * v).sum(1, keepdims=True)
    routing = router(x_ND)
    for e in range(EXPERTS):
        best = np.argsort(-(u * kernel)[:, e])[:4]
        assert sorted(best) == routing.used_NK[:, e].nonzero()[:, 0].tolist()
    share = probabilities(router, x_ND)
    np.testing.assert_allclose(
        routing.weight_NK.detach().numpy(), np.where(routing.used_NK, share, 0.0), atol=1e-12
    )


def test_sinkhorn_is_noisy_in_training_alone() -> None:
    router, x_ND = built(Sinkhorn(noise=2.0)), torch.zeros(4000, WIDTH).double()
    noise_NE = router(x_ND).scores_NE.detach().log()
    spread = (noise_NE[:, 0] - noise_NE[:, 1]).std()
    assert float(spread) == pytest.approx(2.0 / EXPERTS * 2**0.5, rel=0.05)
    assert bool((router(x_ND).logits_NE == 0).all())
    assert bool((router.eval()(x_ND).scores_NE == 0.25).all())


# --- what they refuse ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacity_factor": 0.9}, "less than a place"),
        ({"capacity_factor": float("nan")}, "capacity_factor is nan"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"group_size": 0}, "group_size is 0"),
        ({"init_std": 0.0}, "init_std is 0.0"),
        ({"k": 0, "group_size": 4}, "k is 0"),
        ({"k": 8}, "set group_size"),
        ({"k": 8, "group_size": 16, "capacity_factor": 2.0}, "k is used alone"),
        ({"sparse": "token"}, "give the number of experts"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"gamma": float("inf")}, "gamma is inf"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"iterations": -1}, "iterations is -1"),
        ({"tolerance": -1.0}, "tolerance is -1.0"),
    ],
    ids=str,
)
def test_bad_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        SparseTransport(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"iterations": -1}, "iterations"), ({"epsilon": 0.0}, "epsilon"), ({"noise": -1.0}, "noise")],
    ids=str,
)
def test_bad_values_of_sinkhorn(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Sinkhorn(**fields)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SparseTransport(capacity_factor=5), "the bank has 4"),
        (SparseTransport(sparse="token", k=5), "the bank has 4"),
        (SparseTransport(k=3, group_size=13), "less than a place for each of 13"),
    ],
    ids=str,
)
def test_a_bank_that_does_not_fit(spec: SparseTransport, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        MoESpec(spec, SwiGLU(count=EXPERTS, hidden=8))


def test_what_composes() -> None:
    bank = SwiGLU(count=EXPERTS, hidden=8)
    limited = MoESpec(SparseTransport(sparse="token", k=2), bank, Capacity(factor=1.0))
    out = limited.build(WIDTH)(torch.randn(16, WIDTH))
    assert int(out.rows_E.max()) <= 8
    assert limited.expected_load() == 2
    with pytest.raises(SpecError, match="use Dropless"):
        MoESpec(SparseTransport(), bank, Capacity(factor=1.0))
    balanced = MoESpec(SparseTransport(capacity_factor=2), bank, losses=(SwitchBalance(),))
    assert balanced.expected_load() == 2
    assert isinstance(balanced.build(WIDTH).router, SparseTransportRouter)


def test_a_balanced_load_where_top_k_has_none() -> None:
    x_ND = inputs(64) + 3.0  # a common part that all tokens share
    assert built(SparseTransport())(x_ND).load_E().tolist() == [16] * EXPERTS
    assert int(built(TopK(k=1))(x_ND).load_E().max()) > 32

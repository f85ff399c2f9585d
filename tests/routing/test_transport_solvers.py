"""Solvers of sparse transport, gradients through their solutions, and bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transport_cases import FORMS, Given, inside, problem, solve

from moekit.errors import SpecError
from moekit.routing import solve_sparse_ot, sparse_simplex_projection
from moekit.routing.transport_solvers import adam_ascent, bfgs_ascent

# --- solvers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("solver", ["adam", "bfgs"])
def test_a_batch_equals_a_loop(solver: str, form: str) -> None:
    several = [problem(6, 3, seed) for seed in range(4)]
    stacked = Given(*(torch.stack(values) for values in zip(*several, strict=True)))
    # k = 6 has no ties. With k = 2 plans differ, for the paths round differently at kinks.
    for k, plans_agree in ((6, True), (2, solver == "adam")):
        options = {"solver": solver, "form": form, "gamma": 0.5}
        options["iterations"] = 500 if solver == "bfgs" else 60
        batch = solve(*stacked, k=k, **options)
        for i, instance in enumerate(several):
            alone = solve(*instance, k=k, **options)
            torch.testing.assert_close(batch.dual[i], alone.dual, rtol=1e-7, atol=1e-9)
            if plans_agree:
                torch.testing.assert_close(batch.plan_IJ[i], alone.plan_IJ, rtol=0, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["adam", "bfgs"])
def test_a_gpu_gives_what_the_cpu_gives(solver: str) -> None:
    several = [problem(40, 12, seed) for seed in range(4)]
    stacked = [torch.stack(values) for values in zip(*several, strict=True)]
    on_cpu = solve(*stacked, k=40, solver=solver, iterations=100)
    on_gpu = solve(*(v.cuda() for v in stacked), k=40, solver=solver, iterations=100)
    torch.testing.assert_close(on_gpu.plan_IJ.cpu(), on_cpu.plan_IJ, rtol=0, atol=1e-8)


def test_adam_is_that_of_torch() -> None:
    form = inside(problem(), 3)
    wanted = torch.zeros(8, dtype=torch.float64)
    optimiser = torch.optim.Adam([wanted], lr=0.03, maximize=True)
    for _ in range(25):
        wanted.grad = form.semidual(wanted)[1]
        optimiser.step()
    found, steps = adam_ascent(lambda x: form.semidual(x)[1], torch.zeros(8).double(), 25, 0.03)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    assert steps == 25
    close = solve(*problem(), k=8, solver="adam", tolerance=1e-3, iterations=5000)
    assert close.iterations < 5000
    assert float(close.row_residual) <= 1e-3


def test_bfgs_finds_a_maximum_that_is_a_kink() -> None:
    """``-max_i |x_i - i|`` has its kink at the maximum, where no gradient is 0."""
    centre = torch.arange(5).double()

    def objective(x: Tensor) -> tuple[Tensor, Tensor]:
        gap = x - centre
        value, place = gap.abs().max(-1)
        gradient = torch.zeros_like(x).scatter(-1, place[..., None], 1.0)
        return -value, -gradient * gap.sign()

    start = torch.randn(3, 5).double() * 10
    found, steps = bfgs_ascent(objective, start, 500, 1e-12)
    assert float((found - centre).abs().max()) < 1e-6
    assert steps < 500


@pytest.mark.parametrize("form", FORMS)
def test_totals_that_differ_by_rounding_do_no_harm(form: str) -> None:
    """The potentials then have a direction in which the dual has no maximum at all."""
    cost = torch.from_numpy(np.random.default_rng(3).random((4, 3)))
    a, b = torch.full((4,), 1 / 4).double(), torch.full((3,), 1 / 3, dtype=torch.float32).double()
    assert float(b.sum()) != 1.0
    result = solve(cost, a, b, k=3, form=form)
    exact = solve(cost, a, torch.full((3,), 1 / 3).double() * (1 / float(b.sum())), k=3)
    assert float(result.row_residual) < 1e-7
    torch.testing.assert_close(result.plan_IJ, exact.plan_IJ, rtol=0, atol=1e-7)
    single = solve(cost.float(), a.float(), b.float(), k=3, form=form, tolerance=0.0)
    torch.testing.assert_close(single.plan_IJ.double(), exact.plan_IJ, rtol=0, atol=1e-5)


def test_no_problem_at_all() -> None:
    empty = torch.zeros(0, 5, 3)
    for solver in ("adam", "bfgs"):
        result = solve(empty, torch.zeros(0, 5), torch.zeros(0, 3), k=2, solver=solver)
        assert result.plan_IJ.shape == (0, 5, 3)


# --- gradients through the solution --------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "columns", "k"), [(6, 3, 6), (6, 3, 4), (3, 6, 3), (8, 4, 5)])
def test_implicit_gradient(rows: int, columns: int, k: int, form: str) -> None:
    """With respect to the cost and, along sums of equal totals, to a and b."""
    given = problem(rows, columns, seed=4)
    assert float(solve(*given, k=k, gamma=0.8).row_residual) < 1e-8  # no ties: differentiable

    def plan(cost: Tensor, row: Tensor, column: Tensor) -> Tensor:
        result = solve(
            cost, row.softmax(-1), column.softmax(-1), k, 0.8, form=form, tolerance=1e-13
        )
        return result.plan_IJ

    leaves = [given.cost.clone(), given.a.log(), given.b.log()]
    assert torch.autograd.gradcheck(
        plan, [leaf.requires_grad_() for leaf in leaves], eps=1e-5, atol=1e-5, rtol=1e-4
    )


def test_implicit_gradient_equals_that_of_unrolled_steps() -> None:
    given = problem(seed=4)
    weight = torch.randn(8, 4, dtype=torch.float64)
    cost = given.cost.clone().requires_grad_()
    (solve(cost, given.a, given.b, k=8).plan_IJ * weight).sum().backward()
    other = given.cost.clone().requires_grad_()
    alpha = torch.zeros(8, dtype=torch.float64)
    for _ in range(600):  # plain gradient ascent, each step differentiated
        plan = sparse_simplex_projection(alpha - other.T, 8, given.b)
        alpha = alpha + 0.25 * (given.a - plan.sum(0))
    (plan.T * weight).sum().backward()
    assert other.grad is not None
    assert cost.grad is not None
    torch.testing.assert_close(cost.grad, other.grad, rtol=1e-5, atol=1e-7)


def test_gradients_of_parts_that_no_entry_connects() -> None:
    """Two problems in one, each with a constant of its own in α."""
    block = torch.tensor([[0.0, 0.3], [0.4, 0.1]]).double()
    cost = torch.full((4, 4), 50.0).double()
    cost[:2, :2], cost[2:, 2:] = block, block.flip(0)
    cost.requires_grad_()
    half = torch.full((4,), 0.5).double()
    result = solve(cost, half, half, k=3)
    weight = torch.randn(4, 4).double()
    (result.plan_IJ * weight).sum().backward()
    alone = block.clone().requires_grad_()
    plan = solve(alone, half[:2], half[:2], k=2).plan_IJ
    (plan * weight[:2, :2]).sum().backward()
    assert cost.grad is not None
    torch.testing.assert_close(cost.grad[:2, :2], alone.grad, rtol=1e-7, atol=1e-9)
    assert bool((cost.grad[:2, 2:] == 0).all())


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 9}, "k is 9"),
        ({"a": problem().a * 2}, "differ in total"),
        ({"a": -problem().a}, "negative"),
        ({"b": problem().b - problem().b[0]}, "not positive"),
        ({"gamma": 0.0}, "gamma is 0.0"),
        ({"gamma": -1.0}, "gamma is -1.0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"cost": torch.full((8, 4), float("nan"))}, "the cost holds NaN"),
        ({"a": torch.full((8,), float("nan"))}, "a holds NaN"),
        ({"cost": torch.zeros(4, 8)}, "do not fit"),
        ({"a": torch.ones(2, 8)}, "do not fit"),
    ],
    ids=str,
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    given = {**problem()._asdict(), "k": 2, **changes}
    with pytest.raises(SpecError, match=message):
        solve_sparse_ot(given["cost"], given["a"], given["b"], given["k"], given.get("gamma", 1.0))


def test_k_is_clamped_if_asked() -> None:
    given = problem()
    plan = solve(*given, k=20, clamp=True).plan_IJ
    torch.testing.assert_close(plan, solve(*given, k=8).plan_IJ)


def test_a_good_solution_does_not_warn() -> None:
    assert float(solve_sparse_ot(*problem(seed=4), k=8).row_residual) <= 1e-6

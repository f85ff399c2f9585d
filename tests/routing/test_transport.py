"""Sparsity-constrained transport against brute force, POT, finite differences and itself."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moekit.errors import SpecError
from moekit.routing import SparseOTResult, solve_sparse_ot, sparse_simplex_projection
from moekit.routing.transport import TransportProblem
from moekit.routing.transport_solvers import adam_ascent, bfgs_ascent

# POT 0.9.7 passes an option to scipy's L-BFGS-B that scipy 1.17 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:scipy.optimize. The `disp` and `iprint` options:DeprecationWarning"
)
FORMS = ("semidual", "dual")


class Given(NamedTuple):
    """A random problem in float64, with unequal sums."""

    cost: Tensor
    a: Tensor
    b: Tensor


def problem(rows: int = 8, columns: int = 4, seed: int = 0) -> Given:
    generator = np.random.default_rng(seed)
    cost, a, b = (generator.random(size) for size in ((rows, columns), rows, columns))
    a, b = (a + 0.1) / (a + 0.1).sum(), (b + 0.1) / (b + 0.1).sum()
    return Given(*(torch.from_numpy(value) for value in (cost, a, b)))


def solve(*args: Any, **options: Any) -> SparseOTResult:
    """The solution, ties or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solve_sparse_ot(*args, **{"tolerance": 1e-10, **options})


def inside(given: Given, k: int, gamma: float = 1.0) -> TransportProblem:
    return TransportProblem(given.cost.T.contiguous(), given.a, given.b, k, gamma)


# --- optimal values -----------------------------------------------------------------------------


def test_values_computed_elsewhere() -> None:
    """8 rows, 4 columns, uniform sums: values found with POT's solvers."""
    cost = torch.from_numpy(np.random.default_rng(0).random((8, 4)))
    a, b = torch.full((8,), 1 / 8).double(), torch.full((4,), 1 / 4).double()
    wanted = {1: 0.3739, 2: 0.3114, 3: 0.303419, 4: 0.303417, 8: 0.303417}
    for k, value in wanted.items():
        result = solve(cost, a, b, k)
        assert float(result.dual) == pytest.approx(value, abs=1e-6 if k > 2 else 6e-5)
        feasible = float(result.row_residual) < 1e-6
        assert feasible == (k > 1)  # four places for eight rows are too few
        if feasible:
            assert float(result.primal) == pytest.approx(float(result.dual), abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(3))
def test_k_of_one_has_the_value_of_the_linear_program(seed: int, form: str) -> None:
    given = problem(seed=seed)
    wanted = ot.emd2(*(v.numpy() for v in (given.a, given.b, given.cost)))
    wanted += 0.35 * float(given.b.square().sum())
    result = solve(*given, k=1, gamma=0.7, form=form)
    assert float(result.dual) == pytest.approx(wanted, abs=1e-6)
    with pytest.warns(UserWarning, match=r"violates a sum by .* ties?"):
        solve_sparse_ot(*given, k=1, iterations=20)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(8, 4), (5, 9)], ids=str)
def test_k_of_all_rows_is_quadratic_transport(
    shape: tuple[int, int], gamma: float, form: str
) -> None:
    given = problem(*shape, seed=3)
    values = [v.numpy() for v in (given.a, given.b, given.cost)]
    # POT's dual solver ends with sums that are 1e-6 off for the smallest γ, this one does not.
    wanted = ot.smooth.smooth_ot_semi_dual(*values, gamma, stopThr=1e-12, numItermax=5000)
    result = solve(*given, k=shape[0], gamma=gamma, form=form)
    np.testing.assert_allclose(result.plan_IJ.numpy(), wanted, rtol=0, atol=1e-6)
    assert result.nonzeros_J.tolist() == (result.plan_IJ > 0).sum(0).tolist()


@pytest.mark.parametrize("seed", [1, 4])
def test_equals_pot_where_no_entries_tie(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    given = problem(seed=seed)
    values = [v.numpy() for v in (given.a, given.b, given.cost)]
    plans = [
        function(*values, 1.0, reg_type="sparsity_constrained", max_nz=5, stopThr=1e-13)
        for function in (ot.smooth.smooth_ot_dual, ot.smooth.smooth_ot_semi_dual)
    ]
    capsys.readouterr()
    result = solve(*given, k=5)
    assert float(result.row_residual) < 1e-9
    for plan in plans:
        np.testing.assert_allclose(result.plan_IJ.numpy(), plan, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_value_falls_as_k_grows(seed: int) -> None:
    values = [float(solve(*problem(seed=seed), k=k).dual) for k in range(1, 9)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(values))
    assert values[0] > values[-1] + 1e-3


def least_cost(given: Given, k: int, gamma: float) -> float:
    """Over every set of positive entries, the stationary plan, if it is a plan at all."""
    rows, columns = given.cost.shape
    choices = [c for n in range(1, k + 1) for c in itertools.combinations(range(rows), n)]
    best = float("inf")
    for supports in itertools.product(choices, repeat=columns):
        entries = [(i, j) for j, support in enumerate(supports) for i in support]
        sums = torch.zeros(rows + columns, len(entries), dtype=torch.float64)
        for n, (i, j) in enumerate(entries):
            sums[i, n] = sums[rows + j, n] = 1.0
        cost = torch.tensor([float(given.cost[i, j]) for i, j in entries], dtype=torch.float64)
        right = torch.cat([given.a, given.b])
        # t = (Aᵀλ - c) / γ, A t = right
        potential = torch.linalg.pinv(sums @ sums.T) @ (gamma * right + sums @ cost)
        t = (sums.T @ potential - cost) / gamma
        if float(t.min()) > -1e-12 and float((sums @ t - right).abs().max()) < 1e-9:
            best = min(best, float(cost @ t + gamma / 2 * t @ t))
    return best


@pytest.mark.parametrize(
    ("rows", "columns", "k", "seeds", "without_ties", "felt"),
    [(4, 3, 2, (0, 8), 1, 0), (3, 3, 2, (0, 1, 2, 3), 3, 2), (4, 3, 3, (0, 9), 1, 0)],
)
def test_the_dual_is_the_least_cost_over_all_supports_where_nothing_ties(
    rows: int, columns: int, k: int, seeds: tuple[int, ...], without_ties: int, felt: int
) -> None:
    """``felt`` of them cost more than quadratic transport: no cut of its plan would do there."""
    exact = dearer = 0
    for seed in seeds:
        given = problem(rows, columns, seed)
        wanted = least_cost(given, k, 0.5)
        result = solve(*given, k=k, gamma=0.5)
        assert float(result.dual) <= wanted + 1e-9
        if float(result.row_residual) < 1e-6:
            exact += 1
            dearer += wanted > float(solve(*given, k=rows, gamma=0.5).dual) + 1e-6
            assert float(result.dual) == pytest.approx(wanted, abs=1e-6)
            assert float(result.primal) == pytest.approx(wanted, abs=1e-6)
    assert (exact, dearer) == (without_ties, felt)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
@pytest.mark.parametrize("seed", range(2))
def test_dual_and_semidual_have_one_optimum(seed: int, k: int) -> None:
    given = problem(seed=seed)
    results = [solve(*given, k=k, form=form) for form in FORMS]
    assert float(results[0].dual) == pytest.approx(float(results[1].dual), abs=1e-6)
    for result in results:  # each set of potentials has that value in the dual
        value, _ = inside(given, k).dual(torch.cat([result.alpha_I, result.beta_J]))
        assert float(value) == pytest.approx(float(results[0].dual), abs=1e-6)


# --- the dual functions -------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("k", [1, 3, 7])
def test_gradients_equal_finite_differences(k: int, form: str) -> None:
    given = problem(7, 5, seed=k)
    size = 7 if form == "semidual" else 12
    objective = getattr(inside(given, k, gamma=0.3), form)
    x = torch.randn(size, dtype=torch.float64)
    step = 1e-6 * torch.eye(size, dtype=torch.float64)
    differences = torch.stack([(objective(x + h)[0] - objective(x - h)[0]) / 2e-6 for h in step])
    torch.testing.assert_close(objective(x)[1], differences, rtol=1e-6, atol=1e-7)


def semidual_by_loop(given: Given, alpha: Tensor, k: int, gamma: float) -> float:
    """The definition, column by column, with a grid-free search over prefixes of the ranking."""
    value = float(alpha @ given.a)
    for j in range(given.cost.shape[1]):
        x, b = alpha - given.cost[:, j], float(given.b[j])
        best = float("-inf")
        order = x.argsort(descending=True)[:k]
        for n in range(1, k + 1):
            top = x[order[:n]]
            p = top / (gamma * b) - (float(top.sum()) / (gamma * b) - 1) / n
            if float(p.min()) >= 0:
                best = max(best, float(p @ top - gamma * b / 2 * p @ p))
        value -= b * best
    return value


@given(st.integers(0, 2**20), st.integers(1, 6), st.floats(0.05, 20))
def test_semidual_by_definition_and_concavity(seed: int, k: int, gamma: float) -> None:
    instance = problem(6, 4, seed)
    objective = inside(instance, k, gamma)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    assert float(objective.semidual(x)[0]) == pytest.approx(
        semidual_by_loop(instance, x, k, gamma), rel=1e-9, abs=1e-9
    )
    middle = float(objective.semidual((x + y) / 2)[0])
    mean = (float(objective.semidual(x)[0]) + float(objective.semidual(y)[0])) / 2
    assert middle >= mean - 1e-9 * max(1.0, abs(mean))


@given(st.integers(0, 2**20), st.integers(1, 7), st.sampled_from([0, 1, 5]))
def test_columns_hold_after_any_number_of_steps(seed: int, k: int, steps: int) -> None:
    instance = problem(7, 3, seed)
    for solver in ("adam", "bfgs"):
        result = solve(*instance, k=k, gamma=0.2, solver=solver, iterations=steps)
        assert int(result.nonzeros_J.max()) <= k
        assert float(result.plan_IJ.min()) >= 0
        torch.testing.assert_close(result.plan_IJ.sum(0), instance.b, rtol=0, atol=1e-12)
        assert float(result.column_residual) < 1e-12
        assert result.iterations <= steps


def test_what_leaves_the_plan_as_it_is() -> None:
    given = problem(seed=4)
    form = inside(given, 4)
    alpha = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(form.plan(alpha + 3.0), form.plan(alpha), rtol=0, atol=1e-12)
    shifted = given.cost + torch.randn(8, 1).double() + torch.randn(1, 4).double()
    plan = solve(*given, k=5).plan_IJ
    moved = solve(shifted, given.a, given.b, k=5).plan_IJ
    torch.testing.assert_close(moved, plan, rtol=0, atol=1e-8)


def test_rows_without_mass_take_no_part() -> None:
    given = problem(6, 4, seed=2)
    cost = torch.cat([given.cost, torch.full((3, 4), -9.0).double()])  # cheap, and yet not used
    wide = solve(cost, torch.cat([given.a, torch.zeros(3).double()]), given.b, k=5)
    narrow = solve(*given, k=5)
    torch.testing.assert_close(wide.plan_IJ[:6], narrow.plan_IJ, rtol=0, atol=1e-9)
    assert bool((wide.plan_IJ[6:] == 0).all())


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

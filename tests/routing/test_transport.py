"""Sparsity-constrained transport against brute force, POT, finite differences and itself."""

from __future__ import annotations

import itertools

import numpy as np
import ot
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transport_cases import FORMS, Given, inside, problem, solve

from moekit.routing import solve_sparse_ot

# POT 0.9.7 passes an option to scipy's L-BFGS-B that scipy 1.17 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:scipy.optimize. The `disp` and `iprint` options:DeprecationWarning"
)

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

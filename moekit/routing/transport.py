"""Optimal transport with at most k entries a column: the problem, its dual and its semi-dual.

Liu, Puigcerver, Blondel: "Sparsity-Constrained Optimal Transport", ICLR 2023, arXiv 2209.15466.
Of all plans ``T ≥ 0`` with row sums a, column sums b and at most k entries above zero a column,
the one of least ``⟨T, C⟩ + γ/2 ‖T‖²``. The constraint on k is not convex; dual and semi-dual are
concave, bound the least cost from below, and cost one top-k a column.

Shape suffixes here: I rows (sources), J columns (sinks); leading dimensions are independent
problems. Inside, columns come first: ``cost_JI``, so that a column is contiguous.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.routing.sparse_simplex import project
from moekit.routing.transport_gradient import differentiable_plan
from moekit.routing.transport_solvers import adam_ascent, bfgs_ascent

Form = Literal["semidual", "dual"]
Solver = Literal["adam", "bfgs"]


@dataclass(frozen=True)
class TransportProblem:
    """One transport problem, or a batch of them.

    Attributes:
        cost_JI: cost of each pair, columns first; finite.
        a_I: row sums; rows of 0 take no part.
        b_J: column sums.
        k: most entries above zero a column.
        gamma: weight γ of the quadratic term.
    """

    cost_JI: Tensor
    a_I: Tensor
    b_J: Tensor
    k: int
    gamma: float = 1.0

    def scores(self, alpha_I: Tensor) -> Tensor:
        """``α - c_j``, which ranks the rows within each column (J, I)."""
        score_JI = alpha_I[..., None, :] - self.cost_JI
        return score_JI.masked_fill((self.a_I == 0)[..., None, :], float("-inf"))

    @property
    def _live_I(self) -> Tensor:
        return (self.a_I != 0).to(self.a_I.dtype)

    def plan(self, alpha_I: Tensor) -> Tensor:
        """The plan (J, I) that the semi-dual potentials stand for; its column sums are b.

        ``b_j`` times the projection of ``(α - c_j) / (γ b_j)`` on the simplex is the projection of
        ``(α - c_j) / γ`` on the simplex of sum ``b_j``.
        """
        return project(self.scores(alpha_I) / self.gamma, self.k, self.b_J)[0]

    def semidual(self, alpha_I: Tensor) -> tuple[Tensor, Tensor]:
        """Value (...,) and gradient (..., I) of the semi-dual.

        Its value is the cost of the plan plus ``αᵀ(a - T1)``, its gradient ``a - T1`` (Danskin).
        """
        plan_JI = self.plan(alpha_I)
        gap_I = self._row_gap(plan_JI)
        return self.primal(plan_JI) + (alpha_I * gap_I).sum(-1), gap_I

    def semidual_gradient(self, alpha_I: Tensor) -> Tensor:
        """The gradient (..., I) of the semi-dual alone."""
        return self._row_gap(self.plan(alpha_I))

    def _row_gap(self, plan_JI: Tensor) -> Tensor:
        return _across(self.a_I - plan_JI.sum(-2), self._live_I)

    def dual_plan(self, potentials: Tensor) -> Tensor:
        """The plan (J, I) of the dual potentials ``(α, β)``, given on end (..., I + J)."""
        alpha_I, beta_J = self.split(potentials)
        score_JI = self.scores(alpha_I) + beta_J[..., None]
        best_JK, row_JK = score_JI.topk(self.k, dim=-1)
        value_JK = best_JK.clamp_min(0) / self.gamma
        return torch.zeros_like(score_JI).scatter(-1, row_JK, value_JK)

    def dual(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        """Value (...,) and gradient (..., I + J) of the dual."""
        plan_JI = self.dual_plan(potentials)
        gap = torch.cat([self.a_I - plan_JI.sum(-2), self.b_J - plan_JI.sum(-1)], dim=-1)
        gap = _across(gap, torch.cat([self._live_I, -torch.ones_like(self.b_J)], dim=-1))
        return self.primal(plan_JI) + (potentials * gap).sum(-1), gap

    def primal(self, plan_JI: Tensor) -> Tensor:
        """``⟨T, C⟩ + γ/2 ‖T‖²`` (...,)."""
        return (plan_JI * (self.cost_JI + plan_JI * (self.gamma / 2))).sum((-2, -1))

    def split(self, potentials: Tensor) -> tuple[Tensor, Tensor]:
        """``α (..., I)`` and ``β (..., J)`` of dual potentials given on end."""
        rows, columns = self.a_I.shape[-1], self.b_J.shape[-1]
        alpha_I, beta_J = potentials.split([rows, columns], dim=-1)
        return alpha_I, beta_J


def _across(gradient_D: Tensor, level_D: Tensor) -> Tensor:
    """The gradient without its part along a direction in which the function does not change.

    That is 0 but for the rounding of the totals of a and b, along which there is no maximum.
    """
    part = (gradient_D * level_D).sum(-1, keepdim=True)
    return gradient_D - level_D * (part / level_D.square().sum(-1, keepdim=True))


@dataclass(frozen=True)
class SparseOTResult:
    """A solved transport problem, or a batch of them.

    Attributes:
        plan_IJ: the plan. It has a gradient with respect to cost, a and b.
        alpha_I, beta_J: potentials.
        dual: value of the dual or semi-dual (...,), a lower bound on the least cost.
        primal: cost of the plan (...,); no upper bound on the least cost where the plan violates
            the sums.
        row_residual, column_residual: largest violation of a row and of a column sum (...,).
        iterations: steps that the solver took.
    """

    plan_IJ: Tensor
    alpha_I: Tensor
    beta_J: Tensor
    dual: Tensor
    primal: Tensor
    row_residual: Tensor
    column_residual: Tensor
    iterations: int

    @property
    def nonzeros_J(self) -> Tensor:
        """Entries above zero of each column, int64 (..., J)."""
        return (self.plan_IJ > 0).sum(-2)


def solve_sparse_ot(
    cost_IJ: Tensor,
    a_I: Tensor,
    b_J: Tensor,
    k: int,
    gamma: float = 1.0,
    *,
    form: Form = "semidual",
    solver: Solver = "bfgs",
    iterations: int = 500,
    tolerance: float = 1e-6,
    learning_rate: float = 1e-2,
    clamp: bool = False,
) -> SparseOTResult:
    """Solve ``min ⟨T, C⟩ + γ/2 ‖T‖²`` over plans with at most k entries above zero a column.

    k = 1 has the value of unregularised transport (plus ``γ/2 ‖b‖²``), k = I is quadratically
    regularised transport. To limit rows instead, transpose the cost and exchange a and b.

    If the k-th and (k+1)-th entry of a column tie at the solution, the plan that is read off
    violates row sums, however long the solver runs: ``row_residual`` says so, and a warning. It
    does at k = 1, as a rule. The dual value is right all the same.

    Args:
        cost_IJ: costs (..., I, J).
        a_I, b_J: row and column sums (..., I) and (..., J), of equal total.
        k: most entries above zero a column, 1 to I.
        gamma: γ.
        form: ``semidual`` has half the variables and exact column sums at every step.
        solver: ``bfgs``, which ends at ``tolerance`` or where it cannot rise further; or Adam with
            ``learning_rate``.
        iterations: most steps.
        tolerance: violation of the sums at which to stop.
        clamp: take k = I where k is larger, instead of refusing it.

    Raises:
        SpecError: a value is not finite, negative where it must not be, or the totals differ.

    Example:
        >>> from moekit.routing import solve_sparse_ot
        >>> cost_IJ = torch.tensor([[0.0, 1.0], [0.2, 0.3], [1.0, 0.0]])
        >>> result = solve_sparse_ot(cost_IJ, torch.ones(3), torch.full((2,), 1.5), k=2, gamma=0.1)
        >>> result.plan_IJ
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000],
                [0.0000, 1.0000]])
    """
    k = min(k, cost_IJ.shape[-2]) if clamp and cost_IJ.dim() >= 2 else k
    _check(cost_IJ, a_I, b_J, k, gamma)
    problem = TransportProblem(
        cost_IJ.detach().transpose(-2, -1).contiguous(), a_I.detach(), b_J.detach(), k, gamma
    )
    potentials, steps = maximise(problem, form, solver, iterations, tolerance, learning_rate)
    found = result_of(problem, form, potentials, steps)
    _warn_of_violations(found, tolerance)
    plan_JI = found.plan_IJ.transpose(-2, -1)
    return replace(found, plan_IJ=differentiable_plan(cost_IJ, a_I, b_J, plan_JI, gamma))


@torch.no_grad()
def maximise(
    problem: TransportProblem,
    form: Form,
    solver: Solver,
    iterations: int,
    tolerance: float | None,
    learning_rate: float,
) -> tuple[Tensor, int]:
    """Potentials (..., I) of the semi-dual or (..., I + J) of the dual, and the steps taken.

    Without a ``tolerance`` Adam takes all its steps and reads nothing back from the device.
    """
    objective = problem.semidual if form == "semidual" else problem.dual
    start = torch.zeros_like(problem.a_I)
    if form == "dual":
        start = torch.cat([start, torch.zeros_like(problem.b_J)], dim=-1)
    if solver == "bfgs":
        return bfgs_ascent(objective, start, iterations, 0.0 if tolerance is None else tolerance)
    gradient = problem.semidual_gradient if form == "semidual" else lambda x: problem.dual(x)[1]
    return adam_ascent(gradient, start, iterations, learning_rate, tolerance)


@torch.no_grad()
def result_of(
    problem: TransportProblem, form: Form, potentials: Tensor, iterations: int
) -> SparseOTResult:
    """What the potentials of the dual or semi-dual stand for; the plan has no gradient."""
    if form == "dual":
        (value, _), plan_JI = problem.dual(potentials), problem.dual_plan(potentials)
        alpha_I, beta_J = problem.split(potentials)
    else:
        (value, _), alpha_I = problem.semidual(potentials), potentials
        scaled_JI = problem.scores(alpha_I) / problem.gamma
        plan_JI, threshold_J = project(scaled_JI, problem.k, problem.b_J)
        beta_J = -problem.gamma * threshold_J
    return SparseOTResult(
        plan_IJ=plan_JI.transpose(-2, -1),
        alpha_I=alpha_I,
        beta_J=beta_J,
        dual=value,
        primal=problem.primal(plan_JI),
        row_residual=(problem.a_I - plan_JI.sum(-2)).abs().amax(-1),
        column_residual=(problem.b_J - plan_JI.sum(-1)).abs().amax(-1),
        iterations=iterations,
    )


def _check(cost_IJ: Tensor, a_I: Tensor, b_J: Tensor, k: int, gamma: float) -> None:
    if cost_IJ.shape != (*a_I.shape, b_J.shape[-1]) or a_I.shape[:-1] != b_J.shape[:-1]:
        raise SpecError(
            f"cost {tuple(cost_IJ.shape)}, a {tuple(a_I.shape)} and b {tuple(b_J.shape)} do not "
            "fit; wanted (..., I, J), (..., I) and (..., J)"
        )
    if not 1 <= k <= a_I.shape[-1]:
        raise SpecError(f"k is {k} of columns with {a_I.shape[-1]} rows; wanted 1 to the rows")
    if not 0 < gamma < float("inf"):
        raise SpecError(f"gamma is {gamma}; wanted a positive finite number")
    for name, value in (("the cost", cost_IJ), ("a", a_I), ("b", b_J)):
        if not bool(torch.isfinite(value).all()):
            raise SpecError(f"{name} holds NaN or infinity; wanted finite numbers")
    if not bool((a_I >= 0).all()) or not bool((b_J > 0).all()):
        raise SpecError("a row sum is negative, or a column sum is not positive; drop such columns")
    total, other = a_I.sum(-1), b_J.sum(-1)
    if not torch.allclose(total, other, rtol=1e-5, atol=0):
        raise SpecError("a and b differ in total; scale one of them to the other's sum")


def _warn_of_violations(result: SparseOTResult, tolerance: float) -> None:
    worst = torch.maximum(result.row_residual, result.column_residual)
    if bool((worst > tolerance).any()):
        warnings.warn(
            f"the plan violates a sum by {float(worst.max()):.2g}, more than {tolerance:.2g}: the "
            "solver needs more steps, or entries of a column tie and k allows no such plan; the "
            "dual value stays a lower bound",
            stacklevel=3,
        )

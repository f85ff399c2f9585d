"""How fast the transport solver converges for each limit k, on what a gate has learnt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.routing.transport import TransportProblem
from moekit.routing.transport_solvers import bfgs_ascent

LIMITS = (1, 2, 8, 32, 64, 256)  # of 256 tokens; 8 experts need 32 each to take them all
SHARE = 0.99
LEVEL = 1e-6  # relative; the start can be the solution
ROW_SUMS = 1e-3


@dataclass(frozen=True)
class Convergence:
    """Evaluations of the semi-dual by BFGS.

    Attributes:
        to_value: until the semi-dual has made 99% of its way from the start to the best value
            found, or is level with it.
        to_plan: until every row sum is right within 0.001; None if it never is.
    """

    to_value: int
    to_plan: int | None


@torch.no_grad()
def convergence(scores_NE: Tensor, k: int, steps: int) -> Convergence:
    """Of the semi-dual for experts that take at most k of the N tokens, in float64.

    Args:
        steps: most steps of BFGS. Where they do not reach the maximum, its value is set too low,
            and ``to_value`` with it.
    """
    tokens, experts = scores_NE.shape
    cost_EN = -scores_NE.T.double().contiguous()
    problem = TransportProblem(
        cost_EN, cost_EN.new_ones(tokens), cost_EN.new_full((experts,), tokens / experts), k
    )
    values, rows = [], []

    def objective(alpha_N: Tensor) -> tuple[Tensor, Tensor]:
        value, gap_N = problem.semidual(alpha_N)
        values.append(float(value))
        rows.append(float(gap_N.abs().max()))
        return value, gap_N

    bfgs_ascent(objective, torch.zeros_like(problem.a_I), steps, tolerance=1e-8)
    top = max(values)
    wanted = min(values[0] + SHARE * (top - values[0]), top - LEVEL * abs(top))
    to_value = next(n for n, value in enumerate(values) if value >= wanted)
    to_plan = next((n for n, row in enumerate(rows) if row < ROW_SUMS), None)
    return Convergence(to_value, to_plan)

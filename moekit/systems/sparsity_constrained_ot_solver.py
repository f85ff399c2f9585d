"""How fast the transport solver converges for each limit k, on what a gate has learnt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.routing.transport import TransportProblem, maximise
from moekit.routing.transport_solvers import adam_ascent

LIMITS = (1, 2, 8, 32, 64, 256)  # of 256 tokens; 8 experts need 32 each to take them all
SHARE = 0.99
LEVEL = 1e-6  # relative; the start can be the solution
ROW_SUMS = 1e-3
REFERENCE = 300


@dataclass(frozen=True)
class Convergence:
    """Steps of Adam at the router's rate.

    Attributes:
        steps_to_value: steps until the semi-dual has made 99% of its way from the start to the
            best value known, or is level with it; all of them if it never does.
        steps_to_plan: steps until every row sum is right within 0.001; None if it never is.
    """

    steps_to_value: int
    steps_to_plan: int | None


@torch.no_grad()
def convergence(scores_NE: Tensor, k: int, steps: int) -> Convergence:
    """Of the semi-dual for experts that take at most k of the N tokens, in float64.

    The best value known is the better of the end of these steps and of BFGS.
    """
    tokens, experts = scores_NE.shape
    cost_EN = -scores_NE.T.double().contiguous()
    problem = TransportProblem(
        cost_EN, cost_EN.new_ones(tokens), cost_EN.new_full((experts,), tokens / experts), k
    )
    values, rows = [], []

    def gradient(alpha_N: Tensor) -> Tensor:
        value, gap_N = problem.semidual(alpha_N)
        values.append(float(value))
        rows.append(float(gap_N.abs().max()))
        return gap_N

    adam_ascent(gradient, torch.zeros_like(problem.a_I), steps, learning_rate=1e-2)
    best, _ = maximise(problem, "semidual", "bfgs", REFERENCE, 1e-8, 1e-2)
    top = max(*values, float(problem.semidual(best)[0]))
    wanted = min(values[0] + SHARE * (top - values[0]), top - LEVEL * abs(top))
    to_value = next((n for n, value in enumerate(values) if value >= wanted), steps)
    to_plan = next((n for n, row in enumerate(rows) if row < ROW_SUMS), None)
    return Convergence(to_value, to_plan)

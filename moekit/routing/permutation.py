"""Soft permutations by annealed Sinkhorn iterations, and their hardening."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moekit.errors import DivergedError, SpecError

Schedule = Literal["paper", "safe"]

ENTROPY_FLOOR = 1e-6
ROW_TOLERANCE = 1e-2


def soft_permutation(log_weight_EE: Tensor, schedule: Schedule, progress: float) -> Tensor:
    """A matrix (E, E) near a permutation, differentiable in ``log_weight_EE``.

    Columns sum to 1. With ``paper`` the rows need not, for the temperature falls to 1e-7 faster
    than the iterations can follow; with ``safe`` they do, up to 1e-2 unless 500 iterations are too
    few. :func:`row_error` tells how far off they are.

    Args:
        progress: share of the learning phase that is over, 0 to 1.

    Raises:
        SpecError: the log-weights are no square matrix.
    """
    if log_weight_EE.dim() != 2 or log_weight_EE.shape[0] != log_weight_EE.shape[1]:
        raise SpecError(
            f"the log-weights of a permutation have shape {tuple(log_weight_EE.shape)}; "
            "wanted a square matrix, gate outputs by experts"
        )
    if schedule == "paper":
        tau = 10.0 ** (-3 - 4 * progress)
        return sinkhorn(log_weight_EE / tau, int(20 + 130 * progress)).exp()
    log_plan_EE = sinkhorn(log_weight_EE / 10.0 ** (-1 - 1.5 * progress), 60)
    for _ in range(500 - 60):
        if float(row_error(log_plan_EE.exp())) < ROW_TOLERANCE:
            break
        log_plan_EE = sinkhorn(log_plan_EE, 1)
    return log_plan_EE.exp()


def sinkhorn(log_plan_EE: Tensor, iterations: int) -> Tensor:
    """Normalise rows, then columns, in the log domain, so often."""
    for _ in range(iterations):
        log_plan_EE = log_plan_EE.log_softmax(1).log_softmax(0)
    return log_plan_EE


def row_error(plan_EE: Tensor) -> Tensor:
    """Largest distance of a row's sum from 1 ()."""
    return (plan_EE.detach().sum(1) - 1).abs().max()


def permutation_entropy(plan_EE: Tensor) -> Tensor:
    """Entropy of the entries as they are, plus that of the rows divided by their sum ()."""
    rows_EE = plan_EE / plan_EE.sum(1, keepdim=True).clamp_min(torch.finfo(plan_EE.dtype).tiny)
    return _entropy(plan_EE) + _entropy(rows_EE)


def best_assignment(value_EE: Tensor) -> Tensor:
    """The column (E,) of each row in the permutation of the largest total value.

    Raises:
        DivergedError: a value is not finite.
    """
    if not bool(torch.isfinite(value_EE).all()):
        raise DivergedError(
            "the learned permutation is not finite; training has diverged: lower the learning rate"
        )
    # Imported here, as it takes a quarter of the time that all of moekit takes.
    from scipy.optimize import linear_sum_assignment

    _, column_E = linear_sum_assignment(value_EE.detach().double().cpu().numpy(), maximize=True)
    return torch.as_tensor(column_E, dtype=torch.int64, device=value_EE.device)


def _entropy(plan_EE: Tensor) -> Tensor:
    return -(plan_EE * (plan_EE + ENTROPY_FLOOR).log()).sum()

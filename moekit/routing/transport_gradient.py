"""Gradients through the solution of a transport problem, by the implicit function theorem.

Write ``1_j`` for the indicator of the support of column j, which has s_j entries. At the solution
``a = Σ_j t_j``, and while the supports stay, ``t_j = J_j (α - c_j) + (b_j / s_j) 1_j`` with
``J_j = (diag(1_j) - 1_j 1_jᵀ / s_j) / γ``. Hence ``H dα = da + Σ_j (J_j dc_j - db_j / s_j 1_j)``
with ``H = Σ_j J_j``. No solver step is differentiated. The gradient is that of the exact solution;
away from it, after a few steps of Adam, say, it is an approximation.

Shape suffixes as in :mod:`moekit.routing.transport`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.routing.sparse_simplex import support_mean


def differentiable_plan(
    cost_IJ: Tensor, a_I: Tensor, b_J: Tensor, plan_JI: Tensor, gamma: float
) -> Tensor:
    """The solution ``plan_JI`` as a function (I, J) of cost and sums.

    The gradient with respect to a holds up to a constant, for the totals of a and b move together.
    """
    plan_IJ: Tensor = _Plan.apply(plan_JI, gamma, cost_IJ, a_I, b_J)  # type: ignore[no-untyped-call]
    return plan_IJ


class _Plan(torch.autograd.Function):
    @staticmethod
    def forward(plan_JI: Tensor, *_: Any) -> Tensor:
        return plan_JI.transpose(-2, -1).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        plan_JI, ctx.gamma, *others = inputs
        ctx.save_for_backward(plan_JI > 0)
        ctx.dtypes = tuple(value.dtype for value in others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_IJ: Tensor) -> tuple[Tensor | None, ...]:
        (support_JI,) = ctx.saved_tensors
        # A small eigenvalue and one that is 0 differ by less than float32 can tell.
        grad_JI = grad_IJ.transpose(-2, -1).double()
        pulled_I = _centred(grad_JI, support_JI, ctx.gamma).sum(-2)
        moved_I = _solved(support_JI.double(), ctx.gamma * pulled_I)
        rest_JI = grad_JI - moved_I[..., None, :]
        cost_JI = -_centred(rest_JI, support_JI, ctx.gamma)
        grads = cost_JI.transpose(-2, -1), moved_I, support_mean(rest_JI, support_JI)
        typed = (grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True))
        return None, None, *typed


def _centred(value_JI: Tensor, support_JI: Tensor, gamma: float) -> Tensor:
    """``J_j`` applied to each column."""
    mean_J = support_mean(value_JI, support_JI)
    return (value_JI - mean_J[..., None]).masked_fill(~support_JI, 0.0) / gamma


def _solved(support_JI: Tensor, right_I: Tensor) -> Tensor:
    """``w`` (I) with ``γ H w = right``, where ``γ H = diag(d) - Mᵀ diag(1/s) M``.

    M is the support, d and s its sums over columns and rows. It is a Laplacian, singular by a
    constant for each connected part, for which any will do. The smaller of the two equal systems,
    over rows or over columns, is solved.
    """
    size_J = support_JI.sum(-1).clamp_min(1)
    degree_I = support_JI.sum(-2).clamp_min(1)
    if support_JI.shape[-1] <= support_JI.shape[-2]:
        return _pinv_times(_laplacian(support_JI.transpose(-2, -1), degree_I, size_J), right_I)
    scaled_I = right_I / degree_I
    right_J = (support_JI @ scaled_I[..., None])[..., 0]
    mean_J = _pinv_times(_laplacian(support_JI, size_J, degree_I), right_J)
    return scaled_I + (mean_J[..., None, :] @ support_JI)[..., 0, :] / degree_I


def _laplacian(edge_XY: Tensor, degree_X: Tensor, degree_Y: Tensor) -> Tensor:
    """``diag(degree_X) - M diag(1/degree_Y) Mᵀ`` (X, X)."""
    return torch.diag_embed(degree_X) - (edge_XY / degree_Y[..., None, :]) @ edge_XY.mT


def _pinv_times(matrix_XX: Tensor, value_X: Tensor) -> Tensor:
    inverse_XX = torch.linalg.pinv(matrix_XX, hermitian=True)
    return (inverse_XX @ value_X[..., None])[..., 0]

"""The nearest point of a simplex that has at most k entries above zero.

Kyrillidis, Becker, Cevher, Koch: "Sparse projections onto the simplex", ICML 2013: keep the k
largest entries, then project those on the ordinary simplex. The result is exact.

Shape suffix here: I entries of one vector; leading dimensions are independent vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.errors import SpecError


def sparse_simplex_projection(x_I: Tensor, k: int, total: Tensor | float = 1.0) -> Tensor:
    """The nearest vector to ``x_I`` that is not negative, sums to ``total`` and has k entries.

    Differentiable in ``x_I`` and ``total`` where no entry ties with the k-th largest. An entry of
    minus infinity stays zero.

    Args:
        x_I: vectors (..., I).
        k: most entries above zero.
        total: sum of each vector, a number or (...,), at least 0.

    Raises:
        SpecError: ``k`` is not between 1 and I.

    Example:
        >>> from moekit.routing import sparse_simplex_projection
        >>> sparse_simplex_projection(torch.tensor([0.9, 0.5, 0.4]), k=2)
        tensor([0.7000, 0.3000, 0.0000])
    """
    if not 1 <= k <= x_I.shape[-1]:
        raise SpecError(
            f"k is {k} of vectors with {x_I.shape[-1]} entries; wanted 1 to {x_I.shape[-1]}"
        )
    total = torch.as_tensor(total, dtype=x_I.dtype, device=x_I.device).expand(x_I.shape[:-1])
    return _Projection.apply(x_I, total, k)  # type: ignore[no-untyped-call]


def project(x_I: Tensor, k: int, total: Tensor) -> tuple[Tensor, Tensor]:
    """The projection, and the threshold (...,) that it subtracts from the entries it keeps."""
    best_K, place_K = x_I.topk(k, dim=-1)
    excess_K = best_K.cumsum(-1) - total[..., None]
    rank_K = torch.arange(1, k + 1, device=x_I.device)
    kept = (best_K - excess_K / rank_K > 0).sum(-1, keepdim=True).clamp_min(1)
    threshold = excess_K.gather(-1, kept - 1) / kept
    value_K = (best_K - threshold).clamp_min(0)
    return torch.zeros_like(x_I).scatter(-1, place_K, value_K), threshold[..., 0]


class _Projection(torch.autograd.Function):
    """On a fixed support of s entries the projection is ``x - (Σ x - total) / s``."""

    @staticmethod
    def forward(x_I: Tensor, total: Tensor, k: int) -> Tensor:
        return project(x_I, k, total)[0]

    @staticmethod
    def setup_context(ctx: Any, _: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_I: Tensor) -> tuple[Tensor, Tensor, None]:
        (value_I,) = ctx.saved_tensors
        support_I = value_I > 0
        mean = support_mean(grad_I, support_I)
        return (grad_I - mean[..., None]).masked_fill(~support_I, 0.0), mean, None


def support_mean(value_I: Tensor, support_I: Tensor) -> Tensor:
    """Mean (...,) of the entries in the support; 0 where it is empty."""
    return (value_I * support_I).sum(-1) / support_I.sum(-1).clamp_min(1)

"""The interface of a backend: a whole feed-forward pass over a plan, and its backward pass."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moekit.dispatch.plan import Plan
from moekit.experts.experts import FeedForward


class Wanted(NamedTuple):
    """One flag for each tensor that a backward pass may be asked the gradient of."""

    x: bool
    weight: bool
    up: bool
    down: bool
    up_bias: bool
    down_bias: bool


class Gradients(NamedTuple):
    """The gradients of the tokens, combine weights, projections and biases; None if not wanted."""

    x_ND: Tensor | None = None
    weight_NK: Tensor | None = None
    up_EJD: Tensor | None = None
    down_EOH: Tensor | None = None
    up_bias_EJ: Tensor | None = None
    down_bias_EO: Tensor | None = None


class Backend:
    """Gather, first product, activation, second product, weighting and sum, as one operation.

    With ``A`` the activation of a row, ``s`` its combine weight and ``g`` its token's gradient,
    the backward pass of every backend is that of SonicMoE

    - ``dA' = g W_down`` with g unscaled, which gives the router's gradient ``ds = Σ_H dA' ⊙ A``
      without the second product's output;
    - ``dW_down = gᵀ (s ⊙ A)``, with A computed anew from the first product's output;
    - from ``s dA'`` through the activation the gradients of that output, ``W_up`` and the tokens.

    So nothing is kept for it but the tokens, the first product's output and the plan.
    """

    name: ClassVar[str]

    def forward(
        self, x_ND: Tensor, plan: Plan, bank: FeedForward, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """The combined outputs (N, O) in the dtype of ``x_ND``.

        Also, if ``keep``, the first product's output as one or several tensors whose rows
        together are (R, J); otherwise an empty list.
        """
        raise NotImplementedError

    def backward(
        self,
        grad_NO: Tensor,
        x_ND: Tensor,
        plan: Plan,
        bank: FeedForward,
        inner: list[Tensor],
        wanted: Wanted,
    ) -> Gradients:
        """The gradients that are wanted, from what :meth:`forward` kept."""
        raise NotImplementedError


def accumulator(like: Tensor, width: int) -> Tensor:
    """Zeros (N, width) in which rows are summed: in at least float32."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(like.shape[0], width, dtype=dtype, device=like.device)


def row_weights(plan: Plan) -> Tensor:
    """The combine weight of each row, (R,)."""
    return plan.weight_NK.flatten().index_select(0, plan.assignment_R)


def row_dots(a_RX: Tensor, b_RX: Tensor) -> Tensor:
    """The inner product of each pair of rows, (R,), in at least float32."""
    dtype = torch.promote_types(a_RX.dtype, torch.float32)
    return torch.linalg.vecdot(a_RX.to(dtype), b_RX.to(dtype))


def slot_gradient(grad_R: Tensor, plan: Plan) -> Tensor:
    """Gradients of rows as those of the combine weights (N, K): zero where a slot has no row."""
    weight_NK = plan.weight_NK
    flat = torch.zeros(weight_NK.numel(), dtype=weight_NK.dtype, device=weight_NK.device)
    return flat.index_copy(0, plan.assignment_R, grad_R.to(flat.dtype)).view_as(weight_NK)

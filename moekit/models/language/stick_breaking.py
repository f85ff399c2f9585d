"""Stick-breaking attention: a token breaks a stick backwards over itself and those before it.

The token at i takes the share ``β_ij = σ(q_i · k_j / √h)`` of what the tokens after j, up to i
itself, have left: ``w_ij = β_ij Π_{j < r ≤ i} (1 - β_ir)`` (ModuleFormer, arXiv 2306.04640). There
are no positions: recent tokens come first by construction. What is left at the end goes nowhere,
so weights sum to at most 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


def stick_breaking_weights(logits_TS: Tensor, allowed_TS: Tensor) -> Tensor:
    """The weights ``w`` of logits ``q · k / √h``, computed in at least float32.

    Args:
        logits_TS: (..., T, S), keys in the order of time.
        allowed_TS: True where a query may look at a key; broadcast over the leading dimensions.
            Other keys take nothing and break nothing.

    Returns:
        (..., T, S) in the dtype of computing. Each row sums to ``1 - Π (1 - β)``.

    Example:
        >>> causal = torch.ones(3, 3, dtype=torch.bool).tril()
        >>> stick_breaking_weights(torch.zeros(3, 3), causal)[2]
        tensor([0.1250, 0.2500, 0.5000])
    """
    dtype = torch.promote_types(logits_TS.dtype, torch.float32)
    weights: Tensor = _Weights.apply(logits_TS.to(dtype), allowed_TS)  # type: ignore[no-untyped-call]
    return weights


def stick_breaking_attention(
    query: Tensor, key: Tensor, value: Tensor, allowed_TS: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention of several modules that share keys and values.

    Args:
        query: (B, heads, K, T, h), one query a slot.
        key, value: (B, heads, S, h).
        allowed_TS: (B or 1, 1, T, S), see :func:`stick_breaking_weights`.

    Returns:
        The output, like ``query``, and the weights (B, heads, K, T, S).
    """
    slots, queries, scale = query.shape[2], query.shape[3], query.shape[4] ** -0.5
    logits = (query * scale).flatten(2, 3) @ key.transpose(2, 3)
    weights = stick_breaking_weights(logits.unflatten(2, (slots, queries)), allowed_TS[:, :, None])
    mixed = weights.flatten(2, 3).to(value.dtype) @ value
    return mixed.unflatten(2, (slots, queries)), weights


class _Weights(torch.autograd.Function):
    """``log w_j = l_j + Σ_{r ≥ j} log σ(-l_r)`` over allowed keys r, as log β = l + log(1 - β).

    The gradient has the closed form ``g_j w_j - β_j Σ_{r ≤ j} g_r w_r``, which keeps two tensors
    for the backward pass where autograd would keep five.
    """

    @staticmethod
    def forward(logits_TS: Tensor, allowed_TS: Tensor) -> Tensor:
        stay_TS = F.logsigmoid(-logits_TS).masked_fill_(~allowed_TS, 0.0)
        left_TS = stay_TS.flip(-1).cumsum(-1).flip(-1)
        return (left_TS + logits_TS).exp().masked_fill_(~allowed_TS, 0.0)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        logits_TS, allowed_TS = inputs
        ctx.save_for_backward(logits_TS, output, allowed_TS)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TS):  # type: ignore[no-untyped-def]
        logits_TS, weights_TS, allowed_TS = ctx.saved_tensors
        weighted_TS = grad_TS * weights_TS
        broken_TS = logits_TS.sigmoid().mul_(weighted_TS.cumsum(-1))
        return weighted_TS - broken_TS.masked_fill_(~allowed_TS, 0.0), None

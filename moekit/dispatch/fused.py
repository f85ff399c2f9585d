"""A feed-forward bank on a plan, with a backward pass that keeps as little as it can.

:func:`feed_forward` is what our own layer and transformers' models both run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moekit.autocast import autocast, without_autocast
from moekit.dispatch.backend import Backend, Wanted
from moekit.dispatch.plan import Plan
from moekit.experts.activation import Activation
from moekit.experts.experts import FeedForward
from moekit.experts.groups import RowGroups


def feed_forward(x_ND: Tensor, plan: Plan, bank: FeedForward, backend: Backend | None) -> Tensor:
    """Each token's weighted sum (N, O) of its experts' outputs.

    Under autocast, operands are cast as ``torch.nn.functional.linear`` would cast them.

    Args:
        x_ND: the tokens.
        plan: which of them each expert gets.
        bank: the experts.
        backend: what runs them; None for plain operations that autograd records, which compile,
            trace and run on tensors of every kind.
    """
    if backend is None:
        return composed(x_ND, plan, bank)
    device = x_ND.device.type
    if not torch.is_autocast_enabled(device):
        return _feed_forward(x_ND, plan, bank, backend)
    x_ND, bank = autocast(x_ND), autocast_bank(bank)
    with torch.autocast(device, enabled=False):
        return _feed_forward(x_ND, plan, bank, backend)


def _feed_forward(x_ND: Tensor, plan: Plan, bank: FeedForward, backend: Backend) -> Tensor:
    if torch.is_grad_enabled():
        inputs = (x_ND, plan.weight_NK, *bank.tensors)
        if any(t is not None and t.requires_grad for t in inputs):
            call = _Call(backend, bank.activation, plan.groups, plan.every)
            return _FeedForward.apply(*inputs, plan.assignment_R, call)  # type: ignore[no-untyped-call]
    y_NO, _ = backend.forward(x_ND, plan, bank, keep=False)
    return y_NO


def composed(
    x_ND: Tensor,
    plan: Plan,
    bank: FeedForward,
    after: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The same in plain operations, one after the other; autograd keeps what each of them needs.

    Args:
        after: applied to the rows (R, O) that come out of the experts, such as a norm.
    """
    inner_RJ = plan.groups.linear(plan.gather(x_ND), bank.up_EJD, bank.up_bias_EJ)
    outer_RH = bank.activation(inner_RJ)
    out_RO = plan.groups.linear(outer_RH, bank.down_EOH, bank.down_bias_EO)
    return plan.combine(out_RO if after is None else after(out_RO))


def autocast_bank(bank: FeedForward) -> FeedForward:
    """The bank in the dtype that autocast asks for, if it is on."""
    up_bias_EJ, down_bias_EO = bank.up_bias_EJ, bank.down_bias_EO
    return FeedForward(
        autocast(bank.up_EJD),
        autocast(bank.down_EOH),
        None if up_bias_EJ is None else autocast(up_bias_EJ),
        None if down_bias_EO is None else autocast(down_bias_EO),
        bank.activation,
    )


@dataclass(frozen=True)
class _Call:
    """What a pass needs beside tensors."""

    backend: Backend
    activation: Activation
    groups: RowGroups
    every: bool


class _FeedForward(torch.autograd.Function):
    """Keeps the tokens, the first product's output and the plan; parameters are alive anyway."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_ND, weight_NK, up, down, up_bias, down_bias, assignment_R, call
    ) -> Tensor:
        inputs = [x_ND, weight_NK, up, down, up_bias, down_bias]
        y_NO, inner = call.backend.forward(*_arguments(inputs, assignment_R, call), keep=True)
        ctx.call = call
        ctx.save_for_backward(*inputs, assignment_R, *inner)
        return y_NO

    @staticmethod
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> Any:
        saved = list(ctx.saved_tensors)  # type: ignore[attr-defined]
        inputs, assignment_R, inner = saved[:6], saved[6], saved[7:]
        call: _Call = ctx.call  # type: ignore[attr-defined]
        wanted = Wanted(*ctx.needs_input_grad[:6])  # type: ignore[attr-defined]
        with without_autocast(grad_NO):
            if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
                return (*_differentiable(inputs, assignment_R, call, grad_NO, wanted), None, None)
            x_ND, plan, bank = _arguments(inputs, assignment_R, call)
            found = call.backend.backward(grad_NO, x_ND, plan, bank, inner, wanted)
        return (*found, None, None)


def _arguments(
    inputs: Sequence[Any], assignment_R: Tensor, call: _Call
) -> tuple[Tensor, Plan, FeedForward]:
    x_ND, weight_NK, up, down, up_bias, down_bias = inputs
    plan = Plan(assignment_R, weight_NK, call.groups, call.every)
    return x_ND, plan, FeedForward(up, down, up_bias, down_bias, call.activation)


def _differentiable(
    inputs: Sequence[Any], assignment_R: Tensor, call: _Call, grad_NO: Tensor, wanted: Wanted
) -> list[Tensor | None]:
    """Gradients that can be differentiated again.

    They are taken at views of the inputs, because one input may be made from another, as combine
    weights are from tokens, and a gradient must not pass through that.
    """
    views = [None if t is None else t.view_as(t) for t in inputs]
    y_NO = composed(*_arguments(views, assignment_R, call))
    asked = [t for t, want in zip(views, wanted, strict=True) if t is not None and want]
    gradients = torch.autograd.grad(y_NO, asked, grad_NO, create_graph=True, materialize_grads=True)
    found = iter(gradients)
    return [next(found) if want else None for want in wanted]

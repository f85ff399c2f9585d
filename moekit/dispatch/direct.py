"""The part of zero-computation experts, added to the output in one pass over the tokens by kernels
for CPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moekit.dispatch.native_library import DTYPES, KernelCall, library
from moekit.experts.direct import Direct

# The struct ``DirectCall`` of ``native_direct.h``.
FIELDS = (
    *("threads", "tokens", "width", "constants", "x_ND", "x_ld", "copied_N", "weight_NC"),
    *("gap_CD", "constant_CD", "y_ND", "grad_ND", "grad_ld", "grad_x_ND", "grad_copied_N"),
    *("grad_weight_NC", "grad_gap_CD", "grad_constant_CD"),
)
ONE_THREAD = 2**15  # elements, below which one thread is done before a second one is awake


def takes_direct(y_ND: Tensor, x_ND: Tensor, direct: Direct) -> bool:
    """Whether the kernels are there, and for these tensors."""
    operands = (y_ND, x_ND, direct.gap_CD, direct.constant_CD)
    dtypes = {t.dtype for t in operands if t is not None}
    fits = len(dtypes) == 1 and dtypes <= DTYPES.keys() and not torch.is_autocast_enabled("cpu")
    return fits and x_ND.is_cpu and library() is not None


def add_direct(y_ND: Tensor, x_ND: Tensor, direct: Direct) -> Tensor:
    """``direct.added(y_ND, x_ND)`` for tensors that the kernels take; ``y_ND`` is overwritten."""
    if not y_ND.is_contiguous() or y_ND._is_view() or (y_ND.is_leaf and y_ND.requires_grad):
        y_ND = y_ND.clone(memory_format=torch.contiguous_format)
    copied_N1, weight_NC, *experts = direct.tensors
    weights = (None if weight is None else weight.float() for weight in (copied_N1, weight_NC))
    direct = Direct(*weights, *experts)
    inputs = (y_ND, x_ND, *direct.tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        found: Tensor = _AddDirect.apply(*inputs)  # type: ignore[no-untyped-call]
        return found
    return _added(y_ND, x_ND, direct)


class _AddDirect(torch.autograd.Function):
    """Keeps its inputs alone, the output left out: α is computed again."""

    @staticmethod
    def forward(ctx, y_ND, x_ND, *tensors) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.mark_dirty(y_ND)
        ctx.save_for_backward(x_ND, *tensors)
        return _added(y_ND, x_ND, Direct(*tensors))

    @staticmethod
    def backward(ctx: FunctionCtx, grad_ND: Tensor) -> Any:
        x_ND, *tensors = ctx.saved_tensors  # type: ignore[attr-defined]
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            wanted = ctx.needs_input_grad[1:]  # type: ignore[attr-defined]
            return grad_ND, *_differentiable((x_ND, *tensors), wanted, grad_ND)
        return grad_ND, *_gradients(x_ND, Direct(*tensors), grad_ND)


def _added(y_ND: Tensor, x_ND: Tensor, direct: Direct) -> Tensor:
    call = _Call(x_ND, direct)
    call.give("y_ND", y_ND)
    call.run("add_direct")
    return y_ND


def _gradients(x_ND: Tensor, direct: Direct, grad_ND: Tensor) -> list[Tensor | None]:
    """Gradients of the tokens and of ``direct.tensors``."""
    call = _Call(x_ND, direct)
    call.give_rows("grad_ND", "grad_ld", grad_ND)
    found: list[Tensor | None] = [torch.empty_like(x_ND, memory_format=torch.contiguous_format)]
    found += [None if like is None else torch.empty(like.shape) for like in direct.tensors]
    names = ("grad_x_ND", "grad_copied_N", "grad_weight_NC", "grad_gap_CD", "grad_constant_CD")
    for name, gradient in zip(names, found, strict=True):
        if gradient is not None:
            call.give(name, gradient)
    call.run("direct_backward")
    pairs = zip(found, (x_ND, *direct.tensors), strict=True)
    return [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]


def _differentiable(
    inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], grad_ND: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, taken at views: one input may be made from
    another, as combine weights are from tokens."""
    views = [None if t is None else t.view_as(t) for t in inputs]
    x_ND, *rest = views
    assert x_ND is not None
    added_ND = Direct(*rest).added(torch.zeros_like(grad_ND), x_ND)
    asked = [t for t, want in zip(views, wanted, strict=True) if t is not None and want]
    if not asked:
        return [None] * len(inputs)
    found = iter(torch.autograd.grad(added_ND, asked, grad_ND, create_graph=True))
    return [next(found) if want else None for want in wanted]


class _Call(KernelCall):
    """A call of the kernels for a layer's direct experts."""

    def __init__(self, x_ND: Tensor, direct: Direct) -> None:
        super().__init__(FIELDS, x_ND.dtype)
        threads = 1 if x_ND.numel() < ONE_THREAD else torch.get_num_threads()
        constants = 0 if direct.weight_NC is None else direct.weight_NC.shape[1]
        self.fields |= {"threads": threads, "constants": constants}
        self.fields |= {"tokens": x_ND.shape[0], "width": x_ND.shape[1]}
        self.give_rows("x_ND", "x_ld", x_ND)
        names = ("copied_N", "weight_NC", "gap_CD", "constant_CD")
        for name, tensor in zip(names, direct.tensors, strict=True):
            if tensor is not None:
                self.give(name, tensor.contiguous())

"""Rows grouped by expert, and the matrix products over them.

A bank receives its rows sorted by expert together with a :class:`RowGroups`, and writes its
products as ``groups.linear(rows, weight, bias)``. Which kernel that is, is the dispatcher's
choice; the loop is the oracle of the others.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from moekit.autocast import autocast
from moekit.watched import transformed


class RowGroups:
    """R rows sorted by expert: the first ``count_E[0]`` belong to expert 0, and so on.

    ``linear`` here is a readable loop over experts, one product each. It takes every dtype and
    size, and reads the counts back to the host once.

    Args:
        count_E: rows of each expert, int64.
    """

    def __init__(self, count_E: Tensor) -> None:
        self.count_E = count_E
        self._sizes: list[int] | None = None

    @property
    def experts(self) -> int:
        """Number of experts E."""
        return self.count_E.shape[0]

    @property
    def sizes(self) -> list[int]:
        """The counts as Python integers; a device sync on its first use."""
        if self._sizes is None:
            self._sizes = [int(n) for n in self.count_E.tolist()]
        return self._sizes

    def slice(self, start: int, stop: int) -> Self:
        """The groups of experts ``start`` to ``stop`` alone."""
        return type(self)(self.count_E[start:stop])

    def linear(self, rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None = None) -> Tensor:
        """``row Wᵀ + b`` with the weight and bias of each row's expert, (R, O).

        Under autocast, operands are cast as ``torch.nn.functional.linear`` would cast them.
        """
        out_RO = self.product(autocast(rows_RI), autocast(weight_EOI))
        return out_RO if bias_EO is None else out_RO + self.of_row(autocast(bias_EO))

    def product(self, rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        """The grouped product without bias."""
        parts = rows_RI.split(self.sizes)
        weights = weight_EOI.unbind(0)
        return torch.cat([part @ w.T for part, w in zip(parts, weights, strict=True)])

    def weight_gradient(self, grad_RO: Tensor, rows_RI: Tensor) -> Tensor:
        """The gradient (E, O, I) of the weights of :meth:`product`."""
        parts = zip(grad_RO.split(self.sizes), rows_RI.split(self.sizes), strict=True)
        return torch.stack([grad.T @ rows for grad, rows in parts])

    def of_row(self, value_EX: Tensor) -> Tensor:
        """Each row's own expert's entry of ``value_EX``, (R, X)."""
        return value_EX.repeat_interleave(self.count_E, dim=0)


class GroupedMM(RowGroups):
    """Products through ``torch.nn.functional.grouped_mm``; needs :func:`fits_grouped_mm`.

    The loop serves where that does not hold, and under transforms of torch.func, of which
    grouped_mm knows few.
    """

    def __init__(self, count_E: Tensor) -> None:
        super().__init__(count_E)
        self._end_E: Tensor | None = None

    @property
    def end_E(self) -> Tensor:
        """Where each expert's rows end, as grouped_mm wants it."""
        if self._end_E is None:
            self._end_E = self.count_E.cumsum(0, dtype=torch.int32)
        return self._end_E

    def product(self, rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        if not fits_grouped_mm(rows_RI, weight_EOI) or transformed():
            return super().product(rows_RI, weight_EOI)
        if not torch.is_grad_enabled():  # without the cost of an autograd function
            return _grouped_mm(rows_RI, weight_EOI.mT, self.end_E)
        return _GroupedMM.apply(rows_RI, weight_EOI, self.end_E)  # type: ignore[no-untyped-call]

    def weight_gradient(self, grad_RO: Tensor, rows_RI: Tensor) -> Tensor:
        if not (_fits(grad_RO, grad_RO.shape[1]) and _fits(rows_RI, rows_RI.shape[1])):
            return super().weight_gradient(grad_RO, rows_RI)
        return _weight_gradient(grad_RO, rows_RI, self.end_E)


class PaddedGroups(RowGroups):
    """Every expert has the same number of row places; places beyond its count hold zeros.

    Shapes are static, so nothing is read back to the host; the padding is computed too.

    Args:
        count_E: rows of each expert that hold a token.
        places: row places C of each expert.
    """

    def __init__(self, count_E: Tensor, places: int) -> None:
        super().__init__(count_E)
        self.places = places

    @property
    def sizes(self) -> list[int]:
        return [self.places] * self.experts

    def slice(self, start: int, stop: int) -> Self:
        return type(self)(self.count_E[start:stop], self.places)

    def product(self, rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        rows_ECI = rows_RI.unflatten(0, (self.experts, self.places))
        return torch.bmm(rows_ECI, weight_EOI.transpose(1, 2)).flatten(0, 1)

    def of_row(self, value_EX: Tensor) -> Tensor:
        return value_EX.repeat_interleave(self.places, dim=0)


def fits_grouped_mm(rows_RI: Tensor, weight_EOI: Tensor) -> bool:
    """Whether torch's grouped_mm takes these operands.

    It wants float32, bfloat16 or float16 and row strides of a multiple of 16 bytes; tracing with
    fake tensors accepts bfloat16 only (torch 2.13), so float32 under ``torch.compile`` loops.
    """
    same = rows_RI.dtype == weight_EOI.dtype
    return same and all(_fits(rows_RI, width) for width in weight_EOI.shape[1:])


def _fits(tensor: Tensor, width: int) -> bool:
    """Whether grouped_mm takes the tensor's dtype on its device, and rows of ``width``."""
    allowed = {torch.float32, torch.bfloat16, torch.float16}
    if tensor.device.type == "cuda" or torch.compiler.is_compiling():
        allowed = {torch.bfloat16}
    return tensor.dtype in allowed and width % (16 // tensor.element_size()) == 0


class _GroupedMM(torch.autograd.Function):
    """grouped_mm whose backward accepts any incoming gradient layout.

    torch's own backward fails on an expanded gradient, such as that of ``out.sum()``.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, rows_RI: Tensor, weight_EOI: Tensor, end_E: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, weight_EOI, end_E)
        return _grouped_mm(rows_RI, weight_EOI.mT, end_E)

    @staticmethod
    def backward(ctx, grad_RO):  # type: ignore[no-untyped-def]
        rows_RI, weight_EOI, end_E = ctx.saved_tensors
        grad_rows_RI = grad_weight_EOI = None
        if ctx.needs_input_grad[0]:
            grad_rows_RI = _grouped_mm(grad_RO, weight_EOI, end_E)
        if ctx.needs_input_grad[1]:
            grad_weight_EOI = _weight_gradient(grad_RO, rows_RI, end_E)
        return grad_rows_RI, grad_weight_EOI, None


def _grouped_mm(rows_RI: Tensor, weight_EIO: Tensor, end_E: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(rows_RI.contiguous(), weight_EIO, offs=end_E)


def _weight_gradient(grad_RO: Tensor, rows_RI: Tensor, end_E: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(grad_RO.contiguous().T, rows_RI.contiguous(), offs=end_E)

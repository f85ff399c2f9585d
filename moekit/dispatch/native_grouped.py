"""Experts of any kind through our kernels for CPUs, one product after the other."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moekit.autocast import common_dtype
from moekit.dispatch.grouped import Grouped
from moekit.dispatch.native_library import DTYPES, ONE_THREAD, KernelCall, library
from moekit.experts.experts import FeedForward
from moekit.experts.groups import RowGroups

# The struct ``GroupedCall`` of ``native_grouped.h``.
FIELDS = (
    *("threads", "experts", "rows", "count_E", "left_RI", "left_ld", "left_width"),
    *("weight", "weight_expert", "weight_ld", "along_result", "bias_EO"),
    *("right_RO", "right_ld", "right_width", "out", "zero_out"),
)


class NativeGrouped(Grouped):
    """What ``Dropless(backend="native")`` runs where experts are no SwiGLU, or transposed.

    As :class:`~moekit.dispatch.grouped.Grouped`, but the products read the weights of experts with
    rows alone, once, and in the layout they have: (E, O, I), or (E, I, O) as GPT-OSS keeps them.
    """

    name: ClassVar[str] = "native_grouped"

    @staticmethod
    def takes(x_ND: Tensor, bank: FeedForward) -> bool:
        """Whether the kernels are there, and for these tensors."""
        weights = (bank.up_EJD, bank.down_EOH)
        fits = common_dtype(x_ND, *bank.tensors) in DTYPES and all(
            _along_sum(weight) or _along_sum(weight.mT) for weight in weights
        )
        return fits and x_ND.is_cpu and library() is not None

    def product(self, groups: RowGroups, rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        return self.linear(groups, rows_RI, weight_EOI, None)

    def linear(
        self, groups: RowGroups, rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None
    ) -> Tensor:
        call = _Call(groups, rows_RI.to(weight_EOI.dtype), weight_EOI.shape[1])
        call.give_weight(weight_EOI)
        if bias_EO is not None:
            call.give("bias_EO", bias_EO.contiguous())
        out_RO = call.room("out", rows_RI.shape[0], weight_EOI.shape[1], dtype=call.dtype)
        call.run("product")
        return out_RO

    def weight_gradient(
        self, groups: RowGroups, grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor
    ) -> Tensor:
        grad_RO, rows_RI = grad_RO.to(weight_EOI.dtype), rows_RI.to(weight_EOI.dtype)
        if _along_sum(weight_EOI):
            return _gradient(groups, grad_RO, rows_RI)
        return _gradient(groups, rows_RI, grad_RO).mT


def _along_sum(weight_EOI: Tensor) -> bool:
    """Whether elements that one result sums lie side by side."""
    return weight_EOI.stride(2) == 1


def _gradient(groups: RowGroups, left_RI: Tensor, right_RO: Tensor) -> Tensor:
    """``leftᵀ right`` over each expert's rows, (E, I, O)."""
    call = _Call(groups, left_RI, right_RO.shape[1])
    call.give_rows("right_RO", "right_ld", right_RO)
    out_EIO = call.gradient("out", groups, groups.experts, left_RI.shape[1], right_RO.shape[1])
    call.run("gradient")
    return out_EIO


class _Call(KernelCall):
    """A call of the grouped kernels."""

    def __init__(self, groups: RowGroups, left_RI: Tensor, right_width: int) -> None:
        super().__init__(FIELDS, left_RI.dtype)
        rows, left_width = left_RI.shape
        work = rows * left_width * right_width
        self.fields |= {
            "threads": 1 if work < ONE_THREAD else torch.get_num_threads(),
            "experts": groups.experts,
            "rows": rows,
            "left_width": left_width,
            "right_width": right_width,
        }
        self.give("count_E", groups.count_E.contiguous())
        self.give_rows("left_RI", "left_ld", left_RI)

    def give_weight(self, weight_EOI: Tensor) -> None:
        """Set the fields of the weights."""
        along_sum = _along_sum(weight_EOI)
        expert, over_results, over_sum = weight_EOI.stride()
        self.give("weight", weight_EOI)
        self.fields |= {
            "weight_expert": expert,
            "weight_ld": over_results if along_sum else over_sum,
            "along_result": not along_sum,
        }

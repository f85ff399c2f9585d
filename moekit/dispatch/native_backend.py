"""Kernels of our own for CPUs: weights are read once, in the order they have, for any number of
rows."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from moekit.autocast import common_dtype
from moekit.dispatch.backend import Backend, Gradients, Wanted
from moekit.dispatch.grouped import per_expert
from moekit.dispatch.native_library import (
    DTYPES,
    FIELDS,
    ONE_THREAD,
    KernelCall,
    library,
    packed,
)
from moekit.dispatch.plan import Plan
from moekit.experts.activation import GatedSiLU
from moekit.experts.experts import FeedForward

MUCH_WORK = 2**27  # of an expert's first product, on 16 cores of a Xeon


class Native(Backend):
    """The backend of ``Dropless(backend="native")``, for SwiGLU experts on CPUs."""

    name: ClassVar[str] = "native"

    @staticmethod
    def takes(x_ND: Tensor, bank: FeedForward) -> bool:
        """Whether the kernels are there, and for these tensors."""
        fits = (
            common_dtype(x_ND, *bank.tensors) in DTYPES
            and isinstance(bank.activation, GatedSiLU)
            and bank.up_EJD.stride(2) == bank.down_EOH.stride(2) == 1
        )
        return fits and x_ND.is_cpu and library() is not None

    @staticmethod
    def in_pairs(bank: FeedForward, rows_an_expert: float, training: bool) -> bool:
        """Whether rows of bfloat16, if they are many, run in pairs, faster than anything else.

        Matrix units (AMX), which pairs do without, are ahead of them for much work an expert.
        """
        kernels = library()
        biased = bank.up_bias_EJ is not None or bank.down_bias_EO is not None
        if kernels is None or (training and biased):
            return False
        width, hidden = bank.up_EJD.shape[2], bank.down_EOH.shape[2]
        if rows_an_expert * 2 * hidden * width > MUCH_WORK and kernels.moekit_has_matrix_units():
            return False
        return bool(kernels.moekit_has_pairs(width, hidden, bank.out_width))

    def forward(
        self, x_ND: Tensor, plan: Plan, bank: FeedForward, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        rows, inner = plan.assignment_R.shape[0], bank.up_EJD.shape[1]
        call = NativeCall(x_ND, plan, bank)
        kept = [call.room("inner_RJ", rows, inner, dtype=x_ND.dtype)] if keep else []
        y_NO = call.room("y_NO", x_ND.shape[0], bank.out_width, dtype=x_ND.dtype)
        call.run("forward")
        return y_NO, kept

    def backward(
        self,
        grad_NO: Tensor,
        x_ND: Tensor,
        plan: Plan,
        bank: FeedForward,
        inner: list[Tensor],
        wanted: Wanted,
    ) -> Gradients:
        rows, inner_width = plan.assignment_R.shape[0], bank.up_EJD.shape[1]
        call = NativeCall(x_ND, plan, bank)
        call.give("inner_RJ", inner[0])
        call.give_rows("grad_NO", "grad_ld", grad_NO)
        call.ask_for_pairs()
        kept: dict[str, Tensor] = {}
        if bank.up_bias_EJ is not None or bank.down_bias_EO is not None:  # never in pairs
            sizes = {"grad_RO": bank.out_width, "back_RJ": inner_width}
            kept = {name: call.room(name, rows, size) for name, size in sizes.items()}
        grad_NK = call.room("grad_NK", *plan.weight_NK.shape)
        found = Gradients()
        if wanted.x:
            grad_x_ND = call.room("grad_x_ND", *x_ND.shape, dtype=x_ND.dtype)
            found = found._replace(x_ND=grad_x_ND)
        if wanted.up:
            grad_up_EJD = call.gradient("grad_up_EJD", plan.groups, *bank.up_EJD.shape)
            found = found._replace(up_EJD=grad_up_EJD)
        if wanted.down:
            grad_down_EOH = call.gradient("grad_down_EOH", plan.groups, *bank.down_EOH.shape)
            found = found._replace(down_EOH=grad_down_EOH)
        call.run("backward")
        return self._others(found, plan, bank, wanted, grad_NK, kept)

    def _others(
        self,
        found: Gradients,
        plan: Plan,
        bank: FeedForward,
        wanted: Wanted,
        grad_NK: Tensor,
        kept: dict[str, Tensor],
    ) -> Gradients:
        """The gradients of combine weights and biases, from what the kernels left."""
        groups, bias_EO = plan.groups, bank.down_bias_EO
        if wanted.weight:
            if bias_EO is not None:
                of_bias_R = torch.linalg.vecdot(kept["grad_RO"], groups.of_row(bias_EO.float()))
                grad_NK.view(-1).index_add_(0, plan.assignment_R, of_bias_R)
            found = found._replace(weight_NK=grad_NK.to(plan.weight_NK.dtype))
        if wanted.up_bias:
            up_bias_EJ = per_expert(kept["back_RJ"], plan).to(bank.up_EJD.dtype)
            found = found._replace(up_bias_EJ=up_bias_EJ)
        if wanted.down_bias:
            weight_R1 = plan.weight_NK.flatten()[plan.assignment_R].float()[:, None]
            down_bias_EO = per_expert(kept["grad_RO"] * weight_R1, plan).to(bank.down_EOH.dtype)
            found = found._replace(down_bias_EO=down_bias_EO)
        return found


class NativeCall(KernelCall):
    """A call of a pass."""

    def __init__(self, x_ND: Tensor, plan: Plan, bank: FeedForward) -> None:
        up_EJD, down_EOH = bank.up_EJD, bank.down_EOH
        tokens, slots = plan.weight_NK.shape
        experts, inner, width = up_EJD.shape
        _, out_width, hidden = down_EOH.shape
        rows = plan.assignment_R.shape[0]
        up_expert, up_ld, _ = up_EJD.stride()
        down_expert, down_ld, _ = down_EOH.stride()
        work = rows * inner * (width + out_width)
        super().__init__(FIELDS, x_ND.dtype)
        self.fields |= {
            "threads": 1 if work < ONE_THREAD else torch.get_num_threads(),
            "tokens": tokens,
            "slots": slots,
            "rows": rows,
            "experts": experts,
            "width": width,
            "hidden": hidden,
            "out_width": out_width,
            "up_expert": up_expert,
            "up_ld": up_ld,
            "down_expert": down_expert,
            "down_ld": down_ld,
        }
        self.give("count_E", plan.groups.count_E.contiguous())
        self.give("assignment_R", plan.assignment_R.contiguous())
        weight_NK = plan.weight_NK.contiguous()
        if weight_NK.dtype != torch.float32:
            self.fields["half_weights"] = weight_NK.dtype == torch.bfloat16
            weight_NK = weight_NK if self.fields["half_weights"] else weight_NK.float()
        self.give("weight_NK", weight_NK)
        self.give_rows("x_ND", "x_ld", x_ND)
        self.give("up_EJD", up_EJD)
        self.give("down_EOH", down_EOH)
        if bank.up_bias_EJ is not None:
            self.give("up_bias_EJ", bank.up_bias_EJ.contiguous())
        if bank.down_bias_EO is not None:
            self.give("down_bias_EO", bank.down_bias_EO.contiguous())

    def ask_for_pairs(self) -> bool:
        """Let a backward pass run in pairs of bfloat16 where it can; whether it does."""
        if self.dtype != torch.bfloat16:
            return False
        kernels = library()
        assert kernels is not None  # `Native.takes` has looked
        found = kernels.moekit_runs_in_pairs(packed(self.fields))
        self.fields["in_pairs"] = found
        return bool(found)

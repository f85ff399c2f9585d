"""All rows at once, through grouped products: for accelerators, and many small experts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moekit.dispatch.backend import (
    Backend,
    Gradients,
    Wanted,
    row_dots,
    row_weights,
    slot_gradient,
)
from moekit.dispatch.plan import Plan
from moekit.experts.experts import FeedForward
from moekit.experts.groups import RowGroups

# Up to so many values, a sum over slots takes less time than the threads of one large operation.
FEW_VALUES = 2**16


class Grouped(Backend):
    """The backend of ``Dropless(backend="grouped_mm")``; which product, the plan's groups say."""

    name: ClassVar[str] = "grouped_mm"

    def product(self, groups: RowGroups, rows_RI: Tensor, weight_EOI: Tensor) -> Tensor:
        """The grouped product, outside autograd."""
        return groups.product(rows_RI, weight_EOI)

    def linear(
        self, groups: RowGroups, rows_RI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None
    ) -> Tensor:
        """The same plus the bias of each row's expert."""
        out_RO = self.product(groups, rows_RI, weight_EOI)
        return out_RO if bias_EO is None else out_RO.add_(groups.of_row(bias_EO))

    def weight_gradient(
        self, groups: RowGroups, grad_RO: Tensor, rows_RI: Tensor, weight_EOI: Tensor
    ) -> Tensor:
        """The gradient (E, O, I) of the weight of a :meth:`product`."""
        return groups.weight_gradient(grad_RO, rows_RI)

    def forward(
        self, x_ND: Tensor, plan: Plan, bank: FeedForward, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        groups = plan.groups
        rows_RD = x_ND.index_select(0, plan.token_R)
        inner_RJ = self.linear(groups, rows_RD, bank.up_EJD, bank.up_bias_EJ)
        activation = bank.activation if keep else bank.activation.consume
        outer_RH = activation(inner_RJ)
        out_RO = self.linear(groups, outer_RH, bank.down_EOH, bank.down_bias_EO)
        return _sum(out_RO, plan, weighted=True), [inner_RJ] if keep else []

    def backward(
        self,
        grad_NO: Tensor,
        x_ND: Tensor,
        plan: Plan,
        bank: FeedForward,
        inner: list[Tensor],
        wanted: Wanted,
    ) -> Gradients:
        groups, weight_R1 = plan.groups, row_weights(plan)[:, None]
        rows_RO = grad_NO.index_select(0, plan.token_R)
        back_RH = self.product(groups, rows_RO, bank.down_EOH.mT)
        outer_RH, pull = bank.activation.pull_back(inner[0])
        found = Gradients()
        if wanted.weight:
            grad_R = row_dots(back_RH, outer_RH)
            if bank.down_bias_EO is not None:
                grad_R = grad_R + row_dots(rows_RO, groups.of_row(bank.down_bias_EO))
            found = found._replace(weight_NK=slot_gradient(grad_R, plan))
        if wanted.down:
            scaled_RH = torch.mul(outer_RH, weight_R1, out=torch.empty_like(outer_RH))
            found = found._replace(
                down_EOH=self.weight_gradient(groups, rows_RO, scaled_RH, bank.down_EOH)
            )
        if wanted.down_bias:
            scaled_RO = rows_RO * weight_R1.to(rows_RO.dtype)
            found = found._replace(down_bias_EO=per_expert(scaled_RO, plan))
        if wanted.x or wanted.up or wanted.up_bias:
            found = self._first(pull(back_RH.mul_(weight_R1)), x_ND, plan, bank, wanted, found)
        return found

    def _first(
        self,
        back_RJ: Tensor,
        x_ND: Tensor,
        plan: Plan,
        bank: FeedForward,
        wanted: Wanted,
        found: Gradients,
    ) -> Gradients:
        """The gradients before the activation, added to those that were found."""
        groups = plan.groups
        if wanted.up:
            rows_RD = x_ND.index_select(0, plan.token_R)
            found = found._replace(
                up_EJD=self.weight_gradient(groups, back_RJ, rows_RD, bank.up_EJD)
            )
        if wanted.up_bias:
            found = found._replace(up_bias_EJ=per_expert(back_RJ, plan))
        if wanted.x:
            rows_RD = self.product(groups, back_RJ, bank.up_EJD.mT)
            found = found._replace(x_ND=_sum(rows_RD, plan, weighted=False))
        return found


def _sum(rows_RX: Tensor, plan: Plan, *, weighted: bool) -> Tensor:
    """Each token's sum (N, X) of its rows, in their dtype; accumulated in at least float32."""
    weight_NK = plan.weight_NK
    if plan.every:
        row_R = torch.arange(len(plan.assignment_R), device=plan.assignment_R.device)
        place_R = torch.empty_like(row_R).scatter_(0, plan.assignment_R, row_R)
        if rows_RX.numel() <= FEW_VALUES:
            return _sum_few(rows_RX, place_R, plan, weighted)
        scale_NK = weight_NK.to(rows_RX.dtype) if weighted else None
        place_NK = place_R.view_as(weight_NK)
        return F.embedding_bag(place_NK, rows_RX, mode="sum", per_sample_weights=scale_NK)
    dtype = torch.promote_types(rows_RX.dtype, torch.float32)
    summed_RX = rows_RX.to(dtype)
    if weighted:
        summed_RX = summed_RX * row_weights(plan)[:, None].to(dtype)
    total_NX = summed_RX.new_zeros(weight_NK.shape[0], rows_RX.shape[1])
    return total_NX.index_add_(0, plan.token_R, summed_RX).to(rows_RX.dtype)


def _sum_few(rows_RX: Tensor, place_R: Tensor, plan: Plan, weighted: bool) -> Tensor:
    """The same in three small operations, which cost less than to wake the threads of one."""
    dtype = torch.promote_types(rows_RX.dtype, torch.float32)
    rows_NKX = rows_RX.index_select(0, place_R).unflatten(0, plan.weight_NK.shape)
    if weighted:
        rows_NKX = rows_NKX * plan.weight_NK[..., None].to(dtype)
    return rows_NKX.sum(1, dtype=dtype).to(rows_RX.dtype)


def per_expert(rows_RX: Tensor, plan: Plan) -> Tensor:
    """The sum of each expert's rows, (E, X)."""
    count_E = plan.groups.count_E
    expert_E = torch.arange(len(count_E), device=count_E.device)
    expert_R = expert_E.repeat_interleave(count_E, output_size=rows_RX.shape[0])
    dtype = torch.promote_types(rows_RX.dtype, torch.float32)
    total_EX = torch.zeros(len(count_E), rows_RX.shape[1], dtype=dtype, device=rows_RX.device)
    return total_EX.index_add_(0, expert_R, rows_RX.to(dtype)).to(rows_RX.dtype)

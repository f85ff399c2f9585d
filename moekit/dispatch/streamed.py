"""One expert after another, each from gather to sum while its rows are in the cache.

For CPUs. A pass over all rows at once writes and reads several (R, D) and (R, H) matrices, and
memory that is newly asked of the operating system costs more than the arithmetic on it. Here every
intermediate is as large as one expert's rows and is used again for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from moekit.dispatch.backend import (
    Backend,
    Gradients,
    Wanted,
    accumulator,
    row_dots,
    row_weights,
    slot_gradient,
)
from moekit.dispatch.few_rows import product
from moekit.dispatch.plan import Plan
from moekit.experts.experts import FeedForward


class Streamed(Backend):
    """The backend of ``Dropless(backend="streamed")``."""

    name: ClassVar[str] = "streamed"

    def forward(
        self, x_ND: Tensor, plan: Plan, bank: FeedForward, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        total_NO, kept = accumulator(x_ND, bank.out_width), []
        activation = bank.activation if keep else bank.activation.consume
        for e, token_n, weight_n1 in _visits(plan):
            inner_nJ = product(x_ND.index_select(0, token_n), bank.up_EJD[e])
            if bank.up_bias_EJ is not None:
                inner_nJ.add_(bank.up_bias_EJ[e])
            if keep:
                kept.append(inner_nJ)
            out_nO = product(activation(inner_nJ), bank.down_EOH[e])
            if bank.down_bias_EO is not None:
                out_nO.add_(bank.down_bias_EO[e])
            weighted_nO = out_nO.to(total_NO.dtype).mul_(weight_n1)
            total_NO.index_add_(0, token_n, weighted_nO)
        return total_NO.to(x_ND.dtype), kept

    def backward(
        self,
        grad_NO: Tensor,
        x_ND: Tensor,
        plan: Plan,
        bank: FeedForward,
        inner: list[Tensor],
        wanted: Wanted,
    ) -> Gradients:
        sums = _Sums(x_ND, plan, bank, wanted)
        for place, (e, token_n, weight_n1) in enumerate(_visits(plan)):
            rows_nO = grad_NO.index_select(0, token_n)
            back_nH = rows_nO @ bank.down_EOH[e]
            outer_nH, pull = bank.activation.pull_back(inner[place])
            sums.router(bank, e, rows_nO, back_nH, outer_nH)
            sums.second(e, rows_nO, outer_nH, weight_n1)
            if sums.first_wanted:
                back_nJ = pull(back_nH.mul_(weight_n1))
                sums.first(bank, e, token_n, x_ND, back_nJ)
        return sums.gradients(x_ND, plan, bank)


class _Sums:
    """The gradients while they are made, one expert after another."""

    def __init__(self, x_ND: Tensor, plan: Plan, bank: FeedForward, wanted: Wanted) -> None:
        self.first_wanted = wanted.x or wanted.up or wanted.up_bias
        self.x_ND = accumulator(x_ND, x_ND.shape[1]) if wanted.x else None
        self.weight: list[Tensor] | None = [] if wanted.weight else None
        empty = [e for e, size in enumerate(plan.groups.sizes) if size == 0]
        self.up_EJD = _per_expert(bank.up_EJD, empty) if wanted.up else None
        self.down_EOH = _per_expert(bank.down_EOH, empty) if wanted.down else None
        self.up_bias_EJ = _per_expert(bank.up_bias_EJ, empty) if wanted.up_bias else None
        self.down_bias_EO = _per_expert(bank.down_bias_EO, empty) if wanted.down_bias else None

    def router(
        self, bank: FeedForward, e: int, rows_nO: Tensor, back_nH: Tensor, outer_nH: Tensor
    ) -> None:
        if self.weight is not None:
            grad_n = row_dots(back_nH, outer_nH)
            if bank.down_bias_EO is not None:
                grad_n = grad_n + row_dots(rows_nO, bank.down_bias_EO[e])
            self.weight.append(grad_n)

    def second(self, e: int, rows_nO: Tensor, outer_nH: Tensor, weight_n1: Tensor) -> None:
        if self.down_EOH is not None:
            scaled_nH = torch.mul(outer_nH, weight_n1, out=torch.empty_like(outer_nH))
            torch.mm(rows_nO.T, scaled_nH, out=self.down_EOH[e])
        if self.down_bias_EO is not None:
            self.down_bias_EO[e] = weight_n1[:, 0].to(rows_nO.dtype) @ rows_nO

    def first(
        self, bank: FeedForward, e: int, token_n: Tensor, x_ND: Tensor, back_nJ: Tensor
    ) -> None:
        if self.up_EJD is not None:
            torch.mm(back_nJ.T, x_ND.index_select(0, token_n), out=self.up_EJD[e])
        if self.up_bias_EJ is not None:
            self.up_bias_EJ[e] = back_nJ.sum(0)
        if self.x_ND is not None:
            rows_nD = back_nJ @ bank.up_EJD[e]
            self.x_ND.index_add_(0, token_n, rows_nD.to(self.x_ND.dtype))

    def gradients(self, x_ND: Tensor, plan: Plan, bank: FeedForward) -> Gradients:
        weight_NK = None
        if self.weight is not None:
            weight_NK = slot_gradient(torch.cat([*self.weight, x_ND.new_zeros(0)]), plan)
        return Gradients(
            None if self.x_ND is None else self.x_ND.to(x_ND.dtype),
            weight_NK,
            self.up_EJD,
            self.down_EOH,
            self.up_bias_EJ,
            self.down_bias_EO,
        )


class _Visit(NamedTuple):
    """An expert with rows: its number, their tokens (n,) and combine weights (n, 1)."""

    expert: int
    token_n: Tensor
    weight_n1: Tensor


def _visits(plan: Plan) -> Iterator[_Visit]:
    sizes = plan.groups.sizes
    tokens = plan.token_R.split(sizes)
    weights = row_weights(plan).unsqueeze(1).split(sizes)
    for e, size in enumerate(sizes):
        if size:
            yield _Visit(e, tokens[e], weights[e])


def _per_expert(like: Tensor | None, empty: list[int]) -> Tensor | None:
    """Room for a gradient, laid out as its tensor; zero for the experts without rows."""
    if like is None:
        return None
    room = torch.empty_like(like)
    for e in empty:
        room[e].zero_()
    return room

"""Experts of a single projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.experts.experts import Experts, ExpertsSpec
from moekit.experts.groups import RowGroups


@dataclass(frozen=True)
class Linear(ExpertsSpec):
    """``x Wᵀ + b``: one projection an expert, without activation.

    A mixture of such experts with weights g is the single projection ``Σ g W``, so that running
    and merging them give the same (MEO, He et al. 2023).

    Attributes:
        count: number of experts.
        bias: whether the projections have biases.
        out: width of the output; None for that of the input.
    """

    count: int = 8
    bias: bool = True
    out: int | None = None

    def check(self) -> None:
        self.require(self.count >= 1, f"count is {self.count}; a bank needs at least one expert")
        self.require(self.out is None or self.out >= 1, f"out is {self.out}; wanted a width")

    def expert_kinds(self) -> tuple[str, ...]:
        return ("feed_forward",) * self.count

    def build(self, width: int) -> LinearExperts:
        return LinearExperts(self, width)

    def out_width(self, width: int) -> int:
        return self.out or width

    def parameters_E(self, width: int) -> tuple[int, ...]:
        out = self.out_width(width)
        return (width * out + (out if self.bias else 0),) * self.count


class LinearExperts(Experts):
    """The module of :class:`Linear`."""

    def __init__(self, spec: Linear, width: int) -> None:
        out = spec.out_width(width)
        super().__init__(spec.expert_kinds(), width, out)
        self.weight = nn.Parameter(torch.empty(spec.count, out, width))
        self.bias = nn.Parameter(torch.empty(spec.count, out)) if spec.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        return groups.linear(rows_RD, self.weight, self.bias)

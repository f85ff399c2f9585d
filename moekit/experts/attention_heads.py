"""Attention modules as experts: each has its own queries and output, all share keys and values.

A module is itself multi-headed. The bank holds what differs from module to module, the projections
around attention: ``map`` makes the queries of each row, ``reduce`` projects what its attention
returned. Attention itself, which looks at other tokens, is done by whoever runs the bank, between
the two and on the same plan (ModuleFormer, arXiv 2306.04640; Mixture of Attention Heads, Zhang et
al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.errors import SpecError
from moekit.experts.experts import Bank, Experts, ExpertsSpec
from moekit.experts.groups import RowGroups
from moekit.experts.zero_computation import ZeroComputationSpec


@dataclass(frozen=True)
class AttentionHeads(ExpertsSpec):
    """Modules ``x Wqᵀ`` before attention and ``o Woᵀ`` after it, without biases.

    Attributes:
        count: number of modules E.
        heads: heads of each module.
        inner: width of all heads of a module together; None for half the model's width, at which
            two modules a token cost what one of the model's width costs.
    """

    count: int = 8
    heads: int = 2
    inner: int | None = None

    def check(self) -> None:
        self.require(self.count >= 1, f"count is {self.count}; a bank needs at least one expert")
        self.require(self.heads >= 1, f"heads is {self.heads}; a module needs at least one head")
        if self.inner is not None:
            self._check_inner(self.inner)

    def expert_kinds(self) -> tuple[str, ...]:
        return ("feed_forward",) * self.count

    def inner_width(self, width: int) -> int:
        """Width of queries, keys and values in a model of ``width``.

        Raises:
            SpecError: it cannot be split into heads.
        """
        inner = width // 2 if self.inner is None else self.inner
        self._check_inner(inner)
        return inner

    def build(self, width: int) -> AttentionHeadsExperts:
        return AttentionHeadsExperts(self, width)

    def parameters_E(self, width: int) -> tuple[int, ...]:
        return (2 * width * self.inner_width(width),) * self.count

    def check_merging(self) -> None:
        self.require(False, "attention runs for each module of a token, so that none are merged")

    def _check_inner(self, inner: int) -> None:
        self.require(
            inner >= self.heads and inner % self.heads == 0,
            f"inner width {inner} cannot be split into {self.heads} equal heads",
        )


class AttentionHeadsExperts(Experts):
    """The module of :class:`AttentionHeads`.

    Attributes:
        inner: width of the inner rows.
    """

    def __init__(self, spec: AttentionHeads, width: int) -> None:
        super().__init__(spec.expert_kinds(), width, width)
        self.spec = spec
        self.inner = spec.inner_width(width)
        self.query_proj = nn.Parameter(torch.empty(spec.count, self.inner, width))
        self.output_proj = nn.Parameter(torch.empty(spec.count, width, self.inner))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.query_proj, std=std)
        nn.init.normal_(self.output_proj, std=std)

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        """Map and reduce with nothing between: what attention gives where a value is its query."""
        return self.reduce(self.map(rows_RD, groups), groups)

    def map(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        return groups.linear(rows_RD, self.query_proj)

    def reduce(self, rows_RI: Tensor, groups: RowGroups) -> Tensor:
        return groups.linear(rows_RI, self.output_proj)


def attention_heads(bank: ExpertsSpec) -> AttentionHeads | None:
    """The attention modules of a bank, which may hold zero-computation experts too, or None.

    Raises:
        SpecError: the bank mixes attention modules with others, or modules of different sizes.
    """
    parts = [p for p in _parts(bank) if not isinstance(p, ZeroComputationSpec)]
    heads = [part for part in parts if isinstance(part, AttentionHeads)]
    if not heads:
        return None
    if len(heads) < len(parts):
        raise SpecError(
            "a bank holds attention modules beside other experts with matrix products; attention "
            "is done for all of its rows or for none, so use one bank of each"
        )
    sizes = {(part.heads, part.inner) for part in heads}
    if len(sizes) > 1:
        raise SpecError(
            f"the attention modules of a bank share keys and values, but these have heads and "
            f"inner widths {sorted(sizes, key=str)}; make them equal"
        )
    return heads[0]


def _parts(bank: ExpertsSpec) -> list[ExpertsSpec]:
    if isinstance(bank, Bank):
        return [inner for part in bank.parts for inner in _parts(part)]
    return [bank]

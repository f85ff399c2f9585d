"""Experts that cost no matrix product: zero, copy and constant (MoE++; AdaMoE's null experts)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.experts.direct import Direct
from moekit.experts.experts import Experts, ExpertsSpec


@dataclass(frozen=True)
class ZeroComputationSpec(ExpertsSpec):
    """Base of the zero-computation banks.

    Attributes:
        count: number of experts.
    """

    abstract: ClassVar[bool] = True
    kind: ClassVar[str]
    count: int = 1

    def check(self) -> None:
        self.require(self.count >= 1, f"count is {self.count}; a bank needs at least one expert")

    def expert_kinds(self) -> tuple[str, ...]:
        return (self.kind,) * self.count

    def parameters_E(self, width: int) -> tuple[int, ...]:
        return (0,) * self.count


@dataclass(frozen=True)
class Zero(ZeroComputationSpec):
    """``E(x) = 0``: discards the token's share (MoE++, eq. 3; AdaMoE's null expert)."""

    kind: ClassVar[str] = "zero"

    def build(self, width: int) -> Experts:
        return ZeroExperts(self, width)


@dataclass(frozen=True)
class Copy(ZeroComputationSpec):
    """``E(x) = x``: skips the layer (MoE++, eq. 4)."""

    kind: ClassVar[str] = "copy"

    def build(self, width: int) -> Experts:
        return CopyExperts(self, width)


@dataclass(frozen=True)
class Constant(ZeroComputationSpec):
    """``E(x) = α₁ x + α₂ v`` with ``α = softmax(W_c x)`` and a learned v (MoE++, eq. 5).

    Every constant expert has its own ``W_c (2, D)`` and ``v (D)``.
    """

    kind: ClassVar[str] = "constant"

    def build(self, width: int) -> Experts:
        return ConstantExperts(self, width)

    def parameters_E(self, width: int) -> tuple[int, ...]:
        return (3 * width,) * self.count


class _DirectExperts(Experts):
    """A bank that never sees dispatched rows."""

    def __init__(self, spec: ZeroComputationSpec, width: int) -> None:
        super().__init__(spec.expert_kinds(), width, width)

    @property
    def dispatched_ranges(self) -> list[tuple[int, int]]:
        return []


class ZeroExperts(_DirectExperts):
    """The module of :class:`Zero`; its contribution is nothing."""


class CopyExperts(_DirectExperts):
    """The module of :class:`Copy`."""

    def direct(self, weight_NE: Tensor) -> Direct:
        return Direct(copied_N1=weight_NE.sum(1, keepdim=True))


class ConstantExperts(_DirectExperts):
    """The module of :class:`Constant`."""

    def __init__(self, spec: Constant, width: int) -> None:
        super().__init__(spec, width)
        self.mix_proj = nn.Parameter(torch.empty(spec.count, 2, width))
        self.constant = nn.Parameter(torch.empty(spec.count, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.mix_proj, std=std)
        nn.init.normal_(self.constant, std=1.0)  # as the released model

    def direct(self, weight_NE: Tensor) -> Direct:
        gap_ED = self.mix_proj[:, 0] - self.mix_proj[:, 1]
        return Direct(weight_NC=weight_NE, gap_CD=gap_ED, constant_CD=self.constant)

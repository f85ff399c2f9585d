"""Feed-forward banks: SwiGLU, GEGLU, GELU and ReLU experts with optional biases.

Weights are laid out as in transformers' fused experts: ``gate_up_proj (E, 2H, D)`` with the gate
first, ``down_proj (E, O, H)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.experts.activation import Activation, Gated, GatedSiLU
from moekit.experts.experts import Experts, ExpertsSpec, FeedForward
from moekit.experts.groups import RowGroups


@dataclass(frozen=True)
class FeedForwardSpec(ExpertsSpec):
    """Base of the feed-forward banks.

    Attributes:
        count: number of experts.
        hidden: hidden width H of each.
        bias: whether the projections have biases.
        out: width of the output; None for that of the input.
    """

    abstract: ClassVar[bool] = True
    gated: ClassVar[bool]
    activation: ClassVar[Callable[[Tensor], Tensor]]
    count: int = 8
    hidden: int = 256
    bias: bool = False
    out: int | None = None

    def check(self) -> None:
        self.require(self.count >= 1, f"count is {self.count}; a bank needs at least one expert")
        self.require(self.hidden >= 1, f"hidden is {self.hidden}; wanted a positive width")
        self.require(self.out is None or self.out >= 1, f"out is {self.out}; wanted a width")

    def expert_kinds(self) -> tuple[str, ...]:
        return ("feed_forward",) * self.count

    def build(self, width: int) -> FeedForwardExperts:
        return FeedForwardExperts(self, width)

    def out_width(self, width: int) -> int:
        return self.out or width

    @classmethod
    def between(cls) -> Activation:
        """What stands between the two products."""
        if not cls.gated:
            return Activation(cls.activation)
        return GatedSiLU() if cls.activation is F.silu else Gated(cls.activation)

    def parameters_E(self, width: int) -> tuple[int, ...]:
        out, inner = self.out_width(width), self.hidden * (2 if self.gated else 1)
        biases = inner + out if self.bias else 0
        return (width * inner + self.hidden * out + biases,) * self.count


@dataclass(frozen=True)
class SwiGLU(FeedForwardSpec):
    """``(silu(x W_gate) ⊙ x W_up) W_down`` (Shazeer 2020)."""

    gated: ClassVar[bool] = True
    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.silu)


@dataclass(frozen=True)
class GEGLU(FeedForwardSpec):
    """``(gelu(x W_gate) ⊙ x W_up) W_down`` (Shazeer 2020)."""

    gated: ClassVar[bool] = True
    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.gelu)


@dataclass(frozen=True)
class GELU(FeedForwardSpec):
    """``gelu(x W_up) W_down``."""

    gated: ClassVar[bool] = False
    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.gelu)


@dataclass(frozen=True)
class ReLU(FeedForwardSpec):
    """``relu(x W_up) W_down``."""

    gated: ClassVar[bool] = False
    activation: ClassVar[Callable[[Tensor], Tensor]] = staticmethod(F.relu)


class FeedForwardExperts(Experts):
    """The module of every feed-forward bank.

    Attributes:
        up_name: name of the first projection, that of transformers.
    """

    def __init__(self, spec: FeedForwardSpec, width: int) -> None:
        out = spec.out_width(width)
        super().__init__(spec.expert_kinds(), width, out)
        self.spec = spec
        self.activate = spec.between()
        inner = spec.hidden * (2 if spec.gated else 1)
        self.up_name = "gate_up_proj" if spec.gated else "up_proj"
        up = nn.Parameter(torch.empty(spec.count, inner, width))
        self.register_parameter(self.up_name, up)
        self.down_proj = nn.Parameter(torch.empty(spec.count, out, spec.hidden))
        self.up_bias = nn.Parameter(torch.empty(spec.count, inner)) if spec.bias else None
        self.down_bias = nn.Parameter(torch.empty(spec.count, out)) if spec.bias else None
        self.reset_parameters()

    @property
    def up_weight(self) -> Tensor:
        """The first projection's weight; no Parameter under ``functional_call`` or LoRA."""
        weight: Tensor = getattr(self, self.up_name)
        return weight

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.up_weight, std=std)
        nn.init.normal_(self.down_proj, std=std)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, rows_RD: Tensor, groups: RowGroups) -> Tensor:
        inner = groups.linear(rows_RD, self.up_weight, self.up_bias)
        return groups.linear(self.activate(inner), self.down_proj, self.down_bias)

    def feed_forward(self) -> FeedForward | None:
        if not self.runs_as(FeedForwardExperts):
            return None
        return FeedForward(
            self.up_weight, self.down_proj, self.up_bias, self.down_bias, self.activate
        )

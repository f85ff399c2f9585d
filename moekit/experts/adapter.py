"""What every row passes before it is routed: MEO's token attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.spec import Spec


@dataclass(frozen=True)
class AdapterSpec(Spec):
    """Base of what changes a layer's rows before its router and its experts see them."""

    abstract: ClassVar[bool] = True

    def build(self, width: int) -> Adapter:
        """The module for rows of ``width``."""
        raise NotImplementedError


class Adapter(nn.Module):
    """Base of their modules: ``forward(x)`` returns rows of the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        """The changed rows (..., D)."""
        raise NotImplementedError

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the parameters anew from torch's default generator."""


@dataclass(frozen=True)
class TokenAttention(AdapterSpec):
    """``x + relu(x W_down + b_down) W_up + b_up``, MEO's token level (He et al. 2023).

    Where one decision serves a whole sequence, this small block keeps what is particular to a
    token. It is the identity before training: ``W_up`` and the biases start at zero.

    Attributes:
        reduction: the width between is D divided by this, rounded down, and at least 1.
    """

    reduction: int = 64

    def check(self) -> None:
        self.require(self.reduction >= 1, f"reduction is {self.reduction}; wanted at least 1")

    def build(self, width: int) -> TokenAttentionBlock:
        return TokenAttentionBlock(self, width)


class TokenAttentionBlock(Adapter):
    """The module of :class:`TokenAttention`."""

    def __init__(self, spec: TokenAttention, width: int) -> None:
        super().__init__()
        inner = max(1, width // spec.reduction)
        self.down = nn.Parameter(torch.empty(inner, width))
        self.down_bias = nn.Parameter(torch.empty(inner))
        self.up = nn.Parameter(torch.empty(width, inner))
        self.up_bias = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.kaiming_uniform_(self.down, a=5**0.5)  # as released, whatever the model's own
        for parameter in (self.down_bias, self.up, self.up_bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(F.linear(x, self.down, self.down_bias))
        return x + F.linear(inner, self.up, self.up_bias)

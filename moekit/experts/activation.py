"""What an expert does between its two products, and how a gradient passes back through it.

Both are needed apart from autograd by a backward pass that computes activations anew instead of
keeping them (:mod:`moekit.dispatch.fused`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

PullBack = Callable[[Tensor], Tensor]


class Activation:
    """A map from (R, J) to (R, H), row by row, without parameters of its own.

    Args:
        function: the map, differentiable by autograd.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __call__(self, inner_RJ: Tensor) -> Tensor:
        """The activation, differentiable."""
        return self.function(inner_RJ)

    def consume(self, inner_RJ: Tensor) -> Tensor:
        """The activation, where ``inner_RJ`` is needed no more and may be overwritten."""
        return self.function(inner_RJ)

    def pull_back(self, inner_RJ: Tensor) -> tuple[Tensor, PullBack]:
        """The activation, and the map from its gradient (R, H) to that of ``inner_RJ``.

        The map may overwrite the gradient it is given, and is called once at most.
        """
        inner_RJ = inner_RJ.detach().requires_grad_()
        with torch.enable_grad():
            outer_RH = self.function(inner_RJ)

        def pull(grad_RH: Tensor) -> Tensor:
            (grad_RJ,) = torch.autograd.grad(outer_RH, inner_RJ, grad_RH)
            return grad_RJ

        return outer_RH.detach(), pull


class Gated(Activation):
    """``f(gate) ⊙ up``, where ``gate`` is the first half of the columns and ``up`` the second."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__(self._gated)
        self.gate = gate

    def _gated(self, inner_RJ: Tensor) -> Tensor:
        gate_RH, up_RH = inner_RJ.chunk(2, dim=-1)
        return self.gate(gate_RH) * up_RH


class GatedSiLU(Gated):
    """SwiGLU's activation, with fewer passes over memory than autograd needs."""

    def __init__(self) -> None:
        super().__init__(F.silu)

    def consume(self, inner_RJ: Tensor) -> Tensor:
        gate_RH, up_RH = inner_RJ.chunk(2, dim=-1)
        return F.silu(gate_RH, inplace=True).mul_(up_RH)

    def pull_back(self, inner_RJ: Tensor) -> tuple[Tensor, PullBack]:
        gate_RH, up_RH = inner_RJ.chunk(2, dim=-1)
        passed_RH = F.silu(gate_RH)

        def pull(grad_RH: Tensor) -> Tensor:
            grad_RJ = torch.empty_like(inner_RJ)
            to_gate_RH, to_up_RH = grad_RJ.chunk(2, dim=-1)
            torch.mul(grad_RH, passed_RH, out=to_up_RH)
            through_RH = grad_RH.mul_(up_RH)
            torch.ops.aten.silu_backward.grad_input(through_RH, gate_RH, grad_input=to_gate_RH)
            return grad_RJ

        return passed_RH * up_RH, pull

"""Gradients for one expert of a fused bank, and for no other.

The bank stays frozen and holds the expert's present weights, so the forward pass is the model's
own. Beside it, the expert runs once more on its own tokens from tensors that have gradients, and
what is added to the output is that result minus itself: nothing in value, and the whole gradient of
the expert's weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.dispatch import Dispatched
from moekit.surgery.view import BlockView
from moekit.surgery.weights import ExpertWeights, RouterWeights


class ExpertTap:
    """One expert that is trained apart from its bank.

    Args:
        view: its block.
        expert: its number.

    Attributes:
        leaves: its weights in float32 (or wider) with gradients.
    """

    def __init__(self, view: BlockView, expert: int) -> None:
        self.view = view
        self.expert = expert
        self.leaves = view.expert(expert).map(_leaf)

    def attach(self) -> RemovableHandle:
        """Listen to the block's experts until the handle is removed."""
        module = self.view.architecture.experts_module(self.view.block)
        return module.register_forward_hook(self._hook)

    def write(self, weights: ExpertWeights | None = None) -> None:
        """Put ``weights``, or those that are trained, into the bank."""
        self.view.expert(self.expert).copy_(self.leaves if weights is None else weights)

    def parameters(self) -> list[nn.Parameter]:
        """The fused parameters that the expert is a part of."""
        return parameters_of(self.view, self.view.bank)

    def _hook(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        if isinstance(output, Dispatched):
            routing = output.routing
            added = self._nothing(args[0], routing.expert_NK, routing.weight_NK)
            return replace(output, y_ND=output.y_ND + added)
        return output + self._nothing(*args[:3])

    def _nothing(self, x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor) -> Tensor:
        """Zeros (N, D) with the gradient of this expert's part in the block's output."""
        token_R, slot_R = (expert_NK == self.expert).nonzero(as_tuple=True)
        weights = self.leaves.map(lambda leaf: leaf.to(x_ND.dtype))
        y_RD = self.view.compute(weights, x_ND.detach()[token_R])
        y_RD = y_RD * weight_NK.detach()[token_R, slot_R, None].to(y_RD.dtype)
        zeros_ND = torch.zeros_like(x_ND)
        return zeros_ND.index_add(0, token_R, (y_RD - y_RD.detach()).to(x_ND.dtype))


def parameters_of(view: BlockView, weights: ExpertWeights | RouterWeights) -> list[nn.Parameter]:
    """The parameters of a view's layer in whose memory the tensors lie."""
    starts = [tensor.data_ptr() for _, tensor in weights.items()]
    return [
        parameter
        for parameter in view.layer.parameters()
        if any(parameter.data_ptr() <= s < parameter.data_ptr() + parameter.nbytes for s in starts)
    ]


def _leaf(tensor: Tensor) -> Tensor:
    wide = tensor.dtype if tensor.dtype == torch.float64 else torch.float32
    return tensor.detach().to(wide, copy=True).contiguous().requires_grad_()

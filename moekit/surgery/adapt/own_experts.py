"""LoRA on the experts of moekit's own banks, whose interface peft's layers do not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moekit.experts import Experts
from moekit.surgery.adapt.mixture import adapter_dtype
from moekit.surgery.adapt.spec import AdaptSpec


class LowRankUpdate(nn.Module):
    """``W + (alpha / r) B A`` for each expert of a weight (E, O, I)."""

    def __init__(self, weight_EOI: Tensor, spec: AdaptSpec) -> None:
        super().__init__()
        experts, out, inner = weight_EOI.shape
        own = torch.empty(0, device=weight_EOI.device, dtype=adapter_dtype(weight_EOI))
        self.scale = spec.scale
        self.lora_A = nn.Parameter(own.new_empty(experts, spec.rank, inner))
        self.lora_B = nn.Parameter(own.new_zeros(experts, out, spec.rank))
        for pair_rI in self.lora_A:
            nn.init.kaiming_uniform_(pair_rI, a=math.sqrt(5))

    def forward(self, weight_EOI: Tensor) -> Tensor:
        """The weight that the bank computes with."""
        return weight_EOI + (self.scale * self.lora_B @ self.lora_A).to(weight_EOI.dtype)


def is_own(model: nn.Module, path: str) -> bool:
    """Whether a parameter is one of a bank of moekit's."""
    return isinstance(model.get_submodule(path.rpartition(".")[0]), Experts)


def update_experts(model: nn.Module, path: str, spec: AdaptSpec) -> None:
    """Put LoRA on a bank's weight, by path."""
    bank, name = model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
    update = LowRankUpdate(bank.get_parameter(name), spec)
    parametrize.register_parametrization(bank, name, update)


def merge_experts(model: nn.Module) -> None:
    """Add what was learned to the weights, and leave them as they were before."""
    for bank in list(model.modules()):
        if not (isinstance(bank, Experts) and parametrize.is_parametrized(bank)):
            continue
        for name, applied in list(bank.parametrizations.items()):  # type: ignore[union-attr, operator]
            if any(isinstance(update, LowRankUpdate) for update in applied):
                parametrize.remove_parametrizations(bank, name, leave_parametrized=True)

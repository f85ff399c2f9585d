"""Experts merged into one: weighted sums of their parameters."""

from __future__ import annotations

import torch
from torch import Tensor


class Mixtures:
    """Weights of E experts in each of S mixtures.

    ``of`` here is one matrix product over all E experts, ``E`` multiply-adds an entry whatever the
    number that is selected. On a CPU and a GPU alike it runs at the speed of a product, while
    gathering the selected experts first moves them through memory.

    Args:
        expert_SK: experts of each mixture, -1 for none.
        weight_SK: their weights, 0 for none.
        experts: E.
    """

    def __init__(self, expert_SK: Tensor, weight_SK: Tensor, experts: int) -> None:
        self.expert_SK = expert_SK
        self.weight_SK = weight_SK
        self.experts = experts

    def slice(self, start: int, stop: int) -> Mixtures:
        """The mixtures of experts ``start`` to ``stop`` alone; weights are kept as they are."""
        inside_SK = (self.expert_SK >= start) & (self.expert_SK < stop)
        return type(self)(
            torch.where(inside_SK, self.expert_SK - start, -1),
            self.weight_SK.masked_fill(~inside_SK, 0.0),
            stop - start,
        )

    def of(self, value_EX: Tensor) -> Tensor:
        """``Σ_e g_se value_e``, of shape (S, ...) for ``value_EX`` of shape (E, ...)."""
        mixed = self.dense_SE().to(value_EX.dtype) @ value_EX.flatten(1)
        return mixed.unflatten(1, value_EX.shape[1:])

    def dense_SE(self) -> Tensor:
        """The weights as a matrix over all experts."""
        place_SK = torch.where(self.expert_SK >= 0, self.expert_SK, self.experts)
        dense = self.weight_SK.new_zeros(len(place_SK), self.experts + 1)
        return dense.scatter_add(1, place_SK, self.weight_SK)[:, :-1]


class GatheredMixtures(Mixtures):
    """The same by gathering the selected experts: K multiply-adds an entry, and K copies of it."""

    def of(self, value_EX: Tensor) -> Tensor:
        chosen_SKX = value_EX[self.expert_SK.clamp_min(0)].flatten(2)
        weight_S1K = self.weight_SK[:, None].to(value_EX.dtype)
        return torch.bmm(weight_S1K, chosen_SKX).squeeze(1).unflatten(1, value_EX.shape[1:])

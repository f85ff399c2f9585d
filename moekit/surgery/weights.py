"""The weights of experts and routers, in one form whatever the architecture stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Tensors:
    """A record of tensors of which some may be absent."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same record with ``change`` applied to each tensor."""
        return type(self)(**{name: change(value) for name, value in self.items()})

    def items(self) -> list[tuple[str, Tensor]]:
        """The tensors that are there, by name."""
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in values if value is not None]

    def copy_(self, source: Self) -> None:
        """Write the values of ``source`` into these tensors.

        Raises:
            KeyError: ``source`` lacks one of them.
        """
        given = dict(source.items())
        with torch.no_grad():
            for name, value in self.items():
                value.copy_(given[name])


@dataclass(frozen=True)
class ExpertWeights(_Tensors):
    """One expert, or a whole bank where every tensor has one more dimension E in front.

    The expert is ``down(act(gate x) ⊙ up x)``, or ``down(act(up x))`` where it has no gate. A row
    of ``gate`` and ``up`` and a column of ``down`` are one hidden neuron.

    Attributes:
        up: (H, D).
        down: (D, H).
        gate: (H, D), or None.
        gate_bias, up_bias: (H,), or None.
        down_bias: (D,), or None.
    """

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def hidden(self) -> int:
        """Number of hidden neurons H."""
        return self.up.shape[-2]

    @property
    def has_bias(self) -> bool:
        """Whether any bias is there."""
        return any(b is not None for b in (self.gate_bias, self.up_bias, self.down_bias))

    def __getitem__(self, index: int | slice | Tensor) -> ExpertWeights:
        """The expert, or the experts, at ``index`` of a bank."""
        return self.map(lambda value: value[index])

    def reordered(self, order_H: Tensor) -> ExpertWeights:
        """One expert with its hidden neurons in another order, which computes the same."""
        moved = {name: value for name, value in self.items() if name != "down_bias"}
        moved = {
            name: value[:, order_H] if name == "down" else value[order_H]
            for name, value in moved.items()
        }
        return ExpertWeights(**moved, down_bias=self.down_bias)

    def neurons(self) -> Tensor:
        """Every hidden neuron as one row (H, …): gate row, up row, down column, hidden biases."""
        parts = [self.up, self.down.transpose(-1, -2)]
        parts += [] if self.gate is None else [self.gate]
        biases = [b for b in (self.gate_bias, self.up_bias) if b is not None]
        return torch.cat([*parts, *(bias[..., None] for bias in biases)], dim=-1)


@dataclass(frozen=True)
class RouterWeights(_Tensors):
    """A linear router.

    Attributes:
        weight: (E, D).
        bias: added to the logits (E,), or None.
        correction: added to the scores when experts are chosen, and not to the weights (E,), or
            None (DeepSeek-V3's ``e_score_correction_bias``).
    """

    weight: Tensor
    bias: Tensor | None = None
    correction: Tensor | None = None


def stacked(experts: list[ExpertWeights]) -> ExpertWeights:
    """A bank of these experts."""
    names = [name for name, _ in experts[0].items()]
    return ExpertWeights(
        **{name: torch.stack([getattr(expert, name) for expert in experts]) for name in names}
    )

"""Groups of rows that share a decision: their sizes, means, and the places of rows in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from moekit.errors import SignalError
from moekit.routing.ids import count_ids, queue_positions
from moekit.routing.router import routing_dtype
from moekit.routing.routing import Signals


@dataclass(frozen=True)
class Scopes:
    """N rows in S scopes.

    Attributes:
        scope_N: scope of each row, from 0 to S - 1.
        number: S, at least 1.
        valid_N: False for padding, which belongs to no scope, or None when there is none.
    """

    scope_N: Tensor
    number: int
    valid_N: Tensor | None

    @classmethod
    def of(cls, signals: Signals) -> Self:
        """The scopes that the signals tell; reads S back from the device if they do not."""
        scope_N = signals.scope_N
        assert scope_N is not None  # routers by scope require it
        number = signals.scopes
        if number is None:
            number = int(scope_N.max()) + 1 if len(scope_N) else 1
        return cls(scope_N, max(number, 1), signals.valid_N)

    def rows_S(self) -> Tensor:
        """Rows of each scope, padding left out."""
        return count_ids(self._counted_N(), self.number + 1)[:-1]

    def means(self, value_NX: Tensor) -> Tensor:
        """Mean (S, X) of the rows of each scope, in at least float32; 0 for one without rows."""
        value_NX = value_NX.to(routing_dtype(value_NX))
        total = value_NX.new_zeros(self.number + 1, value_NX.shape[1])
        total = total.index_add(0, self._counted_N(), value_NX)[:-1]
        return total / self.rows_S().clamp_min(1)[:, None]

    def positions(self) -> Tensor:
        """How many rows of the same scope come before each row (N,), padding left out."""
        order_N = torch.arange(len(self.scope_N), device=self.scope_N.device)
        return queue_positions(self._counted_N(), order_N, self.number + 1)

    def _counted_N(self) -> Tensor:
        """The scope of each row; S for padding, whose values must reach no mean."""
        if self.valid_N is None:
            return self.scope_N
        return torch.where(self.valid_N, self.scope_N, self.number)


def check_scopes(name: str, signals: Signals) -> None:
    """Look at the values of ``scope_N``: on a CPU only, elsewhere it would wait for the device.

    Raises:
        SignalError: a row's scope is outside 0 to S - 1, or all rows of a scope are padding.
    """
    scope_N, number, valid_N = signals.scope_N, signals.scopes, signals.valid_N
    if torch.compiler.is_compiling() or scope_N is None or scope_N.device.type != "cpu":
        return
    if not len(scope_N):
        return
    low, high = int(scope_N.min()), int(scope_N.max())
    if low < 0 or (number is not None and high >= number):
        known = "0 or more" if number is None else f"0 to {number - 1}"
        raise SignalError(f"{name}: signal scope_N holds {low} to {high}; wanted {known}")
    if valid_N is None:
        return
    rows_S, real_S = count_ids(scope_N, high + 1), count_ids(scope_N[valid_N], high + 1)
    empty = ((rows_S > 0) & (real_S == 0)).nonzero().flatten().tolist()
    if empty:
        raise SignalError(
            f"{name}: every row of scope {empty[0]} is padding, so it has no mean to be routed by; "
            "leave such sequences out of the batch"
        )

"""Groups of consecutive tokens that are routed together, and apart from all others.

Shape suffixes here: G groups, S places a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGroups:
    """Which row stands where.

    Attributes:
        row_GS: the row in each place; N for an empty place.
        place_N: the place of each row, counted through all groups; G·S for padding.
    """

    row_GS: Tensor
    place_N: Tensor

    @classmethod
    def of(cls, x_ND: Tensor, valid_N: Tensor | None, size: int | None) -> TokenGroups:
        """Runs of at most ``size`` consecutive tokens (None: all in one), as even as possible.

        Padding is left out, and its count is then read back to the host.
        """
        rows, device = x_ND.shape[0], x_ND.device
        tokens = rows if valid_N is None else int(valid_N.sum())
        groups = math.ceil(tokens / (size or max(tokens, 1)))
        places = max(1, math.ceil(tokens / max(groups, 1)))
        row_N = torch.arange(rows, device=device)
        rank_N = row_N if valid_N is None else valid_N.cumsum(0) - 1
        group_N = (rank_N + 1) * groups - 1
        group_N = group_N.div(max(tokens, 1), rounding_mode="floor").clamp_min(0)
        place_N = group_N * places + rank_N - group_N * tokens // max(groups, 1)
        if valid_N is not None:
            place_N = torch.where(valid_N, place_N, groups * places)
        row_P = row_N.new_full((groups * places + 1,), rows).scatter(0, place_N, row_N)
        return cls(row_P[:-1].view(groups, places), place_N)

    @property
    def places(self) -> int:
        """Places S of each group, the number of tokens of the largest."""
        return self.row_GS.shape[1]

    @property
    def live_GS(self) -> Tensor:
        """True where a place holds a token."""
        return self.row_GS < len(self.place_N)

    def split(self, value_NX: Tensor) -> Tensor:
        """The rows (G, S, X) by place; zero in empty ones."""
        padded = torch.cat([value_NX, value_NX.new_zeros(1, value_NX.shape[1])])
        return padded[self.row_GS]

    def join(self, value_GSX: Tensor) -> Tensor:
        """The values (N, X) of each row's place; zero for padding."""
        flat = value_GSX.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, flat.shape[1])])[self.place_N]

"""What zero-computation experts add to a layer's output, as one formula for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Direct:
    """The weighted outputs of copies and of C constant experts.

    Of token n, with combine weights w and MoE++'s α₁ = σ(x · gap) (eq. 5; a softmax of two is the
    sigmoid of their difference)::

        (copied_n + Σ_c w_nc α_nc) x_n + Σ_c w_nc (1 − α_nc) constant_c

    Attributes:
        copied_N1: sums of the copies' combine weights; None without copies.
        weight_NC: combine weights of the constant experts; None without them, as what follows.
        gap_CD: ``W_c``'s row for x less its row for the constant.
        constant_CD: the constants.
    """

    copied_N1: Tensor | None = None
    weight_NC: Tensor | None = None
    gap_CD: Tensor | None = None
    constant_CD: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The attributes, in order."""
        return self.copied_N1, self.weight_NC, self.gap_CD, self.constant_CD

    def __add__(self, other: Direct) -> Direct:
        """The experts of both."""
        return Direct(
            _both(torch.add, self.copied_N1, other.copied_N1),
            _both(_columns, self.weight_NC, other.weight_NC),
            _both(_rows, self.gap_CD, other.gap_CD),
            _both(_rows, self.constant_CD, other.constant_CD),
        )

    def added(self, y_ND: Tensor, x_ND: Tensor) -> Tensor:
        """``y_ND`` and what the experts make of ``x_ND``, both (N, D), in plain operations."""
        scale_N1 = self.copied_N1
        if self.weight_NC is not None and self.gap_CD is not None and self.constant_CD is not None:
            gap_NC = (x_ND @ self.gap_CD.T).to(torch.promote_types(x_ND.dtype, torch.float32))
            kept_NC = self.weight_NC * gap_NC.sigmoid()
            rest_NC = (self.weight_NC - kept_NC).to(x_ND.dtype)
            y_ND = torch.addmm(y_ND, rest_NC, self.constant_CD)
            scale_N1 = _both(torch.add, scale_N1, kept_NC.sum(1, keepdim=True))
        if scale_N1 is None:
            return y_ND
        return torch.addcmul(y_ND, scale_N1.to(x_ND.dtype), x_ND)


def _both(
    join: Callable[[Tensor, Tensor], Tensor], one: Tensor | None, other: Tensor | None
) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return join(one, other)


def _columns(one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([one, other], dim=1)


def _rows(one: Tensor, other: Tensor) -> Tensor:
    return torch.cat([one, other])

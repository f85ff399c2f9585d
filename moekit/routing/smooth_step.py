"""The smooth step, and what the gates that are built from it share."""

from __future__ import annotations

import torch
from torch import Tensor

ENTROPY_FLOOR = 1e-6
LOGIT_FLOOR = 1e-8


def smooth_step(t: Tensor, gamma: float) -> Tensor:
    """0 up to ``-γ/2``, 1 from ``γ/2``, the cubic ``-2t³/γ³ + 3t/(2γ) + 1/2`` between them.

    Unlike a sigmoid it is exactly 0 or 1 outside the band, and its slope is 0 there and at the
    ends (COMET, sec. 3; Hazimeh et al. 2020, "The Tree Ensemble Layer").

    Example:
        >>> smooth_step(torch.tensor([-2.0, -0.5, 0.0, 0.25, 0.5]), gamma=1.0).tolist()
        [0.0, 0.0, 0.5, 0.84375, 1.0]
    """
    ramp = (t / gamma + 0.5).clamp(0, 1)
    return (ramp * ramp * (3 - 2 * ramp)).clamp_max(1)  # the product can round to above 1


def selection_entropy(probability_NKE: Tensor, valid_N: Tensor | None) -> Tensor:
    """Entropy of each of K selections over E experts, summed over K and averaged over tokens ().

    It is 0, up to 1e-6 a selection, where every selection is certain, and positive elsewhere.
    """
    entropy_NKE = -probability_NKE * (probability_NKE + ENTROPY_FLOOR).log()
    return mean_over_tokens(entropy_NKE.sum((1, 2)), valid_N)


def mean_over_tokens(value_N: Tensor, valid_N: Tensor | None) -> Tensor:
    """Mean over the rows that are no padding; 0 if there are none."""
    if valid_N is None:
        return value_N.sum() / max(value_N.shape[0], 1)
    return torch.where(valid_N, value_N, 0.0).sum() / valid_N.sum().clamp_min(1)

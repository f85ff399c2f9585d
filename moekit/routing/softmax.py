"""Softmax at a temperature, and the Gumbel noise that turns it into a sample."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

# The least temperature that float32, in which routers compute, can still divide by.
LEAST_TEMPERATURE: Final = torch.finfo(torch.float32).tiny


def is_temperature(value: float) -> bool:
    """Whether logits can be divided by ``value``: positive, finite, and not 0 in float32."""
    return math.isfinite(value) and value >= LEAST_TEMPERATURE


def tempered_softmax(logits: Tensor, temperature: Tensor | float, dim: int = -1) -> Tensor:
    """``softmax(logits / temperature)``, finite however low the temperature.

    The greatest logit is subtracted before the division and not after it, so that the quotient of
    a large logit by a small temperature can run to -inf, whose share is 0, and never to +inf.
    """
    centred = logits - logits.amax(dim, keepdim=True).detach()
    return (centred / temperature).softmax(dim)


def gumbel_like(logits: Tensor) -> Tensor:
    """Independent standard Gumbel noise of the shape of ``logits``, from torch's own generator.

    Drawn as ``-log E`` with E exponential: the textbook ``-log(-log u)`` is infinite where a
    uniform draw is 0.
    """
    exponential = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    return -exponential.log()

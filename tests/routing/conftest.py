"""A router trained on nothing but its balance loss: where do the loads settle?"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moekit.layer import MoE, MoESpec
from moekit.routing import Load, LossSite, RoutingLosses

WIDTH = 32


def _settle(spec: MoESpec, steps: int = 600, tokens: int = 2048, rate: float = 0.02) -> Tensor:
    """Mean assignments (E,) a token over fresh batches, after ``steps`` Adam steps.

    The inputs are Gaussian; the learning rate falls to nothing, so that what is measured is the
    fixed point and not the noise of the last steps.
    """
    torch.manual_seed(0)
    layer: MoE = spec.build(WIDTH)
    losses = RoutingLosses([LossSite(spec.losses, layer.router)])
    optimiser = torch.optim.Adam(layer.router.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=rate / 1000)
    for _ in range(steps):
        total, _ = losses([layer.router(torch.randn(tokens, WIDTH))])
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        loads = [Load.of(layer.router(torch.randn(4096, WIDTH))) for _ in range(16)]
    return sum((load.assignments_E for load in loads), torch.zeros(())) / (16 * 4096)


@pytest.fixture(scope="session")
def settle() -> Callable[..., Tensor]:
    """Trains a layer's router on its balance losses alone and returns the loads."""
    return _settle

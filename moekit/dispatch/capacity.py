"""Capacity limits: functions from a routing to one without the assignments that found no place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.routing.ids import queue_positions
from moekit.routing.router import ZERO_COMPUTATION
from moekit.routing.routing import Routing

Priority = Literal["position", "score", "slot", "random"]


def capacities(
    tokens: int, slots: int, kinds: Sequence[str], factor: float, tau: float = 1.0
) -> list[int]:
    """Row places of each expert, rounded up.

    ``tokens · slots`` assignments times ``factor`` are shared out so that an expert with a matrix
    product gets ``tau`` times the places of a zero-computation expert (MoE++, eq. 8, which prints
    the formula without K; pass ``slots=1`` for that literal form). With ``tau`` 1 this is the
    usual ``⌈factor · N K / E⌉``.
    """
    share = [1.0 if kind in ZERO_COMPUTATION else tau for kind in kinds]
    unit = factor * tokens * slots / sum(share)
    return [math.ceil(unit * s - 1e-9) for s in share]  # 1e-9: products such as 1.1 · 10 round up


def limit(routing: Routing, capacity: Sequence[int], priority: Priority = "slot") -> Routing:
    """The routing with at most ``capacity[e]`` assignments to each expert ``e``.

    Args:
        priority: who stays when an expert overflows. ``slot``: first choices before second
            choices, and earlier tokens first within a choice (GShard); a router whose slots are in
            no order chooses by weight. ``position``: earlier tokens first. ``score``: larger
            combine weights first. ``random``: a random order from torch's default generator.

    Raises:
        SpecError: ``capacity`` has not one entry an expert.
    """
    if len(capacity) != routing.experts:
        raise SpecError(f"{len(capacity)} capacities were given for {routing.experts} experts")
    expert = torch.where(routing.used_NK, routing.expert_NK, routing.experts).flatten()
    position = queue_positions(expert, _order(routing, priority), routing.experts + 1)
    room = torch.tensor([*capacity, 0], device=expert.device)
    keep = position < room[expert]
    return routing.keep(keep.view_as(routing.expert_NK))


def _order(routing: Routing, priority: Priority) -> Tensor:
    """The assignments, flattened over (N, K), in the order in which they are given places."""
    tokens, slots = routing.expert_NK.shape
    index_NK = torch.arange(tokens * slots, device=routing.expert_NK.device).view(tokens, slots)
    if priority == "slot":
        return index_NK.gather(1, routing.choices_NK()).T.flatten()
    if priority == "position":
        return index_NK.flatten()
    if priority == "random":
        return torch.randperm(tokens * slots, device=index_NK.device)
    return routing.weight_NK.detach().flatten().argsort(descending=True, stable=True)

"""Top-k routing that starts near-dense: the baseline that ReMoE is to be compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.routing.router import Site
from moekit.routing.routing import Load
from moekit.routing.top_k import TopK, TopKRouter


@dataclass(frozen=True)
class DenseWarmup(TopK):
    """Top-k with ``warmup_k`` experts a token during the first optimiser steps (ReMoE, sec. 4).

    ReMoE spends extra compute while its gates are still dense. This baseline spends the same.

    Attributes:
        warmup_k: experts a token during the warm-up.
        warmup_steps: optimiser steps of the warm-up.
    """

    warmup_k: int = 6
    warmup_steps: int = 100

    def check(self) -> None:
        super().check()
        self.require(self.warmup_k >= 1, f"warmup_k is {self.warmup_k}; wanted at least 1")
        self.require(self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; wanted >= 0")

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        super().check_experts(kinds)
        room = len(kinds) // self.groups * self.top_groups
        self.require(
            self.warmup_k <= room,
            f"warmup_k is {self.warmup_k} but a token can choose among {room} experts",
        )

    def build(self, site: Site) -> DenseWarmupRouter:
        return DenseWarmupRouter(self, site)


class DenseWarmupRouter(TopKRouter):
    """The module of :class:`DenseWarmup`; ``steps_left`` is a buffer, saved with the checkpoint."""

    spec: DenseWarmup
    steps_left: Tensor

    def __init__(self, spec: DenseWarmup, site: Site) -> None:
        super().__init__(spec, site)
        self.register_buffer("steps_left", torch.tensor(spec.warmup_steps))

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        if hasattr(self, "steps_left"):  # absent while the base class initialises
            self.steps_left.fill_(self.spec.warmup_steps)

    def select(self, scores_NE: Tensor) -> Tensor:
        warming = self.training and int(self.steps_left) > 0
        return self.best(scores_NE, self.spec.warmup_k if warming else self.spec.k)

    @torch.no_grad()
    def update(self, load: Load) -> None:
        super().update(load)
        self.steps_left.sub_(1).clamp_min_(0)

"""Keep experts at random: what every other method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moekit.surgery.methods.method import Method, best_in_groups
from moekit.surgery.plan import BlockPlan, kept
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class Random(Method):
    """Experts drawn without regard to anything.

    Attributes:
        seed: draws them, for each block anew.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def check(self) -> None:
        self.require(
            self.allocation == "uniform",
            "random ranks no experts and so cannot spread them over blocks; set allocation to "
            "uniform",
        )
        self.require(0 <= self.seed < 2**31, f"seed is {self.seed}; wanted 0 to 2**31 - 1")

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + view.index)
        score_E = torch.rand(statistics.experts, generator=generator)
        return kept(best_in_groups(score_E, count, view.rule.groups), statistics.experts)

"""Keep the experts that are given the most weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moekit.surgery.methods.method import ScoreMethod
from moekit.surgery.statistics import BlockStatistics


@dataclass(frozen=True)
class RouterWeight(ScoreMethod):
    """Scores an expert by its mean combine weight over all tokens, 0 where it is not chosen."""

    name: ClassVar[str] = "router-weight"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.weight_E / statistics.tokens

"""Keep the experts that are chosen most often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moekit.surgery.methods.method import ScoreMethod
from moekit.surgery.statistics import BlockStatistics


@dataclass(frozen=True)
class Frequency(ScoreMethod):
    """Scores an expert by the share of tokens that choose it."""

    name: ClassVar[str] = "frequency"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.count_E.double() / statistics.tokens

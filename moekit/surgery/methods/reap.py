"""REAP (Lasby et al. 2025, arXiv 2510.13999): keep the experts that add most where used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moekit.errors import SpecError
from moekit.surgery.methods.method import ScoreMethod
from moekit.surgery.statistics import BlockStatistics, Needs


@dataclass(frozen=True)
class REAP(ScoreMethod):
    """Scores an expert by the mean, over the tokens that chose it, of weight times output norm.

    An expert that no token chose scores 0. Weights are those that the router combines with, after
    its own normalisation.
    """

    name: ClassVar[str] = "reap"

    @property
    def needs(self) -> Needs:
        return Needs(norms=True)

    def importance(self, statistics: BlockStatistics) -> Tensor:
        if statistics.weighted_norm_E is None:
            raise SpecError("reap needs the norms of the experts' outputs; record them with norms")
        return statistics.weighted_norm_E / statistics.count_E.clamp_min(1)

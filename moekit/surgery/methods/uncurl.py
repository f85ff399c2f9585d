"""UNCURL (Sarkar et al. 2024, arXiv 2409.01483): cluster by the task's router logits, and merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.errors import SpecError
from moekit.surgery.methods.merging import Clusters, MergingMethod, clusters_of
from moekit.surgery.methods.spectral import spectral_labels
from moekit.surgery.statistics import BlockStatistics


@dataclass(frozen=True)
class Uncurl(MergingMethod):
    """Spectral clustering of experts by the cosine of their logits on the task's own tokens.

    The affinity is ``(1 + cosine) / 2``. Members are aligned to the most used one of their cluster
    and averaged by how often the task's tokens choose them. It is task-aware by its calibration
    data: give it text of the task that the model is to serve. What becomes of the router is not
    stated in what we could read of the paper; ``average`` makes a checkpoint with fewer rows.

    Attributes:
        center: whether each token's mean logit is taken off before the cosine.
        seed: of the clustering.
    """

    name: ClassVar[str] = "uncurl"
    router: Literal["alias", "average", "dominant"] = "average"
    center: bool = False
    seed: int = 0

    def check(self) -> None:
        self.require(0 <= self.seed < 2**31, f"seed is {self.seed}; wanted 0 to 2**31 - 1")

    def clusters(self, statistics: BlockStatistics, members: list[int], count: int) -> Clusters:
        if statistics.tokens < 2:
            raise SpecError(
                f"{statistics.tokens} token tells nothing of how logits vary; give more text"
            )
        affinity_EE = (1 + statistics.logit_similarity(self.center)) / 2
        affinity = affinity_EE[members][:, members].numpy()
        return clusters_of(spectral_labels(affinity, count, self.seed), members)

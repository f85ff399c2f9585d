"""UNCURL (Sarkar et al. 2024, arXiv 2409.01483): cluster by the task's router logits, and merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moekit.errors import SpecError
from moekit.surgery.methods.merging import (
    Clusters,
    aligned_orders,
    clusters_of,
    heads_of,
    in_groups,
)
from moekit.surgery.methods.method import Method
from moekit.surgery.methods.spectral import spectral_labels
from moekit.surgery.plan import BlockPlan, clustered
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class Uncurl(Method):
    """Spectral clustering of experts by the cosine of their logits on the task's own tokens.

    The affinity is ``(1 + cosine) / 2``. Members are aligned to the most used one of their cluster
    and averaged by how often the task's tokens choose them. It is task-aware by its calibration
    data: give it text of the task that the model is to serve.

    Attributes:
        router: ``average`` gives each merged expert the weighted mean of its members' rows;
            ``dominant`` the most used one's; ``alias`` keeps all rows, and a token's weight for any
            member goes to the merged expert. The paper's abstract does not say which it takes.
        align: whether hidden neurons are aligned before averaging.
        center: whether each token's mean logit is taken off before the cosine.
        seed: of the clustering.
    """

    name: ClassVar[str] = "uncurl"
    router: Literal["average", "dominant", "alias"] = "average"
    align: bool = True
    center: bool = False
    seed: int = 0

    @property
    def reroutes(self) -> bool:
        return self.router == "alias"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.count_E.double() / statistics.tokens

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        if statistics.tokens < 2:
            raise SpecError(
                f"{statistics.tokens} token tells nothing of how logits vary; give more text"
            )
        affinity_EE = (1 + statistics.logit_similarity(self.center)) / 2

        def cluster(members: list[int], size: int) -> Clusters:
            labels = spectral_labels(affinity_EE[members][:, members].numpy(), size, self.seed)
            return clusters_of(labels, members)

        groups = 1 if self.reroutes else view.rule.groups
        clusters = in_groups(statistics.experts, count, groups, cluster)
        heads = heads_of(clusters, statistics.count_E)
        order_EH = aligned_orders(view.bank, clusters, heads) if self.align else None
        return clustered(clusters, heads, statistics.count_E, self.router, order_EH)

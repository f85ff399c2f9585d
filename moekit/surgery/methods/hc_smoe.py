"""HC-SMoE (Chen et al. 2024, arXiv 2410.08589): merge experts whose mean outputs are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from scipy.cluster.hierarchy import cut_tree, linkage
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
from moekit.surgery.plan import BlockPlan, clustered
from moekit.surgery.statistics import BlockStatistics, Needs
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class HCSMoE(Method):
    """Agglomerative clustering of the experts' mean outputs over all tokens, then averaging.

    Linkage is the average Euclidean distance; members count by how often they are chosen.

    Attributes:
        router: ``alias`` keeps the rows of all experts, as the paper does: a token's weight for any
            member goes to the merged expert. ``average`` and ``dominant`` give it one row.
        align: whether hidden neurons are aligned before averaging; the paper does not.
    """

    name: ClassVar[str] = "hc-smoe"
    router: Literal["alias", "average", "dominant"] = "alias"
    align: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(means=True)

    @property
    def reroutes(self) -> bool:
        return self.router == "alias"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.count_E.double() / statistics.tokens

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        mean_ED = statistics.mean_ED
        if mean_ED is None:
            raise SpecError("hc-smoe needs the mean output of every expert; record it with means")

        def cluster(members: list[int], size: int) -> Clusters:
            if size == len(members):
                return [[member] for member in members]
            tree = linkage(mean_ED[members].numpy(), method="average", metric="euclidean")
            return clusters_of(cut_tree(tree, n_clusters=size).flatten().tolist(), members)

        groups = 1 if self.reroutes else view.rule.groups
        clusters = in_groups(statistics.experts, count, groups, cluster)
        heads = heads_of(clusters, statistics.count_E)
        order_EH = aligned_orders(view.bank, clusters, heads) if self.align else None
        return clustered(clusters, heads, statistics.count_E, self.router, order_EH)

"""HC-SMoE (Chen et al. 2024, arXiv 2410.08589): merge experts whose mean outputs are alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from scipy.cluster.hierarchy import cut_tree, linkage

from moekit.errors import SpecError
from moekit.surgery.methods.merging import Clusters, MergingMethod, clusters_of
from moekit.surgery.statistics import BlockStatistics, Needs


@dataclass(frozen=True)
class HCSMoE(MergingMethod):
    """Agglomerative clustering of the experts' mean outputs over all tokens, then averaging.

    Linkage is the average Euclidean distance. The paper keeps the rows of all experts (``alias``)
    and does not align.
    """

    name: ClassVar[str] = "hc-smoe"
    align: bool = False

    @property
    def needs(self) -> Needs:
        return Needs(means=True)

    def clusters(self, statistics: BlockStatistics, members: list[int], count: int) -> Clusters:
        if statistics.mean_ED is None:
            raise SpecError("hc-smoe needs the mean output of every expert; record it with means")
        if count == len(members):
            return [[member] for member in members]
        points = statistics.mean_ED[members].numpy()
        tree = linkage(points, method="average", metric="euclidean")
        return clusters_of(cut_tree(tree, n_clusters=count).flatten().tolist(), members)

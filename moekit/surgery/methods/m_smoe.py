"""M-SMoE (Li et al. 2024, arXiv 2310.01334): merge experts into the most used ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from moekit.surgery.methods.merging import Clusters, MergingMethod
from moekit.surgery.methods.method import best_in_groups
from moekit.surgery.statistics import BlockStatistics


@dataclass(frozen=True)
class MSMoE(MergingMethod):
    """The most used experts of all blocks are dominant; each other joins one of its block.

    It joins the dominant one whose router logits are most similar to its own, is aligned to it by a
    permutation of hidden neurons, and the members are averaged by how often they are chosen. The
    paper keeps the rows of all experts (``alias``). This is its merging stage; the compression
    stage (low rank plus sparse, with distillation) is not part of it.
    """

    name: ClassVar[str] = "m-smoe"
    allocation: Literal["uniform", "global"] = "global"

    def clusters(self, statistics: BlockStatistics, members: list[int], count: int) -> Clusters:
        similarity_EE = statistics.logit_similarity()
        best = best_in_groups(statistics.count_E[members], count, 1)
        joined = {members[place]: [members[place]] for place in best}
        dominant = list(joined)
        for expert in members:
            if expert not in dominant:
                near = max(dominant, key=lambda d: (float(similarity_EE[expert, d]), -d))
                joined[near].append(expert)
        return list(joined.values())

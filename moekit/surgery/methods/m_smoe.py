"""M-SMoE (Li et al. 2024, arXiv 2310.01334): merge experts into the most used ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moekit.surgery.methods.merging import Clusters, aligned_orders, in_groups
from moekit.surgery.methods.method import Method, best_in_groups
from moekit.surgery.plan import BlockPlan, clustered
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView


@dataclass(frozen=True)
class MSMoE(Method):
    """The most used experts of all blocks are dominant; each other joins one of its block.

    It joins the dominant one whose router logits are most similar to its own, is aligned to it by a
    permutation of hidden neurons, and the members are averaged by how often they are chosen. This
    is the merging stage; the compression stage (low rank plus sparse, with distillation) is not
    part of it.

    Attributes:
        router: ``alias`` keeps the rows of all experts, as the paper does: a token's weight for any
            member goes to the merged expert. ``average`` and ``dominant`` give it one row.
        align: whether members are aligned first.
    """

    name: ClassVar[str] = "m-smoe"
    allocation: Literal["uniform", "global"] = "global"
    router: Literal["alias", "average", "dominant"] = "alias"
    align: bool = True

    @property
    def reroutes(self) -> bool:
        return self.router == "alias"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.count_E.double() / statistics.tokens

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        similarity_EE = statistics.logit_similarity()
        usage_E = self.importance(statistics)

        def join(members: list[int], size: int) -> Clusters:
            best = best_in_groups(usage_E[members], size, 1)
            dominant = [members[place] for place in best]
            joined = {head: [head] for head in dominant}
            for expert in members:
                if expert not in joined:
                    near = max(dominant, key=lambda d: (float(similarity_EE[expert, d]), -d))
                    joined[near].append(expert)
            return list(joined.values())

        groups = 1 if self.reroutes else view.rule.groups
        clusters = in_groups(statistics.experts, count, groups, join)
        heads = [cluster[0] for cluster in clusters]
        order_EH = aligned_orders(view.bank, clusters, heads) if self.align else None
        return clustered(clusters, heads, statistics.count_E, self.router, order_EH)

"""What the methods that merge experts share: alignment, clusters within groups, the plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moekit.surgery.methods.method import Method, require_equal_groups
from moekit.surgery.plan import BlockPlan, clustered
from moekit.surgery.statistics import BlockStatistics
from moekit.surgery.view import BlockView
from moekit.surgery.weights import ExpertWeights

Clusters = list[list[int]]


def alignment(reference: ExpertWeights, other: ExpertWeights) -> Tensor:
    """The order of ``other``'s hidden neurons (H,) in which they fit those of ``reference`` best.

    Maximises the sum of the inner products of the pairs over gate, up and down, as the weight
    matching of M-SMoE does (Li et al. 2024, arXiv 2310.01334, sec. 3.1); with it the squared
    distance of the weights is least. What the expert computes stays the same.
    """
    gain_HH = reference.neurons().double() @ other.neurons().double().T
    _, order = linear_sum_assignment(gain_HH.cpu().numpy(), maximize=True)
    return torch.from_numpy(order)


def aligned_orders(bank: ExpertWeights, clusters: Clusters, heads: Sequence[int]) -> Tensor:
    """The order (E, H) of every expert's neurons that fits those of its cluster's head."""
    order_EH = torch.arange(bank.hidden).repeat(bank.up.shape[0], 1)
    for head, cluster in zip(heads, clusters, strict=True):
        for expert in cluster:
            if expert != head:
                order_EH[expert] = alignment(bank[head], bank[expert])
    return order_EH


@dataclass(frozen=True)
class MergingMethod(Method):
    """Base of the methods that put experts into clusters and average each.

    Members count by how often tokens choose them, and are aligned to the most used of them.

    Attributes:
        router: ``alias`` keeps the rows of all experts: a token's weight for any member goes to the
            merged expert. ``average`` gives a merged expert the weighted mean of its members' rows,
            ``dominant`` that of the most used.
        align: whether hidden neurons are aligned before averaging.
    """

    abstract: ClassVar[bool] = True
    router: Literal["alias", "average", "dominant"] = "alias"
    align: bool = True

    @property
    def reroutes(self) -> bool:
        return self.router == "alias"

    def importance(self, statistics: BlockStatistics) -> Tensor:
        return statistics.count_E.double() / statistics.tokens

    def clusters(
        self, statistics: BlockStatistics, members: list[int], count: int
    ) -> list[list[int]]:
        """``count`` clusters of some of a block's experts, none empty."""
        raise NotImplementedError

    def plan(self, view: BlockView, statistics: BlockStatistics, count: int) -> BlockPlan:
        groups = 1 if self.reroutes else view.rule.groups
        cluster = partial(self.clusters, statistics)
        clusters = in_groups(statistics.experts, count, groups, cluster)
        heads = heads_of(clusters, statistics.count_E)
        order_EH = aligned_orders(view.bank, clusters, heads) if self.align else None
        return clustered(clusters, heads, statistics.count_E, self.router, order_EH)


def heads_of(clusters: Clusters, weight_E: Tensor) -> list[int]:
    """The member of each cluster with the largest weight, the first of equals."""
    return [max(cluster, key=lambda e: (float(weight_E[e]), -e)) for cluster in clusters]


def in_groups(
    experts: int, count: int, groups: int, cluster: Callable[[list[int], int], Clusters]
) -> Clusters:
    """Clusters that none of the router's groups shares with another.

    Args:
        cluster: puts these experts into so many clusters.

    Raises:
        SpecError: the groups cannot share ``count`` clusters equally.
    """
    require_equal_groups(count, groups)
    size = experts // groups
    found: Clusters = []
    for group in range(groups):
        members = list(range(group * size, (group + 1) * size))
        found += cluster(members, count // groups)
    return found


def clusters_of(labels: Sequence[int], members: Sequence[int]) -> Clusters:
    """The members of each label."""
    return [
        [m for m, own in zip(members, labels, strict=True) if own == label]
        for label in sorted(set(labels))
    ]

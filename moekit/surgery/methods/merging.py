"""What the methods that merge experts share: how members are aligned and clusters kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from moekit.surgery.methods.method import require_equal_groups
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

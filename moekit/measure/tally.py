"""Running counts of which tokens and groups went to which experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.measure.observe import Observation
from moekit.measure.statistics import ModelStatistics
from moekit.routing.router import ranges_of


@dataclass(frozen=True)
class Pairs:
    """How often each (token id, expert) pair of a layer occurred.

    Only pairs that did are kept, as vocabulary × experts can be vast.

    Attributes:
        key_P: ``token id · E + expert``, ascending.
        count_P: occurrences.
    """

    key_P: Tensor
    count_P: Tensor

    @classmethod
    def none(cls) -> Pairs:
        """No pairs yet."""
        empty = torch.zeros(0, dtype=torch.int64)
        return cls(empty, empty)

    def add(self, keys: Tensor) -> Pairs:
        """These pairs and one more for each of ``keys``."""
        counts = torch.cat([self.count_P, torch.ones_like(keys)])
        distinct, index = torch.cat([self.key_P, keys]).unique(return_inverse=True)
        return Pairs(distinct, torch.zeros_like(distinct).index_add_(0, index, counts))


class TokenTally:
    """Sums over observations, on the host.

    Args:
        vocabulary: number of token ids V.
        groups: number of groups G.

    Attributes:
        statistics: the counts of each layer.
        count_V: occurrences of each token id.
        used_V: feed-forward experts its occurrences chose, over all layers.
        pairs_L: token and expert pairs of each layer.
        group_count_G, group_used_G: tokens of each group, and the experts they chose.
        group_load_LGE: assignments of each group to each expert, one tensor a layer.
    """

    def __init__(self, vocabulary: int, groups: int) -> None:
        self.statistics = ModelStatistics(())
        self.count_V = torch.zeros(vocabulary, dtype=torch.int64)
        self.used_V = torch.zeros(vocabulary, dtype=torch.int64)
        self.pairs_L: list[Pairs] = []
        self.group_count_G = torch.zeros(groups, dtype=torch.int64)
        self.group_used_G = torch.zeros(groups, dtype=torch.int64)
        self.group_load_LGE: list[Tensor] = []

    def add(self, seen: Observation) -> None:
        """Count one batch."""
        if not self.statistics:
            self._open(seen)
        else:
            self.statistics = self.statistics + seen.statistics
        valid_N = seen.valid_N.cpu()
        token_N = seen.token_N.cpu()[valid_N]
        expert_LNK = [routing.expert_NK.cpu()[valid_N] for routing in seen.routings]
        used_N = self._used(token_N, expert_LNK)
        self.count_V += torch.bincount(token_N, minlength=len(self.count_V))
        self.used_V.index_add_(0, token_N, used_N)
        for index, (expert_NK, experts) in enumerate(zip(expert_LNK, self._sizes(), strict=True)):
            self.pairs_L[index] = self.pairs_L[index].add(_keys(token_N, expert_NK, experts))
        if seen.group_N is not None and len(self.group_count_G):
            self._add_groups(seen.group_N.cpu()[valid_N], used_N, expert_LNK)

    def _open(self, seen: Observation) -> None:
        self.statistics = seen.statistics
        groups = len(self.group_count_G)
        self.pairs_L = [Pairs.none() for _ in seen.statistics]
        self.group_load_LGE = [
            torch.zeros(groups, experts, dtype=torch.int64) for experts in self._sizes()
        ]

    def _sizes(self) -> list[int]:
        return [len(layer.kinds) for layer in self.statistics]

    def _used(self, token_N: Tensor, expert_LNK: list[Tensor]) -> Tensor:
        """Feed-forward experts of each token over all layers."""
        used_N = torch.zeros_like(token_N)
        for expert_NK, layer in zip(expert_LNK, self.statistics, strict=True):
            for start, stop in ranges_of(layer.kinds, "feed_forward"):
                used_N += ((expert_NK >= start) & (expert_NK < stop)).sum(1)
        return used_N

    def _add_groups(self, group_N: Tensor, used_N: Tensor, expert_LNK: list[Tensor]) -> None:
        known_N = group_N >= 0
        group_N = group_N[known_N]
        self.group_count_G += torch.bincount(group_N, minlength=len(self.group_count_G))
        self.group_used_G.index_add_(0, group_N, used_N[known_N])
        for load_GE, expert_NK in zip(self.group_load_LGE, expert_LNK, strict=True):
            keys = _keys(group_N, expert_NK[known_N], load_GE.shape[1])
            load_GE += torch.bincount(keys, minlength=load_GE.numel()).view_as(load_GE)


def _keys(value_N: Tensor, expert_NK: Tensor, experts: int) -> Tensor:
    """One number ``value · E + expert`` for each assignment."""
    keys_NK = value_N[:, None] * experts + expert_NK
    return keys_NK[expert_NK >= 0]

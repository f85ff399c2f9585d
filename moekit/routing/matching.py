"""Routers that match all tokens of a group to experts at once, each expert to its capacity.

Transport routers differ in the potential that they add to a token's score before each expert takes
its best tokens; with no potential they are expert choice.

Shape suffixes here: G groups, S places a group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site
from moekit.routing.token_groups import TokenGroups


@dataclass(frozen=True)
class MatchingSpec(RouterSpec):
    """Base of the routers that match a whole group.

    Which expert a token gets depends on all other tokens of its group, later ones included, in
    training and in evaluation alike: these routers are not causal. In a language model the loss on
    text is flattered, and generation, which sees no later tokens, routes otherwise than training.

    Attributes:
        capacity_factor: tokens that an expert takes, over the S / E of an even share.
        multiple_of: an expert's places are rounded up to a multiple of this (4 in the paper's
            code), and never exceed the tokens of the largest group.
        group_size: tokens that are matched at once, at most: the batch is cut into runs of
            consecutive tokens, as even as possible; None for the whole batch.
        init_std: standard deviation of the initial weights; None for the model's own.
    """

    abstract: ClassVar[bool] = True
    causal: ClassVar[bool] = False
    fixed_k: ClassVar[bool] = False
    capacity_factor: float = 1.0
    multiple_of: int = 4
    group_size: int | None = None
    init_std: float | None = None

    def check(self) -> None:
        self.require(
            1 <= self.capacity_factor < math.inf,
            f"capacity_factor is {self.capacity_factor}; below 1 there is less than a place a "
            "token, and above the number of experts an expert has more places than tokens",
        )
        self.require(
            self.multiple_of >= 1, f"multiple_of is {self.multiple_of}; wanted 1 for no rounding"
        )
        self.require(
            self.group_size is None or self.group_size >= 1,
            f"group_size is {self.group_size}; wanted tokens, or None for the whole batch",
        )
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(
            self.capacity_factor <= len(kinds),
            f"capacity_factor is {self.capacity_factor} experts a token but the bank has "
            f"{len(kinds)}",
        )

    def capacity(self, places: int, experts: int) -> int:
        """Tokens that each of E experts takes of a group with S places."""
        wanted = math.ceil(self.capacity_factor * places / experts - 1e-9)  # 1.1 · 10 is above 11
        return min(places, math.ceil(wanted / self.multiple_of) * self.multiple_of)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.capacity_factor * sum(counted_E) / len(share_E)


class MatchingRouter(Router):
    """Base of their modules: a linear gate without bias."""

    def __init__(self, spec: MatchingSpec, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.init_std = spec.init_std
        self.weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=self.init_std or std)


def best_of_each_expert(ranking_GES: Tensor, groups: TokenGroups, places: int) -> Tensor:
    """Bool (N, E): the tokens that each expert takes, of every group those it ranks highest."""
    live_G1S = groups.live_GS[:, None]
    ranking_GES = ranking_GES.detach().masked_fill(~live_G1S, float("-inf"))
    best_GEP = ranking_GES.topk(places, dim=-1).indices
    taken_GES = torch.zeros_like(ranking_GES, dtype=torch.bool).scatter_(-1, best_GEP, True)
    return groups.join((taken_GES & live_G1S).transpose(1, 2))

"""A dispatch that merges the selected experts' parameters and runs one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.dispatch.dispatch import Dispatch, DispatchSpec
from moekit.dispatch.plan import Plan, plan_rows
from moekit.experts.experts import Experts, ExpertsSpec, Run
from moekit.experts.groups import GroupedMM
from moekit.experts.mixtures import GatheredMixtures, Mixtures
from moekit.routing.router import RouterSpec
from moekit.routing.routing import Routing


@dataclass(frozen=True)
class Merged(DispatchSpec):
    """Each scope runs one expert: the weighted sum of its experts' parameters (MEO).

    With combine weights g, a scope's expert has the weights ``Σ g W`` and biases ``Σ g b``, and
    each of its rows reaches one matrix product an expert's projection has, whatever the number
    of experts. Experts of one projection (:class:`~moekit.experts.Linear`) give the same whether
    they are merged or run; experts with an activation inside do not.

    Merging itself costs a few multiply-adds for each entry of an expert, once a scope. That is
    little where a scope has many rows, and more than it saves where it has one; a router that
    decides row by row is refused.

    He et al. 2023, arXiv 2310.09832.

    Attributes:
        merge: ``product`` merges by one product of the weights with all E experts, which costs E
            multiply-adds an entry; ``gather`` copies the K selected ones first, which costs K and
            the copies. Gathering pays where K is far below E.
    """

    merge: Literal["product", "gather"] = "product"

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        name = type(router).__name__
        self.require(
            router.per_scope,
            f"{name} decides row by row, and merging experts for a single row costs more than "
            f"running them; use PerSequence({name}(...)), PerChunk or PerTask, with "
            "adapter=TokenAttention() in the layer for what is particular to a token",
        )

    def check_bank(self, experts: ExpertsSpec) -> None:
        experts.check_merging()

    def rows_per_token(self, load: float) -> float:
        """One, where a scope has an expert at all."""
        return min(load, 1.0)

    def build(self) -> Dispatch:
        return MergedDispatch(self)


@dataclass(frozen=True)
class MergedPlan(Plan):
    """The plan of a bank of S experts, one a scope, each of weight 1.

    Attributes:
        mixtures: what each of them is made of.
        ranges: ids of the dispatched experts, as in :class:`~moekit.experts.Experts`.
    """

    mixtures: Mixtures
    ranges: list[tuple[int, int]]


class MergedDispatch(Dispatch):
    """The module of :class:`Merged`.

    Its ``rows_E`` counts each row once, for the expert of the largest weight in its mixture.
    """

    mixtures: ClassVar[dict[str, type[Mixtures]]] = {
        "product": Mixtures,
        "gather": GatheredMixtures,
    }

    def __init__(self, spec: Merged) -> None:
        super().__init__()
        self.spec = spec

    def plan(self, routing: Routing, experts: Experts) -> MergedPlan:
        decisions, ranges = routing.per_scope(), experts.dispatched_ranges
        kind = self.mixtures[self.spec.merge]
        mixtures = kind(decisions.expert_NK, decisions.weight_NK, routing.experts)
        every = experts.dispatched == routing.experts
        rows = plan_rows(_of_scopes(routing, ranges, every), [(0, decisions.tokens)], GroupedMM)
        return MergedPlan(
            rows.assignment_R, rows.weight_NK, rows.groups, rows.every, mixtures, ranges
        )

    def bank(self, plan: Plan, experts: Experts) -> Run:
        assert isinstance(plan, MergedPlan)
        return experts.merged(plan.mixtures)

    def rows(self, plan: Plan) -> Tensor:
        assert isinstance(plan, MergedPlan)
        dense_SE = plan.mixtures.dense_SE()
        weight_SE = torch.cat([dense_SE[:, start:stop] for start, stop in plan.ranges], dim=1)
        count_S = plan.groups.count_E
        return count_S.new_zeros(weight_SE.shape[1]).index_add(0, weight_SE.argmax(1), count_S)


def _of_scopes(routing: Routing, ranges: list[tuple[int, int]], every: bool) -> Routing:
    """The routing in which a row's one expert is its scope.

    Rows without an expert in ``ranges``, which ``every`` says are all, have none.
    """
    assert routing.scope_N is not None  # ``per_scope`` has seen to it
    assert routing.scopes is not None
    expert_NK = routing.expert_NK
    working_NK = torch.zeros_like(expert_NK, dtype=torch.bool)
    for start, stop in ranges:
        working_NK |= (expert_NK >= start) & (expert_NK < stop)
    scope_N1 = torch.where(working_NK.any(1), routing.scope_N, -1)[:, None]
    return Routing(
        expert_NK=scope_N1,
        weight_NK=torch.ones_like(scope_N1, dtype=routing.weight_NK.dtype),
        experts=routing.scopes,
        full=routing.full and every,
    )

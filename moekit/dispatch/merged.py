"""A dispatch that merges the selected experts' parameters and runs one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.dispatch.dispatch import Dispatch, DispatchSpec
from moekit.dispatch.plan import Plan, plan_rows
from moekit.experts.experts import Experts, ExpertsSpec
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

    def run(self, x_ND: Tensor, routing: Routing, experts: Experts) -> tuple[Tensor, Tensor]:
        decisions = routing.per_scope()
        kind = self.mixtures[self.spec.merge]
        mixtures = kind(decisions.expert_NK, decisions.weight_NK, routing.experts)
        plan = self.plan(routing, experts)
        y_ND = plan.combine(experts.merged(mixtures)(plan.gather(x_ND), plan.groups))
        return y_ND, _rows(plan, mixtures, experts)

    def plan(self, routing: Routing, experts: Experts) -> Plan:
        """The plan of a bank of S experts, one a scope, each of weight 1.

        Rows without an expert, or with none that is dispatched, get no row in it.
        """
        assert routing.scope_N is not None  # ``per_scope`` has seen to it
        assert routing.scopes is not None
        expert_NK = routing.expert_NK
        working_NK = torch.zeros_like(expert_NK, dtype=torch.bool)
        for start, stop in experts.dispatched_ranges:
            working_NK |= (expert_NK >= start) & (expert_NK < stop)
        scope_N1 = torch.where(working_NK.any(1), routing.scope_N, -1)[:, None]
        of_scopes = Routing(
            expert_NK=scope_N1,
            weight_NK=torch.ones_like(scope_N1, dtype=routing.weight_NK.dtype),
            experts=routing.scopes,
            full=routing.full and experts.dispatched == routing.experts,
        )
        return plan_rows(of_scopes, [(0, routing.scopes)], GroupedMM)


def _rows(plan: Plan, mixtures: Mixtures, experts: Experts) -> Tensor:
    """The rows of each scope, counted for the dispatched expert that weighs most in it."""
    dense_SE = mixtures.dense_SE()
    weight_SE = torch.cat([dense_SE[:, a:b] for a, b in experts.dispatched_ranges], dim=1)
    count_S = plan.groups.count_E
    return count_S.new_zeros(experts.dispatched).index_add(0, weight_SE.argmax(1), count_S)

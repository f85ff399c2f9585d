"""Sparsity-constrained transport as a router: at most k tokens an expert, or k experts a token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moekit.routing.matching import MatchingRouter, MatchingSpec, best_of_each_expert
from moekit.routing.router import Site, linear_logits
from moekit.routing.routing import Routing, Signals, all_slots_NE
from moekit.routing.token_groups import TokenGroups
from moekit.routing.transport import (
    Solver,
    SparseOTResult,
    TransportProblem,
    maximise,
    result_of,
)
from moekit.routing.transport_gradient import differentiable_plan


@dataclass(frozen=True)
class SparseTransport(MatchingSpec):
    """Tokens and experts are matched by transport with at most k entries an expert, or a token.

    Tokens have mass 1, experts S / E each, and a pair costs minus its softmax probability (Liu,
    Puigcerver, Blondel, ICLR 2023, arXiv 2209.15466). The marginals balance the load; there is no
    balance loss. The semi-dual is solved in every forward pass, for each group of tokens apart.

    With ``combine="softmax"``, the default of the paper's code, the plan only says who goes where:
    combine weights are the probabilities, and the gate learns through them. An expert takes
    exactly its capacity of tokens: where fewer have an entry above zero, those follow that were
    next in line for one. With ``combine="plan"`` the entries of the plan are the weights, only
    those above zero are run, and the gradient is that through the solution (implicit, so it is
    exact only as far as the solver has converged).

    Attributes:
        sparse: who has at most k: each ``expert`` (k tokens) or each ``token`` (k experts).
        k: that number. None for ``expert`` is the capacity; a number there needs a ``group_size``
            of at most ``k E``. A ``token`` needs a number, and ``capacity_factor`` has no effect:
            set a :class:`~moekit.Capacity` after it, as the paper's code does.
        gamma: weight γ of the quadratic term.
        solver: ``adam`` takes ``iterations`` steps of ``learning_rate`` without looking; ``bfgs``
            takes at most as many and stops at ``tolerance``, which reads back from the device.
        iterations: solver steps; 0 is expert choice on the probabilities.
        learning_rate: of Adam.
        tolerance: violation of the tokens' sums at which ``bfgs`` stops.
        combine: which weights mix the experts' outputs.

    Example:
        >>> import torch
        >>> from moekit import MoESpec, SwiGLU
        >>> from moekit.routing import SparseTransport
        >>> layer = MoESpec(SparseTransport(), SwiGLU(count=4, hidden=16)).build(width=8)
        >>> layer(torch.randn(32, 8)).routing.load_E()
        tensor([8, 8, 8, 8])
    """

    sparse: Literal["expert", "token"] = "expert"
    k: int | None = None
    gamma: float = 1.0
    solver: Solver = "adam"
    iterations: int = 20
    learning_rate: float = 1e-2
    tolerance: float = 1e-6
    combine: Literal["softmax", "plan"] = "softmax"

    @property
    def fixed_k(self) -> bool:  # type: ignore[override]
        return self.sparse == "token" and self.combine == "softmax"

    def check(self) -> None:
        super().check()
        self.require(
            self.k is not None or self.sparse == "expert",
            "sparse is token and k is not set; give the number of experts a token",
        )
        self.require(self.k is None or self.k >= 1, f"k is {self.k}; wanted at least 1")
        self.require(
            self.k is None or self.sparse == "token" or self.group_size is not None,
            f"k is {self.k} tokens an expert of a group of any size; set group_size, or leave k "
            "out for a capacity that follows the group",
        )
        self.require(
            self.k is None or self.capacity_factor == 1,
            "both k and capacity_factor are set; k is used alone",
        )
        for name in ("gamma", "learning_rate"):
            value = getattr(self, name)
            self.require(0 < value < math.inf, f"{name} is {value}; wanted a positive number")
        for name in ("iterations", "tolerance"):
            value = getattr(self, name)
            self.require(0 <= value < math.inf, f"{name} is {value}; wanted 0 or more")

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        super().check_experts(kinds)
        if self.k is None:
            return
        if self.sparse == "token":
            self.require(
                self.k <= len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts"
            )
            return
        assert self.group_size is not None
        self.require(
            self.k * len(kinds) >= self.group_size,
            f"{len(kinds)} experts with k {self.k} have less than a place for each of "
            f"{self.group_size} tokens; raise k or lower group_size",
        )

    def capacity(self, places: int, experts: int) -> int:
        return super().capacity(places, experts) if self.k is None else min(self.k, places)

    def build(self, site: Site) -> SparseTransportRouter:
        return SparseTransportRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        """Of the softmax gate; entries of the plan that are zero make it less."""
        if self.k is None:
            return super().expected_load(share_E, counted_E)
        if self.sparse == "token":
            return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)
        assert self.group_size is not None
        return self.k * sum(counted_E) / self.group_size


class SparseTransportRouter(MatchingRouter):
    """The module of :class:`SparseTransport`."""

    def __init__(self, spec: SparseTransport, site: Site) -> None:
        super().__init__(spec, site)
        self.spec = spec

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = linear_logits(x_ND, self.weight)
        scores_NE = logits_NE.softmax(-1)
        groups = TokenGroups.of(x_ND, signals.valid_N, self.spec.group_size)
        problem = self._problem(scores_NE.detach(), groups)
        potential, _ = self._solved(problem)
        if self.spec.combine == "plan":
            expert_NK, weight_NK = self._by_plan(scores_NE, groups, problem, potential)
        else:
            expert_NK, weight_NK = self._by_probability(scores_NE, groups, problem, potential)
        return Routing(
            expert_NK=expert_NK,
            weight_NK=weight_NK,
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=scores_NE,
            full=self.spec.fixed_k,
        )

    def transport(self, x_ND: Tensor, signals: Signals | None = None) -> SparseOTResult:
        """The solved problem behind a routing, one for each group, to look at.

        The plan is (G, S, E), or (G, E, S) where tokens are sparse. ``row_residual`` tells how far
        the solver got; ``primal`` above ``dual`` how far the plan is from optimal, if it is small.
        """
        signals = Signals() if signals is None else signals
        scores_NE = linear_logits(x_ND, self.weight).softmax(-1).detach()
        groups = TokenGroups.of(x_ND, signals.valid_N, self.spec.group_size)
        problem = self._problem(scores_NE, groups)
        return result_of(problem, "semidual", *self._solved(problem))

    def _problem(self, scores_NE: Tensor, groups: TokenGroups) -> TransportProblem:
        """Columns are what is sparse: experts over the tokens of a group, or the reverse."""
        cost_GSE = -groups.split(scores_NE)
        token_GS = groups.live_GS.to(cost_GSE.dtype)
        expert_GE = (token_GS.sum(1, keepdim=True) / self.site.experts).expand(
            -1, self.site.experts
        )
        if self.spec.sparse == "token":
            assert self.spec.k is not None
            return TransportProblem(cost_GSE, expert_GE, token_GS, self.spec.k, self.spec.gamma)
        places = self.spec.capacity(groups.places, self.site.experts)
        cost_GES = cost_GSE.transpose(1, 2).contiguous()
        return TransportProblem(cost_GES, token_GS, expert_GE, places, self.spec.gamma)

    def _solved(self, problem: TransportProblem) -> tuple[Tensor, int]:
        spec = self.spec
        tolerance = spec.tolerance if spec.solver == "bfgs" else None
        return maximise(
            problem, "semidual", spec.solver, spec.iterations, tolerance, spec.learning_rate
        )

    def _by_probability(
        self,
        scores_NE: Tensor,
        groups: TokenGroups,
        problem: TransportProblem,
        potential: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights (N, K): the plan's choice, and the probabilities of the chosen.

        An entry of the plan rises with its score, so the best scores are the largest entries.
        """
        ranking = problem.scores(potential)
        if self.spec.sparse == "token":
            expert_NK = groups.join(ranking.topk(problem.k, dim=-1).indices)
            return expert_NK, scores_NE.gather(1, expert_NK)
        taken_NE = best_of_each_expert(ranking, groups, problem.k)
        return all_slots_NE(taken_NE), scores_NE.masked_fill(~taken_NE, 0.0)

    def _by_plan(
        self,
        scores_NE: Tensor,
        groups: TokenGroups,
        problem: TransportProblem,
        potential: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Ids and weights (N, E): the entries of the plan, with their gradient."""
        cost_GSE = -groups.split(scores_NE)
        by_expert = self.spec.sparse == "expert"
        cost_IJ = cost_GSE if by_expert else cost_GSE.transpose(1, 2)
        plan_JI = problem.plan(potential)
        plan_IJ = differentiable_plan(cost_IJ, problem.a_I, problem.b_J, plan_JI, problem.gamma)
        weight_NE = groups.join(plan_IJ if by_expert else plan_IJ.transpose(1, 2))
        # Not a number counts as used, so that it shows in the output.
        return all_slots_NE(~(weight_NE.detach() <= 0)), weight_NE

"""Local search over the assignment of a router's outputs to experts (COMET+, Top-k+, Hash+)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.autocast import without_autocast
from moekit.routing.float32 import KeepsFloat32
from moekit.routing.permutation import (
    Schedule,
    best_assignment,
    permutation_entropy,
    soft_permutation,
)
from moekit.routing.router import Router, RouterSpec, Site, routing_dtype
from moekit.routing.routing import Load, Routing, Signals, all_slots_NE
from moekit.routing.top_k import TopK

LOG_WEIGHT_RANGE = 0.05


@dataclass(frozen=True)
class Permuted(RouterSpec):
    """Any router, with a permutation between its outputs and the experts that is learned first.

    For ``steps`` optimiser steps an annealed Sinkhorn matrix P learns with the rest and every token
    reaches all experts: ``g ← g P``, with each token's total weight kept. After that, and at every
    evaluation, P is a hard permutation that only re-indexes experts (Ibrahim et al. 2023, sec. 4).

    The paper advances the schedule at every training forward. Here it advances once an optimiser
    step, in ``update``, so that gradient accumulation and recomputation change nothing. Before the
    first step the permutation is the identity.

    A router that acts on what experts are, such as top-k with ``normalize="nonzero"`` over zero
    experts, cannot be permuted.

    Attributes:
        router: who computes, up to the permutation.
        schedule: ``paper`` is the annealing of the released code, whose Sinkhorn iterations do not
            converge; ``safe`` cools less and iterates to convergence.
        steps: optimiser steps T after which the permutation is frozen.
        zeta: weight of the entropy of P.
    """

    fixed_k: ClassVar[bool] = False
    router: RouterSpec = TopK()
    schedule: Schedule = "safe"
    steps: int = 1000
    zeta: float = 1e-4

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.router.causal

    @property
    def scores(self) -> Literal["probabilities", "gates", "nothing"]:  # type: ignore[override]
        return self.router.scores

    @property
    def per_scope(self) -> bool:  # type: ignore[override]
        return self.router.per_scope

    @property
    def bidirectional(self) -> bool:  # type: ignore[override]
        return self.router.bidirectional

    @property
    def needs_past(self) -> bool:  # type: ignore[override]
        return self.router.needs_past

    def check(self) -> None:
        self.require(self.steps >= 1, f"steps is {self.steps}; wanted at least 1")
        self.require(self.zeta >= 0, f"zeta is {self.zeta}; wanted 0 or more")
        self.require(
            not isinstance(self.router, Permuted),
            "the router is permuted already; two permutations are one, so wrap it once",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.router.check_experts(kinds)
        self.require(len(kinds) >= 2, f"the bank has {len(kinds)} expert; nothing to permute")
        picks_by_kind = isinstance(self.router, TopK) and self.router.normalize == "nonzero"
        self.require(
            not (picks_by_kind and "zero" in kinds),
            "normalize=nonzero leaves zero experts out by place, which a permutation changes; "
            "use normalize=selected",
        )

    def build(self, site: Site) -> PermutedRouter:
        return PermutedRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.router.expected_load(share_E, counted_E)


class PermutedRouter(KeepsFloat32, Router):
    """The module of :class:`Permuted`.

    Output i of the wrapped router goes to expert ``order_E[i]`` once hard. ``plan_EE`` is P after
    the last update while learning, and ``step`` counts updates; all three are saved.
    """

    float32_buffers = ("plan_EE",)
    plan_EE: Tensor
    order_E: Tensor
    step: Tensor

    def __init__(self, spec: Permuted, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.router = spec.router.build(site)
        experts = site.experts
        self.log_weight_EE = nn.Parameter(torch.empty(experts, experts))
        self.register_buffer("plan_EE", torch.empty(experts, experts, dtype=torch.float32))
        self.register_buffer("order_E", torch.empty(experts, dtype=torch.int64))
        self.register_buffer("step", torch.empty((), dtype=torch.int64))
        self._reset_permutation()

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """What the wrapped router requires."""
        return self.router.requires

    @property
    def loss_weights(self) -> dict[str, float]:
        return {**self.router.loss_weights, "permutation_entropy": self.spec.zeta}

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        self.router.reset_parameters(std)
        self._reset_permutation()

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        routing = self.router(x_ND, signals)
        passed = int(self.step) + 1 if self.training else self.spec.steps
        if passed < self.spec.steps:
            plan_EE = self._plan(passed, routing_dtype(x_ND))
            found, entropy = _mixed(routing, plan_EE), permutation_entropy(plan_EE)
        else:
            # A gradient of zero, not none: data parallel training waits for every parameter.
            found, entropy = _reindexed(routing, self.order_E), 0 * self.log_weight_EE.sum()
        return found.replace(losses={**routing.losses, "permutation_entropy": entropy})

    @torch.no_grad()
    def update(self, load: Load) -> None:
        """Count the step, and while learning harden the permutation as it is now."""
        self.router.update(Load(load.assignments_E[self.order_E], load.tokens))
        passed = int(self.step) + 1
        if passed < self.spec.steps:
            plan_EE = self._plan(passed, torch.promote_types(self.log_weight_EE.dtype, torch.float))
            self.plan_EE.copy_(plan_EE)
            hardened = plan_EE if self.spec.schedule == "paper" else self.log_weight_EE
            self.order_E.copy_(best_assignment(hardened))
        self.step.fill_(passed)

    def _plan(self, passed: int, dtype: torch.dtype) -> Tensor:
        with without_autocast(self.log_weight_EE):
            log_weight_EE = self.log_weight_EE.to(dtype)
            return soft_permutation(log_weight_EE, self.spec.schedule, passed / self.spec.steps)

    @torch.no_grad()
    def _reset_permutation(self) -> None:
        nn.init.uniform_(self.log_weight_EE, -LOG_WEIGHT_RANGE, LOG_WEIGHT_RANGE)
        self.plan_EE.copy_(torch.eye(self.site.experts))
        self.order_E.copy_(torch.arange(self.site.experts))
        self.step.zero_()


def _mixed(routing: Routing, plan_EE: Tensor) -> Routing:
    """The routing through a soft permutation: dense, with each token's total weight kept."""
    logits_NE, scores_NE = routing.logits_NE, routing.scores_NE
    with without_autocast(plan_EE):
        weight_NE = _through(routing.dense_weight_NE(), plan_EE)
        return routing.replace(
            expert_NK=all_slots_NE(weight_NE != 0),  # NaN is not 0: it must not vanish here
            weight_NK=weight_NE,
            logits_NE=None if logits_NE is None else logits_NE.to(plan_EE.dtype) @ plan_EE,
            scores_NE=None if scores_NE is None else _through(scores_NE, plan_EE),
            full=False,
        )


def _through(value_NE: Tensor, plan_EE: Tensor) -> Tensor:
    """``value P``, with each row scaled back to its former sum."""
    value_NE = value_NE.to(plan_EE.dtype)
    moved_NE = value_NE @ plan_EE
    before_N1, after_N1 = value_NE.sum(-1, keepdim=True), moved_NE.sum(-1, keepdim=True)
    lost_N1 = after_N1 < torch.finfo(after_N1.dtype).tiny  # 1 / after would overflow
    scale_N1 = before_N1 / torch.where(lost_N1, 1.0, after_N1)
    return moved_NE * torch.where(lost_N1, 0.0, scale_N1)


def _reindexed(routing: Routing, order_E: Tensor) -> Routing:
    """The routing with output i of the router at expert ``order_E[i]``; no arithmetic at all."""
    source_E = order_E.argsort()
    logits_NE, scores_NE = routing.logits_NE, routing.scores_NE
    return routing.remap(order_E, routing.experts).replace(
        logits_NE=None if logits_NE is None else logits_NE[:, source_E],
        scores_NE=None if scores_NE is None else scores_NE[:, source_E],
    )

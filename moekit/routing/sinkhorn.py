"""S-BASE: dense entropic transport decides which tokens an expert takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moekit.routing.matching import MatchingRouter, MatchingSpec, best_of_each_expert
from moekit.routing.router import Site, linear_logits
from moekit.routing.routing import Routing, Signals, all_slots_NE
from moekit.routing.token_groups import TokenGroups


@dataclass(frozen=True)
class Sinkhorn(MatchingSpec):
    """Each expert takes the tokens of the largest entries in its column of a Sinkhorn plan.

    The plan is that of entropic transport from tokens, of mass 1, to experts, of equal mass, whose
    similarity is the logits (S-BASE: Clark et al., "Unified Scaling Laws for Routed Language
    Models", arXiv 2202.01169; here as the dense baseline of sparsity-constrained transport, with
    experts taking tokens). Combine weights are softmax probabilities.

    Attributes:
        iterations: scalings of rows and columns.
        epsilon: strength of the entropy.
        noise: in training, normal noise of this deviation over E is added to the logits.

    Example:
        >>> from moekit import MoESpec, SwiGLU
        >>> from moekit.routing import Sinkhorn
        >>> layer = MoESpec(Sinkhorn(), SwiGLU(count=4, hidden=16)).build(width=8)
        >>> layer(torch.randn(32, 8)).routing.load_E()
        tensor([8, 8, 8, 8])
    """

    iterations: int = 20
    epsilon: float = 1.0
    noise: float = 1.0

    def check(self) -> None:
        super().check()
        self.require(self.iterations >= 0, f"iterations is {self.iterations}; wanted 0 or more")
        self.require(
            0 < self.epsilon < math.inf, f"epsilon is {self.epsilon}; wanted a positive number"
        )
        self.require(0 <= self.noise < math.inf, f"noise is {self.noise}; wanted 0 or more")

    def build(self, site: Site) -> SinkhornRouter:
        return SinkhornRouter(self, site)


class SinkhornRouter(MatchingRouter):
    """The module of :class:`Sinkhorn`."""

    def __init__(self, spec: Sinkhorn, site: Site) -> None:
        super().__init__(spec, site)
        self.spec = spec

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = linear_logits(x_ND, self.weight)
        noisy_NE = self._noisy(logits_NE)
        scores_NE = noisy_NE.softmax(-1)
        groups = TokenGroups.of(x_ND, signals.valid_N, self.spec.group_size)
        plan_GES = self.log_plan(noisy_NE.detach(), groups)
        places = self.spec.capacity(groups.places, self.site.experts)
        taken_NE = best_of_each_expert(plan_GES, groups, places)
        return Routing(
            expert_NK=all_slots_NE(taken_NE),
            weight_NK=scores_NE.masked_fill(~taken_NE, 0.0),
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=scores_NE,
        )

    def log_plan(self, logits_NE: Tensor, groups: TokenGroups) -> Tensor:
        """Logarithm (G, E, S) of the plan after the iterations; its token sums are 1."""
        empty_G1S = ~groups.live_GS[:, None]
        scaled_GES = groups.split(logits_NE).transpose(1, 2) / self.spec.epsilon
        scaled_GES = scaled_GES.masked_fill(empty_G1S, float("-inf"))
        mass_G11 = groups.live_GS.sum(1)[:, None, None] / self.site.experts
        token_G1S = torch.zeros_like(scaled_GES[:, :1])
        expert_GE1 = torch.zeros_like(scaled_GES[:, :, :1])
        for _ in range(self.spec.iterations):
            expert_GE1 = mass_G11.log() - (scaled_GES + token_G1S).logsumexp(-1, keepdim=True)
            token_G1S = -(scaled_GES + expert_GE1).logsumexp(1, keepdim=True)
            token_G1S = token_G1S.masked_fill(empty_G1S, 0.0)
        return scaled_GES + expert_GE1 + token_G1S

    def _noisy(self, logits_NE: Tensor) -> Tensor:
        if not self.training or self.spec.noise == 0:
            return logits_NE
        return logits_NE + torch.randn_like(logits_NE) * (self.spec.noise / self.site.experts)

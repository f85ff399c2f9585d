"""ReMoE's fully differentiable router: an expert is active where its ReLU gate is positive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site, linear_logits
from moekit.routing.routing import Routing, Signals, all_slots_NE


@dataclass(frozen=True)
class ReLURouting(RouterSpec):
    """Gates ``ReLU(x W)``; a positive gate is both selection and combine weight (ReMoE, eq. 5).

    The number of experts a token is free. :class:`~moekit.routing.L1Balance` drives its mean to
    ``k``, so a layer with this router needs that loss.

    Attributes:
        k: target mean of active experts a token.
        init_std: standard deviation of the initial weights (0.01 in the released scripts).
    """

    fixed_k: ClassVar[bool] = False
    scores: ClassVar[Literal["probabilities", "gates", "nothing"]] = "gates"
    k: float = 1
    init_std: float | None = 0.01

    def check(self) -> None:
        self.require(self.k > 0, f"k is {self.k}; wanted a positive target")
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(
            self.k < len(kinds),
            f"k is {self.k} of {len(kinds)} experts; ReLU routing needs k below their number",
        )

    def build(self, site: Site) -> ReLURouter:
        return ReLURouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class ReLURouter(Router):
    """The module of :class:`ReLURouting`."""

    def __init__(self, spec: ReLURouting, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=self.spec.init_std or std)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = linear_logits(x_ND, self.weight)
        gate_NE = logits_NE.relu()
        return Routing(
            expert_NK=all_slots_NE(gate_NE > 0),
            weight_NK=gate_NE,
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=gate_NE,
        )

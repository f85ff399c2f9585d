"""Expert choice: each expert takes its best tokens, so load is even by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site, linear_logits
from moekit.routing.routing import Routing, Signals, all_slots_NE


@dataclass(frozen=True)
class ExpertChoice(RouterSpec):
    """Each expert takes the ``⌈capacity · N / E⌉`` tokens that score it highest (Zhou et al. 2022).

    Whether a token is taken depends on the other tokens of the batch, later ones included: the
    router is not causal, and the validation loss of a language model that uses it is flattered.

    Attributes:
        capacity: mean experts a token.
        init_std: standard deviation of the initial weights; None for the model's own.
    """

    causal: ClassVar[bool] = False
    fixed_k: ClassVar[bool] = False
    capacity: float = 2.0
    init_std: float | None = None

    def check(self) -> None:
        self.require(self.capacity > 0, f"capacity is {self.capacity}; wanted a positive number")
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(
            self.capacity <= len(kinds),
            f"capacity is {self.capacity} experts a token but the bank has {len(kinds)}",
        )

    def build(self, site: Site) -> ExpertChoiceRouter:
        return ExpertChoiceRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.capacity * sum(counted_E) / len(share_E)


class ExpertChoiceRouter(Router):
    """The module of :class:`ExpertChoice`."""

    def __init__(self, spec: ExpertChoice, site: Site) -> None:
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
        scores_NE = logits_NE.softmax(-1)
        chosen_NE = self._chosen(scores_NE.detach(), signals.valid_N)
        return Routing(
            expert_NK=all_slots_NE(chosen_NE),
            weight_NK=scores_NE.masked_fill(~chosen_NE, 0.0),
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=scores_NE,
        )

    def _chosen(self, scores_NE: Tensor, valid_N: Tensor | None) -> Tensor:
        if valid_N is not None:  # padding must neither be taken nor count for the capacity
            scores_NE = scores_NE.masked_fill(~valid_N[:, None], -1.0)
        tokens = scores_NE.shape[0] if valid_N is None else int(valid_N.sum())
        places = min(tokens, math.ceil(self.spec.capacity * tokens / self.site.experts))
        best_PE = scores_NE.topk(places, dim=0).indices
        return torch.zeros_like(scores_NE, dtype=torch.bool).scatter_(0, best_PE, True)

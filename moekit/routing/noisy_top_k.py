"""Noisy top-k gating with the importance and load losses of Shazeer et al. 2017."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site, linear_logits
from moekit.routing.routing import Routing, Signals

EPSILON = 1e-10  # as released: keeps CV² finite where nothing was routed


@dataclass(frozen=True)
class NoisyTopK(RouterSpec):
    """The k largest of noisy logits, softmax over these k (Shazeer et al. 2017, arXiv 1701.06538).

    In training the logits ``x W_g`` get noise ``ε (softplus(x W_n) + floor)``, ε ~ N(0, 1); in
    evaluation they are ranked as they are. Both maps start at zero, so that the noise alone decides
    at first. Two losses keep the experts balanced: the squared coefficient of variation of each
    expert's *importance*, the sum of its weights, and of its *load*, a smooth count of its rows
    (appendix A). Coefficients and floor are those of MEO's released code.

    Attributes:
        k: experts a row.
        noise_floor: least standard deviation of the noise.
        importance: coefficient of the loss ``importance_cv2``.
        load: coefficient of the loss ``load_cv2``.
    """

    k: int = 2
    noise_floor: float = 0.01
    importance: float = 0.01
    load: float = 0.01

    def check(self) -> None:
        self.require(self.k >= 1, f"k is {self.k}; a row needs at least one expert")
        self.require(
            self.noise_floor > 0, f"noise_floor is {self.noise_floor}; wanted a positive number"
        )
        for name in ("importance", "load"):
            value = getattr(self, name)
            self.require(value >= 0, f"{name} is {value}; wanted 0 or more")

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(self.k <= len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts")

    def build(self, site: Site) -> NoisyTopKRouter:
        return NoisyTopKRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class NoisyTopKRouter(Router):
    """The module of :class:`NoisyTopK`."""

    def __init__(self, spec: NoisyTopK, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.noise_weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.reset_parameters()

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"importance_cv2": self.spec.importance, "load_cv2": self.spec.load}

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = linear_logits(x_ND, self.weight)
        noisy_NE, std_NE = logits_NE, None
        if self.training:
            softplus = torch.nn.functional.softplus
            std_NE = softplus(linear_logits(x_ND, self.noise_weight)) + self.spec.noise_floor
            noisy_NE = logits_NE + torch.randn_like(logits_NE) * std_NE
        best_NK, expert_NK = noisy_NE.topk(self.spec.k, dim=-1)
        routing = Routing(
            expert_NK=expert_NK,
            weight_NK=best_NK.softmax(-1),
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=noisy_NE.softmax(-1),
            full=True,
        )
        chance_NE = self._chance_of_a_place(routing, noisy_NE, std_NE)
        losses = _balance(routing.dense_weight_NE(), chance_NE, signals.valid_N)
        return routing.replace(losses=losses)

    def _chance_of_a_place(
        self, routing: Routing, noisy_NE: Tensor, std_NE: Tensor | None
    ) -> Tensor:
        """Each expert's chance (N, E) of a place if its own noise were drawn again.

        Without noise, or where every expert has a place, this is 1 or 0.
        """
        if std_NE is None or self.spec.k == self.site.experts:
            return (routing.dense_weight_NE() > 0).to(noisy_NE.dtype)
        assert routing.logits_NE is not None
        chosen_NE = torch.zeros_like(noisy_NE, dtype=torch.bool)
        chosen_NE.scatter_(1, routing.expert_NK, True)
        return chance_of_a_place(routing.logits_NE, noisy_NE, std_NE, chosen_NE)


def chance_of_a_place(
    logits_NE: Tensor, noisy_NE: Tensor, std_NE: Tensor, chosen_NE: Tensor
) -> Tensor:
    """``Φ((logit - threshold) / std)``, the smooth load of one row (Shazeer et al., eq. 9).

    The threshold is the best noisy logit outside the top k for an expert inside, and the least
    inside for one outside: what its own draw has to beat, the other draws held fixed.
    """
    worst_N1 = noisy_NE.masked_fill(~chosen_NE, float("inf")).amin(1, keepdim=True)
    next_N1 = noisy_NE.masked_fill(chosen_NE, float("-inf")).amax(1, keepdim=True)
    return torch.special.ndtr((logits_NE - torch.where(chosen_NE, next_N1, worst_N1)) / std_NE)


def squared_variation(value_E: Tensor) -> Tensor:
    """``variance / mean²`` with the unbiased variance; 0 for a single value."""
    if len(value_E) < 2:
        return 0.0 * value_E.sum()
    return value_E.var() / (value_E.mean().square() + EPSILON)


def _balance(weight_NE: Tensor, chance_NE: Tensor, valid_N: Tensor | None) -> dict[str, Tensor]:
    if valid_N is not None:
        weight_NE = weight_NE.masked_fill(~valid_N[:, None], 0.0)
        chance_NE = chance_NE.masked_fill(~valid_N[:, None], 0.0)
    return {
        "importance_cv2": squared_variation(weight_NE.sum(0)),
        "load_cv2": squared_variation(chance_NE.sum(0)),
    }

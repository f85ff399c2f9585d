"""DSelect-k: k selectors, each a smooth binary code of one expert."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site, linear_logits, routing_dtype
from moekit.routing.routing import Routing, Signals, all_slots_NE
from moekit.routing.smooth_step import (
    LOGIT_FLOOR,
    mean_over_tokens,
    selection_entropy,
    smooth_step,
)

SELECTOR_RANGE = 0.05
REACHABLE_FLOOR = 1e-6


@dataclass(frozen=True)
class DSelectK(RouterSpec):
    """k selectors of ``⌈log2 n⌉`` smooth-step bits each, under a softmax (Hazimeh et al. 2021).

    A selector's probability of expert i is the product over the bits of i, most significant first,
    of the bit's smooth step or one minus it. If n is no power of two, some codes name no expert and
    the weights of a token add up to less than 1; a loss keeps selectors away from those codes.

    Attributes:
        k: selectors, and experts a token once every bit is saturated.
        gamma: width γ of the smooth step's band.
        entropy: weight of the entropy of the selectors' probabilities.
        reachability: weight of ``1 / (1e-6 + mass on codes of experts)``, summed over selectors and
            averaged over tokens; without effect if n is a power of two. The released code sums over
            tokens too, which makes its strength depend on the batch.
        static: the same experts for every token: bits and selector weights are free parameters.
    """

    fixed_k: ClassVar[bool] = False
    settles: ClassVar[bool] = True
    k: int = 2
    gamma: float = 1.0
    entropy: float = 0.01
    reachability: float = 1.0
    static: bool = False

    def check(self) -> None:
        self.require(self.k >= 1, f"k is {self.k}; a token needs at least one selector")
        self.require(
            0 < self.gamma < math.inf, f"gamma is {self.gamma}; wanted a positive finite width"
        )
        self.require(self.entropy >= 0, f"entropy is {self.entropy}; wanted 0 or more")
        self.require(
            self.reachability >= 0, f"reachability is {self.reachability}; wanted 0 or more"
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(
            len(kinds) >= 2, f"a selector needs at least 2 experts; the bank has {len(kinds)}"
        )
        self.require(self.k <= len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts")

    def build(self, site: Site) -> DSelectKRouter:
        return DSelectKRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class DSelectKRouter(Router):
    """The module of :class:`DSelectK`; without the two weights if it is static."""

    def __init__(self, spec: DSelectK, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.bits = (site.experts - 1).bit_length()
        self.bit_weight = self._weight(spec.k * self.bits)
        self.bit_bias = nn.Parameter(torch.empty(spec.k * self.bits))
        self.selector_weight = self._weight(spec.k)
        self.selector_bias = nn.Parameter(torch.empty(spec.k))
        self.reset_parameters()

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"entropy": self.spec.entropy, "reachability": self.spec.reachability}

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw from the paper's uniform ranges, whatever ``std``: bits must start in the band."""
        ranges = {
            self.spec.gamma / 100: (self.bit_weight, self.bit_bias),
            SELECTOR_RANGE: (self.selector_weight, self.selector_bias),
        }
        for bound, parameters in ranges.items():
            for parameter in parameters:
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        bit_NKM = smooth_step(
            self._values(x_ND, self.bit_weight, self.bit_bias).unflatten(-1, (-1, self.bits)),
            self.spec.gamma,
        )
        select_NKE = code_probabilities(bit_NKM)[..., : self.site.experts]
        share_NK = self._values(x_ND, self.selector_weight, self.selector_bias).softmax(-1)
        gate_NE = (share_NK[..., None] * select_NKE).sum(1)
        return Routing(
            expert_NK=all_slots_NE(gate_NE != 0),  # NaN is not 0: it must not vanish here
            weight_NK=gate_NE,
            experts=self.site.experts,
            logits_NE=(gate_NE + LOGIT_FLOOR).log(),
            scores_NE=_normalised(gate_NE),
            losses=self._losses(select_NKE, signals.valid_N),
            settled_k=self.spec.k,
        )

    def _weight(self, rows: int) -> nn.Parameter | None:
        return None if self.spec.static else nn.Parameter(torch.empty(rows, self.site.width))

    def _values(self, x_ND: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
        if weight is not None:
            return linear_logits(x_ND, weight, bias)
        return bias.to(routing_dtype(x_ND)).expand(x_ND.shape[0], -1)

    def _losses(self, select_NKE: Tensor, valid_N: Tensor | None) -> dict[str, Tensor]:
        losses = {"entropy": selection_entropy(select_NKE, valid_N)}
        if 2**self.bits != self.site.experts:
            penalty_NK = 1 / (REACHABLE_FLOOR + select_NKE.sum(-1))
            losses["reachability"] = mean_over_tokens(penalty_NK.sum(-1), valid_N)
        return losses


def code_probabilities(bit_NKM: Tensor) -> Tensor:
    """Probability (N, K, 2^M) of each code of M bits, most significant first."""
    code = bit_NKM.new_ones(*bit_NKM.shape[:-1], 1)
    for bit in bit_NKM.split(1, dim=-1):
        code = torch.stack((code * (1 - bit), code * bit), dim=-1).flatten(-2)
    return code


def _normalised(gate_NE: Tensor) -> Tensor:
    """The gates divided by their sum; all equal for a token whose selectors reach no expert."""
    total_N1 = gate_NE.sum(-1, keepdim=True)
    lost_N1 = total_N1 < torch.finfo(total_N1.dtype).tiny  # 1 / total would overflow
    share_NE = gate_NE / torch.where(lost_N1, 1.0, total_N1)
    return torch.where(lost_N1, 1 / gate_NE.shape[-1], share_NE)

"""The Gumbel-softmax gate: combine weights are a relaxed sample of one expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.routing.float32 import KeepsFloat32
from moekit.routing.router import Router, RouterSpec, Site, linear_logits
from moekit.routing.routing import Routing, Signals, all_slots_NE
from moekit.routing.softmax import gumbel_like, is_temperature, tempered_softmax


@dataclass(frozen=True)
class GumbelSoftmax(RouterSpec):
    """Every token takes every expert with weight ``softmax((ℓ + g) / τ)``, ``ℓ = x Wᵀ + b``.

    ``g`` is standard Gumbel noise (Jang, Gu, Poole 2017; Maddison, Mnih, Teh 2017); the gate of GG
    MoE (Chernov 2025, arXiv 2502.03608). In training it is drawn afresh for every row and expert
    from torch's default generator. In evaluation the weight is the mean over ``samples`` draws,
    which differs from the softmax of ``ℓ / τ`` and from that of ``ℓ``. Those draws are a table,
    made once from ``seed`` and shared by all rows, so that a token's output depends neither on its
    place in the batch nor on the other tokens.

    ``Routing.scores_NE`` is ``softmax(ℓ)``, the probability that an expert has the largest weight.

    Attributes:
        temperature: τ, constant; 2.2 is the median of GG MoE's tuned models.
        hard: straight-through: weights are 1 for the expert of the largest noisy logit and 0 for
            the others, gradients those of the soft sample. These need the output of every expert,
            so training costs what the soft gate costs; in evaluation the expert of the largest
            logit runs alone, with weight 1. GG MoE itself is soft.
        samples: draws that the soft gate averages in evaluation.
        seed: seed of these draws.
        bias: whether the gate has ``b``.
        init_std: standard deviation of the initial weights; None for the model's own.

    Example:
        >>> from moekit.routing import GumbelSoftmax
        >>> gate = GumbelSoftmax(temperature=1.5, samples=20)
    """

    fixed_k: ClassVar[bool] = False
    temperature: float = 2.2
    hard: bool = False
    samples: int = 10
    seed: int = 0
    bias: bool = True
    init_std: float | None = None

    def check(self) -> None:
        self.require(
            is_temperature(self.temperature),
            f"temperature is {self.temperature}; wanted a positive finite number",
        )
        self.require(self.samples >= 1, f"samples is {self.samples}; wanted at least 1")
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )

    def build(self, site: Site) -> GumbelSoftmaxRouter:
        return GumbelSoftmaxRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        """All experts; of the straight-through gate the one that runs after training."""
        if not self.hard:
            return float(sum(counted_E))
        return sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class GumbelSoftmaxRouter(KeepsFloat32, Router):
    """The module of :class:`GumbelSoftmax`; ``noise_ES`` is saved with the checkpoint."""

    float32_buffers = ("noise_ES",)  # a model cast to half precision keeps its draws
    noise_ES: Tensor

    def __init__(self, spec: GumbelSoftmax, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.bias = nn.Parameter(torch.empty(site.experts)) if spec.bias else None
        noise_ES = torch.empty(site.experts, spec.samples, dtype=torch.float32)
        self.register_buffer("noise_ES", noise_ES)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=self.spec.init_std or std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        generator = torch.Generator().manual_seed(self.spec.seed)
        exponential_ES = torch.empty(self.noise_ES.shape, device="cpu", dtype=torch.float32)
        self.noise_ES.copy_(-exponential_ES.exponential_(generator=generator).log())

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = linear_logits(x_ND, self.weight, self.bias)
        weight_NE, active_NE = self.sample(logits_NE) if self.training else self.settled(logits_NE)
        return Routing(
            expert_NK=all_slots_NE(active_NE),
            weight_NK=weight_NE,
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=logits_NE.softmax(-1),
        )

    def sample(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, E) of one fresh draw a row, and which experts they need."""
        noisy_NE = logits_NE + gumbel_like(logits_NE)
        soft_NE = tempered_softmax(noisy_NE, self.spec.temperature)
        needed_NE = _not_zero(soft_NE)
        if not self.spec.hard:
            return soft_NE, needed_NE
        return one_hot_of_largest(noisy_NE) + (soft_NE - soft_NE.detach()), needed_NE

    def settled(self, logits_NE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, E) without randomness, for evaluation, and which experts they need."""
        if self.spec.hard:
            weight_NE = one_hot_of_largest(logits_NE)
        else:
            noise_ES = self.noise_ES.to(logits_NE.dtype)
            noisy_NES = logits_NE[:, :, None] + noise_ES
            weight_NE = tempered_softmax(noisy_NES, self.spec.temperature, dim=1).mean(-1)
        return weight_NE, _not_zero(weight_NE)


def one_hot_of_largest(logits_NE: Tensor) -> Tensor:
    """1 for the largest logit of each row, 0 for the others, without gradient (N, E)."""
    largest_N1 = logits_NE.detach().argmax(-1, keepdim=True)
    return torch.zeros_like(logits_NE).scatter_(1, largest_N1, 1.0)


def _not_zero(share_NE: Tensor) -> Tensor:
    """True where an expert has any effect; not a number counts, so that it shows in the output."""
    return ~(share_NE.detach() <= 0)

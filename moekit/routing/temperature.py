"""The dense-to-sparse gate: a softmax over all experts whose temperature falls."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, Literal

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site, linear_logits, routing_dtype
from moekit.routing.routing import Load, Routing, Signals, all_slots_NE
from moekit.routing.softmax import gumbel_like, is_temperature, tempered_softmax

Activation = Literal[
    "identity", "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "silu", "softplus"
]
ACTIVATIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = MappingProxyType(
    {
        "identity": lambda z: z,
        "relu": torch.relu,
        "leaky_relu": nn.functional.leaky_relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "gelu": nn.functional.gelu,
        "silu": nn.functional.silu,
        "softplus": nn.functional.softplus,
    }
)
# s(cz) = c s(z) for c > 0: gate weights and temperature can then be scaled together.
HOMOGENEOUS: Final = ("identity", "relu", "leaky_relu")


@dataclass(frozen=True)
class DenseToSparse(RouterSpec):
    """Every token takes every expert with weight ``softmax((s(x Wᵀ) + b) / τ)``.

    Dense while the temperature τ is high. As it falls the weights concentrate, and experts whose
    weight is below ``threshold``, or exactly 0, are not run. With ``s`` the identity this is the
    dense-to-sparse gate (Nie et al. 2021, EvoMoE), otherwise the activation dense-to-sparse gate
    (Nguyen, Akbarian, Ho 2024, arXiv 2401.13875). Weights stay the probabilities themselves when
    experts are left out: nothing is renormalised, detached or straight-through.

    The papers at hand name no function by which τ falls; both of ``schedule`` are this project's.

    Attributes:
        temperature: τ at the first optimiser step.
        final: τ from step ``steps`` on; None keeps it at ``temperature``.
        steps: optimiser steps over which τ goes from ``temperature`` to ``final``.
        schedule: ``linear`` in the step, or ``exponential``: by the same factor every step.
        learned: τ is a parameter (its logarithm, without weight decay) that starts at
            ``temperature``, in place of a schedule. With a homogeneous activation (identity, relu,
            leaky_relu) only ``W/τ`` and ``b/τ`` are determined, and building the router warns.
        activation: ``s``, applied to the linear score alone, before bias and temperature.
        threshold: an expert whose probability is below it is left out; less than 1/E, so that a
            token always has one.
        k: from step ``steps`` on a token keeps at most its k best experts; None for no limit.
        noise: in training, Gumbel noise on the logits before the division by τ (EvoMoE).
        bias: whether the gate has ``b``.
        init_std: standard deviation of the initial weights; None for the model's own.

    Example:
        >>> from moekit.routing import DenseToSparse
        >>> gate = DenseToSparse(temperature=2.0, final=0.3, steps=1000, activation="tanh", k=2)
    """

    fixed_k: ClassVar[bool] = False
    temperature: float = 1.0
    final: float | None = None
    steps: int = 0
    schedule: Literal["linear", "exponential"] = "linear"
    learned: bool = False
    activation: Activation = "identity"
    threshold: float = 0.0
    k: int | None = None
    noise: bool = False
    bias: bool = True
    init_std: float | None = None

    def check(self) -> None:
        for name, value in (("temperature", self.temperature), ("final", self.final)):
            self.require(
                value is None or is_temperature(value),
                f"{name} is {value}; wanted a positive finite number",
            )
        self.require(self.steps >= 0, f"steps is {self.steps}; wanted 0 or more")
        self.require(
            (self.final is None) == (self.steps == 0),
            f"final is {self.final} and steps is {self.steps}; annealing needs both, "
            "a constant temperature neither",
        )
        self.require(
            not self.learned or self.final is None,
            "a learned temperature follows its gradient and no schedule; leave final and steps out",
        )
        self.require(
            0 <= self.threshold < 1, f"threshold is {self.threshold}; wanted 0 <= threshold < 1"
        )
        self.require(
            self.k is None or self.k >= 1, f"k is {self.k}; a token needs at least one expert"
        )
        self.require(
            self.init_std is None or self.init_std > 0,
            f"init_std is {self.init_std}; wanted a positive number, or None for the model's own",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        experts = len(kinds)
        self.require(
            self.k is None or self.k <= experts, f"k is {self.k} but the bank has {experts} experts"
        )
        self.require(
            self.threshold * experts < 1,
            f"threshold is {self.threshold}, but at a high temperature each of {experts} experts "
            f"has 1/{experts} and all would be left out; give one below that",
        )

    def build(self, site: Site) -> DenseToSparseRouter:
        return DenseToSparseRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        """Experts a token once ``k`` is in force; without ``k`` all of them, an upper bound."""
        if self.k is None:
            return float(sum(counted_E))
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class DenseToSparseRouter(Router):
    """The module of :class:`DenseToSparse`.

    Its state is the number of optimiser steps taken, from which the temperature follows: an
    integer survives a cast to half precision, and a resumed run is on the same trajectory.
    """

    step: Tensor

    def __init__(self, spec: DenseToSparse, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(site.experts, site.width))
        self.bias = nn.Parameter(torch.empty(site.experts)) if spec.bias else None
        self.log_temperature = nn.Parameter(torch.empty(())) if spec.learned else None
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.reset_parameters()
        if spec.learned and spec.activation in HOMOGENEOUS:
            warnings.warn(
                f"DenseToSparse learns its temperature under the activation {spec.activation}: "
                "gate weights and temperature can be scaled together without any effect, so that "
                "neither can be estimated; use tanh or sigmoid, or a schedule",
                UserWarning,
                stacklevel=2,
            )

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.weight, std=self.spec.init_std or std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.log_temperature is not None:
            self.log_temperature.fill_(math.log(self.spec.temperature))
        self.step.zero_()

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE = self.logits(x_ND)
        noisy_NE = logits_NE
        if self.spec.noise and self.training:
            noisy_NE = logits_NE + gumbel_like(logits_NE)
        share_NE = tempered_softmax(noisy_NE, self.temperature())
        active_NE = self.active(share_NE.detach())
        return Routing(
            expert_NK=all_slots_NE(active_NE),
            weight_NK=share_NE.masked_fill(~active_NE, 0.0),
            experts=self.site.experts,
            logits_NE=logits_NE,
            scores_NE=share_NE,
        )

    def logits(self, x_ND: Tensor) -> Tensor:
        """``s(x Wᵀ) + b``, before noise and temperature (N, E)."""
        score_NE = ACTIVATIONS[self.spec.activation](linear_logits(x_ND, self.weight))
        return score_NE if self.bias is None else score_NE + self.bias.to(score_NE.dtype)

    def temperature(self) -> Tensor:
        """τ at this step (): float64 from the schedule, or with gradient where it is learned."""
        if self.log_temperature is not None:
            return self.log_temperature.to(routing_dtype(self.log_temperature)).exp()
        start, final = self.spec.temperature, self.spec.final
        if final is None:
            return torch.full_like(self.step, start, dtype=torch.float64)
        done = (self.step.double() / self.spec.steps).clamp(max=1)
        if self.spec.schedule == "linear":
            return start * (1 - done) + final * done
        return torch.pow(start, 1 - done) * torch.pow(final, done)

    def active(self, share_NE: Tensor) -> Tensor:
        """True where an expert is run.

        A probability of exactly 0 has no effect and no gradient. One that is not a number counts
        as active, so that it shows in the output.
        """
        active_NE = ~((share_NE <= 0) | (share_NE < self.spec.threshold))
        if self.spec.k is None:
            return active_NE
        best_NK = share_NE.topk(self.spec.k, dim=-1).indices
        best_NE = torch.zeros_like(active_NE).scatter_(1, best_NK, True)
        return active_NE & (best_NE | (self.step < self.spec.steps))

    @torch.no_grad()
    def update(self, load: Load) -> None:
        """Count an optimiser step."""
        self.step.add_(1)

"""ReMoE's load-balancing L1 penalty and the controller of its coefficient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moekit.routing.losses import Batch, Loss, LossSpec
from moekit.routing.permuted import Permuted
from moekit.routing.router import RouterSpec, Site
from moekit.routing.routing import Load


@dataclass(frozen=True)
class L1Balance(LossSpec):
    """Keeps the mean number of active experts a token at ``k`` (ReMoE, eq. 7-9).

    Loss of a layer: ``(1/T) Σ_t Σ_e f_e R_te`` with ``f_e = (E / kT) Σ_t [R_te > 0]`` detached,
    averaged over layers as in the paper (the released code adds layers up, so its λ are not
    comparable). Its coefficient λ is state: after each optimiser step it is multiplied by
    ``alpha`` if the sparsity of the step was below ``1 - k/E``, divided by it if above, and held
    where they are equal (the released code divides there).

    Attributes:
        weight: factor on λ; 1 in the paper.
        k: target mean of active experts a token; must equal the router's.
        initial: λ at the first step.
        alpha: factor of one correction.
        balanced: False leaves ``f`` out, the paper's plain L1.
    """

    needs: ClassVar[tuple[str, ...]] = ("gates",)
    weight: float = 1.0
    k: float = 1
    initial: float = 1e-8
    alpha: float = 1.2
    balanced: bool = True

    def check(self) -> None:
        super().check()
        self.require(self.k > 0, f"k is {self.k}; wanted a positive target")
        self.require(self.initial > 0, f"initial is {self.initial}; wanted a positive λ")
        self.require(not self.then, "its coefficient is controlled; leave then empty")
        self.require(self.alpha > 1, f"alpha is {self.alpha}; wanted more than 1")

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        super().check_layer(router, kinds)
        self.require(
            not isinstance(router, Permuted),
            "a permuted router runs every expert while it learns, and λ would rise without end; "
            "leave the permutation or this loss out",
        )
        k = getattr(router, "k", None)
        self.require(k == self.k, f"its k is {self.k} but the router's is {k}; make them equal")
        self.require(self.k < len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts")

    def build(self, site: Site) -> L1BalanceLoss:
        return L1BalanceLoss(self, site)


class L1BalanceLoss(Loss):
    """The module of :class:`L1Balance`.

    Its state is the exponent n of ``λ = initial · alphaⁿ``, steps below the target less steps
    above it. An integer survives a cast to half precision, and λ neither drifts by rounding nor
    sticks at 0 once it has underflowed.
    """

    spec: L1Balance
    exponent: Tensor

    def __init__(self, spec: L1Balance, site: Site) -> None:
        super().__init__(spec, site)
        self.register_buffer("exponent", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Put λ back to its initial value."""
        self.exponent.zero_()

    @property
    def lam(self) -> Tensor:
        """λ, float32 ()."""
        alpha = torch.full_like(self.exponent, self.spec.alpha, dtype=torch.float64)
        return (self.spec.initial * alpha**self.exponent).to(torch.float32)

    def coefficient(self) -> Tensor:
        return self.lam * self.spec.weight

    def forward(self, batch: Batch) -> Tensor:
        mean_E = batch.mean(batch.scores_NE)
        if self.spec.balanced:
            mean_E = mean_E * batch.fraction_E * (len(self.kinds) / self.spec.k)
        return mean_E.sum()

    def reduce(self, values_L: Tensor) -> Tensor:
        return values_L.mean()

    @torch.no_grad()
    def update(self, loads: Sequence[Load]) -> None:
        """Correct λ once, by the sparsity of the step over all layers, micro-batches and ranks.

        A step in which a layer saw no token says nothing and leaves λ as it is.
        """
        tokens_L = torch.stack([load.tokens for load in loads])
        active_L = torch.stack([load.assignments_E.sum() for load in loads])
        per_token = (active_L.double() / tokens_L.clamp_min(1)).mean()
        sign = torch.sign(per_token - self.spec.k) * (tokens_L.min() > 0)
        self.exponent.add_(sign.to(self.exponent.dtype))

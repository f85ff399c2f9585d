"""Routing losses: the weighted balance loss Σ η f P in its published forms, z-loss and entropy.

Every loss is a function of the routings of the layers that share its spec. Padding is left out.
``scope="layer"`` computes the loss in each layer and adds the layers up; ``scope="global"`` pools
the tokens of all layers first, so that balance is asked only on average over layers.

Under data parallelism the token counts and the loads ``f`` are summed over ranks, and each rank
returns its own share times the number of ranks: the mean over ranks, which is what gradient
averaging computes, is then the loss of the global batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekit.routing.router import ZERO_COMPUTATION, RouterSpec, Site
from moekit.routing.routing import Load
from moekit.spec import Spec


@dataclass(frozen=True)
class Batch:
    """What a loss sees of one layer, or of several pooled.

    Attributes:
        load_E: assignments each expert received, over all ranks; carries no gradient.
        tokens: tokens routed, over all ranks ().
        logits_NE, scores_NE: of this rank's rows, padding included.
        valid_N1: False for padding, or None when there is none.
        ranks: number of data-parallel ranks.
    """

    load_E: Tensor
    tokens: Tensor
    logits_NE: Tensor
    scores_NE: Tensor
    valid_N1: Tensor | None
    ranks: int

    def mean(self, value_NE: Tensor) -> Tensor:
        """Mean over the tokens of all ranks, as this rank's share (see the module docstring)."""
        if self.valid_N1 is not None:
            value_NE = value_NE.masked_fill(~self.valid_N1, 0.0)
        return value_NE.sum(0) * self.ranks / self.tokens.clamp_min(1)

    def over_ranks(self, share: Tensor) -> Tensor:
        """The mean over ranks of what ``mean`` gave on each, without gradient."""
        if self.ranks == 1:
            return share.detach()
        total = share.detach().clone()
        dist.all_reduce(total)
        return total / self.ranks

    @property
    def fraction_E(self) -> Tensor:
        """``f_i``: share of the tokens that chose expert i; sums to the experts a token."""
        return self.load_E.to(self.scores_NE.dtype) / self.tokens.clamp_min(1)


@dataclass(frozen=True)
class LossSpec(Spec):
    """Base of every routing loss.

    Attributes:
        weight: coefficient in the training loss.
        scope: ``layer`` or ``global``; see the module docstring.
        then: ``(step, weight)`` pairs in order: after that many optimiser steps, the coefficient
            is that weight. AdaMoE anneals 0.02 to 0.0001 after its first epoch.
    """

    abstract: ClassVar[bool] = True
    weight: float = 0.01
    scope: Literal["layer", "global"] = "layer"
    then: tuple[tuple[int, float], ...] = ()

    def check(self) -> None:
        weights = [self.weight, *(weight for _, weight in self.then)]
        self.require(min(weights) >= 0, f"weight is {min(weights)}; wanted 0 or more")
        starts = [0, *(step for step, _ in self.then)]
        self.require(
            all(a < b for a, b in itertools.pairwise(starts)),
            f"then has the steps {starts[1:]}; wanted positive steps in rising order",
        )

    needs: ClassVar[tuple[str, ...]] = ("probabilities",)

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        """Refuse a router or bank that this loss makes no sense for."""
        self.require(
            router.scores in self.needs,
            f"it works on {' or '.join(self.needs)}, but {type(router).__name__} "
            f"gives {router.scores}",
        )

    def shares(self, kinds: tuple[str, ...]) -> tuple[float, ...] | None:
        """Share of all assignments each expert has where this loss is least, if it fixes them."""
        return None

    def build(self, site: Site) -> Loss:
        """The module that computes the loss for layers at places like ``site``."""
        raise NotImplementedError


class Loss(nn.Module):
    """Base of every loss module: unscaled value of one :class:`Batch`, and a coefficient."""

    step: Tensor

    def __init__(self, spec: LossSpec, site: Site) -> None:
        super().__init__()
        self.spec = spec
        self.kinds = site.kinds
        if spec.then:
            self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def name(self) -> str:
        """Key of the loss in logs."""
        return type(self.spec).__name__

    def coefficient(self) -> float | Tensor:
        """Factor of the loss in the training loss; a tensor if it changes during training."""
        if not self.spec.then:
            return self.spec.weight
        value = torch.as_tensor(self.spec.weight, device=self.step.device)
        for start, weight in self.spec.then:
            value = torch.where(self.step >= start, weight, value)
        return value

    def forward(self, batch: Batch) -> Tensor:
        """The unscaled loss."""
        raise NotImplementedError

    def reduce(self, values_L: Tensor) -> Tensor:
        """The loss of several layers from the loss of each."""
        return values_L.sum()

    def update(self, loads: Sequence[Load]) -> None:
        """Change state once an optimiser step, given each layer's load of that step."""
        if self.spec.then:
            self.step += 1

    def reset_parameters(self, std: float = 0.02) -> None:
        """Put the state back to that of the first step."""
        if self.spec.then:
            self.step.zero_()


# --- balance ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwitchBalance(LossSpec):
    """``E Σ_i f_i P_i`` (Switch Transformer, eq. 4-6; transformers' ``load_balancing_loss_func``).

    ``f_i`` is the share of tokens that chose expert i and carries no gradient, ``P_i`` its mean
    probability.

    Attributes:
        divide_by_k: whether ``f`` is divided by its sum, the mean number of experts a token. The
            value at perfect balance is then 1; without it, as in transformers, it is k.
    """

    divide_by_k: bool = False

    def build(self, site: Site) -> Loss:
        return _SwitchBalance(self, site)

    def shares(self, kinds: tuple[str, ...]) -> tuple[float, ...]:
        return tuple(1 / len(kinds) for _ in kinds)


class _SwitchBalance(Loss):
    spec: SwitchBalance

    def forward(self, batch: Batch) -> Tensor:
        fraction_E = batch.fraction_E
        if self.spec.divide_by_k:
            fraction_E = fraction_E / fraction_E.sum().clamp_min(torch.finfo(fraction_E.dtype).tiny)
        return len(self.kinds) * (fraction_E * batch.mean(batch.scores_NE)).sum()


@dataclass(frozen=True)
class NullAwareBalance(LossSpec):
    """AdaMoE's balance loss: null experts are interchangeable, so only their mean load counts.

    ``(n+m) Σ_i f̃_i P_i``, where ``f̃`` of every null expert is the mean ``f`` of all of them
    (AdaMoE, eq. 8). The value at perfect balance is k.
    """

    def check_layer(self, router: RouterSpec, kinds: tuple[str, ...]) -> None:
        super().check_layer(router, kinds)
        self.require(
            any(kind in ZERO_COMPUTATION for kind in kinds),
            "the bank has no null experts; add Zero(count=...) or use SwitchBalance",
        )

    def build(self, site: Site) -> Loss:
        return _NullAwareBalance(self, site)

    def shares(self, kinds: tuple[str, ...]) -> tuple[float, ...]:
        return tuple(1 / len(kinds) for _ in kinds)


class _NullAwareBalance(Loss):
    def forward(self, batch: Batch) -> Tensor:
        null_E = _zero_computation_mask(self.kinds, batch.scores_NE)
        fraction_E = batch.fraction_E
        null_mean = (fraction_E * null_E).sum() / null_E.sum().clamp_min(1)
        averaged_E = fraction_E * (1 - null_E) + null_mean * null_E
        return len(self.kinds) * (averaged_E * batch.mean(batch.scores_NE)).sum()


@dataclass(frozen=True)
class HeterogeneousBalance(LossSpec):
    """``Σ_i η_i f_i P_i``, η = τ for zero-computation experts and 1 for others (MoE++, eq. 7).

    There is no factor E and no 1/k. At the minimum η_i f_i is equal for all experts, so the load
    of a feed-forward expert is τ times that of a zero-computation expert: τ < 1 penalises the
    latter less, and they receive more.

    Attributes:
        tau: τ.
    """

    tau: float = 0.75

    def check(self) -> None:
        super().check()
        self.require(self.tau > 0, f"tau is {self.tau}; wanted a positive number")

    def build(self, site: Site) -> Loss:
        return _HeterogeneousBalance(self, site)

    def shares(self, kinds: tuple[str, ...]) -> tuple[float, ...]:
        raw = [1.0 if kind in ZERO_COMPUTATION else self.tau for kind in kinds]
        return tuple(value / sum(raw) for value in raw)


class _HeterogeneousBalance(Loss):
    spec: HeterogeneousBalance

    def forward(self, batch: Batch) -> Tensor:
        cheap_E = _zero_computation_mask(self.kinds, batch.scores_NE)
        eta_E = 1 + (self.spec.tau - 1) * cheap_E
        return (eta_E * batch.fraction_E * batch.mean(batch.scores_NE)).sum()


# --- logits and entropy -------------------------------------------------------------------------


@dataclass(frozen=True)
class RouterZ(LossSpec):
    """``mean_t logsumexp(logits_t)²`` keeps router logits small (ST-MoE, eq. 5)."""

    needs: ClassVar[tuple[str, ...]] = ("probabilities", "gates")
    weight: float = 1e-3

    def build(self, site: Site) -> Loss:
        return _RouterZ(self, site)


class _RouterZ(Loss):
    def forward(self, batch: Batch) -> Tensor:
        return batch.mean(batch.logits_NE.logsumexp(-1, keepdim=True).square()).sum()


@dataclass(frozen=True)
class Entropy(LossSpec):
    """Entropy of the routing probabilities, in nats.

    Attributes:
        of: ``token`` is the mean entropy of a token's probabilities (minimised: confident
            routing); ``marginal`` the entropy of their mean (minimised: few experts in all, which
            is ModuleFormer's load concentration, arXiv 2306.04640).
    """

    of: Literal["token", "marginal"] = "token"

    def build(self, site: Site) -> Loss:
        return _Entropy(self, site)


class _Entropy(Loss):
    spec: Entropy

    def forward(self, batch: Batch) -> Tensor:
        return token_entropy(batch) if self.spec.of == "token" else marginal_entropy(batch)


def token_entropy(batch: Batch) -> Tensor:
    """Mean entropy of a token's probabilities, as this rank's share.

    torch.special.entr has a gradient of infinity at 0, which routers do reach.
    """
    tiny = torch.finfo(batch.scores_NE.dtype).tiny
    entropy_NE = -batch.scores_NE * batch.scores_NE.clamp_min(tiny).log()
    return batch.mean(entropy_NE).sum()


def marginal_entropy(batch: Batch) -> Tensor:
    """Entropy of the mean probabilities, as this rank's share.

    -Σ p log p̄ with the mean p̄ of all ranks held fixed is linear in this rank's share, has the value
    of the entropy where p = p̄, and its gradient, for Σ p does not change.
    """
    mean_E = batch.mean(batch.scores_NE)
    log_E = batch.over_ranks(mean_E).clamp_min(torch.finfo(mean_E.dtype).tiny).log()
    return -(mean_E * log_E).sum()


def _zero_computation_mask(kinds: tuple[str, ...], like: Tensor) -> Tensor:
    return like.new_tensor([float(kind in ZERO_COMPUTATION) for kind in kinds])

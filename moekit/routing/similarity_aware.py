"""Similarity-aware routing: a token's neighbours are the tokens that are like it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moekit.routing.router import Site, linear_logits, routing_dtype
from moekit.routing.routing import Signals
from moekit.routing.sequences import Attention, DotProductAttention, View
from moekit.routing.token_graph import TokenGraph, TokenGraphRouter

LEAST_TEMPERATURE = 1e-6
"""Scores divided by less could leave the range of float32."""


@dataclass(frozen=True)
class SimilarityAware(TokenGraph):
    """Neighbours by similarity: ``S_ij ∝ exp(u_iᵀ W u_j / τ)`` for the router's inputs u.

    ``W`` starts as the identity over √D, as does its expectation where it is of low rank. With a
    low τ each token has itself as its only neighbour, and routing is that of ``router``.

    Attributes:
        temperature: τ.
        rank: None for a full D × D matrix W, a number for a product of two maps to so many
            channels, 0 for the identity over √D without parameters.

    Example:
        >>> from moekit.routing import SimilarityAware, TopK
        >>> router = SimilarityAware(TopK(k=2), temperature=1.0)
    """

    temperature: float = 1.0
    rank: int | None = None

    def check(self) -> None:
        super().check()
        self.require(
            LEAST_TEMPERATURE <= self.temperature < math.inf,
            f"temperature is {self.temperature}; wanted {LEAST_TEMPERATURE} or more",
        )
        self.require(
            self.rank is None or self.rank >= 0, f"rank is {self.rank}; wanted 0 or more, or None"
        )
        self.require(
            not self.detach or self.rank == 0,
            "detach leaves W without a gradient to learn from; set rank=0, or detach=False",
        )

    def build(self, site: Site) -> SimilarityAwareRouter:
        return SimilarityAwareRouter(self, site)


class SimilarityAwareRouter(TokenGraphRouter):
    """The module of :class:`SimilarityAware`.

    ``W`` is ``query_weight`` where it stands alone, and ``query_weightᵀ key_weight`` otherwise.
    """

    spec: SimilarityAware

    def __init__(self, spec: SimilarityAware, site: Site) -> None:
        super().__init__(spec, site)
        rows = site.width if spec.rank is None else spec.rank
        self.query_weight = nn.Parameter(torch.empty(rows, site.width)) if rows else None
        self.key_weight = nn.Parameter(torch.empty(rows, site.width)) if spec.rank else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        width = self.site.width
        if self.query_weight is None:
            return
        if self.key_weight is None:
            nn.init.eye_(self.query_weight).div_(math.sqrt(width))
            return
        nn.init.normal_(self.key_weight, std=width**-0.25 * self.key_weight.shape[0] ** -0.5)
        self.query_weight.copy_(self.key_weight)

    def key(self, x_ND: Tensor, signals: Signals) -> Tensor:
        if self.key_weight is None:
            return x_ND.to(routing_dtype(x_ND))
        return linear_logits(x_ND, self.key_weight)

    def attention(self, x_BTD: Tensor, key_BPC: Tensor, signals: Signals, view: View) -> Attention:
        query_BTC, scale = x_BTD, 1 / math.sqrt(self.site.width)
        if self.query_weight is not None:
            # u_i^T W u_j of a full W: rows x become x W, and linear maps take the transpose.
            weight = self.query_weight if self.key_weight is not None else self.query_weight.T
            query_BTC, scale = linear_logits(x_BTD, weight), 1.0
        scale /= self.spec.temperature
        return DotProductAttention(query_BTC[:, None], key_BPC[:, None], scale)

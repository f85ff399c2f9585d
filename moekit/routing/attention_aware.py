"""Attention-aware routing: a token's neighbours are the tokens that it attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moekit.autocast import without_autocast
from moekit.errors import SignalError
from moekit.routing.router import Site, routing_dtype
from moekit.routing.routing import Signals
from moekit.routing.sequences import Attention, AttentionWeights, View
from moekit.routing.softmax import is_temperature
from moekit.routing.token_graph import TokenGraph, TokenGraphRouter


@dataclass(frozen=True)
class AttentionAware(TokenGraph):
    """Neighbours by the attention sublayer before the MoE layer: S is its matrix of weights.

    Gradient reaches the attention's queries and keys, unless ``detach`` is set.

    Attributes:
        heads: how S follows from the weights of all heads: their ``mean``; for each token the head
            that is most certain about it (``min_entropy``); or the mean of each head's
            ``posterior``, ``A_ij exp(-|u_i - v_j|² / 2σ²)`` with each row divided by its sum, where
            ``v_j`` is what token j gives to those that attend to it. The last two form the
            matrices of weights, which ``mean`` does not.
        sigma: σ of ``posterior``; a large one gives ``mean``.

    Example:
        >>> from moekit.routing import AttentionAware, TopK
        >>> router = AttentionAware(TopK(k=2), heads="min_entropy")
    """

    heads: Literal["mean", "min_entropy", "posterior"] = "mean"
    sigma: float = 1.0

    def check(self) -> None:
        super().check()
        self.require(
            self.sigma > 0 and is_temperature(2 * self.sigma**2),
            f"sigma is {self.sigma}; wanted a positive finite number",
        )

    def build(self, site: Site) -> AttentionAwareRouter:
        return AttentionAwareRouter(self, site)


class AttentionAwareRouter(TokenGraphRouter):
    """The module of :class:`AttentionAware`, which has no parameters beside the router's."""

    spec: AttentionAware

    @property
    def graph_requires(self) -> frozenset[str]:
        extra = {"value_ND"} if self.spec.heads == "posterior" else set()
        return frozenset({"sequences", "attention"} | extra)

    def key(self, x_ND: Tensor, signals: Signals) -> Tensor:
        if self.spec.heads != "posterior":
            return super().key(x_ND, signals)
        assert signals.value_ND is not None  # required
        if signals.value_ND.shape != x_ND.shape:
            raise SignalError(
                f"{type(self).__name__}: signal value_ND has shape {tuple(signals.value_ND.shape)};"
                f" wanted {tuple(x_ND.shape)}, that of the rows"
            )
        return signals.value_ND.to(routing_dtype(x_ND))

    def attention(self, x_BTD: Tensor, key_BPC: Tensor, signals: Signals, view: View) -> Attention:
        assert signals.attention is not None  # required
        signals.attention.check(x_BTD.shape[0], x_BTD.shape[1], key_BPC.shape[1])
        if not torch.compiler.is_compiling() and torch.is_anomaly_enabled():
            signals.attention.check_values(view)
        if self.spec.heads == "mean":
            return signals.attention
        weight_BATP = signals.attention.weights(view)
        if self.spec.heads == "min_entropy":
            return AttentionWeights(_most_certain(weight_BATP))
        distance_BTP = _squared_distance(x_BTD.to(key_BPC.dtype), key_BPC)
        return AttentionWeights(_posterior(weight_BATP, distance_BTP, 2 * self.spec.sigma**2))


def _most_certain(weight_BATP: Tensor) -> Tensor:
    """The row of the head with the least entropy, for each token (B, 1, T, P).

    A head chosen by its mean entropy over a sequence would tell a token of later ones.
    """
    entropy_BAT = torch.special.entr(weight_BATP.detach()).sum(-1)
    best_B1T = entropy_BAT.argmin(1, keepdim=True)
    index = best_B1T[..., None].expand(-1, -1, -1, weight_BATP.shape[-1])
    return weight_BATP.gather(1, index)


def _squared_distance(x_BTD: Tensor, y_BPD: Tensor) -> Tensor:
    """``|x_t - y_p|²`` (B, T, P), never below 0."""
    with without_autocast(x_BTD):
        product = x_BTD @ y_BPD.transpose(1, 2)
    norms = x_BTD.square().sum(-1)[:, :, None] + y_BPD.square().sum(-1)[:, None]
    return (norms - 2 * product).clamp_min(0)


def _posterior(weight_BATP: Tensor, distance_BTP: Tensor, scale: float) -> Tensor:
    """Each row of the weights times ``exp(-distance / scale)``, divided by its sum.

    The least distance is subtracted before the division, as the quotient may be infinite.
    """
    unseen = weight_BATP <= 0
    blind = unseen.all(-1, keepdim=True)  # padding, whose row is replaced afterwards
    unseen = unseen & ~blind
    distance = distance_BTP[:, None].masked_fill(unseen, float("inf"))
    nearest = distance.amin(-1, keepdim=True).detach() if distance.numel() else 0.0
    log_weight = weight_BATP.masked_fill(unseen | blind, 1.0).log()
    return (log_weight - (distance - nearest) / scale).softmax(-1)

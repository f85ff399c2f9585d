"""COMET's gate: k soft binary trees over the experts that saturate to one path each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from moekit.routing.router import Router, RouterSpec, Site, linear_logits
from moekit.routing.routing import Routing, Signals, all_slots_NE
from moekit.routing.smooth_step import LOGIT_FLOOR, selection_entropy, smooth_step

LEAF_RANGE = 0.05


@dataclass(frozen=True)
class Comet(RouterSpec):
    """k trees with smooth-step nodes, whose leaves are the experts (Ibrahim et al. 2023, sec. 3).

    A tree reaches expert i with probability ``v_ji``, the product of its nodes along the path, and
    scores it ``a_ji``. One softmax over all k·n pairs gives the weights,
    ``g_i = Σ_j v_ji exp(a_ji) / Σ_j'i' v_j'i' exp(a_j'i')``. An expert that no tree reaches takes
    an unused slot. At most k experts are active once every tree is saturated, more before: compare
    with top-k only beside the number of experts that ran.

    Attributes:
        k: trees, and experts a token at saturation.
        gamma: width γ of the smooth step's band; a narrow one saturates early.
        entropy: weight λ of the entropy of ``v``, which drives the trees to saturation.
        hard: in evaluation, round every node at 1/2, so that no token uses more than k experts.
            Training stays soft, for a rounded node has no gradient.

    Example:
        >>> from moekit.routing import Comet, Site
        >>> router = Comet(k=2).build(Site(width=16, kinds=("feed_forward",) * 6))
        >>> router(torch.randn(3, 16)).expert_NK.shape
        torch.Size([3, 6])
    """

    fixed_k: ClassVar[bool] = False
    settles: ClassVar[bool] = True
    k: int = 2
    gamma: float = 1.0
    entropy: float = 0.01
    hard: bool = False

    def check(self) -> None:
        self.require(self.k >= 1, f"k is {self.k}; a token needs at least one tree")
        self.require(
            0 < self.gamma < math.inf, f"gamma is {self.gamma}; wanted a positive finite width"
        )
        self.require(self.entropy >= 0, f"entropy is {self.entropy}; wanted 0 or more")

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(len(kinds) >= 2, f"a tree needs at least 2 experts; the bank has {len(kinds)}")
        self.require(self.k <= len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts")

    def build(self, site: Site) -> CometRouter:
        return CometRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(s for s, counted in zip(share_E, counted_E, strict=True) if counted)


class CometRouter(Router):
    """The module of :class:`Comet`.

    The rows of ``node_weight`` are the inner nodes of the first tree in heap order, then those of
    the second, and so on; those of ``leaf_weight`` likewise, leaves from left to right.
    """

    def __init__(self, spec: Comet, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        nodes, leaves = spec.k * (site.experts - 1), spec.k * site.experts
        self.node_weight = nn.Parameter(torch.empty(nodes, site.width))
        self.node_bias = nn.Parameter(torch.empty(nodes))
        self.leaf_weight = nn.Parameter(torch.empty(leaves, site.width))
        self.leaf_bias = nn.Parameter(torch.empty(leaves))
        self.reset_parameters()

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"entropy": self.spec.entropy}

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw from the paper's uniform ranges, whatever ``std``: nodes must start in the band."""
        for parameter in (self.node_weight, self.node_bias):
            nn.init.uniform_(parameter, -self.spec.gamma / 100, self.spec.gamma / 100)
        for parameter in (self.leaf_weight, self.leaf_bias):
            nn.init.uniform_(parameter, -LEAF_RANGE, LEAF_RANGE)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        reach_NKE = leaf_probabilities(self._left(x_ND))
        score_NKE = self._per_tree(linear_logits(x_ND, self.leaf_weight, self.leaf_bias))
        gate_NE = _gate(score_NKE, reach_NKE)
        return Routing(
            expert_NK=all_slots_NE(gate_NE != 0),  # NaN is not 0: it must not vanish here
            weight_NK=gate_NE,
            experts=self.site.experts,
            logits_NE=(score_NKE + (reach_NKE + LOGIT_FLOOR).log()).logsumexp(1),
            scores_NE=gate_NE,
            losses={"entropy": selection_entropy(reach_NKE, signals.valid_N)},
            settled_k=self.spec.k,
        )

    def _left(self, x_ND: Tensor) -> Tensor:
        """Probability (N, K, E - 1) of going left at each inner node."""
        node_NKQ = self._per_tree(linear_logits(x_ND, self.node_weight, self.node_bias))
        if self.spec.hard and not self.training:
            return (node_NKQ >= 0).to(node_NKQ.dtype)
        return smooth_step(node_NKQ, self.spec.gamma)

    def _per_tree(self, value: Tensor) -> Tensor:
        return value.unflatten(-1, (self.spec.k, -1))


def leaf_probabilities(left_NKQ: Tensor) -> Tensor:
    """Probability (N, K, E) of each leaf, from left to right, of trees with Q = E - 1 inner nodes.

    Inner nodes are numbered as in a heap: the children of node q are 2q + 1, left, and 2q + 2. Any
    number of leaves will do; those of the lowest level stand left of those above it.

    Args:
        left_NKQ: probability of going left at each inner node.
    """
    inner, start = left_NKQ.shape[-1], 0
    reach_NKE = left_NKQ.new_ones(*left_NKQ.shape[:-1], 1)
    while start < inner:
        width = min(reach_NKE.shape[-1], inner - start)
        left = left_NKQ[..., start : start + width]
        parent, leaves = reach_NKE[..., :width], reach_NKE[..., width:]
        children = torch.stack((parent * left, parent * (1 - left)), dim=-1).flatten(-2)
        reach_NKE = torch.cat((children, leaves), dim=-1)
        start += width
    return reach_NKE


def _gate(score_NKE: Tensor, reach_NKE: Tensor) -> Tensor:
    """The weights (N, E): one softmax over all trees and leaves, summed over the trees.

    The released code adds 1e-8 to ``v`` in the logarithm. Clamping it at the smallest normal
    number keeps the formula exact, and every tree has a leaf above that.
    """
    tiny = torch.finfo(reach_NKE.dtype).tiny
    joint_NKE = score_NKE + reach_NKE.clamp_min(tiny).log()
    joint_NKE = joint_NKE.masked_fill(reach_NKE < tiny, torch.finfo(joint_NKE.dtype).min)
    return joint_NKE.flatten(1).softmax(-1).view_as(joint_NKE).sum(1)

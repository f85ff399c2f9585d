"""The pathway-aware router of MoE++: top-k with gating residuals between layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from moekit.errors import SignalError
from moekit.routing.router import Site, linear_logits
from moekit.routing.routing import Signals
from moekit.routing.top_k import TopK, TopKRouter


@dataclass(frozen=True)
class Pathway(TopK):
    """Top-k whose logits add a linear map of the previous layer's raw logits (MoE++, eq. 6).

    ``G_j = X W_jᵀ + G_{j-1} W_gjᵀ``; the residual is recursive and carries gradient. The first
    MoE layer of a model has none. ``normalize`` gives the weights of the released code
    (``nonzero``, the default), of the paper's equation 1 (``none``) or of Mixtral (``selected``).

    Attributes:
        logit_norm: ``std`` divides each token's logits by their unbiased standard deviation over
            experts before scoring, as the released 7B model does; the next layer is still handed
            the raw logits.
    """

    normalize: Literal["none", "selected", "nonzero"] = "nonzero"
    logit_norm: Literal["none", "std"] = "none"
    init_std: float | None = 0.01

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        super().check_experts(kinds)
        self.require(
            self.logit_norm == "none" or len(kinds) > 1,
            "logit_norm std needs at least two experts",
        )

    def build(self, site: Site) -> PathwayRouter:
        return PathwayRouter(self, site)


class PathwayRouter(TopKRouter):
    """The module of :class:`Pathway`; ``gate_map`` exists only above another MoE layer."""

    spec: Pathway

    def __init__(self, spec: Pathway, site: Site) -> None:
        super().__init__(spec, site)
        previous = site.previous_experts
        self.gate_map = (
            None if previous is None else nn.Parameter(torch.empty(site.experts, previous))
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        gate_map = getattr(self, "gate_map", None)  # absent while the base class initialises
        if gate_map is not None:
            nn.init.normal_(gate_map, std=self.spec.init_std or std)

    def logits(self, x_ND: Tensor, signals: Signals) -> Tensor:
        logits_NE = linear_logits(x_ND, self.weight, self.bias)
        if self.gate_map is None:
            return logits_NE
        previous = signals.previous_logits_NE
        wanted = (x_ND.shape[0], self.gate_map.shape[1])
        if previous is None or tuple(previous.shape) != wanted:
            given = "nothing" if previous is None else f"shape {tuple(previous.shape)}"
            raise SignalError(
                f"PathwayRouter needs the signal previous_logits_NE of shape {wanted}; got {given}"
            )
        return logits_NE + linear_logits(previous, self.gate_map)

    def scaled(self, logits_NE: Tensor) -> Tensor:
        return logits_NE / _std(logits_NE) if self.spec.logit_norm == "std" else logits_NE


def _std(logits_NE: Tensor) -> Tensor:
    """Each token's unbiased standard deviation over experts (N, 1); 1 where all logits agree.

    ``Tensor.std`` warns about a batch without tokens, and dividing by next to nothing would send
    an endless gradient into the hidden states.
    """
    centred_NE = logits_NE - logits_NE.mean(-1, keepdim=True)
    norm_N1 = torch.linalg.vector_norm(centred_NE, dim=-1, keepdim=True)
    std_N1 = norm_N1 / (logits_NE.shape[1] - 1) ** 0.5
    return std_N1.masked_fill(std_N1 < torch.finfo(std_N1.dtype).eps, 1.0)

"""Routings that the tests of rectified dispatch draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moekit.dispatch import Rectified
from moekit.experts import SwiGLU
from moekit.layer import MoE, MoESpec
from moekit.routing import (
    RouterSpec,
    Routing,
)


def routing_of(p_NE: Tensor, k: int) -> Routing:
    """Dropless top-k over given probabilities, ties to the lower id."""
    weight_NK, expert_NK = p_NE.detach().sort(dim=-1, descending=True, stable=True)
    weight_NK, expert_NK = weight_NK[:, :k], expert_NK[:, :k]
    weight_NK = weight_NK / weight_NK.sum(-1, keepdim=True)
    return Routing(expert_NK, weight_NK, p_NE.shape[1], scores_NE=p_NE, full=True)


def probabilities(
    tokens: int, experts: int, seed: int, kind: str = "random", dtype: torch.dtype = torch.float64
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64) * 1.5
    if kind == "tied":
        logits = logits.round()
    if kind == "one expert":  # everybody wants expert 0
        logits[:, 0] += 10
    if kind == "flat":
        logits = torch.zeros_like(logits)
    return logits.softmax(-1).to(dtype)


@dataclass(frozen=True)
class Given:
    """Probabilities, choices, and which experts compute nothing."""

    p_NE: Tensor
    k: int
    spec: Rectified
    free: frozenset[int]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The experts with matrix products, one by one."""
        return [(e, e + 1) for e in range(self.p_NE.shape[1]) if e not in self.free]


@st.composite
def cases(draw: st.DrawFn) -> Given:
    groups = draw(st.integers(1, 4))
    experts = groups * draw(st.integers(1, 3))
    fill_in = experts > 1 and draw(st.booleans())
    intra = draw(st.booleans())
    modes = ["auto", "all", "any", *(["ignore_kth"] if fill_in else [])] if intra else ["auto"]
    spec = Rectified(
        factor=draw(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.5, 4.0])),
        groups=groups,
        fill_in=fill_in,
        intra_device=intra,
        unrouted=draw(st.sampled_from(modes)),
        priority=draw(st.sampled_from(["probability", "request", "position"])),
    )
    k = draw(st.integers(1, min(3, experts - fill_in)))
    kind = draw(st.sampled_from(["random", "tied", "one expert", "flat"]))
    tokens, seed = draw(st.integers(1, 17)), draw(st.integers(0, 2**31))
    cheap = draw(st.integers(0, 2))
    ids = st.integers(0, experts + cheap - 1)
    free = frozenset(draw(st.sets(ids, min_size=cheap, max_size=cheap)))
    return Given(probabilities(tokens, experts + cheap, seed, kind), k, spec, free)


def built(router: RouterSpec, dispatch: Any, identical: bool = False) -> MoE:
    torch.manual_seed(3)
    layer = MoESpec(router, SwiGLU(count=8, hidden=8), dispatch).build(8).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for parameter in layer.experts.parameters() if identical else ():
            parameter.copy_(parameter[:1].expand_as(parameter))
    return layer

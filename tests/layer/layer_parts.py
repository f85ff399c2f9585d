"""Small parts that the tests of whole designs share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekit.dispatch import Dispatch, Dropless
from moekit.experts import (
    Experts,
    FeedForwardExperts,
    SwiGLU,
)
from moekit.layer import MoE
from moekit.routing import (
    Router,
    Routing,
    Signals,
    Site,
    TopK,
)

WIDTH, EXPERTS = 8, 6
KINDS = ("feed_forward",) * EXPERTS


def bank(count: int = EXPERTS) -> FeedForwardExperts:
    made = SwiGLU(count=count, hidden=WIDTH).build(WIDTH)
    made.reset_parameters(std=0.4)
    return made


def site(kinds: tuple[str, ...] = KINDS) -> Site:
    return Site(WIDTH, kinds)


def one_expert(experts: FeedForwardExperts, e: int, x_ND: Tensor) -> Tensor:
    gate, up = (x_ND @ experts.gate_up_proj[e].T).chunk(2, -1)
    return (F.silu(gate) * up) @ experts.down_proj[e].T


def weighted(experts: FeedForwardExperts, x_ND: Tensor, weight_NE: Tensor) -> Tensor:
    every = [one_expert(experts, e, x_ND) for e in range(len(experts.kinds))]
    return torch.einsum("ne,end->nd", weight_NE, torch.stack(every))


def layer_of(router: Router, experts: Experts, dispatch: Dispatch | None = None) -> MoE:
    return MoE(router, experts, dispatch or Dropless().build())


class ScopeRouter(Router):
    """One decision a sequence, chunk or task, from the mean of its tokens (Hydra, MEO)."""

    requires: ClassVar[frozenset[str]] = frozenset({"scope_N"})

    def __init__(self, at: Site, k: int) -> None:
        super().__init__(at)
        self.inner = TopK(k=k).build(at)
        nn.init.normal_(self.inner.weight)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        scope_N = signals.scope_N
        counted = torch.ones_like(scope_N) if signals.valid_N is None else signals.valid_N
        scopes = int(scope_N.max()) + 1
        total = x_ND.new_zeros(scopes, x_ND.shape[1]).index_add(0, scope_N, x_ND * counted[:, None])
        count = x_ND.new_zeros(scopes).index_add(0, scope_N, counted.to(x_ND.dtype))
        return self.inner.route(total / count[:, None], signals).take(scope_N)

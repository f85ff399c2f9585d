"""Hash layers: a fixed table from token id to experts, with nothing to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.errors import SpecError
from moekit.routing.router import Router, RouterSpec, Site
from moekit.routing.routing import Routing, Signals


@dataclass(frozen=True)
class Hash(RouterSpec):
    """Each token id has k fixed experts, drawn once (Roller et al. 2021).

    The table gives every expert the same number of ids, up to one. A token's k experts are
    distinct and weigh 1/k each.

    Attributes:
        k: experts a token.
        seed: seed of the table.
    """

    scores: ClassVar[Literal["probabilities", "gates", "nothing"]] = "nothing"
    k: int = 1
    seed: int = 0

    def check(self) -> None:
        self.require(self.k >= 1, f"k is {self.k}; a token needs at least one expert")

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.require(self.k <= len(kinds), f"k is {self.k} but the bank has {len(kinds)} experts")

    def build(self, site: Site) -> HashRouter:
        return HashRouter(self, site)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.k * sum(counted_E) / len(share_E)


class HashRouter(Router):
    """The module of :class:`Hash`; its table is a buffer, saved with the checkpoint."""

    requires: ClassVar[frozenset[str]] = frozenset({"token_id_N"})
    table_VK: Tensor

    def __init__(self, spec: Hash, site: Site) -> None:
        spec.check_experts(site.kinds)
        if site.vocabulary is None:
            raise SpecError("Hash routes by token id and needs the size of the vocabulary")
        super().__init__(site)
        self.spec = spec
        self.register_buffer("table_VK", torch.empty(site.vocabulary, spec.k, dtype=torch.int64))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        ids, experts = self.table_VK.shape[0], self.site.experts
        generator = torch.Generator().manual_seed(self.spec.seed)
        first_V = torch.arange(ids)[torch.randperm(ids, generator=generator)] % experts
        stride_K = torch.randperm(experts, generator=generator)[: self.spec.k]
        table_VK = (first_V[:, None] + (stride_K - stride_K[0])[None, :]) % experts
        self.table_VK.copy_(table_VK)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        assert signals.token_id_N is not None  # ``requires`` has seen to it
        expert_NK = self.table_VK[signals.token_id_N]
        weight_NK = torch.full(
            expert_NK.shape, 1 / self.spec.k, dtype=x_ND.dtype, device=x_ND.device
        )
        return Routing(expert_NK, weight_NK, experts=self.site.experts, full=True)

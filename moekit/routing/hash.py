"""Hash layers: a fixed table from token id to experts, with nothing to learn."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.errors import SignalError, SpecError
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

    @torch.no_grad()
    def balance(self, frequency_V: Tensor) -> None:
        """Fill the table anew so that experts see equally many tokens (Roller et al. 2021, sec. 3).

        Ids are dealt by falling frequency, each to the k experts with the least load so far.

        Args:
            frequency_V: how often each id occurs, in any unit.

        Raises:
            SpecError: there is not one finite, non-negative frequency an id.

        Example:
            >>> from moekit.routing import Hash, Site
            >>> router = Hash().build(Site(width=4, kinds=("feed_forward",) * 2, vocabulary=4))
            >>> router.balance(torch.tensor([5, 3, 9, 1]))
            >>> router.table_VK.flatten().tolist()
            [1, 1, 0, 1]
        """
        frequencies = self._checked(frequency_V)
        experts = [(0.0, expert) for expert in range(self.site.experts)]
        for token in sorted(range(len(frequencies)), key=lambda i: -frequencies[i]):
            chosen = [heapq.heappop(experts) for _ in range(self.spec.k)]
            self.table_VK[token] = torch.tensor([expert for _, expert in chosen])
            for load, expert in chosen:
                heapq.heappush(experts, (load + frequencies[token], expert))

    def _checked(self, frequency_V: Tensor) -> list[float]:
        wanted = (self.table_VK.shape[0],)
        if tuple(frequency_V.shape) != wanted:
            raise SpecError(
                f"Hash: frequencies have shape {tuple(frequency_V.shape)}; wanted {wanted}, "
                "one an id"
            )
        if not bool((torch.isfinite(frequency_V) & (frequency_V >= 0)).all()):
            raise SpecError("Hash: some frequencies are negative or not finite; wanted counts")
        return [float(value) for value in frequency_V.tolist()]

    def _check(self, x_ND: Tensor, signals: Signals) -> None:
        super()._check(x_ND, signals)
        ids_N, size = signals.token_id_N, self.table_VK.shape[0]
        if torch.compiler.is_compiling() or ids_N is None or ids_N.device.type != "cpu":
            return  # reading values would wait for the device or end the graph
        if bool(((ids_N < 0) | (ids_N >= size)).any()):
            raise SignalError(
                f"{type(self).__name__}: signal token_id_N holds ids outside 0 to {size - 1}, "
                "the rows of its table"
            )

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        assert signals.token_id_N is not None  # ``requires`` has seen to it
        expert_NK = self.table_VK[signals.token_id_N]
        weight_NK = torch.full(
            expert_NK.shape, 1 / self.spec.k, dtype=x_ND.dtype, device=x_ND.device
        )
        return Routing(expert_NK, weight_NK, experts=self.site.experts, full=True)

"""One decision for all rows of a sequence, or of a chunk of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from moekit.errors import SpecError
from moekit.routing.hash import Hash
from moekit.routing.noisy_top_k import NoisyTopK
from moekit.routing.router import Router, RouterSpec, Site
from moekit.routing.routing import Load, Routing, Signals
from moekit.routing.scopes import Scopes, check_scopes


@dataclass(frozen=True)
class ScopedSpec(RouterSpec):
    """Base of the routers that let another router decide once for a whole scope.

    Attributes:
        router: any router that looks at hidden states alone; it sees one row a scope.
    """

    abstract: ClassVar[bool] = True
    per_scope: ClassVar[bool] = True
    router: RouterSpec = NoisyTopK()

    @property
    def k(self) -> float | None:
        """Experts a row, where the router of scopes says so."""
        k: float | None = getattr(self.router, "k", None)
        return k

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.router.causal

    @property
    def fixed_k(self) -> bool:  # type: ignore[override]
        return self.router.fixed_k

    @property
    def scores(self) -> Literal["probabilities", "gates", "nothing"]:  # type: ignore[override]
        return self.router.scores

    def check(self) -> None:
        self.require(
            not self.router.per_scope,
            f"{type(self.router).__name__} decides for a scope already; wrap a router of rows",
        )
        self.require(
            not isinstance(self.router, Hash),
            "Hash looks up the id of a single token, which a whole scope does not have; "
            "use a router that looks at hidden states, such as TopK or NoisyTopK",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.router.check_experts(kinds)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.router.expected_load(share_E, counted_E)


class ScopedRouter(Router):
    """Base of their modules: a router whose rows are scopes.

    Args:
        spec: the wrapper.
        site: where the wrapper stands.
        inner: where the router of scopes stands, whose rows may have another width.
    """

    tells_scope: ClassVar[frozenset[str]] = frozenset({"scope_N"})

    def __init__(self, spec: ScopedSpec, site: Site, inner: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.router = spec.router.build(inner)
        of_rows = self.router.requires - {"experts"}
        if of_rows:
            raise SpecError(
                f"{type(spec).__name__}: {type(spec.router).__name__} needs the signal "
                f"{', '.join(sorted(of_rows))} of single rows, which a scope does not have"
            )

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """The signals that tell the scope, and what the router of scopes requires."""
        return self.tells_scope | self.router.requires

    @property
    def loss_weights(self) -> dict[str, float]:
        return self.router.loss_weights

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        self.router.reset_parameters(std)

    @torch.no_grad()
    def update(self, load: Load) -> None:
        self.router.update(load)

    def _check(self, x_ND: Tensor, signals: Signals) -> None:
        super()._check(x_ND, signals)
        check_scopes(type(self).__name__, signals)


@dataclass(frozen=True)
class PerSequence(ScopedSpec):
    """Every sequence is routed by the mean of its tokens (MEO's sequence level).

    The mean leaves padding out and holds later tokens, so a causal language model refuses this
    router; use :class:`PerChunk` or :class:`PerTask` there. A scope need not be a sequence:
    whatever ``scope_N`` groups shares a decision.

    He et al. 2023, arXiv 2310.09832.

    Example:
        >>> from moekit import Merged, MoESpec, PerSequence, SwiGLU, TopK
        >>> layer = MoESpec(PerSequence(TopK(k=4)), SwiGLU(count=8, hidden=64), Merged()).build(32)
        >>> int(layer(torch.randn(2, 5, 32)).rows_E.sum())
        10
    """

    causal: ClassVar[bool] = False
    bidirectional: ClassVar[bool] = True

    def build(self, site: Site) -> PerSequenceRouter:
        return PerSequenceRouter(self, site)


class PerSequenceRouter(ScopedRouter):
    """The module of :class:`PerSequence`."""

    def __init__(self, spec: PerSequence, site: Site) -> None:
        super().__init__(spec, site, site)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        scopes, previous = Scopes.of(signals), signals.previous_logits_NE
        seen = Signals(
            valid_N=scopes.rows_S() > 0,
            previous_logits_NE=None if previous is None else scopes.means(previous),
            experts=signals.experts,
        )
        return self.router.route(scopes.means(x_ND), seen).take(scopes.scope_N)


@dataclass(frozen=True)
class PerChunk(ScopedSpec):
    """Every chunk of a sequence is routed by the mean of the chunk before it.

    The causal form of :class:`PerSequence`: no token's routing depends on later tokens, nor on its
    own chunk. The first chunk, which has nothing before it, is routed by a learned vector. Routing
    a segment by the one before it is the rule of Lory (Zhong et al. 2024, arXiv 2405.03133).

    A language model generates with it without a KV cache, which does not keep the hidden states
    that are averaged. The longest sequence is read back from the device at every call.

    Attributes:
        length: tokens a chunk, padding not counted.
    """

    needs_past: ClassVar[bool] = True
    length: int = 64

    def check(self) -> None:
        super().check()
        self.require(self.length >= 1, f"length is {self.length}; a chunk has at least one token")

    def build(self, site: Site) -> PerChunkRouter:
        return PerChunkRouter(self, site)


class PerChunkRouter(ScopedRouter):
    """The module of :class:`PerChunk`."""

    def __init__(self, spec: PerChunk, site: Site) -> None:
        super().__init__(spec, site, site)
        self.length = spec.length
        self.start_D = nn.Parameter(torch.empty(site.width))
        self._reset_start(0.02)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        self._reset_start(std)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        sequences, previous = Scopes.of(signals), signals.previous_logits_NE
        chunks = self._chunks(sequences)
        if previous is not None:
            nothing = previous.new_zeros(previous.shape[1])
            previous = _before(chunks.means(previous), sequences.number, nothing)
        seen = Signals(
            valid_N=chunks.rows_S() > 0, previous_logits_NE=previous, experts=signals.experts
        )
        before_SD = _before(chunks.means(x_ND), sequences.number, self.start_D)
        return self.router.route(before_SD, seen).take(chunks.scope_N)

    def _chunks(self, sequences: Scopes) -> Scopes:
        """The chunks as scopes: those of the first sequence, then those of the second, and so on.

        Every sequence has as many as the longest; some are without rows.
        """
        chunk_N = sequences.positions() // self.length
        if sequences.valid_N is not None:
            chunk_N = chunk_N.masked_fill(~sequences.valid_N, 0)
        most = int(chunk_N.max()) + 1 if len(chunk_N) else 1
        scope_N = sequences.scope_N * most + chunk_N
        return Scopes(scope_N, sequences.number * most, sequences.valid_N)

    @torch.no_grad()
    def _reset_start(self, std: float) -> None:
        nn.init.normal_(self.start_D, std=std)


def _before(means_SX: Tensor, sequences: int, first_X: Tensor) -> Tensor:
    """The mean of the chunk before each chunk (S, X), ``first_X`` for each sequence's first."""
    means_BCX = means_SX.unflatten(0, (sequences, -1))
    first_B1X = first_X.to(means_SX.dtype).expand(sequences, 1, -1)
    return torch.cat([first_B1X, means_BCX[:, :-1]], dim=1).flatten(0, 1)

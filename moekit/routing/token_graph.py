"""Routing over a graph of tokens: a token's expert distribution averages those of its neighbours.

The graph is a matrix S over the tokens of one sequence, with rows that sum to 1. A token draws
another by it and takes that one's expert, so that its distribution is ``P = S R``, with R the
distributions of a top-k router. Only scores are mixed: an expert still sees the token itself
(Nguyen et al. 2025, arXiv 2505.00792).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from moekit.errors import SignalError
from moekit.routing.router import Router, RouterSpec, Site
from moekit.routing.routing import Load, Routing, Signals
from moekit.routing.sequences import Attention, Sequences, View
from moekit.routing.top_k import TopK, TopKRouter


@dataclass(frozen=True)
class TokenGraph(RouterSpec):
    """Base of the routers over a graph of tokens.

    Who sees whom is said by the signal ``sequences``. In a decoder no token sees a later one.

    Attributes:
        router: the router whose distributions are averaged: ``TopK`` or a kind of it.
        mix: average the distributions (``prob``, as the paper derives), or the logits before the
            softmax.
        detach: no gradient through the graph, for ablations.
    """

    abstract: ClassVar[bool] = True
    router: RouterSpec = TopK()
    mix: Literal["prob", "logit"] = "prob"
    detach: bool = False

    @property
    def k(self) -> int:
        """Experts a token."""
        return self.top_k.k

    @property
    def top_k(self) -> TopK:
        """The wrapped router's spec."""
        assert isinstance(self.router, TopK)  # checked
        return self.router

    def check(self) -> None:
        self.require(
            isinstance(self.router, TopK),
            "the average is taken between scoring and choosing, which "
            f"{type(self.router).__name__} does not tell apart; use TopK, Pathway or DenseWarmup",
        )
        self.require(
            self.mix == "logit" or self.top_k.score == "softmax",
            "sigmoid scores are no distribution over experts that could be averaged; "
            "use score=softmax or mix=logit",
        )

    def check_experts(self, kinds: tuple[str, ...]) -> None:
        self.router.check_experts(kinds)

    def expected_load(self, share_E: tuple[float, ...], counted_E: tuple[bool, ...]) -> float:
        return self.router.expected_load(share_E, counted_E)


class TokenGraphRouter(Router):
    """Base of the modules: averages the wrapped router's scores along an attention."""

    def __init__(self, spec: TokenGraph, site: Site) -> None:
        spec.check_experts(site.kinds)
        super().__init__(site)
        self.spec = spec
        self.router: TopKRouter = spec.top_k.build(site)

    @property
    def requires(self) -> frozenset[str]:  # type: ignore[override]
        """What the graph and the wrapped router require."""
        return self.router.requires | self.graph_requires

    @property
    def graph_requires(self) -> frozenset[str]:
        """What the graph requires."""
        return frozenset({"sequences"})

    @property
    def loss_weights(self) -> dict[str, float]:
        return self.router.loss_weights

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02) -> None:
        self.router.reset_parameters(std)

    def update(self, load: Load) -> None:
        self.router.update(load)

    def route(self, x_ND: Tensor, signals: Signals) -> Routing:
        logits_NE, scored_NE = self.router.evaluate(x_ND, signals)
        if self.spec.mix == "logit":
            return self.router.decide(logits_NE, self._average(scored_NE, x_ND, signals))
        mixed_NE = self._average(scored_NE.softmax(-1), x_ND, signals)
        tiny = torch.finfo(mixed_NE.dtype).tiny
        return self.router.decide(logits_NE, mixed_NE.clamp_min(tiny).log())

    def attention(self, x_BTD: Tensor, key_BPC: Tensor, signals: Signals, view: View) -> Attention:
        """The graph: attention of the rows over the tokens whose keys were kept."""
        raise NotImplementedError

    def key(self, x_ND: Tensor, signals: Signals) -> Tensor:
        """What later rows need of each row to look at it, beside its scores (N, C)."""
        return x_ND.new_empty(x_ND.shape[0], 0)

    def _average(self, value_NE: Tensor, x_ND: Tensor, signals: Signals) -> Tensor:
        sequences = _sequences(signals)
        if not sequences.count:
            return value_NE  # no rows either
        view = sequences.view(signals.valid_N)
        value_BTE, x_BTD = sequences.split(value_NE), sequences.split(x_ND)
        key_BTC = sequences.split(self.key(x_ND, signals))
        value_BPE, key_BPC = sequences.remember(value_BTE, key_BTC)
        graph = self.attention(x_BTD, key_BPC, signals, view)
        graph = graph.detach() if self.spec.detach else graph
        return view.own_where_alone(graph.average(value_BPE, view), value_BTE).flatten(0, 1)

    def _check(self, x_ND: Tensor, signals: Signals) -> None:
        if signals.sequences is None:
            raise SignalError(
                f"{type(self).__name__} needs the signal sequences: rows (N, D) do not say which "
                "(B, T, D) they form; pass Signals(sequences=Sequences(count=B))"
            )
        signals.sequences.check(x_ND.shape[0])
        super()._check(x_ND, signals)


def _sequences(signals: Signals) -> Sequences:
    assert signals.sequences is not None  # required
    return signals.sequences

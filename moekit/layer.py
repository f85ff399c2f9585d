"""The MoE layer: who computes (router), how rows travel (dispatch), what is computed (experts)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moekit.dispatch.dispatch import Between, Dispatch, DispatchSpec, Dropless
from moekit.errors import SpecError
from moekit.experts.adapter import Adapter, AdapterSpec
from moekit.experts.experts import Experts, ExpertsSpec
from moekit.experts.feed_forward import FeedForwardSpec
from moekit.experts.groups import GroupedMM
from moekit.residual import Plain, ResidualSpec
from moekit.routing.losses import LossSpec
from moekit.routing.router import ZERO_COMPUTATION, Router, RouterSpec, Site
from moekit.routing.routing import Carry, Routing, Signals
from moekit.spec import Spec


@dataclass(frozen=True)
class MoESpec(Spec):
    """A whole MoE layer, as a person types it and ``config.json`` stores it.

    Attributes:
        router: who computes.
        experts: what is computed.
        dispatch: how rows travel.
        losses: routing losses of the layer, each with its weight.
        shared: a feed-forward expert that every token also passes, or None.
        shared_gate: multiply the shared expert's output by ``sigmoid(x w)`` (Qwen2-MoE).
        residual: how the block around the layer adds its output to the hidden state. The layer
            itself returns its output alone.
        adapter: what every row passes before it is routed and computed, or None.

    Example:
        >>> from moekit import MoESpec, SwiGLU, TopK
        >>> layer = MoESpec(TopK(k=2), SwiGLU(count=8, hidden=64)).build(width=32)
        >>> layer(torch.randn(2, 5, 32)).y.shape
        torch.Size([2, 5, 32])
    """

    router: RouterSpec
    experts: ExpertsSpec
    dispatch: DispatchSpec = Dropless()
    losses: tuple[LossSpec, ...] = ()
    shared: FeedForwardSpec | None = None
    shared_gate: bool = False
    residual: ResidualSpec = Plain()
    adapter: AdapterSpec | None = None

    def check(self) -> None:
        kinds = self.experts.expert_kinds()
        self.router.check_experts(kinds)
        self.dispatch.check_layer(self.router, kinds)
        self.dispatch.check_bank(self.experts)
        for loss in self.losses:
            loss.check_layer(self.router, kinds)
        self.require(
            self.shared is None or self.shared.count == 1,
            "shared is one expert for every token; give it count=1 and the hidden width you want",
        )
        self.require(
            self.shared is not None or not self.shared_gate, "shared_gate is set without shared"
        )
        self.require(
            any(kind not in ZERO_COMPUTATION for kind in kinds),
            "the bank has zero-computation experts only; add a feed-forward bank",
        )

    def build(self, width: int, previous: int | None = None, vocabulary: int | None = None) -> MoE:
        """The layer for rows of ``width``.

        Args:
            previous: number of experts of the nearest MoE layer below with logits, if any.
            vocabulary: number of token ids, for routers that look at them.

        Raises:
            SpecError: the shared expert returns rows of another width than the bank.
        """
        site = Site(width, self.experts.expert_kinds(), previous, vocabulary)
        out = self.experts.out_width(width)
        self.require(
            self.shared is None or self.shared.out_width(width) == out,
            f"the bank returns rows of width {out} and the shared expert does not; set its out",
        )
        shared = None if self.shared is None else self.shared.build(width)
        gate = nn.Linear(width, 1, bias=False) if self.shared_gate else None
        return MoE(
            self.router.build(site),
            self.experts.build(width),
            self.dispatch.build(),
            shared=shared,
            shared_gate=gate,
            adapter=None if self.adapter is None else self.adapter.build(width),
        )

    def handed_on(self, previous: int | None) -> int | None:
        """Width of the logits that the next layer is handed, if ``previous`` reached this one.

        A router without logits, such as a hash, hands on what it was handed.
        """
        if self.router.scores == "nothing":
            return previous
        return len(self.experts.expert_kinds())

    def expected_load(self) -> float:
        """Rows a token that reach an expert's product once the balance loss has settled.

        For top-k with MoE++'s loss this is ``k τ N / (τ N + Z)``, for AdaMoE ``k n / (n + m)``.
        """
        kinds = self.experts.expert_kinds()
        shares = next((s for s in (loss.shares(kinds) for loss in self.losses) if s), None)
        shares = shares or tuple(1 / len(kinds) for _ in kinds)
        counted = tuple(kind not in ZERO_COMPUTATION for kind in kinds)
        return self.dispatch.rows_per_token(self.router.expected_load(shares, counted))


@dataclass(frozen=True)
class MoEOutput:
    """What a layer returns.

    Attributes:
        y: outputs, of the input's leading shape.
        routing: the router's decision, before any capacity limit.
        rows_E: rows of each dispatched expert that reached a matrix product.
        dropped: assignments that a capacity limit dropped ().
        carry: what the next layer is handed.
    """

    y: Tensor
    routing: Routing
    rows_E: Tensor
    dropped: Tensor
    carry: Carry


class MoE(nn.Module):
    """The layer. Modules can be shared between layers by passing the same one to several."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatch: Dispatch,
        *,
        shared: Experts | None = None,
        shared_gate: nn.Linear | None = None,
        adapter: Adapter | None = None,
    ) -> None:
        super().__init__()
        if router.site.kinds != experts.kinds:
            raise SpecError(
                f"the router was built for {router.site.experts} experts "
                f"and the bank has {len(experts.kinds)}, or of other kinds"
            )
        self.router = router
        self.experts = experts
        self.dispatch = dispatch
        self.shared = shared
        self.shared_gate = shared_gate
        self.adapter = adapter

    def forward(
        self,
        x: Tensor,
        signals: Signals | None = None,
        carry: Carry | None = None,
        between: Between | None = None,
    ) -> MoEOutput:
        """Route and compute the rows of ``x`` (..., D).

        Args:
            signals: what the router may look at, one entry a row of the flattened ``x``. For a
                router that asks for scopes, those of ``x`` (..., T, D) are its sequences of T rows
                unless the signals say otherwise.
            carry: what the layer below handed over.
            between: what to do between the map and the reduce of a bank that has them.

        Raises:
            SpecError: the rows are of another width than the layer's.
        """
        width = self.router.site.width
        if x.shape[-1:] != (width,):
            raise SpecError(f"x is {tuple(x.shape)}; this layer is for rows (..., {width})")
        carry = Carry() if carry is None else carry
        own: dict[str, Any] = {"previous_logits_NE": carry.logits_NE, "experts": self.experts}
        signals = Signals(**own) if signals is None else signals.replace(**own)
        signals = self._with_scopes(x, signals)
        x_ND = x.flatten(0, -2)
        x_ND = x_ND if self.adapter is None else self.adapter(x_ND)
        routing = self.router(x_ND, signals)
        around = () if between is None else (between,)
        done = self.dispatch(x_ND, routing, self.experts, *around)
        y_ND = done.y_ND if self.shared is None else done.y_ND + self._shared(x_ND)
        return MoEOutput(
            y=y_ND.view(*x.shape[:-1], y_ND.shape[-1]),
            routing=routing,
            rows_E=done.rows_E,
            dropped=_dropped(routing, done.routing),
            carry=carry if routing.logits_NE is None else Carry(routing.logits_NE, carry.momentum),
        )

    def _with_scopes(self, x: Tensor, signals: Signals) -> Signals:
        """The signals with each sequence of ``x`` as a scope, where the router asks for scopes."""
        given = signals.scope_N is not None or x.dim() < 3
        if given or "scope_N" not in self.router.requires:
            return signals
        sequences, length = math.prod(x.shape[:-2]), x.shape[-2]
        scope_N = torch.arange(sequences, device=x.device).repeat_interleave(length)
        return signals.replace(scope_N=scope_N, scopes=sequences)

    def _shared(self, x_ND: Tensor) -> Tensor:
        assert self.shared is not None
        count_E = torch.full((1,), x_ND.shape[0], device=x_ND.device)
        y_ND = self.shared(x_ND, GroupedMM(count_E))
        return y_ND if self.shared_gate is None else self.shared_gate(x_ND).sigmoid() * y_ND


def _dropped(before: Routing, after: Routing) -> Tensor:
    """Assignments of ``before`` that are gone; a dispatch may append slots but moves none."""
    if after is before:
        return before.expert_NK.new_zeros(())
    return (before.used_NK & ~after.used_NK[:, : before.used_NK.shape[1]]).sum()

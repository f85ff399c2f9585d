"""What zero-computation experts save: MoE++'s bank at several loads against top-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moekit.dispatch import Dropless
from moekit.experts import Bank, Constant, Copy, Experts, ExpertsSpec, SwiGLU, Zero
from moekit.measure.roofline import interleaved
from moekit.routing import Routing

VANILLA = "top-2 of 8"


@dataclass(frozen=True)
class ZeroComputationTiming:
    """The expert phase of one bank.

    Attributes:
        name: the bank and its load.
        rows_per_token: rows that reached a product.
        forward, training: median seconds, without and with the backward pass.
        forward_ratio, training_ratio: how many times as fast as top-2 of the same run.
    """

    name: str
    rows_per_token: float
    forward: float
    training: float
    forward_ratio: float
    training_ratio: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Phase:
    """A bank with tokens and a routing of a given load."""

    bank: Experts
    x_ND: Tensor
    routing: Routing

    def run(self) -> Tensor:
        y_ND: Tensor = Dropless().build()(self.x_ND, self.routing, self.bank).y_ND
        return y_ND

    @torch.no_grad()
    def forward(self) -> Tensor:
        return self.run()

    def training(self) -> None:
        self.bank.zero_grad()
        x_ND = self.x_ND.detach().requires_grad_()
        y_ND = Dropless().build()(x_ND, self.routing, self.bank).y_ND
        y_ND.backward(torch.ones_like(y_ND))

    @property
    def rows_per_token(self) -> float:
        start, stop = self.bank.dispatched_ranges[0]
        expert_NK = self.routing.expert_NK
        rows = ((expert_NK >= start) & (expert_NK < stop)).sum()
        return float(rows) / self.routing.tokens


def time_zero_computation(
    device: torch.device,
    *,
    width: int = 512,
    hidden: int = 1024,
    tokens: int = 2048,
    dtype: str = "float32",
    taus: Sequence[float] = (1.0, 0.75, 0.5, 0.25, 0.1),
    repeats: int = 9,
    seed: int = 0,
) -> list[ZeroComputationTiming]:
    """Time MoE++'s 8 + 4 experts at the loads that its τ aims at, against 8 feed-forward experts.

    Routings are drawn at random, each token two different experts, with every zero-computation
    expert ``1 / τ`` times as likely as a feed-forward one; the rows that come of it are counted.
    """
    mixed = Bank((SwiGLU(count=8, hidden=hidden), Constant(2), Copy(1), Zero(1)))
    loads: dict[str, tuple[ExpertsSpec, float]] = {VANILLA: (SwiGLU(count=8, hidden=hidden), 1.0)}
    loads |= {f"MoE++ 8+4, τ={tau:g}": (mixed, tau) for tau in taus}
    generator = torch.Generator().manual_seed(seed)
    x_ND = torch.randn(tokens, width, generator=generator).to(device, getattr(torch, dtype))
    phases = {
        name: _Phase(
            spec.build(width).to(x_ND), x_ND, _routing(spec, tau, tokens, generator, device)
        )
        for name, (spec, tau) in loads.items()
    }
    forward: dict[str, Callable[[], Tensor | None]] = {n: p.forward for n, p in phases.items()}
    training: dict[str, Callable[[], Tensor | None]] = {n: p.training for n, p in phases.items()}
    first = interleaved(forward, device, repeats)
    both = interleaved(training, device, repeats)
    return [
        ZeroComputationTiming(
            name,
            phase.rows_per_token,
            first[name],
            both[name],
            first[VANILLA] / first[name],
            both[VANILLA] / both[name],
        )
        for name, phase in phases.items()
    ]


def _routing(
    spec: ExpertsSpec, tau: float, tokens: int, generator: torch.Generator, device: torch.device
) -> Routing:
    """Two different experts a token, drawn with odds τ to 1 (Gumbel top-k)."""
    odds_E = torch.tensor([tau if k == "feed_forward" else 1.0 for k in spec.expert_kinds()])
    noise_NE = torch.rand(tokens, len(odds_E), generator=generator).log().neg().log().neg()
    expert_NK = (odds_E.log() + noise_NE).topk(2).indices.to(device)
    weight_NK = torch.full((tokens, 2), 0.5, device=device)
    return Routing(expert_NK, weight_NK, len(odds_E), full=True)

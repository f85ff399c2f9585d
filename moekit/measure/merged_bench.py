"""What k experts cost when they are run, and when they are merged into one first."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from moekit.dispatch import Dispatched, DispatchSpec, Dropless, Merged
from moekit.experts import GELU
from moekit.layer import MoE, MoESpec
from moekit.measure.flops import flop_counter
from moekit.routing import PerSequence, Signals, TopK

EXPERTS = 8
WARM_UP = 2


@dataclass(frozen=True)
class Sizes:
    """Sizes of one measurement.

    Attributes:
        width, hidden: of an expert ``gelu(x W_up + b) W_down + b``.
        sequences, length: rows are ``sequences`` of ``length`` tokens each.
        dtype: of weights and rows.
    """

    width: int
    hidden: int
    sequences: int = 32
    length: int = 128
    dtype: str = "float32"


@dataclass(frozen=True)
class Cost:
    """One way to use k experts: counted operations and median times of the expert phase.

    Attributes:
        way: ``run``, or how the experts are merged.
        k: experts a sequence.
        rows_per_token: rows that reached an expert's products.
        mflops_per_token: forward operations a token, merging included.
        forward_ms, training_ms: forward, and forward with backward.
    """

    way: str
    k: int
    rows_per_token: float
    mflops_per_token: float
    forward_ms: float
    training_ms: float

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


WAYS: Mapping[str, DispatchSpec] = {
    "run": Dropless(),
    "merged": Merged(),
    "merged by gathering": Merged(merge="gather"),
}


def costs(
    sizes: Sizes, ks: Sequence[int], repeats: int, ways: Sequence[str] = ("run", "merged")
) -> list[Cost]:
    """Every way with every k on the same rows and weights, taking turns in random order.

    Each sequence is routed by its mean, so that both ways use the same experts with the same
    weights; they differ in what is done with them.
    """
    layers = {(way, k): _layer(WAYS[way], k, sizes) for way in ways for k in ks}
    x_ND, signals = _rows(sizes)
    phases = {name: Phase(layer, x_ND, signals) for name, layer in layers.items()}
    times: dict[tuple[str, int], list[tuple[float, float]]] = {name: [] for name in layers}
    order, shuffled = list(phases), random.Random(0)
    for repeat in range(repeats + WARM_UP):
        shuffled.shuffle(order)
        for name in order:
            seconds = phases[name].timed()
            if repeat >= WARM_UP:
                times[name].append(seconds)
    return [_cost(*name, phase, times[name]) for name, phase in phases.items()]


def slope(costs_K: Sequence[Cost], of: str = "forward_ms") -> float:
    """Least-squares slope of a time over k."""
    mean = statistics.fmean(cost.k for cost in costs_K)
    values = [(cost.k - mean, getattr(cost, of)) for cost in costs_K]
    return sum(k * v for k, v in values) / sum(k * k for k, _ in values)


class Phase:
    """The expert phase of a layer: planning, merging, computing and combining, without routing."""

    def __init__(self, layer: MoE, x_ND: Tensor, signals: Signals) -> None:
        self.layer, self.x_ND = layer, x_ND
        with torch.no_grad():
            self.routing = layer.router(x_ND, signals)

    def run(self) -> Dispatched:
        """Forward."""
        return cast("Dispatched", self.layer.dispatch(self.x_ND, self.routing, self.layer.experts))

    def timed(self) -> tuple[float, float]:
        """Seconds of forward, and of forward with backward."""
        self.layer.zero_grad()
        self.x_ND = self.x_ND.detach().requires_grad_()
        start = time.perf_counter()
        done = self.run()
        forward = time.perf_counter() - start
        done.y_ND.backward(torch.ones_like(done.y_ND))
        return forward, time.perf_counter() - start

    @torch.no_grad()
    def counted(self) -> tuple[int, int]:
        """Rows that reached a product, and floating-point operations, forward."""
        with flop_counter() as counter:
            rows = int(self.run().rows_E.sum())
        return rows, counter.get_total_flops()


def _rows(sizes: Sizes) -> tuple[Tensor, Signals]:
    generator = torch.Generator().manual_seed(2)
    x_ND = torch.randn(sizes.sequences * sizes.length, sizes.width, generator=generator)
    scope_N = torch.arange(sizes.sequences).repeat_interleave(sizes.length)
    return x_ND.to(getattr(torch, sizes.dtype)), Signals(scope_N=scope_N, scopes=sizes.sequences)


def _layer(dispatch: DispatchSpec, k: int, sizes: Sizes) -> MoE:
    spec = MoESpec(
        PerSequence(TopK(k=k, init_std=1.0)),
        GELU(count=EXPERTS, hidden=sizes.hidden, bias=True),
        dispatch,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return spec.build(sizes.width).to(getattr(torch, sizes.dtype))


def _cost(way: str, k: int, phase: Phase, times: Sequence[tuple[float, float]]) -> Cost:
    rows, flops = phase.counted()
    tokens = len(phase.x_ND)
    forward, training = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    return Cost(way, k, rows / tokens, flops / tokens / 1e6, forward, training)

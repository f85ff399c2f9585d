"""Does the expert phase's time fall with the feed-forward rows? MoE++ and AdaMoE against top-2.

Each design is one dropless layer of the same size. Its router is first trained on its balance loss
alone, over Gaussian inputs, until its load settles; then all layers take turns on the same inputs,
and the time from planning to combining is taken, forward and forward with backward.

    python benchmarks/expert_phase.py --output benchmarks/results/expert_phase

writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit import MoE, MoESpec
from moekit.compare.machine import machine
from moekit.compare.record import write_json, write_text
from moekit.dispatch import Dropless
from moekit.routing import LossSite, RoutingLosses
from moekit.systems import Shape
from moekit.systems.adamoe import adamoe
from moekit.systems.baselines import top_k
from moekit.systems.moepp import moepp

TAUS = (1.0, 0.75, 0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one measurement."""

    width: int
    hidden: int
    tokens: int
    dtype: str


@dataclass(frozen=True)
class Row:
    """One design: rows a token, median seconds, and throughput against top-2 of the same run."""

    design: str
    rows_per_token: float
    forward_ms: float
    training_ms: float
    rows_ratio: float = 1.0
    forward_ratio: float = 1.0
    training_ratio: float = 1.0


def designs(hidden: int) -> dict[str, MoESpec]:
    """Top-2, AdaMoE and MoE++ at several τ."""
    shape = Shape(experts=8, hidden=hidden, k=2)
    found = {"top-2 of 8": top_k(shape), "AdaMoE 8+8, k=3": adamoe(shape)}
    found |= {f"MoE++ 8+4, τ={tau}": moepp(shape, tau) for tau in TAUS}
    layers = {name: design.layers[0] for name, design in found.items()}
    return {
        name: layer.replace(dispatch=Dropless())
        for name, layer in layers.items()
        if isinstance(layer, MoESpec)
    }


def settled(spec: MoESpec, sizes: Sizes, steps: int = 600) -> MoE:
    """The layer after its router was trained on its balance loss alone."""
    torch.manual_seed(0)
    layer = spec.build(sizes.width)
    losses = RoutingLosses([LossSite(spec.losses, layer.router)])
    optimiser = torch.optim.Adam(layer.router.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x_ND = torch.randn(1024, sizes.width, generator=generator)
        loss, _ = losses([layer.router(x_ND)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return layer.to(getattr(torch, sizes.dtype))


def measure(layers: dict[str, MoE], sizes: Sizes, repeats: int) -> list[Row]:
    """Median times of the expert phase, the layers taking turns."""
    generator = torch.Generator().manual_seed(2)
    x_ND = torch.randn(sizes.tokens, sizes.width, generator=generator)
    x_ND = x_ND.to(getattr(torch, sizes.dtype))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    rows: dict[str, float] = {}
    for repeat in range(repeats + 2):
        for name, layer in layers.items():
            forward, training, count = _once(layer, x_ND)
            rows[name] = count / sizes.tokens
            if repeat >= 2:  # the first ones warm up
                times[name].append((forward, training))
    medians = {
        name: [1e3 * statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, pairs in times.items()
    }
    base, (forward, training) = rows["top-2 of 8"], medians["top-2 of 8"]
    return [
        Row(name, rows[name], f, t, base / rows[name], forward / f, training / t)
        for name, (f, t) in medians.items()
    ]


def _once(layer: MoE, x_ND: Tensor) -> tuple[float, float, int]:
    """Seconds of the expert phase forward, and with backward; rows that reached a product."""
    layer.zero_grad()
    x_ND = x_ND.detach().requires_grad_()
    with torch.no_grad():
        routing = layer.router(x_ND)
    start = time.perf_counter()
    done = layer.dispatch(x_ND, routing, layer.experts)
    forward = time.perf_counter() - start
    done.y_ND.backward(torch.ones_like(done.y_ND))
    return forward, time.perf_counter() - start, int(done.rows_E.sum())


def table(sizes: Sizes, rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        f"### D={sizes.width}, H={sizes.hidden}, {sizes.tokens} tokens, {sizes.dtype}",
        "",
        "| design | rows/token | forward ms | forward + backward ms | fewer rows | "
        "forward speed | training speed |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r.design} | {r.rows_per_token:.3f} | {r.forward_ms:.1f} | {r.training_ms:.1f} | "
        f"{r.rows_ratio:.2f}x | {r.forward_ratio:.2f}x | {r.training_ratio:.2f}x |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/expert_phase"))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    grid = [
        Sizes(width, hidden, 4096, dtype)
        for width, hidden in ((128, 256), (512, 1024))
        for dtype in ("float32", "bfloat16")
    ]
    results: list[dict[str, Any]] = []
    texts = []
    for sizes in grid:
        layers = {name: settled(spec, sizes) for name, spec in designs(sizes.hidden).items()}
        rows = measure(layers, sizes, options.repeats)
        results.append({"sizes": asdict(sizes), "rows": [asdict(row) for row in rows]})
        texts.append(table(sizes, rows))
        print(texts[-1], flush=True)
    where = machine("cpu")
    head = (
        "# Expert phase of MoE++ and AdaMoE against top-2\n\n"
        "`python benchmarks/expert_phase.py`; medians of "
        f"{options.repeats} interleaved repeats; {where['device']}, {where['threads']} threads, "
        f"torch {where['torch']}. Speeds are throughput against top-2 in the same run; the "
        "published range for MoE++ is 1.1x to 2.1x.\n\n"
    )
    write_text(options.output.with_suffix(".md"), head + "\n".join(texts))
    write_json(options.output.with_suffix(".json"), {"machine": where, "results": results})


if __name__ == "__main__":
    main()

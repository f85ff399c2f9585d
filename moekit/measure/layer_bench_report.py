"""The results of a layer benchmark as JSON and as a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from moekit.measure.layer_bench import (
    DENSE,
    OURS,
    RECOMPUTED,
    SCATTERMOE,
    THEIRS,
    LayerTiming,
)
from moekit.measure.merged_bench import EXPERTS, Cost
from moekit.measure.report import Block, Cell, Column, Facts, Plot, Report, Section, Table, Text
from moekit.measure.report.speed import speed_ratios
from moekit.measure.roofline import Limits
from moekit.measure.zero_computation_bench import ZeroComputationTiming

ORDER = (*OURS, *THEIRS, SCATTERMOE, RECOMPUTED, DENSE)


def results(
    timings: Sequence[LayerTiming],
    zero: Sequence[ZeroComputationTiming],
    merged: Sequence[Cost],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was measured, as JSON values."""
    return {
        "machine": dict(machine),
        "limits": {  # medians of those of the timings
            name: {"flops": limit.flops, "bandwidth": limit.bandwidth}
            for name, limit in limits_of(timings).items()
        },
        "geometric_mean_ratio": {
            mode: geometric_mean(_of(timings, training))
            for mode, training in (("forward", False), ("training", True))
        },
        "timings": [timing.to_dict() for timing in timings],
        "zero_computation": [timing.to_dict() for timing in zero],
        "merged": [cost.to_dict() for cost in merged],
    }


def limits_of(timings: Sequence[LayerTiming]) -> dict[str, Limits]:
    """By dtype, the median of the limits that were measured beside each shape."""
    found: dict[str, list[Limits]] = {}
    for timing in timings:
        found.setdefault(timing.shape.dtype, []).append(timing.limits)
    return {
        dtype: Limits(median(x.flops for x in some), median(x.bandwidth for x in some))
        for dtype, some in found.items()
    }


def geometric_mean(timings: Sequence[LayerTiming]) -> float | None:
    """Of the ratios to the best backend of transformers; None without any."""
    if not timings:
        return None
    return math.exp(sum(math.log(timing.ratio) for timing in timings) / len(timings))


def report(
    timings: Sequence[LayerTiming],
    zero: Sequence[ZeroComputationTiming],
    merged: Sequence[Cost],
    machine: Mapping[str, Any],
    command: str,
) -> Report:
    """The page."""
    sections = [Section("Machine", [_machine(limits_of(timings), machine)])]
    for heading, training in (("Forward", False), ("Forward and backward", True)):
        some = _of(timings, training)
        if some:
            sections.append(Section(heading, _mode(some, training)))
    if zero:
        sections.append(Section("Zero-computation experts", [_zero(zero)]))
    if merged:
        sections.append(Section("Merged experts", [_merged(merged)]))
    return Report("Speed of the MoE layer", sections, _lead(timings), f"Made by: {command}")


def _of(timings: Sequence[LayerTiming], training: bool) -> list[LayerTiming]:
    return [timing for timing in timings if timing.training == training]


def _lead(timings: Sequence[LayerTiming]) -> str:
    parts = []
    for mode, training in (("forward", False), ("forward and backward", True)):
        some = _of(timings, training)
        mean = geometric_mean(some)
        if mean is not None:
            slower = sum(timing.ratio < 0.97 for timing in some)
            parts.append(
                f"{mode}: {mean:.2f} times as fast as the best backend of transformers "
                f"(geometric mean of {len(some)} shapes, at {slower} of them below 0.97)"
            )
    return "; ".join(parts)


def _machine(limits: Mapping[str, Limits], machine: Mapping[str, Any]) -> Block:
    entries = [(name, str(value)) for name, value in machine.items()]
    for dtype, limit in limits.items():
        entries.append((f"product, {dtype}", f"{limit.flops / 1e9:,.0f} GFLOP/s"))
        entries.append((f"reading memory, {dtype} run", f"{limit.bandwidth / 1e9:,.1f} GB/s"))
    return Facts(entries)


def _mode(timings: Sequence[LayerTiming], training: bool) -> list[Block]:
    names = [n for n in ORDER if any(n in timing.seconds for timing in timings)]
    ratios: dict[str, list[float | None]] = {
        name: [_ratio(timing, name) for timing in timings]
        for name in names
        if name == "moekit" or name not in OURS
    }
    given = "tokens, the router in it" if timings[0].whole else "tokens and routing"
    graphed = [replace(t, seconds=t.graph_seconds) for t in timings if t.graph_seconds]
    blocks: list[Block] = [
        Text(
            f"Medians of interleaved runs on the same weights, {given}. The share is "
            "that of the limit that binds, measured between these runs: operations at the rate of "
            "a large product, or weights at the rate of reading memory."
        ),
        _times(timings, names, "Median times"),
        *([_times(graphed, names, "Median times of replayed CUDA graphs")] if graphed else []),
        Plot(
            speed_ratios(
                [str(t.shape) for t in timings], ratios, "the best backend of transformers"
            ),
            "Speed against the best backend of transformers at each shape; 1 is as fast.",
        ),
        _memory(timings, names, "Memory that a run adds at its highest", "MiB", 2**20, peak=True),
    ]
    if training:
        caption = "Kept for the backward pass, weights left out"
        blocks.append(_memory(timings, names, caption, "KiB a token", 2**10, peak=False))
    return blocks


def _ratio(timing: LayerTiming, name: str) -> float | None:
    return timing.best_other / timing.seconds[name] if name in timing.seconds else None


def _times(timings: Sequence[LayerTiming], names: Sequence[str], caption: str) -> Table:
    columns = [
        Column("shape"),
        Column("ratio", "to the best of transformers", ".2f"),
        Column("share", "of the limit", ".0%"),
        Column("limit"),
        *(Column(name, "ms", ".3g") for name in names),
    ]
    rows: list[list[Cell]] = []
    for t in timings:
        times = (t.seconds.get(name) for name in names)
        rows.append([str(t.shape), t.ratio, t.share, t.bound, *(_scaled(s, 1e-3) for s in times)])
    return Table(columns, rows, caption)


def _memory(
    timings: Sequence[LayerTiming],
    names: Sequence[str],
    caption: str,
    unit: str,
    scale: float,
    *,
    peak: bool,
) -> Table:
    columns = [Column("shape"), *(Column(name, unit, ".3g") for name in names)]
    rows: list[list[Cell]] = []
    for timing in timings:
        values = timing.peak_bytes if peak else timing.saved_bytes
        rows.append([str(timing.shape), *(_scaled(values.get(name), scale) for name in names)])
    return Table(columns, rows, caption)


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else value / scale


def _zero(timings: Sequence[ZeroComputationTiming]) -> Table:
    columns = [
        Column("bank"),
        Column("rows", "a token", ".3f"),
        Column("forward", "ms", ".3g", best="low"),
        Column("forward and backward", "ms", ".3g", best="low"),
        Column("forward speed", "times top-2", ".2f"),
        Column("training speed", "times top-2", ".2f"),
    ]
    rows: list[list[Cell]] = [
        [
            t.name,
            t.rows_per_token,
            1e3 * t.forward,
            1e3 * t.training,
            t.forward_ratio,
            t.training_ratio,
        ]
        for t in timings
    ]
    return Table(columns, rows, "Expert phase at the loads that MoE++'s τ aims at")


def _merged(costs: Sequence[Cost]) -> Table:
    run = {cost.k: cost for cost in costs if cost.way == "run"}
    columns = [
        Column(f"k of {EXPERTS}"),
        Column("way"),
        Column("operations", "MFLOP a token", ".3f"),
        Column("forward", "ms", ".3g", best="low"),
        Column("forward and backward", "ms", ".3g", best="low"),
        Column("forward speed", "times running k", ".2f"),
        Column("training speed", "times running k", ".2f"),
    ]
    rows: list[list[Cell]] = [
        [
            cost.k,
            cost.way,
            cost.mflops_per_token,
            cost.forward_ms,
            cost.training_ms,
            run[cost.k].forward_ms / cost.forward_ms,
            run[cost.k].training_ms / cost.training_ms,
        ]
        for cost in costs
    ]
    return Table(columns, rows, "Experts that are merged for a sequence (MEO), or run")

"""Does a merged expert cost one expert? k experts of 8 that are merged, against k that are run.

Each layer has eight GELU experts and routes every sequence by its mean, so that both ways use the
same experts with the same weights. All layers take turns on the same rows, and the time from
planning to combining is taken, forward and forward with backward; operations are counted.

    python benchmarks/merged_experts.py --output benchmarks/results/merged_experts

writes a JSON file and a Markdown table.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moekit.compare.machine import machine
from moekit.compare.record import write_json, write_text
from moekit.measure.merged_bench import EXPERTS, WAYS, Cost, Sizes, costs, slope

KS = tuple(range(1, EXPERTS + 1))


def table(sizes: Sizes, found: list[Cost]) -> str:
    """The costs as a Markdown table; speeds are against running as many experts."""
    run = {cost.k: cost for cost in found if cost.way == "run"}
    lines = [
        f"### D={sizes.width}, H={sizes.hidden}, {sizes.sequences} sequences of {sizes.length} "
        f"tokens, {sizes.dtype}",
        "",
        f"| k of {EXPERTS} | way | mean active experts | rows/token | MFLOPs/token | forward ms | "
        "forward + backward ms | fewer FLOPs | forward speed | training speed |",
        "|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for cost in sorted(found, key=lambda c: c.k):
        base = run[cost.k]
        lines.append(
            f"| {cost.k} | {cost.way} | {cost.k} | {cost.rows_per_token:.3f} | "
            f"{cost.mflops_per_token:.3f} | {cost.forward_ms:.1f} | {cost.training_ms:.1f} | "
            f"{base.mflops_per_token / cost.mflops_per_token:.2f}x | "
            f"{base.forward_ms / cost.forward_ms:.2f}x | "
            f"{base.training_ms / cost.training_ms:.2f}x |"
        )
    slopes = ", ".join(
        f"{way} {slope(of_way):+.2f} and {slope(of_way, 'training_ms'):+.2f}"
        for way in WAYS
        if (of_way := [cost for cost in found if cost.way == way])
    )
    return "\n".join(lines) + f"\n\nMilliseconds an expert, forward and with backward: {slopes}.\n"


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/merged_experts"))
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    grid = [
        Sizes(width, hidden, sequences, 128, dtype)
        for width, hidden, sequences in ((128, 256, 32), (512, 1024, 8))
        for dtype in ("float32", "bfloat16")
    ]
    results: list[dict[str, Any]] = []
    texts = []
    for sizes in grid:
        found = costs(sizes, KS, options.repeats, tuple(WAYS))
        results.append({"sizes": asdict(sizes), "rows": [asdict(cost) for cost in found]})
        texts.append(table(sizes, found))
        print(texts[-1], flush=True)
    where = machine("cpu")
    head = (
        "# Expert phase of k merged experts against k that are run\n\n"
        "`python benchmarks/merged_experts.py`; medians of "
        f"{options.repeats} interleaved repeats; {where['device']}, {where['threads']} threads, "
        f"torch {where['torch']}. Speeds are throughput against running as many experts in the "
        "same run. MFLOPs are forward, merging included.\n\n"
    )
    write_text(options.output.with_suffix(".md"), head + "\n".join(texts))
    write_json(options.output.with_suffix(".json"), {"machine": where, "results": results})


if __name__ == "__main__":
    main()

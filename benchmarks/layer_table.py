"""The results of one or several calls of ``moekit bench layer`` as Markdown, on standard output.

python benchmarks/layer_table.py [--note TEXT] [--joined JOINED.json] RESULTS.json... > RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

PEERS = (
    "transformers eager",
    "transformers batched_mm",
    "transformers grouped_mm",
    "ScatterMoE",
    "dense of equal FLOPs",
)


def main() -> None:
    asked = arguments()
    found = joined([json.loads(path.read_text("utf-8")) for path in asked.results], asked.note)
    if asked.joined:
        asked.joined.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    print(f"# {asked.title}\n\n{machine}\n")
    for dtype, limit in found["limits"].items():
        print(
            f"Limits measured in {dtype}: products {limit['flops'] / 1e12:,.2f} TFLOP/s, "
            f"reading {limit['bandwidth'] / 1e9:,.0f} GB/s.\n"
        )
    if asked.note:
        print(f"{asked.note}\n")
    for title, training in (("Forward", False), ("Forward and backward", True)):
        timings = [t for t in found["timings"] if t["training"] == training]
        if timings:
            print(f"## {title}\n\n{summary(timings)}\n")
            table(timings, "seconds")
            if any(t.get("graph_seconds") for t in timings):
                print("\nThe same, replayed as CUDA graphs, without the host's part:\n")
                table([t for t in timings if t["graph_seconds"]], "graph_seconds")
            print()
    if any(t["training"] for t in found["timings"]):
        print("## Kept for the backward pass\n\nKiB a token, weights left out.\n")
        memory([t for t in found["timings"] if t["training"]])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Results of moekit bench layer as Markdown.")
    parser.add_argument("results", type=Path, nargs="+", help="layer.json of each call")
    parser.add_argument("--title", default="Speed of the MoE layer")
    parser.add_argument("--note", default="", help="what to say of these calls, as Markdown")
    parser.add_argument("--joined", type=Path, help="file for all results as one")
    return parser.parse_args()


def joined(results: list[dict[str, Any]], note: str) -> dict[str, Any]:
    """Several calls on one machine as one; limits are medians of those beside the timings."""
    first = results[0]
    for other in results[1:]:
        if other["machine"] != first["machine"]:
            raise SystemExit(f"results of two machines: {first['machine']}, {other['machine']}")
    if len(results) == 1:
        return first | {"note": note}
    timings = [timing for result in results for timing in result["timings"]]
    limits = {}
    for dtype in dict.fromkeys(t["shape"]["dtype"] for t in timings):
        own = [t["limits"] for t in timings if t["shape"]["dtype"] == dtype]
        limits[dtype] = {name: statistics.median(limit[name] for limit in own) for name in own[0]}
    means = {
        name: mean([t for t in timings if t["training"] == training])
        for name, training in (("forward", False), ("training", True))
        if any(t["training"] == training for t in timings)
    }
    return {
        "machine": first["machine"],
        "note": note,
        "limits": limits,
        "geometric_mean_ratio": means,
        "timings": timings,
        "zero_computation": [row for result in results for row in result["zero_computation"]],
        "merged": [row for result in results for row in result["merged"]],
    }


def mean(timings: list[dict[str, Any]]) -> float:
    """Geometric mean of the ratios."""
    return math.exp(sum(math.log(t["ratio"]) for t in timings) / len(timings))


def summary(timings: list[dict[str, Any]]) -> str:
    slower = [shape(t) for t in timings if t["ratio"] < 0.97]
    return (
        f"{mean(timings):.2f} times the best backend of transformers, geometric mean of "
        f"{len(timings)} shapes; below 0.97 at {len(slower)}"
        + (f": {'; '.join(slower)}." if slower else ".")
    )


def table(timings: list[dict[str, Any]], which: str) -> None:
    peers = [name for name in PEERS if any(name in t[which] for t in timings)]
    header = ["shape", "moekit, ms", *(f"× {name}" for name in peers), "share of the limit"]
    print_row(header)
    print_row(["---"] * len(header))
    for t in timings:
        ours = t[which]["moekit"]
        ratios = [f"{t[which][name] / ours:.2f}" if name in t[which] else "" for name in peers]
        share = f"{t['least_seconds'] / ours:.0%} ({t['bound']})"
        print_row([shape(t), f"{1e3 * ours:.3g}", *ratios, share])


def memory(timings: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for t in timings for name in t["saved_bytes"]))
    print_row(["shape", *names])
    print_row(["---"] * (1 + len(names)))
    seen = set()
    for t in timings:
        s = t["shape"]
        layer = (s["experts"], s["k"], s["width"], s["hidden"], s["dtype"])
        if s["tokens"] >= 512 and layer not in seen:  # once a layer: bytes a token do not change
            seen.add(layer)
            saved = [t["saved_bytes"].get(name) for name in names]
            print_row([shape(t), *("" if v is None else f"{v / 1024:,.0f}" for v in saved)])


def shape(timing: dict[str, Any]) -> str:
    s = timing["shape"]
    return (
        f"N={s['tokens']} E={s['experts']} k={s['k']} D={s['width']} H={s['hidden']} {s['dtype']}"
    )


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()

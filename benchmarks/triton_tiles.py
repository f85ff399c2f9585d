"""Which block sizes are best for the Triton kernels: times candidates of each kernel on a GPU.

    python benchmarks/triton_tiles.py --output tiles.json

The results are the tables in ``moekit/dispatch/triton_tiles.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import triton

from moekit.dispatch.fused import FeedForward
from moekit.dispatch.plan import plan_rows
from moekit.dispatch.triton_backend import Launches
from moekit.dispatch.triton_tiles import Tile, Tiles
from moekit.experts import GroupedMM, SwiGLU
from moekit.routing import Routing

LARGE = [
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 256, 64, 8, 3, group=1),
    Tile(128, 256, 64, 8, 3, group=16),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 2),
    Tile(64, 256, 64, 4, 4),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 128, 64, 8, 4, copies=False),
    Tile(128, 64, 64, 8, 4),
    Tile(256, 64, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
]
SMALL = [
    Tile(rows, columns, depth, warps, stages, copies=copies)
    for rows in (16, 32, 64)
    for columns, depth, warps, stages in (
        (32, 128, 4, 4),
        (64, 128, 4, 4),
        (128, 64, 4, 4),
        (64, 64, 4, 5),
    )
    for copies in (False, True)
]
GRADIENT = [
    Tile(128, 256, 64, 8, 3),
    Tile(128, 256, 32, 8, 4),
    Tile(128, 128, 64, 4, 4),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 32, 8, 4),
    Tile(256, 128, 64, 8, 3),
    Tile(128, 256, 64, 8, 4),
    Tile(128, 128, 16, 4, 4),
    Tile(64, 128, 32, 4, 4),
]


def launches(tokens: int, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[Tile], object]]]:
    """Each kernel as a function of its tile, on OLMoE's layer."""
    experts, k, width, hidden = 64, 8, 2048, 1024
    torch.manual_seed(0)
    bank = SwiGLU(count=experts, hidden=hidden)
    held = FeedForward(
        torch.randn(experts, 2 * hidden, width, device="cuda", dtype=dtype) * 0.02,
        torch.randn(experts, width, hidden, device="cuda", dtype=dtype) * 0.02,
        None,
        None,
        bank.between(),
    )
    x_ND = torch.randn(tokens, width, device="cuda", dtype=dtype)
    weight_NK, expert_NK = torch.rand(tokens, experts, device="cuda").topk(k)
    routing = Routing(expert_NK, weight_NK.to(dtype), experts, full=True)
    plan = plan_rows(routing, [(0, experts)], GroupedMM)
    rows_RH = torch.randn(tokens * k, hidden, device="cuda", dtype=dtype)
    rows_RJ = torch.randn(tokens * k, 2 * hidden, device="cuda", dtype=dtype)

    def of(tile: Tile) -> Launches:
        return Launches(plan, dtype, Tiles(tile, tile, tile, tile))

    yield "gated", lambda tile: of(tile).gated(x_ND, held, True)
    yield (
        "product",
        lambda tile: of(tile).product(rows_RH, held.down_EOH, None, scatter=True, scale=True),
    )
    yield "backward", lambda tile: of(tile).gated_back(x_ND, held, rows_RJ)
    yield "product back", lambda tile: of(tile).product(rows_RJ, held.up_EJD.mT, None, scatter=True)
    yield (
        "gradient",
        lambda tile: of(tile).weight_gradient(x_ND, rows_RJ, held.up_EJD, transposed=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", default="8192,1024,256,16")
    arguments = parser.parse_args()
    found = []
    for tokens in map(int, arguments.tokens.split(",")):
        for kernel, run in launches(tokens, torch.bfloat16):
            large = LARGE if tokens >= 1024 else LARGE[4:6] + SMALL
            times = []
            for tile in GRADIENT if kernel == "gradient" else large:
                if tokens < 64 and (kernel == "gradient" or tile.rows > 64):
                    continue
                try:
                    time = triton.testing.do_bench(partial(run, tile), 5, 20, return_mode="median")
                except Exception as error:  # too much shared memory, for one
                    print(tokens, kernel, tile, repr(error)[:90], flush=True)
                    continue
                times.append((time, tile))
            times.sort()
            found.append({"tokens": tokens, "kernel": kernel, "times": times})
            arguments.output.write_text(json.dumps(found))
            for time, tile in times[:4]:
                print(f"{tokens} {kernel} {time:.4f} ms {tuple(tile)}", flush=True)


if __name__ == "__main__":
    main()

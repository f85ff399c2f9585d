"""Sizes of the blocks that the Triton kernels work in."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """One kernel's block.

    Attributes:
        rows, columns, depth: of one step's product.
        warps, stages: of 32 threads each; steps that are loaded ahead.
        group: tiles of rows that pass through the columns together.
        copies: whether weights come through the unit that copies tiles, where there is one.
    """

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    copies: bool = True

    def arguments(self) -> dict[str, Any]:
        """The kernel's keyword arguments."""
        return {
            "BLOCK_R": self.rows,
            "BLOCK_C": self.columns,
            "BLOCK_K": self.depth,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


class Tiles(NamedTuple):
    """The blocks of all kernels; of ``gradient``, ``depth`` counts rows of a batch."""

    product: Tile
    gated: Tile
    backward: Tile
    gradient: Tile


def tiles_for(rows: int, experts: int, dtype: torch.dtype) -> Tiles:
    """Blocks for so many rows over so many experts."""
    rows_an_expert = rows / max(1, min(rows, experts))
    if dtype == torch.float32:
        return _FLOAT32_FEW if rows_an_expert <= 32 else _FLOAT32
    if rows_an_expert <= 16:
        return _FEW
    return _SOME if rows_an_expert <= 96 else _MANY


# The best of benchmarks/triton_tiles.py on an H200, in bfloat16 on the layer of OLMoE-7B, at 2, 32
# and 1024 rows an expert. Those of float32 were not searched for.
_FEW = Tiles(
    product=Tile(16, 64, 128, stages=4),
    gated=Tile(16, 64, 128, stages=4, copies=False),
    backward=Tile(16, 128, 64, stages=4),
    gradient=Tile(64, 128, 16, stages=3),
)
_SOME = Tiles(
    product=Tile(64, 128, 64, stages=4),
    gated=Tile(64, 128, 64, stages=4),
    backward=Tile(32, 128, 64, stages=4),
    gradient=Tile(64, 128, 32, stages=4),
)
_MANY = Tiles(
    product=Tile(128, 256, 64, warps=8, stages=3),
    gated=Tile(128, 128, 64, warps=8, stages=4),
    backward=Tile(128, 128, 64, warps=8, stages=4, copies=False),
    gradient=Tile(128, 128, 64, stages=4),
)
_FLOAT32_FEW = Tiles(
    product=Tile(16, 64, 64),
    gated=Tile(16, 32, 64),
    backward=Tile(16, 64, 64),
    gradient=Tile(64, 64, 16),
)
_FLOAT32 = Tiles(
    product=Tile(64, 64, 32),
    gated=Tile(64, 32, 32),
    backward=Tile(64, 64, 32),
    gradient=Tile(64, 64, 32),
)

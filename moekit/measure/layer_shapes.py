"""Shapes at which the layer is timed: those of real models, and small ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LayerShape:
    """One point of the grid.

    Attributes:
        tokens, experts, k, width, hidden: N, E, K, D and H of SwiGLU experts.
        dtype: name of a torch dtype.
    """

    tokens: int
    experts: int
    k: int
    width: int
    hidden: int
    dtype: str = "float32"

    @property
    def flops(self) -> float:
        """Operations of the forward products."""
        return 6.0 * self.tokens * self.k * self.width * self.hidden

    @property
    def weight_bytes(self) -> float:
        """Bytes of one expert's weights."""
        return 3.0 * self.width * self.hidden * getattr(torch, self.dtype).itemsize

    @property
    def aligned(self) -> bool:
        """Whether rows of both widths are multiples of 16 bytes, as torch's grouped_mm wants."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return all(size * itemsize % 16 == 0 for size in (self.width, self.hidden))

    def __str__(self) -> str:
        return (
            f"N={self.tokens} E={self.experts} k={self.k} "
            f"D={self.width} H={self.hidden} {self.dtype}"
        )


SMALL = LayerShape(0, 8, 2, 128, 256)
MIDDLE = LayerShape(0, 32, 4, 512, 512)
OLMOE = LayerShape(0, 64, 8, 2048, 1024)
QWEN3 = LayerShape(0, 128, 8, 2048, 768)
MIXTRAL = LayerShape(0, 8, 2, 4096, 14336)
DECODE, PREFILL = (1, 4, 16, 64), (512, 2048, 8192)
LONG = (512, 2048, 4096, 8192)

Layers = tuple[tuple[LayerShape, tuple[int, ...]], ...]
QUICK: Layers = ((SMALL, (1, 16, 512)), (MIDDLE, (1, 16, 512)))
ON_CPU: Layers = (
    (SMALL, DECODE + LONG),
    (MIDDLE, DECODE + LONG),
    (OLMOE, (*DECODE, 512)),
    (QWEN3, (*DECODE, 512)),
)
ON_GPU: Layers = (
    (MIDDLE, (64, 2048, 32768)),
    (OLMOE, (*DECODE, *PREFILL, 32768)),
    (QWEN3, (*DECODE, *PREFILL)),
    (MIXTRAL, (*DECODE, *PREFILL)),
)


def grid(
    quick: bool = False, dtypes: Iterable[str] = ("float32", "bfloat16"), device: str = "cpu"
) -> list[LayerShape]:
    """The shapes of the committed results, small ones first.

    On a CPU two small layers at decoding and prefill sizes, and the layers of OLMoE-7B and
    Qwen3-30B-A3B at decoding sizes and a prefill of 512; on a GPU these and Mixtral-8x7B's up to
    prefills of 8192 and more. ``quick`` takes the two small ones at few sizes.
    """
    layers = QUICK if quick else ON_GPU if device == "cuda" else ON_CPU
    return list(_grid(layers, tuple(dtypes)))


def _grid(layers: Layers, dtypes: tuple[str, ...]) -> Iterator[LayerShape]:
    for layer, sizes in layers:
        for dtype in dtypes:
            for tokens in sizes:
                yield LayerShape(tokens, layer.experts, layer.k, layer.width, layer.hidden, dtype)

"""The order in which training sees its sequences."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class ShuffledPasses(Sampler[int]):
    """Pass after pass over a data set, each in its own order, cut off at ``total`` sequences.

    The order depends on ``seed`` and the length of the data set alone: not on the number of
    processes, the micro-batch or where a run was resumed. A batch may straddle two passes, so
    every batch is full, and a data set smaller than a batch works too.

    Args:
        length: sequences of the data set.
        total: sequences to give.
        seed: seed of the orders.
    """

    def __init__(self, length: int, total: int, seed: int) -> None:
        self.length = length
        self.total = total
        self.seed = seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        given = 0
        generator = torch.Generator().manual_seed(self.seed)
        while given < self.total:
            order = torch.randperm(self.length, generator=generator)[: self.total - given]
            yield from order.tolist()
            given += len(order)

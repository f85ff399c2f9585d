"""Counting and sorting small ids: experts, places, scopes.

On a CPU, where nothing waits for a device, ids are counted by ``torch.bincount`` and sorted by
numpy's radix sort, several times as fast as by operations that also run on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moekit.watched import watched

MOST_PLACES = 2**16  # that numpy sorts by their digits


def count_ids(ids: Tensor, size: int) -> Tensor:
    """How often each of ``0 … size - 1`` occurs in ``ids``, int64 (size,).

    ``torch.bincount`` would read the largest id back from a device; this reads nothing.
    """
    if is_here(ids):
        return ids.bincount(minlength=size)
    return ids.new_zeros(size).scatter_add_(0, ids, torch.ones_like(ids))


def sort_ids(ids: Tensor, size: int) -> Tensor:
    """The order that sorts ``ids`` of ``0 … size - 1``, of equal ids the first first, int64."""
    if is_here(ids) and size <= MOST_PLACES:
        small = ids.numpy().astype(np.uint8 if size <= 2**8 else np.uint16)
        return torch.from_numpy(np.argsort(small, kind="stable"))
    return ids.argsort(stable=True)


def queue_positions(place_R: Tensor, order_R: Tensor, places: int) -> Tensor:
    """How many assignments to its own place come before each one, int64 (R,).

    Args:
        place_R: what each assignment asks for, ``0 … places - 1``: an expert, say.
        order_R: the assignments in the order in which they are served.
        places: number of different places.
    """
    by_place_R = order_R[sort_ids(place_R[order_R], places)]
    count = count_ids(place_R, places)
    start = count.cumsum(0) - count
    rank_R = torch.arange(len(order_R), device=order_R.device) - start[place_R[by_place_R]]
    return torch.empty_like(rank_R).scatter_(0, by_place_R, rank_R)


def is_here(ids: Tensor) -> bool:
    """Whether the numbers can be looked at: on the CPU, where operations on them just run."""
    return ids.is_cpu and type(ids) is Tensor and not watched()

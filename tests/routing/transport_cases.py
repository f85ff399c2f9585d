"""Transport problems that the tests draw."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from moekit.routing import SparseOTResult, solve_sparse_ot
from moekit.routing.transport import TransportProblem

FORMS = ("semidual", "dual")


class Given(NamedTuple):
    """A random problem in float64, with unequal sums."""

    cost: Tensor
    a: Tensor
    b: Tensor


def problem(rows: int = 8, columns: int = 4, seed: int = 0) -> Given:
    generator = np.random.default_rng(seed)
    cost, a, b = (generator.random(size) for size in ((rows, columns), rows, columns))
    a, b = (a + 0.1) / (a + 0.1).sum(), (b + 0.1) / (b + 0.1).sum()
    return Given(*(torch.from_numpy(value) for value in (cost, a, b)))


def solve(*args: Any, **options: Any) -> SparseOTResult:
    """The solution, ties or not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solve_sparse_ot(*args, **{"tolerance": 1e-10, **options})


def inside(given: Given, k: int, gamma: float = 1.0) -> TransportProblem:
    return TransportProblem(given.cost.T.contiguous(), given.a, given.b, k, gamma)

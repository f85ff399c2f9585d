"""Gates that the tests of temperatures build."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from moekit.routing import DenseToSparse, DenseToSparseRouter, Load, Site

EXPERTS, WIDTH = 6, 8
SITE = Site(WIDTH, ("feed_forward",) * EXPERTS)
ALIKE = ("identity", "relu", "leaky_relu")
OTHERS = ("sigmoid", "tanh", "gelu", "silu", "softplus")
STEP = Load(torch.zeros(EXPERTS, dtype=torch.int64), torch.tensor(1))


def router_of(**fields: object) -> DenseToSparseRouter:
    """A float64 router with weights large enough to tell experts apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        router = DenseToSparse(**fields).build(SITE).double()  # type: ignore[arg-type]
    torch.manual_seed(1)
    for parameter in (router.weight, router.bias):
        if parameter is not None:
            torch.nn.init.normal_(parameter)
    return router


def advance(router: DenseToSparseRouter, steps: int) -> None:
    for _ in range(steps):
        router.update(STEP)


def rows(tokens: int = 20) -> Tensor:
    return torch.randn(tokens, WIDTH, dtype=torch.float64)

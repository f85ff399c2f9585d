"""ScatterMoE as a contender of the layer benchmark, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor
from torch.nn import functional as F

from moekit.experts import FeedForwardExperts


def scattermoe(
    bank: FeedForwardExperts, expert_NK: Tensor
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The SwiGLU layer in ScatterMoE's ``parallel_linear``, on the bank's own parameters.

    What its ``GLUMLP`` does, with our order of gate and up. None where the package is not
    installed (Tan et al. 2024).
    """
    if find_spec("scattermoe") is None:
        return None
    theirs = import_module("scattermoe.parallel_experts")
    experts, slots = len(bank.kinds), expert_NK.shape[1]

    def run(x_ND: Tensor, weight_NK: Tensor) -> Tensor:
        order = theirs.flatten_sort_count(expert_NK, num_experts=experts)
        inner_RJ = theirs.parallel_linear(
            x_ND, bank.up_weight.permute(0, 2, 1), slots, *order, grouped_out=True
        )
        gate_RH, up_RH = inner_RJ.chunk(2, dim=-1)
        y_ND: Tensor = theirs.parallel_linear(
            F.silu(gate_RH) * up_RH,
            bank.down_proj.permute(0, 2, 1),
            1,
            *order,
            grouped_in=True,
            gates=weight_NK,
        )
        return y_ND

    return run

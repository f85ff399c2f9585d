"""Floating-point operations that a forward pass really executes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def count_flops(model: nn.Module, input_ids: Tensor) -> float:
    """Forward floating-point operations a token, counted while the model runs.

    Every matrix product counts twice its multiply-adds, wherever it is called from; elementwise
    work, norms and softmax count nothing. Attention counts the whole square of positions, also
    where a causal kernel skips half of it. A row that is not dispatched, or that a capacity limit
    drops, is not computed and not counted.

    Args:
        model: a causal language model; it is run once in evaluation mode and left as it was.
        input_ids: tokens (B, T).
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), flop_counter() as counter:
            model(input_ids=input_ids)
    finally:
        model.train(was_training)
    return counter.get_total_flops() / input_ids.numel()


def flop_counter() -> FlopCounterMode:
    """torch's counter, taught the operators of sparse models and of attention on CPU."""
    return FlopCounterMode(display=False, custom_mapping=_missing_formulas())


def _missing_formulas() -> dict[Any, Callable[..., int]]:
    aten = torch.ops.aten
    return {
        aten._grouped_mm: _grouped_mm_flop,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
        aten.mv: _mv_flop,
        aten.dot: _dot_flop,
    }


def _grouped_mm_flop(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """One product whose rows, columns or inner positions are split among the groups.

    Two 3-D operands are a batched product; otherwise every row, column and inner position belongs
    to one group, so the work is that of a single product of the flattened sizes.
    """
    groups = a_shape[0] if len(a_shape) == 3 and len(b_shape) == 3 else 1
    return 2 * groups * a_shape[-2] * a_shape[-1] * b_shape[-1]


def _attention_flop(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


def _mv_flop(matrix: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(matrix)


def _dot_flop(vector: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(vector)

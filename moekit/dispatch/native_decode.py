"""A few tokens through the CPU kernels in one call, from the ids of their experts to outputs.

Decoding a token reads a few megabytes of weights, and all the Python around that finds its code
thrown out of the cache by them. So here everything that a plan and a backend would do stands in
one function.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from moekit.dispatch.native_library import DTYPES, ONE_THREAD, library
from moekit.experts.activation import GatedSiLU
from moekit.experts.experts import FeedForward

MOST_ROWS = 128
"""Rows beyond which the time of a call is little beside that of its work."""

_CALL = struct.Struct("19q")  # `DecodeCall` of native_call.h


def decoded(
    x_ND: Tensor, expert_NK: Tensor, weight_NK: Tensor, bank: FeedForward
) -> tuple[Tensor, Tensor] | None:
    """The combined outputs (N, O) and the rows of each expert, int64 (E,).

    None where these tensors are none that the kernels take as they lie.

    Args:
        x_ND: plain tokens, from 1 on, that fit the bank and the routing.
        expert_NK: the experts of each, every slot used.
        weight_NK: combine weights.
        bank: the experts.

    Raises:
        IndexError: an id is not one of the bank's experts.
    """
    up_EJD, down_EOH, up_bias_EJ, down_bias_EO, activation = bank
    dtype, kernels = x_ND.dtype, library()
    if (
        kernels is None
        or dtype not in DTYPES
        or not (up_EJD.dtype == down_EOH.dtype == dtype)
        or not isinstance(activation, GatedSiLU)
        or not (up_bias_EJ is down_bias_EO is None)
    ):
        return None
    half_weights = weight_NK.dtype == torch.bfloat16
    up_expert, up_ld, up_step = up_EJD.stride()
    down_expert, down_ld, down_step = down_EOH.stride()
    if (
        not (up_step == down_step == 1)
        or not (x_ND.is_contiguous() and expert_NK.is_contiguous() and weight_NK.is_contiguous())
        or not (half_weights or weight_NK.dtype == torch.float32)
        or expert_NK.dtype != torch.int64
    ):
        return None
    tokens, slots = expert_NK.shape
    experts, inner, width = up_EJD.shape
    _, out_width, hidden = down_EOH.shape
    work = tokens * slots * inner * (width + out_width)
    count_E = torch.empty(experts, dtype=torch.int64)
    y_NO = torch.empty(tokens, out_width, dtype=dtype)
    call = _CALL.pack(
        *(1 if work < ONE_THREAD else torch.get_num_threads(), tokens, slots),
        *(experts, width, hidden, out_width),
        *(expert_NK.data_ptr(), weight_NK.data_ptr(), half_weights, x_ND.data_ptr()),
        *(up_EJD.data_ptr(), up_expert, up_ld, down_EOH.data_ptr(), down_expert, down_ld),
        *(count_E.data_ptr(), y_NO.data_ptr()),
    )
    half = dtype == torch.bfloat16
    run = kernels.moekit_decode_bfloat16 if half else kernels.moekit_decode_float32
    if run(call):
        raise IndexError(f"an expert's id is not one of 0 to {experts - 1}")
    return y_NO, count_E

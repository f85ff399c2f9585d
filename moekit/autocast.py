"""Operands under autocast: cast as torch's own products cast them, or left in their dtype."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast asks for, if it is on; float64 stays as it is."""
    dtype = autocast_dtype(tensor)
    return tensor if dtype == tensor.dtype else tensor.to(dtype)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the tensor as an operand: that which autocast asks for, if it is on."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def common_dtype(*tensors: Tensor | None) -> torch.dtype | None:
    """The dtype that all of them have as operands; None where they differ, or all are None."""
    given = [tensor for tensor in tensors if tensor is not None]
    dtypes = {tensor.dtype for tensor in given}
    if len(dtypes) > 1:
        dtypes = {autocast_dtype(tensor) for tensor in given}
    return autocast_dtype(given[0]) if len(dtypes) == 1 else None


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """Products of tensors on this one's device run in the dtype that their operands have.

    Where autocast is off, as it mostly is, nothing is entered: torch's own context costs as much as
    a small operation.
    """
    device = tensor.device.type
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)

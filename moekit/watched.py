"""Whether operations just run, one after the other, or are looked at while they do."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def watched() -> bool:
    """Whether operations are compiled, traced, counted by a mode, or transformed by torch.func.

    Tensors may then have no numbers where they say, and whatever runs beside torch's operations
    would be missed.
    """
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or transformed()


def transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()  # there is no public way to ask

"""Controller state that must stay float32 in a half-precision model."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """A module some of whose buffers move between devices with it, but are never cast.

    Multiplicative and small additive corrections vanish in bfloat16. Buffers are restored from
    their value before a cast, so that ``half()`` loses nothing.
    """

    float32_buffers: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: self._buffers.get(name) for name in self.float32_buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kept in before.items():
            moved = self._buffers.get(name)
            if kept is None or moved is None or moved.dtype == torch.float32:
                continue
            source = moved if kept.is_meta else kept
            self._buffers[name] = source.to(device=moved.device, dtype=torch.float32)
        return self

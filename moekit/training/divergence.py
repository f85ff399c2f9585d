"""Noticing a loss that is no longer a number, without reading it back at every step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moekit.errors import DivergedError

_NEVER = 2**62


class LossWatch:
    """Remembers on the device at which step the loss first stopped being finite.

    Args:
        device: where the losses are.
        advice: what to try, the end of the error's sentence.
    """

    def __init__(self, device: torch.device, advice: str) -> None:
        self._advice = advice
        self._step_loss = torch.zeros((), device=device)
        self._last_finite = torch.full((), torch.nan, device=device)
        self._first_bad = torch.full((), _NEVER, device=device)

    def add(self, loss: Tensor) -> None:
        """Count one micro-batch's part of a step's loss."""
        self._step_loss = self._step_loss + loss.detach()

    def close_step(self, step: int) -> None:
        """End the optimiser step number ``step``."""
        good = self._step_loss.isfinite() & (self._first_bad == _NEVER)
        self._last_finite = torch.where(good, self._step_loss, self._last_finite)
        bad_now = torch.where(self._step_loss.isfinite(), _NEVER, step)
        self._first_bad = torch.minimum(self._first_bad, bad_now)
        self._step_loss = torch.zeros_like(self._step_loss)

    def check(self) -> None:
        """Read back whether every step so far was finite. All ranks call it together.

        Raises:
            DivergedError: one was not.
        """
        first_bad = self._first_bad
        if dist.is_available() and dist.is_initialized():
            first_bad = first_bad.clone()
            dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        if int(first_bad) == _NEVER:
            return
        raise DivergedError(
            f"the loss stopped being finite at step {int(first_bad)} "
            f"({self.last_finite()}); {self._advice}"
        )

    def last_finite(self) -> str:
        """The last finite training loss, in words."""
        if not bool(self._last_finite.isfinite()):
            return "no loss was finite"
        return f"the last finite loss was {float(self._last_finite):.4g}"

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Refuse weights that hold NaN or infinity, which the next loss would show.

        Raises:
            DivergedError: ``model`` holds such a weight.
        """
        finite = [p.detach().isfinite().all() for p in model.parameters()]
        if finite and not bool(torch.stack(finite).all()):
            raise DivergedError(
                f"the weights stopped being finite at step {step} "
                f"({self.last_finite()}); {self._advice}"
            )

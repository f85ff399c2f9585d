"""Designs that train in a second, and a progress that keeps what it was told."""

from __future__ import annotations

from moekit import MoESpec, SwiGLU, SwitchBalance, TopK
from moekit.compare import Design, ModelSpec
from moekit.data import ProgressHook
from moekit.training import ProgressReporter, SilentProgress

MODEL = ModelSpec(width=16, depth=2, heads=2, kv_heads=1)
TOP_2 = MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16), losses=(SwitchBalance(0.01),))
DESIGNS = (
    Design("dense", (SwiGLU(count=1, hidden=32),)),
    Design("topk", (TOP_2,)),
)


class Watched:
    """A StudyProgress that keeps what it was told.

    Args:
        stop_at: interrupt the run of this number (0 is the first) at this step.
    """

    def __init__(self, stop_at: tuple[int, int] | None = None) -> None:
        self.ran: list[tuple[str, int]] = []
        self.earlier: list[tuple[str, int]] = []
        self.timed = 0
        self._stop_at = stop_at

    def preparing(self) -> ProgressHook:
        return lambda *_: None

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        self.ran.append((design, seed))
        if self._stop_at is not None and self._stop_at[0] == index:
            return _Interrupting(self._stop_at[1])
        return SilentProgress()

    def found(self, design: str, seed: int) -> None:
        self.earlier.append((design, seed))

    def timing(self) -> None:
        self.timed += 1


class _Interrupting(SilentProgress):
    def __init__(self, step: int) -> None:
        self._step = step

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        if step == self._step:
            raise KeyboardInterrupt

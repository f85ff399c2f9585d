"""What a person sees while a command works."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import Progress, TaskID

from moekit.data import ProgressHook
from moekit.training import ProgressReporter, RichProgress, SilentProgress, bars


class StudyBars:
    """Bars on standard error: one over all runs, one for the run at work.

    Use as a context manager. Where standard error is no terminal, plain lines now and then.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._quiet = quiet
        self._bars: Progress = bars(self._console)
        self._whole: TaskID | None = None
        self._reading: TaskID | None = None
        self._said = 0.0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bars.stop()

    def preparing(self) -> ProgressHook:
        """A bar for reading, tokenising and packing the text."""
        return self._prepare

    def run(self, design: str, seed: int, index: int, total: int) -> ProgressReporter:
        """A bar for the run that starts; the bar of all runs moves on."""
        self._drop_reading()
        self._show_whole(index, total)
        if self._quiet:
            return SilentProgress()
        return RichProgress(self._bars)

    def found(self, design: str, seed: int) -> None:
        """Say that a run was finished earlier."""
        self._say(f"{design}, seed {seed}: finished earlier")

    def timing(self) -> None:
        """Say that the expert phases are being timed."""
        self._say("timing the expert phases")

    def _prepare(self, description: str, done: int, total: int | None) -> None:
        if not self._console.is_terminal:
            now = time.monotonic()
            if now - self._said > 10:
                self._said = now
                of = "" if total is None else f" of {total}"
                self._say(f"{description}: {done}{of}")
            return
        if self._reading is None:
            self._reading = self._bars.add_task(description, total=total, loss="", speed="")
        self._bars.update(self._reading, description=description, completed=done, total=total)

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _drop_reading(self) -> None:
        if self._reading is not None:
            self._bars.remove_task(self._reading)
            self._reading = None

    def _show_whole(self, index: int, total: int) -> None:
        if not self._console.is_terminal:
            self._say(f"run {index + 1} of {total}")
            return
        if self._whole is None:
            self._whole = self._bars.add_task("all runs", total=total, loss="", speed="")
        self._bars.update(self._whole, completed=index, total=total)

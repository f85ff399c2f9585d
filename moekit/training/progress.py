"""Telling a person how far a training run is."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_SECONDS_A_LINE = 10.0


class ProgressReporter(Protocol):
    """Who is told how far a run is. The calls are ``start``, ``update`` …, ``finish``."""

    def start(self, total: int, description: str) -> None:
        """A run of ``total`` steps begins."""

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """``step`` steps are done; the other two are those of the last log row, if any."""

    def finish(self) -> None:
        """The run ended, whether or not it was completed."""


class SilentProgress:
    """Tells nobody."""

    def start(self, total: int, description: str) -> None:
        """Do nothing."""

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class RichProgress:
    """A bar with loss, speed and remaining time; a line now and then where there is no terminal.

    Args:
        progress: a running ``rich.progress.Progress`` to add a bar to, for a run that is one of
            several; None for a bar of its own on standard error. Its bars show loss and speed
            where the columns are those of :func:`bars`.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._owned = progress is None
        self._progress = bars() if progress is None else progress
        self._lines = not self._progress.console.is_terminal
        self._task: TaskID | None = None
        self._total = 0
        self._description = ""
        self._began = self._told = 0.0
        self._first: int | None = None
        self._step = 0
        self._figures: list[str] = []

    def start(self, total: int, description: str) -> None:
        """Show an empty bar."""
        self._total, self._description = total, description
        self._began = self._told = time.monotonic()
        self._first, self._step, self._figures = None, 0, []
        if self._lines:
            return
        if self._owned:
            self._progress.start()
        self._task = self._progress.add_task(description, total=total, loss="", speed="")

    def update(self, step: int, loss: float | None, tokens_per_second: float | None) -> None:
        """Move the bar to ``step``."""
        loss_text = "" if loss is None else f"loss {loss:.3f}"
        speed = "" if tokens_per_second is None else f"{tokens_per_second:,.0f} tokens/s"
        if self._first is None:  # a resumed run does not begin at 0
            self._first = step - 1
            if self._task is not None:
                self._progress.reset(self._task, completed=self._first)
        if self._task is not None:
            self._progress.update(self._task, completed=step, loss=loss_text, speed=speed)
        elif self._lines:
            self._line(step, step - self._first, [loss_text, speed])

    def finish(self) -> None:
        """Remove the bar if it is one of several, else leave it as it stands."""
        if self._lines and self._total:
            self._print(self._step, "done" if self._step == self._total else "stopped")
        elif self._task is not None:
            if self._owned:
                self._progress.stop()
            else:
                self._progress.remove_task(self._task)
            self._task = None

    def _line(self, step: int, done: int, figures: list[str]) -> None:
        now = time.monotonic()
        self._step, self._figures = step, figures
        if now - self._told >= _SECONDS_A_LINE and step < self._total:
            self._told = now
            left = (now - self._began) / done * (self._total - step)
            self._print(step, f"{_clock(left)} left")

    def _print(self, step: int, end: str) -> None:
        parts = [f"{self._description}: step {step}/{self._total}", *self._figures, end]
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)


def bars(console: Console | None = None) -> Progress:
    """A ``rich.progress.Progress`` with columns for loss, speed and remaining time."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True) if console is None else console,
    )


class ProgressCallback(TrainerCallback):
    """Passes what the Trainer does on to a :class:`ProgressReporter`, on the first rank only."""

    def __init__(self, reporter: ProgressReporter, description: str) -> None:
        self._reporter = reporter
        self._description = description
        self._loss: float | None = None
        self._speed: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start."""
        if state.is_world_process_zero:
            self._reporter.start(state.max_steps, self._description)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move on."""
        if state.is_world_process_zero:
            self._reporter.update(state.global_step, self._loss, self._speed)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the new row's loss."""
        self._loss = (logs or {}).get("loss", self._loss)
        self._speed = (logs or {}).get("tokens_per_second", self._speed)
        if state.is_world_process_zero and state.global_step > 0:
            self._reporter.update(state.global_step, self._loss, self._speed)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""The order of things between two optimiser steps."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit.training.clock import StepClock, WallClock
from moekit.training.divergence import LossWatch
from moekit.training.window import RoutingWindow


class RoutingFlow(TrainerCallback):
    """Tells the trainer's parts when a step ends, and closes a log row with each checkpoint."""

    def __init__(
        self, window: RoutingWindow, watch: LossWatch, clock: StepClock, wall: WallClock
    ) -> None:
        self.window = window
        self.watch = watch
        self.clock = clock
        self.wall = wall

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # Otherwise the intervals of a checkpoint would hold.
        state.compute_steps(args, state.max_steps)  # type: ignore[no-untyped-call]
        rows = state.log_history
        self.wall.start(rows[-1].get("seconds", 0.0) if rows else 0.0)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.watch.close_step(state.global_step + 1)
        self.window.close_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        self.clock.stop()
        if control.should_save:
            control.should_log = True
        return control

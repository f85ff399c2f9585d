"""A training run that ends itself with SIGKILL; run as a script by the tests.

Usage: killed_run.py OUTPUT MOMENT, where MOMENT is ``step:N``, ``save:N:FILE`` (FILE of the
checkpoint of step N is cut off half-way) or ``rename:N``.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from resume_cases import DATA, SPEC, model
from transformers import TrainerCallback

import moekit.training.trainer as trainer_module
from moekit.training import MoETrainer, SilentProgress, train


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:  # between two micro-batches of the next step
            die()


def cut_off(path: Any) -> None:
    """Leave half of a file, as a process does that is killed while it writes."""
    size = os.path.getsize(path)
    os.truncate(path, size // 2)
    die()


def arrange(moment: str) -> None:
    kind, step, *rest = moment.split(":")
    if kind == "step":
        original = MoETrainer.__init__

        def with_callback(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.add_callback(DieAtStep(int(step)))

        MoETrainer.__init__ = with_callback  # type: ignore[method-assign]
    elif kind == "rename":
        publish = trainer_module.publish

        def interrupted(staged: Path, output: Path) -> Path:
            if staged.name == f"checkpoint-{step}":
                die()
            return publish(staged, output)

        trainer_module.publish = interrupted
    else:
        cut_off_writing(f"checkpoint-{step}", rest[0])


def cut_off_writing(folder: str, name: str) -> None:
    torch_save, save_file = torch.save, safetensors.torch.save_file

    def after(path: Any) -> None:
        if Path(str(path)).parent.name == folder and Path(str(path)).name == name:
            cut_off(path)

    def save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        torch_save(value, path, *args, **kwargs)
        after(path)

    def save_weights(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        save_file(tensors, path, *args, **kwargs)
        after(path)

    torch.save = save
    import transformers.modeling_utils

    transformers.modeling_utils.safe_save_file = save_weights


if __name__ == "__main__":
    torch.set_num_threads(1)
    arrange(sys.argv[2])
    train(model(), DATA, SPEC, Path(sys.argv[1]), progress=SilentProgress())

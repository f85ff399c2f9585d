"""The same runs in one process or in several; run as a script by the tests, under torchrun.

Usage: distributed_run.py OUTPUT. Each process writes ``NAME.RANK.json`` there for each case.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import PaddedSequences, Sequences, TinyData, tiny_model
from transformers import TrainerCallback

from moekit import (
    Bank,
    Constant,
    L1Balance,
    MoESpec,
    Pathway,
    ReLURouting,
    RouterZ,
    SwiGLU,
    SwitchBalance,
    TopK,
)
from moekit.errors import DivergedError
from moekit.training import (
    MoETrainer,
    SilentProgress,
    TrainingResult,
    TrainingSpec,
    evaluate,
    train,
)

SPEC = TrainingSpec(steps=8, batch_size=8, log_every=1, eval_every=4, eval_batches=1)
CASES: dict[str, tuple[Any, TrainingSpec]] = {
    "switch": (
        MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16), losses=(SwitchBalance(weight=1.0),)),
        SPEC,
    ),
    "relu": (
        MoESpec(
            ReLURouting(k=1), SwiGLU(count=4, hidden=16), losses=(L1Balance(k=1, initial=1e-2),)
        ),
        SPEC.replace(gradient_accumulation=2),
    ),
    "bias": (
        MoESpec(
            TopK(k=2, score="sigmoid", bias_rate=0.01),
            SwiGLU(count=4, hidden=16),
            losses=(RouterZ(weight=0.1),),
        ),
        SPEC,
    ),
    "checkpointing": (
        MoESpec(Pathway(k=2), Bank((SwiGLU(count=3, hidden=16), Constant()))),
        SPEC.replace(gradient_checkpointing=True),
    ),
    "right padding": (
        MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16), losses=(SwitchBalance(weight=1.0),)),
        SPEC.replace(gradient_accumulation=2),
    ),
    "left padding": (
        MoESpec(TopK(k=2), SwiGLU(count=4, hidden=16), losses=(RouterZ(weight=1.0),)),
        SPEC,
    ),
}


class Uneven(TinyData):
    """A validation set that two processes cannot share out equally."""

    def __init__(self) -> None:
        super().__init__(validation=Sequences(7, seed=1))


def data_of(case: str) -> TinyData:
    """Padding makes the tokens of processes and of micro-batches unequal."""
    side = case.removesuffix(" padding")
    if side == case:
        return Uneven()
    return TinyData(PaddedSequences(40, side=side), PaddedSequences(7, seed=1, side=side))


def losses(result: TrainingResult) -> list[float]:
    return [row["loss"] for row in result.history]


def run_case(name: str, output: Path) -> dict[str, Any]:
    layer, spec = CASES[name]
    model = tiny_model(layer)
    data = data_of(name)
    result = train(model, data, spec, output / name, progress=SilentProgress())
    again = train(tiny_model(layer), data, spec, output / name, progress=SilentProgress())
    assert losses(again) == losses(result)  # every process finds the finished run
    buffers = {key: value.tolist() for key, value in model.named_buffers() if "rotary" not in key}
    ids = Sequences(3, seed=9).ids
    logits = model.eval()(input_ids=ids).logits.flatten().tolist()
    whole = evaluate(model, data.validation, batch_size=2)
    return {"history": result.history, "buffers": buffers, "logits": logits, "whole": whole}


class Interrupt(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 6:
            raise KeyboardInterrupt


def interrupted(output: Path) -> dict[str, Any]:
    """A run with random numbers in the router that is stopped after step 6 and resumed."""
    layer = MoESpec(TopK(k=2, jitter=0.1, bias_rate=0.01), SwiGLU(count=4, hidden=16))
    spec = SPEC.replace(save_every=4)
    whole = train(tiny_model(layer), TinyData(), spec, output / "a", progress=SilentProgress())
    original = MoETrainer.__init__

    def with_interrupt(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.add_callback(Interrupt())

    MoETrainer.__init__ = with_interrupt  # type: ignore[method-assign]
    try:
        train(tiny_model(layer), TinyData(), spec, output / "b", progress=SilentProgress())
    except KeyboardInterrupt:
        MoETrainer.__init__ = original  # type: ignore[method-assign]
    resumed = train(tiny_model(layer), TinyData(), spec, output / "b", progress=SilentProgress())
    return {"whole": losses(whole), "resumed": losses(resumed)}


def diverge(output: Path, rank: int) -> str:
    """One process alone meets NaN; all must end, with the same step."""
    model = tiny_model()
    forward = model.forward

    def bad(*args: Any, **kwargs: Any) -> Any:
        result = forward(*args, **kwargs)
        if rank == 1 and model.training:
            result.loss = result.loss * float("nan")
        return result

    model.forward = bad  # type: ignore[method-assign]
    try:
        train(model, TinyData(), SPEC, output / "diverge", progress=SilentProgress())
    except DivergedError as error:
        return str(error)
    return "it did not diverge"


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    process = int(os.environ.get("RANK", "0"))
    for case in CASES:
        found = run_case(case, folder)
        (folder / f"{case}.{process}.json").write_text(json.dumps(found))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        (folder / f"interrupted.{process}.json").write_text(json.dumps(interrupted(folder)))
        (folder / f"diverge.{process}.json").write_text(json.dumps(diverge(folder, process)))
        dist.destroy_process_group()

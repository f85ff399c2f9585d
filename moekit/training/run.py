"""Train a language model on packed text, resumably."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from moekit.errors import CheckpointError, OutputError
from moekit.measure.memory import PeakMemory
from moekit.training.arguments import training_arguments
from moekit.training.checkpoints import (
    checkpoints,
    clear_staging,
    last_whole,
    saving_to,
    write_json,
)
from moekit.training.progress import ProgressCallback, ProgressReporter, RichProgress
from moekit.training.rows import history_rows
from moekit.training.spec import TrainingSpec
from moekit.training.trainer import MoETrainer

RECORD = "run.json"
_FREE_TO_CHANGE = frozenset({"eval_every", "eval_batches", "save_every", "log_every", "keep"})
_NOT_THE_MODEL = frozenset({"transformers_version", "_name_or_path", "use_cache", "architectures"})


class TrainingData(Protocol):
    """What ``train`` needs of a :class:`~moekit.data.TextData`."""

    @property
    def train(self) -> Dataset[Any]:
        """Sequences to train on."""

    @property
    def validation(self) -> Dataset[Any]:
        """Sequences to evaluate on."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Saved with each checkpoint; None for none."""


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run returns.

    Attributes:
        history: rows by step, each with ``step``, ``tokens`` (trained on so far) and ``seconds``
            (wall time so far, over all resumes). Log rows have ``loss`` (cross-entropy plus
            weighted routing losses), ``cross_entropy``, ``learning_rate``, ``grad_norm``,
            ``tokens_per_second`` and ``routing``, see :meth:`RoutingWindow.take`; rows of an
            evaluation have ``validation_loss`` and ``validation_seconds``.
        validation_loss: that of the last evaluation, in nats a token.
        tokens: tokens trained on.
        seconds: wall time, with evaluation and saving, over all resumes.
        tokens_per_second: median over log rows of the median over their steps, without
            evaluation and saving.
        peak_memory_bytes: most memory in use during this call: that of torch's tensors on CUDA,
            of the whole process on the CPU, see :class:`~moekit.measure.memory.PeakMemory`.
        steps: optimiser steps.
        checkpoint: the last checkpoint, which ``from_pretrained`` loads.
    """

    history: list[dict[str, Any]]
    validation_loss: float
    tokens: int
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    steps: int
    checkpoint: Path


def train(
    model: PreTrainedModel,
    data: TrainingData,
    spec: TrainingSpec,
    output: Path,
    *,
    report_to: Sequence[str] = (),
    resume: bool = True,
    progress: ProgressReporter | None = None,
    description: str = "training",
) -> TrainingResult:
    """Train ``model`` where it is, writing checkpoints to ``output``.

    A run that was interrupted, at whatever moment, goes on from its last whole checkpoint and
    comes to the same losses; on the CPU to the same bits. A finished one returns its result
    again. Under ``torchrun`` every process calls this with the same arguments.

    Args:
        model: for instance a :class:`~moekit.models.language.MoEDecoderForCausalLM`; changed in
            place.
        data: training and validation sequences, and the tokenizer to save beside the weights.
        spec: the run.
        output: its folder; made if absent.
        report_to: ``tensorboard``, ``wandb``, or other trackers that transformers knows.
        resume: go on from the last whole checkpoint in ``output``, if there is one.
        progress: who is told how far it is; None for a bar on standard error.
        description: what the bar says is being done.

    Raises:
        SpecError: the batch cannot be split over micro-batches and processes.
        CheckpointError: ``output`` holds checkpoints of another run.
        OutputError: ``output`` cannot be written, or holds checkpoints and ``resume`` is False.
        DivergedError: the loss stopped being finite. The checkpoints before that stay.
        MissingExtraError: a tracker is not installed.

    Example:
        >>> result = train(model, data, TrainingSpec(steps=100), Path("run"))  # doctest: +SKIP
        >>> result.history[-1]["validation_loss"]  # doctest: +SKIP
        5.43
    """
    output = Path(output)
    device = next(model.parameters()).device
    arguments = training_arguments(spec, output, device, report_to)
    with saving_to(output):
        output.mkdir(parents=True, exist_ok=True)
    trainer = MoETrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=_first(data.validation, spec),
        processing_class=data.tokenizer,
        data_collator=_stack,
    )
    trainer.remove_callback(PrinterCallback)
    reporter = RichProgress() if progress is None else progress
    trainer.add_callback(ProgressCallback(reporter, description))
    record = _record(model, data, spec)
    checkpoint = _open(output, record, trainer, resume)
    with PeakMemory(arguments.device) as memory:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            if trainer.is_world_process_zero():
                reporter.finish()
            trainer.release()
    return _result(trainer, output, memory)


def _open(
    output: Path, record: Mapping[str, Any], trainer: MoETrainer, resume: bool
) -> Path | None:
    """The checkpoint to go on from, once ``output`` is seen to be this run's folder or free."""
    accelerator = trainer.accelerator
    found = last_whole(output)
    if found is not None:
        if not resume:
            raise OutputError(
                f"{output} holds {found.name} of an earlier run; "
                "resume it, give another folder or delete this one"
            )
        _require_same(output, record)
    accelerator.wait_for_everyone()  # nobody writes before all have read
    if trainer.args.should_save:
        with saving_to(output):
            clear_staging(output)
            write_json(output / RECORD, record)
    accelerator.wait_for_everyone()
    return found


def _record(model: PreTrainedModel, data: TrainingData, spec: TrainingSpec) -> dict[str, Any]:
    """What must be equal for a checkpoint to be this run's."""
    fixed = {k: v for k, v in spec.to_dict().items() if k not in _FREE_TO_CHANGE}
    config = json.loads(model.config.to_json_string(use_diff=False))
    sequences: Any = data.train
    first, last = (sequences[i]["input_ids"].tolist() for i in (0, len(sequences) - 1))
    return {
        "training": fixed,
        "model": {k: v for k, v in config.items() if k not in _NOT_THE_MODEL},
        "data": {"sequences": len(sequences), "first": first, "last": last},
    }


def _require_same(output: Path, record: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads((output / RECORD).read_text())
    except (OSError, ValueError):
        raise CheckpointError(
            f"{output} holds checkpoints but no readable {RECORD}; give another folder"
        ) from None
    for part, now in json.loads(json.dumps(record)).items():
        before = earlier.get(part, {})
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            raise CheckpointError(
                f"{output} holds checkpoints of a run with another {part}, which differs in "
                f"{', '.join(names)}; set that as it was or give another folder"
            )


def _first(dataset: Dataset[Any], spec: TrainingSpec) -> Dataset[Any]:
    """The sequences that an evaluation uses."""
    if spec.eval_batches is None:
        return dataset
    length = len(dataset)  # type: ignore[arg-type]
    return Subset(dataset, range(min(length, spec.eval_batches * spec.batch_size)))


def _stack(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of sequences of one length."""
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def _result(trainer: MoETrainer, output: Path, memory: PeakMemory) -> TrainingResult:
    history = history_rows(trainer.state.log_history)
    speeds = [row["tokens_per_second"] for row in history if "tokens_per_second" in row]
    losses = [row["validation_loss"] for row in history if "validation_loss" in row]
    return TrainingResult(
        history=history,
        validation_loss=losses[-1],
        tokens=history[-1]["tokens"],
        seconds=history[-1]["seconds"],
        tokens_per_second=statistics.median(speeds),
        peak_memory_bytes=memory.bytes,
        steps=trainer.state.global_step,
        checkpoint=checkpoints(output)[-1],
    )

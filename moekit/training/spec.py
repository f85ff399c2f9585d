"""How a model is trained: the numbers a person chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moekit.spec import Spec


@dataclass(frozen=True)
class TrainingSpec(Spec):
    """One training run with AdamW, a linear warmup and a cosine decay.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences an optimiser step, over all processes and micro-batches.
        gradient_accumulation: micro-batches an optimiser step. Each holds ``batch_size /
            gradient_accumulation / processes`` sequences on each process.
        learning_rate: the highest learning rate.
        min_learning_rate_ratio: learning rate of the last step over the highest one.
        warmup_share: share of the steps in which the learning rate rises to its highest value.
        weight_decay: decoupled weight decay of the matrices; norms, biases, embeddings and
            constant experts' vectors have none, see :func:`moekit.training.decays`.
        beta1, beta2: decay rates of AdamW's moments.
        clip: largest norm of the gradient; a larger one is scaled down to it.
        precision: ``bfloat16`` runs matrix products under autocast; weights, routers and the
            optimiser stay float32.
        gradient_checkpointing: keep only each block's input and compute the block again in the
            backward pass.
        eval_every: evaluate every so many steps, and at the end; None for the end only.
        eval_batches: evaluate on so many batches of ``batch_size`` sequences; None for all data.
        save_every: save a checkpoint every so many steps, and at the end; None for the end only.
        keep: whole checkpoints to keep, the newest ones.
        seed: seed of the data order and of everything random in the training steps.
        log_every: steps between two log rows. A row averages the steps since the one before; each
            checkpoint closes a row too, so that a resumed run logs the same rows.
    """

    steps: int = 400
    batch_size: int = 16
    gradient_accumulation: int = 1
    learning_rate: float = 3e-3
    min_learning_rate_ratio: float = 0.1
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    eval_every: int | None = None
    eval_batches: int | None = None
    save_every: int | None = None
    keep: int = 2
    seed: int = 0
    log_every: int = 10

    def check(self) -> None:
        """Raise :class:`~moekit.errors.SpecError` if a number is out of its range."""
        for name in ("steps", "batch_size", "gradient_accumulation", "keep", "log_every"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; wanted at least 1")
        for name in ("eval_every", "eval_batches", "save_every"):
            value = getattr(self, name)
            self.require(value is None or value >= 1, f"{name} is {value}; wanted at least 1")
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            self.require(value > 0, f"{name} is {value}; wanted a positive number")
        for name in ("min_learning_rate_ratio", "warmup_share"):
            value = getattr(self, name)
            self.require(0 <= value <= 1, f"{name} is {value}; wanted 0 to 1")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self.require(0 <= value < 1, f"{name} is {value}; wanted 0 <= {name} < 1")
        self.require(self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; wanted >= 0")
        self.require(0 <= self.seed < 2**32, f"seed is {self.seed}; wanted 0 to 2**32 - 1")
        self.require(
            self.batch_size % self.gradient_accumulation == 0,
            f"batch_size {self.batch_size} cannot be split into {self.gradient_accumulation} "
            "equal micro-batches; make gradient_accumulation divide it",
        )

    def micro_batch(self, processes: int) -> int:
        """Sequences a forward pass of one of ``processes``.

        Raises:
            SpecError: the batch cannot be split equally.
        """
        parts = self.gradient_accumulation * processes
        self.require(
            self.batch_size % parts == 0,
            f"batch_size {self.batch_size} cannot be split over {processes} processes and "
            f"{self.gradient_accumulation} micro-batches; make it a multiple of {parts}",
        )
        return self.batch_size // parts

"""Training an adapter on text, resumably."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moekit.data.fingerprint import digest_of
from moekit.data.pairs import IGNORED
from moekit.errors import DivergedError
from moekit.measure.observe import TokenBlocks
from moekit.spec import Spec
from moekit.surgery.adapt.install import adapter_of, adapter_parameters
from moekit.surgery.batch import Batch, batch_of, batches_of, require_tokens
from moekit.surgery.run_store import RunStore, blocks_digest, optimiser_tensors, restore
from moekit.training.order import ShuffledPasses
from moekit.training.progress import ProgressReporter, SilentProgress


@dataclass(frozen=True)
class FitSpec(Spec):
    """A run that trains an adapter.

    Attributes:
        steps: optimiser steps.
        batch_size: sequences that run together.
        accumulate: such batches a step; the loss is the mean over all of their predicted tokens.
        learning_rate: the highest (AdamW); it rises over the first steps and falls as a cosine.
        warmup: share of the steps in which it rises.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        check_every: steps from one look at held-out text to the next; an interrupted run goes on
            from the last one.
        held_out_batches: use at most so many batches of held-out text.
        seed: of the order of sequences and of dropout.
    """

    steps: int = 200
    batch_size: int = 4
    accumulate: int = 4
    learning_rate: float = 2e-4
    warmup: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    check_every: int = 50
    held_out_batches: int = 16
    seed: int = 0

    def check(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "check_every", "held_out_batches"):
            value = getattr(self, name)
            self.require(value >= 1, f"{name} is {value}; wanted at least 1")
        for name in ("learning_rate", "max_grad_norm"):
            value = getattr(self, name)
            self.require(value > 0, f"{name} is {value}; wanted a positive number")
        self.require(0 <= self.warmup < 1, f"warmup is {self.warmup}; wanted 0 to below 1")
        self.require(
            self.weight_decay >= 0, f"weight_decay is {self.weight_decay}; wanted 0 or more"
        )

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising = math.ceil(self.warmup * self.steps)
        if step < rising:
            return self.learning_rate * (step + 1) / rising
        done = (step - rising) / max(1, self.steps - rising)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Look:
    """A look at held-out text.

    Attributes:
        step: after how many steps.
        held_out_loss: nats a token.
        train_loss: mean of what was minimised since the look before; None before the first step.
    """

    step: int
    held_out_loss: float
    train_loss: float | None


@dataclass(frozen=True)
class FitReport:
    """What a run did.

    Attributes:
        looks: every look, from before the first step on.
        trained: parameters of the adapter.
        parameters: of the whole model.
    """

    looks: tuple[Look, ...]
    trained: int
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)


def fit_adapter(
    model: PreTrainedModel,
    train: TokenBlocks,
    held_out: TokenBlocks,
    spec: FitSpec,
    *,
    work: Path | None = None,
    reporter: ProgressReporter | None = None,
) -> FitReport:
    """Train a model's adapter; its own weights stay as they are, bit for bit.

    Args:
        model: with an adapter, on the device to run on; left in evaluation mode.
        train: blocks to train on, of any lengths; where they have ``labels``, those say which
            tokens are predicted.
        held_out: other blocks, for the looks.
        spec: the run.
        work: folder for what an interrupted run goes on from; None for none.
        reporter: told how far it is.

    Raises:
        SpecError: the model has no adapter.
        DataError: a text is empty.
        DivergedError: a loss is not finite.
        OutputError: ``work`` cannot be written.
    """
    require_tokens(train, "the text to train on")
    require_tokens(held_out, "the held-out text")
    return _Fit(model, train, held_out, spec, work, reporter or SilentProgress()).run()


class _Fit:
    """One run."""

    def __init__(
        self,
        model: PreTrainedModel,
        train: TokenBlocks,
        held_out: TokenBlocks,
        spec: FitSpec,
        work: Path | None,
        reporter: ProgressReporter,
    ) -> None:
        self.model, self.train, self.held_out = model, train, held_out
        self.spec, self.reporter = spec, reporter
        self.leaves: list[Tensor] = list(adapter_parameters(model).values())
        self.optimiser = torch.optim.AdamW(
            self.leaves, lr=spec.learning_rate, weight_decay=spec.weight_decay
        )
        self.store = RunStore.of(work, self._digest(), "adapting")

    def run(self) -> FitReport:
        spec = self.spec
        self.reporter.start(spec.steps, "adapting")
        try:
            step, looks = self._resume()
            batches, losses = self._batches(step), []
            while step < spec.steps:
                losses.append(self._step(step, [next(batches) for _ in range(spec.accumulate)]))
                step += 1
                self.reporter.update(step, losses[-1], None)
                if step % spec.check_every == 0 or step == spec.steps:
                    looks.append(Look(step, self._held_out_loss(), sum(losses) / len(losses)))
                    losses.clear()
                    self._save(step, looks)
        finally:
            self.reporter.finish()
        self.model.eval()  # type: ignore[no-untyped-call]
        trained = sum(leaf.numel() for leaf in self.leaves)
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        return FitReport(tuple(looks), trained, whole)

    def _step(self, step: int, batches: list[Batch]) -> float:
        """One optimiser step; the mean loss over its predicted tokens."""
        torch.manual_seed(self.spec.seed * 1_000_003 + step)  # dropout, also where a run goes on
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        predicted = [int((batch.target_BT != IGNORED).sum()) for batch in batches]
        total = 0.0
        for batch, count in zip(batches, predicted, strict=True):
            if count:
                loss = self._loss(batch) * (count / sum(predicted))
                loss.backward()
                total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.leaves, self.spec.max_grad_norm)
        if not math.isfinite(total) or not bool(norm.isfinite()):
            raise DivergedError(
                f"step {step + 1}: the loss is {total:.4g}, the gradient's norm {float(norm):.4g}; "
                "use a lower learning rate"
            )
        for group in self.optimiser.param_groups:
            group["lr"] = self.spec.rate(step)
        self.optimiser.step()
        return total

    def _loss(self, batch: Batch) -> Tensor:
        labels_BT = F.pad(batch.target_BT, (1, 0), value=IGNORED)
        loss: Tensor = self.model(
            input_ids=batch.token_BT,
            attention_mask=batch.mask_BT,
            labels=labels_BT,
            use_cache=False,
        ).loss
        return loss

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        self.model.eval()  # type: ignore[no-untyped-call]
        total, count = 0.0, 0
        spec = self.spec
        for batch in batches_of(
            self.held_out, spec.batch_size, spec.held_out_batches, self.model.device
        ):
            logits_BTV = self.model(
                input_ids=batch.token_BT, attention_mask=batch.mask_BT, use_cache=False
            ).logits[:, :-1]
            nats = F.cross_entropy(
                logits_BTV.flatten(0, 1).float(), batch.target_BT.flatten(), reduction="sum"
            )
            total += float(nats)
            count += int((batch.target_BT != IGNORED).sum())
        if not math.isfinite(total):
            raise DivergedError(
                "the loss on held-out text is not finite; use a lower learning rate"
            )
        return total / max(count, 1)

    def _batches(self, step: int) -> Iterator[Batch]:
        """Micro-batches from ``step`` on, in the order of the seed."""
        size, order = self.spec.batch_size, list(self._order())
        for start in range(step * self.spec.accumulate * size, len(order), size):
            yield batch_of(self.train, order[start : start + size], self.model.device)

    def _order(self) -> ShuffledPasses:
        spec = self.spec
        sequences = spec.steps * spec.accumulate * spec.batch_size
        return ShuffledPasses(len(self.train), sequences, spec.seed)

    def _save(self, step: int, looks: list[Look]) -> None:
        facts = {"step": step, "looks": [dataclasses.asdict(look) for look in looks]}
        self.store.save(facts, optimiser_tensors(self.optimiser, self.leaves))

    def _resume(self) -> tuple[int, list[Look]]:
        stored = self.store.load()
        if stored is None:
            return 0, [Look(0, self._held_out_loss(), None)]
        facts, tensors = stored
        restore(self.optimiser, self.leaves, tensors)
        return int(facts["step"]), [Look(**look) for look in facts["looks"]]

    def _digest(self) -> str:
        """Of what must be equal for a run to go on: specs, data, and the model's name and size."""
        drawn = sorted(set(self._order()))
        train = blocks_digest(self.train[index] for index in drawn)
        model = (self.model.config.name_or_path, sum(p.numel() for p in self.model.parameters()))
        adapter = adapter_of(self.model).to_dict()
        return digest_of([self.spec.to_dict(), adapter, len(self.train), train, model])
